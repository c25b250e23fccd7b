"""Checkpoints: a directory of safetensors and JSON, written whole or not at all. Nothing in it is pickled.

    output_dir/checkpoint-000050/
        model.safetensors + config.json + tokenizer   the policy, as from_pretrained reads it
        optimizer.safetensors                         AdamW's moments, "<parameter>.<moment>"
        rng.safetensors                               torch's generator states
        state.json                                    step, data position, generators, configuration in full

It is written to a temporary directory, flushed to the disk (fsync) and renamed: one with that name is whole.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import flush, temporary_name, whole_directory
from ..errors import TrainerError

NAME = "checkpoint-{:06d}"


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without second names of tied tensors (safetensors stores no aliases)."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            tensors[name] = tensor.contiguous()
    return tensors


def save(
    output_dir: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes checkpoint-<step> with `state` (JSON) and then deletes all but the newest `keep`."""
    from safetensors.torch import save_file

    target = output_dir / NAME.format(step)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[id(parameter)]}.{key}": torch.as_tensor(value).contiguous()
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    generators = {"cpu": torch.get_rng_state(), **{f"cuda.{i}": value for i, value in enumerate(cuda)}}
    with whole_directory(target) as directory:
        save_file(state_tensors(model), directory / "model.safetensors", metadata={"format": "pt"})
        save_file(moments, directory / "optimizer.safetensors")
        save_file(generators, directory / "rng.safetensors")
        model.config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "state.json").write_text(json.dumps({**state, "step": step, **_python_generators()}))
    for old in find_all(output_dir)[:-keep]:
        remove(old)
    return target


def remove(path: Path) -> None:
    """Deletes a checkpoint whole or not at all: first its name, so that none is found with files missing."""
    nameless = temporary_name(path)
    shutil.rmtree(nameless, ignore_errors=True)
    os.rename(path, nameless)
    flush(path.parent)
    shutil.rmtree(nameless, ignore_errors=True)


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores model, optimiser and generators in place; returns the JSON state."""
    from safetensors.torch import load_file

    try:
        state = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        generators = load_file(path / "rng.safetensors")
    except Exception as error:  # safetensors raises its own type
        raise TrainerError(
            f"checkpoint {path} is damaged ({error}): delete it to go on from the one before"
        ) from None
    expected = state_tensors(model)
    if expected.keys() != tensors.keys() or any(expected[k].shape != tensors[k].shape for k in expected):
        raise TrainerError(f"checkpoint {path} is of another model: choose another output_dir")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in tensors:
                tensor.copy_(tensors[name])
    for name, parameter in model.named_parameters():
        entry = {
            key.removeprefix(f"{name}."): value
            for key, value in moments.items()
            if key.rpartition(".")[0] == name
        }
        if entry:  # all of them, "step" too, lie beside the parameter: AdamW is fused
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in entry.items()}
    torch.set_rng_state(generators["cpu"])
    cuda = cuda_states(generators)
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    _restore_python_generators(state)
    return state


def cuda_states(generators: dict[str, Tensor]) -> list[Tensor]:
    """The states of the GPUs' generators, in the order of the GPUs."""
    count = sum(name.startswith("cuda.") for name in generators)
    return [generators[f"cuda.{gpu}"] for gpu in range(count)]


def find_all(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [
        path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _python_generators() -> dict[str, Any]:
    """States of `random` and of numpy's global generator (a reward function may use either)."""
    import numpy

    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return {"random": random.getstate(), "numpy": [kind, numpy.asarray(keys).tolist(), *rest]}


def _restore_python_generators(state: dict[str, Any]) -> None:
    import numpy

    version, numbers, gauss = state["random"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, number = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, number))
