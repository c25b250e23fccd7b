"""`g2rl train`: the trainer on the command line."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, TrainerError, import_failure, need
from ..group.options import SCORE_GATE, MethodOptions, ShapingOptions
from ..head.logprobs import LOGITS_MEMORY
from ..models.encoder import DEFAULT_ENCODER
from ..tasks.pool import Limits
from ..trainer.config import TrainerConfig
from .common import run_command

if TYPE_CHECKING:
    from ..trainer.trainer import Trainer

DESCRIPTION = """\
Train a language model on verifiable tasks with gradient-guided exploration (G2RL) or plain GRPO.

  g2rl train recipes/demo.yaml                      a 135M model learns sums in a few minutes on two cores
  g2rl train recipes/demo.yaml algorithm=grpo lr=2e-5 output_dir=runs/grpo
  g2rl train recipes/qwen3-1.7b.yaml --dry-run      check everything, train nothing
  g2rl train --keys                                 every key, its default and meaning

Writes metrics.jsonl, curves.png, samples.md, checkpoints, the trained model and config.yaml (the recipe with
the overrides) to output_dir. The same command continues an interrupted run from the newest checkpoint and
gives the numbers of an uninterrupted one.

A recipe with `engine: trl` is trained by TRL, on as many GPUs as accelerate is given. Its keys are TRL's
(pip install 'g2rl-kernels[trl]'):

  g2rl train --config recipes/trl-demo.yaml learning_rate=2e-5
  g2rl train recipes/trl-demo.yaml --help           every key, G2RL's and TRL's
  accelerate launch --config_file recipes/accelerate/ddp.yaml --no_python g2rl train RECIPE"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", nargs="?", help="recipe, a YAML file (see recipes/); or --config FILE")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="set a key; tasks.0.size=9 sets a nested one"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the resolved configuration, train nothing",
    )
    parser.add_argument(
        "--keys", action="store_true", help="list every configuration key with default and meaning"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `g2rl train`; returns the exit code: 0, 2 after a one-line error, 130 when interrupted."""
    path, others = _recipe(sys.argv[1:] if argv is None else argv)
    return run_command(
        "g2rl train",
        lambda: _run(path, others),
        interrupted=f"the same command continues from the last checkpoint{_but_overwrite(path, others)}",
        memory="lower micro_batch_size or generate_batch_size, or set gradient_checkpointing=true",
        files="the last checkpoint is intact: start the same command again",
        path="output_dir",
    )


def _run(path: str | None, others: list[str]) -> int:
    engine = None if path is None else _value(path, "engine")
    if path is not None and engine == "trl":
        return _train_by_trl(path, others)
    if engine is not None:
        raise ConfigError(f"engine={engine!r}: choose trl, or remove it for this package's own trainer")
    parser = argparse.ArgumentParser(prog="g2rl train")
    add_arguments(parser)
    words = others if path is None else [path, *others]
    args = parser.parse_intermixed_args(words)  # options may stand between overrides
    if args.keys:
        print(_keys())
        return 0
    return _train(args)


def _keys() -> str:
    """The source of TrainerConfig's fields, with the values of defaults that other modules own."""
    source = inspect.getsource(TrainerConfig)
    keys = source[source.index("    # model") : source.index("    @classmethod")].rstrip()
    constants = {"DEFAULT_ENCODER": DEFAULT_ENCODER, "LOGITS_MEMORY": LOGITS_MEMORY, "SCORE_GATE": SCORE_GATE}
    for name, value in constants.items():
        keys = keys.replace(name, json.dumps(value))
    owners = {owner.__name__: owner for owner in (ShapingOptions, MethodOptions, Limits)}

    def written(found: re.Match[str]) -> str:
        default = getattr(owners[found[1]], found[2])
        return str(default) if default is None else json.dumps(default)

    return re.sub(rf"({'|'.join(owners)})\.(\w+)", written, keys)


def _recipe(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe among the arguments (after --config, or *.yaml), and the other arguments."""
    words: list[str] = []
    for word in argv:
        words += word.split("=", 1) if word.startswith("--config=") else [word]
    if "--config" in words[:-1]:
        at = words.index("--config")
        return words[at + 1], words[:at] + words[at + 2 :]
    for at, word in enumerate(words):
        if word.endswith((".yaml", ".yml")) and ("=" not in word or Path(word).exists()):
            return word, words[:at] + words[at + 1 :]
    return None, words


def _but_overwrite(path: str | None, words: Sequence[str]) -> str:
    """What a command needs to go on with its run if it overwrites another; to follow "continues"."""
    given = [word.partition("=")[2] for word in words if word.startswith("resume=")]
    try:
        resume = given[-1] if given else None if path is None else _value(path, "resume")
    except TrainerError:  # told by `_run`
        resume = None
    return " with resume=auto, once a step is done" if resume == "overwrite" else ""


def _value(path: str, key: str) -> Any:
    """A recipe's value; None without one, and for a file that TrainerConfig.load will reject."""
    try:
        import yaml
    except ImportError as error:
        raise need("pyyaml", error) from None
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return values.get(key) if isinstance(values, dict) else None


def _train_by_trl(path: str, arguments: list[str]) -> int:
    try:
        from ..integrations import trl  # noqa: F401 (names what is missing)
        from . import train_trl
    except (ImportError, RuntimeError) as error:
        failed = import_failure(error)
        if failed is None:
            raise
        raise TrainerError(f"engine: trl: {failed if error.__cause__ else error}") from None
    return train_trl.main(path, arguments)


def _train(args: argparse.Namespace) -> int:
    overrides, path = list(args.overrides), args.config
    if path is not None and "=" in path and not Path(path).exists():
        overrides, path = [path, *overrides], None
    if path is None and not overrides:
        raise TrainerError("no configuration: g2rl train recipes/demo.yaml, or --help")
    config = TrainerConfig.load(path, overrides)

    from ..models.loading import load_model
    from ..tasks.sources import load_tasks
    from ..trainer.trainer import Trainer

    tasks = load_tasks(config.tasks)
    trainer = Trainer(*load_model(config), tasks, config)
    start = trainer.resume_point()
    if args.dry_run:
        print(trainer.config.to_yaml())
        where = f"would continue from {start}" if start else "would start at step 0"
        millions, prompts = sum(p.numel() for p in trainer.model.parameters()) / 1e6, sum(map(len, tasks))
        print(f"all checks passed: {millions:.0f}M parameters, {prompts} prompts, {trainer.device}; {where}")
        return 0
    if start:
        print(f"continuing from {start}")
    metrics = trainer.train()
    print(_farewell(trainer, metrics, [*([path] if path else []), *overrides]))
    return 0


def _farewell(trainer: Trainer, metrics: list[dict[str, Any]], arguments: list[str]) -> str:
    from ..trainer.report import table

    config, out = trainer.config, trainer.output_dir
    said = f"step {trainer.step_number} is done; metrics.jsonl is missing"
    if metrics:
        few = max(len(metrics) // 5, 1)
        first, last = (sum(m["accuracy"] for m in some) / few for some in (metrics[:few], metrics[-few:]))
        samples = [sample for sample in trainer.report.samples if sample["step"] == metrics[-1]["step"]]
        steps = f"(mean of the first and the last {few} of {len(metrics)} steps)"
        said = f"{table(samples, 44)}\naccuracy {first:.2f} -> {last:.2f} {steps}"
    other = "grpo" if config.algorithm == "g2rl" else "g2rl"

    def command(*overrides: str) -> str:
        """This run's command with some keys changed."""
        changed = {override.partition("=")[0] for override in (*overrides, "resume=")}
        kept = [argument for argument in arguments if argument.partition("=")[0] not in changed]
        return shlex.join(["g2rl", "train", *kept, *overrides])

    return f"""
{said}

  picture   {out / "curves.png"}
  metrics   {out / "metrics.jsonl"}
  samples   {out / "samples.md"}
  model     {out / "model"}

Next:
  use it          AutoModelForCausalLM.from_pretrained("{out / "model"}")   (transformers)
  train on        {command(f"steps={2 * config.steps}")}
  compare         {command(f"algorithm={other}", f"output_dir={out}-{other}")}
  your own task   see g2rl_kernels/tasks/base.py; on a GPU: recipes/qwen3-1.7b.yaml"""
