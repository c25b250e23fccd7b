"""`g2rl bench`: speed, memory and error of the ops, beside the least time that the machine needs for them."""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from g2rl_kernels._files import write_whole
from g2rl_kernels.cli.common import as_options, run_command
from g2rl_kernels.errors import CommandError

from . import group, head, logprobs, scaling, train
from .measure import ceilings_line, header, machine, profile, why_not
from .methods import Method, default_methods
from .registry import DISTRIBUTIONS, DTYPES, SHAPES, Case, case, default_cases
from .rows import LeftOut, Result

DESCRIPTION = """\
Speed, memory and error of the ops, beside the least time that the machine needs for them.

  g2rl bench head       the LM head: time as a ratio to the bare logits product in the same run
  g2rl bench logprobs   linear_logprobs, forward and backward, as a ratio to the three bare products
  g2rl bench group      the group geometry beside one read of its features
  g2rl bench train      what G2RL adds to a training step
  g2rl bench scaling    the same on paper: models up to 235B, on 1 to 1024 GPUs; measures nothing
  g2rl bench table F    prints the table of a result F (JSON);  g2rl bench plot F  draws it

Runs on the GPU if there is one. Progress goes to stderr, the table to stdout, and --out writes everything as
JSON. Options may be written as key=value: g2rl bench head N=512 rounds=3."""

TURNS = """\
Methods take turns, round by round, and a ratio is taken within a round, so that a machine which slows down
slows both; the table shows the median with the 20 % and 80 % quantiles. On a GPU each call is timed by CUDA
events, after a write that empties the L2."""

HEAD = f"""\
The op beside torch.mm(hidden, weight.T, out=logits), the least work of any method that looks at all logits.
{TURNS}

Extra memory is the growth at a call's peak, outputs included: of torch's allocator on a GPU, of the process
on a CPU. Error is that of the first response's feature, against the reference in float64. Methods that could
not be measured are listed below the table, with the reason."""

HEAD_EXAMPLES = """\
examples:
  g2rl bench head --quick                                 a first look, a minute
  g2rl bench head --out mine.json --plot mine.png
  g2rl bench head --shapes qwen3-0.6b --dtypes bf16 --rounds 5
  g2rl bench head --shapes qwen3-8b --N 4096 16384 65536 --distributions '0.15 nats'
  g2rl bench head --methods certificate nothing --profile kernels.txt
  G2RL_CPU_ISA=avx2 g2rl bench head --out avx2.json
"""


LOGPROBS = f"""\
Forward and backward of linear_logprobs beside the products that a head which holds its logits cannot do
without: logits = hidden W^T, dX = dz W and dW = dz^T hidden, each by torch.mm; with a frozen weight, the
first two. A method that never holds the logits computes them twice: at least four products (three with a
frozen weight). The bare products' logits are allocated beforehand, and stand in for dz. dX and dW are
fresh memory in each call, as gradients from autograd are: on some machines that is slow, for all methods
alike.

{TURNS}

The incoming gradient is random, and that of the log-probs alone; with "entropy bonus" the entropy has one
too. Extra memory is the growth at the peak beyond the gradients themselves: of torch's allocator on a GPU, of
the process on a CPU. Errors are against float64: of hidden's gradient at the first 16 tokens and of 32 rows
of the weight's, half of them rows of tokens that occur, relative to their norm; of log p, the largest.
Methods that could not be measured are listed below the table, with the reason."""

LOGPROBS_EXAMPLES = """\
examples:
  g2rl bench logprobs --quick                             a first look, a minute
  g2rl bench logprobs --out mine.json --plot mine.png
  g2rl bench logprobs --shapes qwen3-0.6b --dtypes bf16 --methods g2rl --rounds 5
  g2rl bench logprobs --shapes qwen3-8b --N 4096 16384 --distributions '0.15 nats'
  g2rl bench logprobs --methods frozen --profile kernels.txt
"""


OPS: dict[str, Any] = {"head": head, "logprobs": logprobs, "group": group, "train": train}


Measure = Callable[[Any], tuple[list[Any], list[LeftOut]]]  # a case -> its rows, and what is left out


