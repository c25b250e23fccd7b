"""What `g2rl eval` and `g2rl geometry` share: which problems, sampled how, with which configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..evaluation.engines import Decoding, choose_engine
from ..evaluation.rows import Sample
from ..evaluation.samples import SAMPLING_KEYS, DataSet, Settings
from ..group.options import SCORE_GATE
from ..trainer.config import TrainerConfig, split_override

# Keys that `key=value` may set: prompts, loading of the model, and a recipe's tasks.
VERIFYING_KEYS = ("verify_seconds", "verify_memory_gb", "verify_workers")
OVERRIDES = {*SAMPLING_KEYS, *VERIFYING_KEYS, "device", "tasks"} - {"model"}
KEYS_HELP = """\
key=value sets prompts and loading as for training (`g2rl train --keys` explains them): system_prompt,
prompt_template, chat_template, chat_template_args, stop_tokens, pad_token, dtype, autocast, device,
verify_seconds, verify_memory_gb, verify_workers; with --recipe also tasks.0.seed=20000 and the like."""


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """--data, --recipe, --limit."""
    add = parser.add_argument_group("problems").add_argument
    add(
        "--data",
        action="append",
        default=[],
        metavar="NAME[=FILE]",
        help="a data set: math500, aime25=file.jsonl, reasoning_gym:chain_sum ...; repeatable",
    )
    add("--recipe", metavar="FILE", help="tasks and prompts of a training recipe (YAML)")
    add("--limit", type=int, metavar="N", help="use only the first N problems of each data set")


def add_options(parser: argparse.ArgumentParser, short: str, n: str, temperature: str) -> Any:
    """How to sample. short: "-n" or "-m", responses a problem; n, temperature: their defaults, for the help.

    Returns the argument group.
    """
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add(short, type=int, metavar="N", help=f"responses a problem ({n})")
    add("--temperature", type=float, metavar="T", help=f"sampling temperature ({temperature})")
    add("--max-new-tokens", type=int, metavar="N", help="longest response (the recipe's, else 2048)")
    add("--seed", type=int, metavar="S", help="random seed (the recipe's, else 0)")
    add("--engine", default="auto", help="transformers | vllm | auto: vllm if it can run here (auto)")
    add("--batch-size", type=int, metavar="N", help="responses at once (transformers 64, vllm 2048)")
    return group


def add_gate_option(group: Any) -> None:
    """--gate."""
    group.add_argument(
        "--gate",
        type=float,
        default=SCORE_GATE,
        metavar="S",
        help="a response is right from this score on (1, less rounding: no partial credit)",
    )


def check_gate(gate: float) -> None:
    """Raises ConfigError unless 0 < gate <= 1."""
    if not 0 < gate <= 1:  # NaN too
        raise ConfigError(f"gate={gate}: must be above 0 and at most 1: the least score of a right response")


def continues(args: argparse.Namespace) -> str:
    """How to continue an interrupted run, for a message."""
    same = "the same command without --overwrite" if args.overwrite else "the same command"
    return f"{same} continues where this one stopped"


def make_config(args: argparse.Namespace, model: str) -> TrainerConfig:
    """The trainer's configuration: the recipe, then overrides, then options; autocast resolved."""
    config = recipe(args)
    values = {**config.to_dict(), "model": model, "score_gate": args.gate}
    if args.seed is not None:
        values["seed"] = args.seed
    given = {split_override(word)[0] for word in args.overrides}
    if args.max_new_tokens is not None:
        values["max_new_tokens"] = args.max_new_tokens
    elif args.recipe is None and "max_new_tokens" not in given:
        values["max_new_tokens"] = 2048
    gpu = torch.cuda.is_available() and config.device != "cpu"
    if not given & {"dtype", "autocast"} and (gpu or choose_engine(args.engine, model) == "vllm"):
        values["dtype"], values["autocast"] = "bfloat16", "none"  # no training: low-precision weights will do
    config = TrainerConfig.from_dict(values)
    return replace(config, autocast=config.resolved("cuda" if gpu else "cpu").autocast)


def make_settings(args: argparse.Namespace, config: TrainerConfig, decoding: Decoding) -> Settings:
    """How to sample, by --engine and --batch-size; the default batch size depends on the engine."""
    engine = choose_engine(args.engine, config.model)
    batch_size = args.batch_size if args.batch_size is not None else 2048 if engine == "vllm" else 64
    return Settings(config, decoding, engine, batch_size)


def recipe(args: argparse.Namespace) -> TrainerConfig:
    """--recipe, if given, with the overrides; ConfigError for an override without effect here."""
    config = TrainerConfig.load(args.recipe, args.overrides)
    for override in args.overrides:
        key = split_override(override)[0].partition(".")[0]
        if key not in OVERRIDES:
            option = f"--{key.replace('_', '-')}"
            hint = f"use {option}" if option in ("--temperature", "--batch-size") else "has no effect here"
            raise ConfigError(f"override {override!r}: {hint}")
    return config


def load_sets(args: argparse.Namespace) -> list[DataSet]:
    """The data sets of --data and --recipe; ConfigError if there is none, or two have one name."""
    from ..evaluation.datasets import load_data, load_specs

    found = [load_data(spec, args.limit) for spec in args.data]
    if any(split_override(override)[0] == "prompt_template" for override in args.overrides):
        found = [replace(one, template=None) for one in found]
    config = recipe(args)
    if args.recipe:
        found += load_specs(config.tasks, args.limit)
    names = [one.name for one in found]
    if not found:
        raise ConfigError("no data: give --data math500, --data reasoning_gym:chain_sum or --recipe FILE")
    if len(set(names)) < len(names):
        raise ConfigError(f"data: a name comes twice: {', '.join(names)}")
    return found


def warn_unfinished(program: str, path: Path, rows: Sequence[Sample]) -> None:
    """Warns if `rows` are the samples of a killed run, which has not reached all of its problems."""
    from ..evaluation.samples import read_settings, unfinished

    found = unfinished(rows, read_settings(path))
    if found:
        print(
            f"{program}: warning: {path} holds {found}: its run is not finished; repeat its command",
            file=sys.stderr,
        )
