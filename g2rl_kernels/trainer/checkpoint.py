"""Checkpoints: directories of safetensors and JSON, without pickles.

    output_dir/checkpoint-000050/
        model.safetensors + config.json + tokenizer   the policy, for from_pretrained
        generation_config.json                        its own end tokens and sampling settings
        optimizer.safetensors                         AdamW's moments, "<parameter>.<moment>"
        rng.safetensors                               states of torch's generators
        state.json                                    step, data position, Python's generators, configuration,
                                                      fingerprints of the tasks' data

A checkpoint is written to a temporary directory, flushed (fsync) and renamed, so every directory of that name
is complete.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import flush, temporary_name, whole_directory
from ..errors import ConfigError, TrainerError
from .config import TrainerConfig

NAME = "checkpoint-{:06d}"


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict; tied tensors appear once, because safetensors stores no aliases."""
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
    generation: Any = None,
) -> Path:
    """Writes checkpoint-<step> with `state` (JSON values), then deletes all but the newest `keep`.

    generation: the model's own generation settings, which the sampler has emptied in the model
    (`Sampler.own_generation`); None: model.generation_config.

    Returns its path. Raises TrainerError if it cannot be written; older checkpoints then stay.
    """
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
        (generation or model.generation_config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "state.json").write_text(json.dumps({**state, "step": step, **_python_generators()}))
    for old in find_all(output_dir)[:-keep]:
        remove(old)
    return target


def remove(path: Path) -> None:
    """Deletes a checkpoint. It is renamed first, so that find_all never returns an incomplete one."""
    nameless = temporary_name(path)
    shutil.rmtree(nameless, ignore_errors=True)
    os.rename(path, nameless)
    flush(path.parent)
    shutil.rmtree(nameless, ignore_errors=True)


def newest(output_dir: Path, config: TrainerConfig, data: list[dict[str, Any]]) -> Path | None:
    """The newest checkpoint in `output_dir`, from which a run with this configuration and data continues.

    data: a `fingerprint` for each task. A checkpoint without any is used, with a warning.

    Raises:
        ConfigError: it has other settings or other data, or is past config.steps.
        TrainerError: it is damaged.
    """
    found = find_all(output_dir)
    if not found:
        return None
    path = found[-1]
    try:
        state = json.loads((path / "state.json").read_text())
        if not isinstance(state, dict) or not isinstance(state["config"], dict):
            raise ValueError("needs a mapping with a mapping")
        then, step = state["config"], state["step"]
        keys = config.differences(then)
    except (OSError, ValueError, KeyError):
        raise TrainerError(f"{path} is damaged: delete it to continue from the previous one") from None
    remedy = "choose another output_dir, or resume=overwrite to start over"
    if keys:
        now = config.to_dict()
        what = ", ".join(f"{key}={then[key]!r} (now {now.get(key, 'no such key')!r})" for key in keys)
        raise ConfigError(f"{path} has {what}: {remedy}")
    if step > config.steps:
        raise ConfigError(f"{path} is past steps={config.steps}: raise it, or choose another output_dir")
    if "data" not in state:
        warnings.warn(
            f"{path} is of an earlier version: it cannot tell if the data has changed", stacklevel=2
        )
    elif state["data"] != data:
        raise ConfigError(f"{path}: {_changed(state['data'], data, config.tasks)}: restore it, {remedy}")
    return path


def _changed(then: list[dict[str, Any]], now: list[dict[str, Any]], specs: list[Any]) -> str:
    """Which task's data is another one, for a message."""
    for number, (before, after) in enumerate(zip(then, now)):
        if before != after:
            spec = specs[number] if number < len(specs) else {}
            named = [str(spec[key]) for key in ("kind", "path", "name", "function") if key in spec]
            task = f"tasks.{number}" + (f" ({' '.join(named)})" if named else "")
            had, has = before["items"], after["items"]
            counts = f"{had} items then, {has} now" if had != has else f"{has} items with another content"
            return f"the data of {task} has changed since: {counts}"
    return f"there were {len(then)} tasks then, {len(now)} now"


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores model, optimiser and generators in place; returns the JSON state.

    Raises TrainerError for a damaged checkpoint and for one of another model.
    """
    from safetensors.torch import load_file

    try:
        state = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        generators = load_file(path / "rng.safetensors")
    except Exception as error:  # safetensors raises its own type
        raise TrainerError(
            f"checkpoint {path} is damaged ({error}): delete it to continue from the previous one"
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
        if entry:  # fused AdamW keeps all state, "step" too, on the parameter's device
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in entry.items()}
    torch.set_rng_state(generators["cpu"])
    cuda = cuda_states(generators)
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    _restore_python_generators(state)
    return state


def cuda_states(generators: dict[str, Tensor]) -> list[Tensor]:
    """The generator states of the GPUs, in their order."""
    count = sum(name.startswith("cuda.") for name in generators)
    return [generators[f"cuda.{gpu}"] for gpu in range(count)]


def find_all(output_dir: Path) -> list[Path]:
    """Paths of all checkpoints in `output_dir`, oldest first."""
    found = [
        path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _python_generators() -> dict[str, Any]:
    """States of `random` and of numpy's global generator, which a task's score may use."""
    import numpy

    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return {"random": random.getstate(), "numpy": [kind, numpy.asarray(keys).tolist(), *rest]}


def _restore_python_generators(state: dict[str, Any]) -> None:
    import numpy

    version, numbers, gauss = state["random"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, number = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, number))