class Recorder:
    """The result so far, written after every case: a run that is killed leaves it."""

    def __init__(self, op: str, device: str, out: Path | None):
        self.out = out
        self.left_out: list[LeftOut] = []
        self.result: Result = {"op": op, "machine": machine(device), "rows": [], "left_out": self.left_out}

    def add(self, rows: Sequence[Any], left_out: Sequence[LeftOut]) -> None:
        self.result["rows"] += rows
        self.left_out += left_out
        if self.out:
            write_whole(self.out, json.dumps(self.result, indent=1) + "\n")

    def leave_out(self, case: str, method: str, reason: str) -> None:
        self.add([], [{"case": case, "method": method, "reason": reason, "fault": False}])


def render(result: Result) -> str:
    """Header, table, notes, and what is left out."""
    op, rows = OPS[result.get("op", "head")], result["rows"]
    parts = [header(result["machine"])]
    if ceilings := ceilings_line(result["machine"]):
        parts.append(ceilings)
    parts.append(op.table(rows) if rows else "nothing was measured")
    if rows and (notes := op.notes(rows, result["machine"])):
        parts.append(notes)
    reasons: dict[tuple[str, str], list[str]] = {}
    for left in result.get("left_out", []):
        reasons.setdefault((left["method"], left["reason"]), []).append(left["case"])
    lines = [f"- {method}, {'; '.join(cases)}: {why}" for (method, why), cases in reasons.items()]
    if lines:
        parts.append("Left out:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


# --- the runs -----------------------------------------------------------------------------------------------


def run_methods(args: argparse.Namespace, device: str, result: Recorder) -> None:
    """head and logprobs: compares methods, case by case."""
    op, gpu = OPS[args.op], device == "cuda"
    cases, methods = chosen_cases(args, gpu), []
    for name in chosen_methods(op.METHODS, args.methods, device):
        if reason := op.METHODS[name].obstacle(device):
            result.leave_out("all cases", name, reason)
        else:
            methods.append(name)
    rounds = args.rounds or (5 if args.quick else op.ROUNDS[device])
    each = args.seconds or (4.0 if gpu else float("inf"))

    def measured(one: Case) -> tuple[list[Any], list[LeftOut]]:
        return op.measure(one, device, methods, rounds, each, not args.no_error)

    within_budget(args.budget, [(one.label, one) for one in cases], measured, result)
    if args.profile:
        profile(device, cases[0].label, op.calls(cases[0], device, methods), args.profile)


def chosen_cases(args: argparse.Namespace, gpu: bool) -> list[Case]:
    if not (args.shapes or args.N or args.dtypes or args.distributions):
        return default_cases(args.op, gpu, args.quick)
    axes = (
        args.shapes or (["qwen3-1.7b"] if gpu else ["smollm2-135m", "qwen3-1.7b"]),
        args.dtypes or (["bf16"] if gpu else ["fp32", "bf16"]),
        args.N or [0],
        args.distributions or (["0.15 nats"] if gpu else ["2.3 sigma"]),
    )
    return [case(*one, gpu=gpu) for one in itertools.product(*axes)]


def chosen_methods(methods: dict[str, Method], wanted: Sequence[str] | None, device: str) -> list[str]:
    """Those whose names contain one of the words."""
    if not wanted:
        return default_methods(methods, device)
    return [name for name in methods if any(word.lower() in name.lower() for word in wanted)]


def run_group(args: argparse.Namespace, device: str, result: Recorder) -> None:
    sizes = group.QUICK_SIZES if args.quick else group.SIZES if device == "cuda" else group.CPU_SIZES
    launches = args.launches or (100 if device == "cuda" else 10)

    def measured(size: tuple[int, int, int]) -> tuple[list[Any], list[LeftOut]]:
        return group.measure(size, device, args.rounds or 15, launches)

    named = [(" x ".join(map(str, size)), size) for size in args.sizes or sizes]
    within_budget(args.budget, named, measured, result)


def run_train(args: argparse.Namespace, device: str, result: Recorder) -> None:
    gpu = device == "cuda"
    models = args.models or (["qwen3-1.7b", "qwen3-0.6b"] if gpu else ["tiny"])
    if args.quick:
        models = models[:1]
    rounds = args.rounds or (3 if args.quick else 5 if gpu else 9)

    def measured(model: str) -> tuple[list[Any], list[LeftOut]]:
        try:
            return train.measure(model, device, train.BATCHES[device], rounds), []
        except Exception as error:
            return [], [why_not(model, "the step", error)]

    within_budget(args.budget, [(model, model) for model in models], measured, result)


def within_budget(
    budget: float | None, cases: list[tuple[str, Any]], measured: Measure, result: Recorder
) -> None:
    """Begins no case that would end after `budget` seconds if it took as long as most so far."""
    start, durations = time.perf_counter(), list[float]()
    for name, one in cases:
        begun = time.perf_counter()
        if budget and durations and begun - start + statistics.median(durations) > budget:
            result.leave_out(name, "all", "no time left (--budget)")
            continue
        result.add(*measured(one))
        durations.append(time.perf_counter() - begun)


# --- command line -------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("g2rl bench", description=DESCRIPTION, formatter_class=raw)
    commands = " | ".join((*OPS, "scaling", "table", "plot"))
    ops = p.add_subparsers(dest="op", metavar=commands, required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one, else cpu")
    common.add_argument("--quick", action="store_true", help="few cases and rounds: a minute")
    common.add_argument("--rounds", type=int, help="measured calls of every method, after one to warm up")
    common.add_argument("--budget", type=float, metavar="SECONDS", help="start no case that would end later")
    common.add_argument("--threads", type=int, help="threads of torch and of the kernels (default: torch's)")
    common.add_argument(
        "--out", type=Path, metavar="JSON", help="write the result to this file, after every case"
    )

    for op, about, examples in (("head", HEAD, HEAD_EXAMPLES), ("logprobs", LOGPROBS, LOGPROBS_EXAMPLES)):
        m = ops.add_parser(op, description=about, epilog=examples, formatter_class=raw, parents=[common])
        add_methods(m, OPS[op].METHODS)

    about = (group.__doc__ or "") + "\nOn a GPU, calls as they come and in a CUDA graph."
    g = ops.add_parser("group", description=about, formatter_class=raw, parents=[common])
    g.add_argument(
        "--sizes", nargs="+", type=_size, metavar="BxMxD", help="groups x rows x d, e.g. 64x16x4096"
    )
    g.add_argument("--launches", type=int, help="calls in a row that are timed together (GPU: 100, CPU: 10)")

    about = (
        "The time that G2RL adds to a training step: the trainer's own step on a model with the shape of a\n"
        "Qwen3 and random weights, with G2RL and without it (GRPO), in turns. Generation and verification,\n"
        "which are the same for both, are not measured."
    )
    t = ops.add_parser("train", description=about, formatter_class=raw, parents=[common])
    names = f"of {', '.join(train.MODELS)}"
    t.add_argument("--models", nargs="+", choices=list(train.MODELS), metavar="NAME", help=names)

    about = (
        "FLOPs, seconds and bytes of a training step with G2RL, on paper: nothing is measured.\n"
        "docs/scaling.md lists the assumptions."
    )
    c = ops.add_parser("scaling", description=about, formatter_class=raw)
    names = f"Qwen3, of {', '.join(scaling.MODELS)} (default: all)"
    c.add_argument("--models", nargs="+", choices=[*scaling.MODELS], metavar="NAME", help=names)
    c.add_argument("--gpus", nargs="+", type=int, default=scaling.GPUS, metavar="G", help="numbers of GPUs")
    c.add_argument("--response", type=int, metavar="TOKENS", help="tokens a response (default: the paper's)")

    for op, what in (
        ("table", "Print the tables of results again."),
        ("plot", "Draw results of `head` or of `logprobs`."),
    ):
        s = ops.add_parser(op, description=what)
        s.add_argument("results", nargs="+", type=Path, help="JSON files that --out wrote")
        if op == "plot":
            s.add_argument("--out", type=Path, required=True, metavar="PNG")
    return p


def add_methods(p: argparse.ArgumentParser, methods: dict[str, Method]) -> None:
    """Options of an op for which methods are compared."""
    for option, choices, what in (
        ("--shapes", list(SHAPES), "models' heads"),
        ("--dtypes", list(DTYPES), "dtypes"),
        ("--distributions", list(DISTRIBUTIONS), "how peaked the softmax is: its mean entropy"),
    ):
        names = f"{what}, of {', '.join(choices)}"
        p.add_argument(option, nargs="+", choices=choices, metavar="NAME", help=names)
    p.add_argument("--N", nargs="+", type=int, help="numbers of tokens (default: as many as take seconds)")
    p.add_argument(
        "--methods",
        nargs="+",
        metavar="WORD",
        help=f"methods whose names contain one of the words, of: {'; '.join(methods)}".replace("%", "%%"),
    )
    p.add_argument(
        "--seconds", type=float, help="fewer rounds, at least 3, where a case takes longer (GPU: 4)"
    )
    p.add_argument("--no-error", action="store_true", help="leave out the comparison with float64")
    p.add_argument("--plot", type=Path, metavar="PNG", help="ratio and memory against N, a line a method")
    p.add_argument(
        "--profile", type=Path, metavar="TXT", help="the kernels of one call of each method, first case"
    )


def _size(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}, needs BxMxD, e.g. 64x16x4096")
    B, m, d = map(int, found.groups())
    return B, m, d


class BenchError(CommandError):
    """An option or a file is wrong."""


def read_result(path: Path) -> Result:
    """Reads what --out wrote; raises BenchError if it cannot be rendered."""
    try:
        found: Result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchError(f"{path} is not JSON: {error}") from None
    try:
        render(found)
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise BenchError(
            f"{path} is not a result of g2rl bench ({why}): give a file that --out wrote"
        ) from None
    return found


def check_output(option: str, path: Path | None) -> None:
    """Fails early if the file cannot be written."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BenchError(f"{option} {path}: {error.strerror}") from None


def check_plot(option: str, path: Path | None) -> None:
    """Fails early if the picture cannot be written, or matplotlib is missing or does not know the suffix."""
    check_output(option, path)
    if path is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise BenchError(f"{option}: {error}; pip install matplotlib") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise BenchError(f"{option} {path}: the name must end in one of .{', .'.join(sorted(kinds))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a method that should run failed (the table says why); 2 for wrong usage, or if nothing
    could be measured; 130 when interrupted."""
    p = parser()
    args = p.parse_args(as_options(sys.argv[1:] if argv is None else argv, p))
    out = getattr(args, "out", None)
    return run_command(
        "g2rl bench",
        lambda: _main(p, args),
        interrupted=f"{out} is written after every case" if args.op in OPS and out else "nothing is kept",
        memory="measure fewer tokens (--N) or a smaller head (--shapes)",
        path=str(out or "the output"),
    )


def _main(p: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.op == "table":
        print("\n\n".join(render(read_result(path)) for path in args.results))
        return 0
    if args.op == "plot":
        check_plot("--out", args.out)
        _plot([read_result(path) for path in args.results], args.out)
        return 0

    if args.op == "scaling":
        if min(*args.gpus, args.response or 1) < 1:
            p.error("--gpus, --response: need 1 or more")
        models = [scaling.MODELS[name] for name in args.models or scaling.MODELS]
        print(scaling.report(models, args.gpus, args.response))
        return 0

    for name in ("rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name} is {value}, needs 1 or more")
    methods = getattr(OPS[args.op], "METHODS", None)
    if methods and min(args.N or [1]) < 1:
        p.error(f"--N: {min(args.N)} tokens, needs 1 or more")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no GPU")
    if methods and not chosen_methods(methods, args.methods, device):
        p.error(f"--methods: no name contains {' or '.join(args.methods)}; they are {'; '.join(methods)}")
    check_output("--out", args.out)
    if methods:
        check_plot("--plot", args.plot)
        check_output("--profile", args.profile)
    if args.threads:
        torch.set_num_threads(args.threads)

    recorder = Recorder(args.op, device, args.out)
    {"group": run_group, "train": run_train}.get(args.op, run_methods)(args, device, recorder)
    print(render(recorder.result))
    faults = any(left["fault"] for left in recorder.left_out)
    if not recorder.result["rows"]:
        return 1 if faults else 2
    if methods and args.plot:
        _plot([recorder.result], args.plot)
    return int(faults)


def _plot(results: Sequence[Result], out: Path) -> None:
    """Draws results of one op: head or logprobs."""
    from .plots import draw

    rows = [row for result in results for row in result["rows"]]
    names = {result.get("op", "head") for result in results}
    floor = getattr(OPS[min(names)], "FLOOR", None)
    if len(names) > 1 or floor is None:
        raise BenchError(f"no plot of {' and '.join(sorted(names))}: of head or of logprobs")
    if not rows:
        raise BenchError("no plot: nothing was measured")
    draw(rows, header(results[0]["machine"]), floor, out)


if __name__ == "__main__":
    sys.exit(main())
