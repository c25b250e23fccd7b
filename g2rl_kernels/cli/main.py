"""The command `g2rl`: info, train, eval, geometry, bench, tune. Commands import heavy modules themselves."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

from .. import _C, __version__

_DESCRIPTION = """\
Gradient-guided exploration (G2RL) for reinforcement learning on language models.

G2RL measures the direction in which each sampled response would move the model's last layer. Right answers
with a new direction in their group gain reward; the rest is GRPO."""

_EPILOG = """\
examples:
  g2rl info                          what this machine can run, and what is missing
  g2rl train recipes/demo.yaml       a 135M-parameter model learns sums, in a few minutes on two cores
  g2rl train recipes/trl-demo.yaml   the same with TRL's GRPO trainer, which also runs on many GPUs
  g2rl eval MODEL --data math500     pass@1, maj@k and pass@k of a model, with intervals
  g2rl geometry MODEL --data aime25  do its answers to a problem ask for the same update? A page with figures
  g2rl bench head                    speed, memory and error of head_features, beside torch's logits product
  g2rl bench logprobs                the same for log-probs and their gradients
  g2rl bench train                   what G2RL adds to a training step; bench group: the group geometry
  g2rl tune --model Qwen/Qwen3-1.7B  the fastest tiles for a head on this GPU, kept for later runs

`g2rl COMMAND --help` explains each command. Keys of a configuration are set by key=value."""

_INFO_EPILOG = """\
examples:
  g2rl info                          for people
  g2rl info --json                   for programs, and for bug reports
  G2RL_CPU_ISA=avx2 g2rl info        with a lower instruction set: plain, avx2, avx512 or avx512bf16

Below each backend that cannot run here stands the reason and the remedy."""


def _info(args: argparse.Namespace) -> int:
    from . import info

    found = info.collect()
    print(json.dumps(found, indent=2) if args.json else info.render(found))
    return 0


def _train(argv: Sequence[str]) -> int:
    from . import train as cli

    return cli.main([_shipped(argument) for argument in argv])


def _eval(argv: Sequence[str]) -> int:
    from . import eval as cli

    return cli.main([_shipped(argument) for argument in argv])


def _shipped(argument: str) -> str:
    """`recipes/x.yaml` or --option=recipes/x.yaml without such a file: the recipe in the package."""
    option, equals, name = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(name)
    if path.parent.name == "recipes" and len(path.parts) == 2 and not path.exists():
        package = Path(__file__).resolve().parent.parent
        for folder in (package, package.parent):  # installed; in a checkout
            if (folder / path).exists():
                return f"{option}{equals}{folder / path}"
    return argument


def _benchmarks() -> ModuleType | None:
    """The benchmark runner: in an installed package, or beside the package in a checkout."""
    if util.find_spec("g2rl_kernels.benchmarks"):
        return import_module("g2rl_kernels.benchmarks.run")
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "run.py").exists():
        return None
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return import_module("benchmarks.run")


def _bench(argv: Sequence[str]) -> int:
    runner = _benchmarks()
    if runner is None:
        print(
            "g2rl bench: error: no benchmarks beside the package; run it in a checkout of the sources",
            file=sys.stderr,
        )
        return 2
    return int(runner.main(list(argv)) or 0)


def _geometry(argv: Sequence[str]) -> int:
    from . import geometry as geometry_cli

    return geometry_cli.main([_shipped(argument) for argument in argv])


def _tune(argv: Sequence[str]) -> int:
    from . import tune

    return tune.main(argv)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("g2rl", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"g2rl-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    info = commands.add_parser(
        "info",
        help="versions, instruction set, and which backends can run here",
        description="Show versions, the instruction set, and which backends can run here or why not.",
        epilog=_INFO_EPILOG,
        formatter_class=raw,
    )
    info.add_argument("--json", action="store_true", help="one JSON object instead of text")
    # These commands parse their own arguments, --help too; their modules are imported only when needed.
    commands.add_parser("train", help="train a language model from a recipe (YAML)", add_help=False)
    commands.add_parser("eval", help="measure a model: pass@1, maj@k, pass@k; compare runs", add_help=False)
    commands.add_parser(
        "geometry", help="how responses relate in gradient space: a page and JSON", add_help=False
    )
    commands.add_parser(
        "bench", help="measure speed, memory and error: bench head | logprobs | group | train", add_help=False
    )
    commands.add_parser("tune", help="find and keep the fastest GPU tiles for a head", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `g2rl` with `argv` (default: the process's own arguments); returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    handed_on = {"train": _train, "eval": _eval, "geometry": _geometry, "bench": _bench, "tune": _tune}
    if argv and argv[0] in handed_on:
        try:
            _C.chosen_isa()
        except ValueError as error:  # wrong G2RL_CPU_ISA: fail early
            print(f"g2rl {argv[0]}: error: {error}", file=sys.stderr)
            return 2
        return handed_on[argv[0]](argv[1:])
    return _info(_parser().parse_args(argv))
