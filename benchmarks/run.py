"""Time, memory and error of the head op beside torch's bare logits product, measured in the same run.

Every row is a ratio to `torch.mm(hidden, weight.T, out=logits)`, the least that anything which looks at all
logits has to do: methods take turns, round by round, and the ratio is taken within a round, so that a machine
which slows down slows both; every five rounds the tensors are made anew. Shown is the median of the rounds
with the 20 % and 80 % quantiles.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import g2rl_kernels as g2
from g2rl_kernels import _C, reference

from .registry import DEFAULT_SHAPES, DTYPES, METHODS, SHAPES, Problem, Shape, problem

ROUNDS_A_PLACEMENT = 5
M_MMAP_THRESHOLD = -3  # malloc.h


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def extra_memory(call: Callable[[], Any]) -> float | None:
    """Bytes of resident memory at the call's peak beyond what was there before; None where not known."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def read(key: str) -> int:
        return next(
            int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key)
        )

    gc.collect()
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 18)  # no buffer from what earlier calls left in the allocator
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = read("VmRSS")
        call()
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # where glibc's own adaptation ends
    except (OSError, AttributeError):
        return None
    return float(max(read("VmHWM") - before, 0))


def relative_error(p: Problem, method: Callable[[Problem], tuple[torch.Tensor, ...]]) -> float:
    """Of the features of the first 64 tokens as one response, against the reference in float64."""
    n = min(64, len(p.tokens))
    part = Problem(p.hidden[:n], p.weight, p.tokens[:n], torch.tensor([0, n]))
    exact = reference.head_features(part.hidden.double(), part.weight.double(), part.tokens, part.cu_seqlens)[
        0
    ]
    return float((method(part)[0].double() - exact).norm() / exact.norm())


def in_fresh_thread(call: Callable[[], Any]) -> Any:
    """The op keeps its workspace for the thread's next call; a new thread has none yet."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()))
    thread.start()
    thread.join()
    return result[0]


def responses(shape: Shape, entry: str) -> int:
    """What packing responses costs is shown by the same tokens cut otherwise: "..., 8 responses"."""
    return int(entry.split(", ")[1].split()[0]) if entry.startswith("g2rl-kernels,") else shape.responses


def entries(shape: Shape, base: Problem) -> dict[str, tuple[Callable[[Problem], Any], Problem]]:
    names = ["g2rl-kernels, 1 response", "g2rl-kernels, 8 responses", *METHODS]
    found = {}
    for name in names:
        cut = torch.arange(responses(shape, name) + 1) * shape.N // responses(shape, name)
        found[name] = (
            METHODS[name.split(", ")[0] if name.startswith("g2rl") else name],
            replace(base, cu_seqlens=cut),
        )
    return found


def turn(shape: Shape, base: Problem, logits: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Seconds of the bare product, then of every method."""
    one = seconds(lambda: torch.mm(base.hidden, base.weight.T, out=logits))
    return one, {name: seconds(lambda m=m, p=p: m(p)) for name, (m, p) in entries(shape, base).items()}


def measure(shape: Shape, dtype: str, rounds: int, with_error: bool) -> list[dict[str, Any]]:
    small = problem(SHAPES["tiny"], DTYPES[dtype], 2)
    base = problem(shape, DTYPES[dtype], shape.responses)
    memory, error = {}, {}
    for name, (method, p) in entries(shape, base).items():
        memory[name] = in_fresh_thread(lambda m=method, p=p: (m(small), extra_memory(lambda: m(p)))[1])
    if with_error:
        error = {name: relative_error(base, method) for name, method in METHODS.items()}

    floor: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in memory}
    for round_ in range(rounds):
        if round_ % ROUNDS_A_PLACEMENT == 0:  # where tensors lie in memory moves torch's product by 15 %
            base = problem(shape, DTYPES[dtype], shape.responses)
            logits = torch.empty(shape.N, shape.V, dtype=DTYPES[dtype])
            turn(shape, base, logits)  # to warm up
        print(f"\r{shape.name} {dtype}: round {round_ + 1}/{rounds} ", end="", file=sys.stderr, flush=True)
        one, timed = turn(shape, base, logits)
        floor.append(one)
        for name, value in timed.items():
            times[name].append(value)
    print(file=sys.stderr)

    rows = []
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, floor, strict=True))
        quantile = [ratios[round(q * (len(ratios) - 1))] for q in (0.2, 0.5, 0.8)]
        rows.append(
            {
                "shape": shape.name,
                "N": shape.N,
                "V": shape.V,
                "d": shape.d,
                "responses": responses(shape, name),
                "dtype": dtype,
                "method": name,
                "ratio_20_50_80": [round(q, 4) for q in quantile],
                "milliseconds": round(statistics.median(values) * 1e3, 2),
                "floor_milliseconds": round(statistics.median(floor) * 1e3, 2),
                "extra_bytes": memory[name],
                "error": error.get(name),
                "rounds": rounds,
            }
        )
    return rows


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line
        )
        values = {key.strip(): value.strip() for key, value in fields.items()}
        family, model = values.get("cpu family"), values.get("model")
        cpu = f"{values.get('model name', cpu)} (family {family}, model {model})"
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.chosen_isa(),
        "torch": torch.__version__,
        "g2rl_kernels": g2.__version__,
        "python": platform.python_version(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| N x V x d, dtype | method | time / logits product (20 to 80 %) | ms | extra memory | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, mid, high = row["ratio_20_50_80"]
        memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.1f} MB"
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        lines.append(
            f"| {row['N']} x {row['V']} x {row['d']}, {row['dtype']} | {row['method']} | "
            f"**{mid:.2f}** ({low:.2f} to {high:.2f}) | {row['milliseconds']:.0f} | {memory} | {error} |"
        )
    return "\n".join(lines)


def write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "g2rl bench",
        description=__doc__,
        epilog="examples:\n  g2rl bench head\n"
        "  g2rl bench head --shapes qwen3-0.6b --dtypes bf16 --rounds 5\n"
        "  G2RL_CPU_ISA=avx2 g2rl bench head --out avx2.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("op", choices=["head"], help="what to measure")
    p.add_argument(
        "--shapes",
        nargs="+",
        choices=list(SHAPES),
        default=list(DEFAULT_SHAPES),
        metavar="NAME",
        help=f"of {', '.join(SHAPES)}",
    )
    p.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(DTYPES),
        default=["fp32", "bf16"],
        metavar="DTYPE",
        help=f"of {', '.join(DTYPES)}",
    )
    p.add_argument(
        "--rounds", type=int, default=15, help="turns of every method after one to warm up (default 15)"
    )
    p.add_argument("--threads", type=int, help="threads of torch and of the kernels (default: torch's)")
    p.add_argument("--no-error", action="store_true", help="leave out the comparison with float64")
    p.add_argument("--out", type=Path, help="where to write the JSON; without it, only the table is printed")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.rounds < 1:
        parser().error(f"--rounds is {args.rounds}, needs 1 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name in args.shapes:
        for dtype in args.dtypes:
            rows += measure(SHAPES[name], dtype, args.rounds, not args.no_error)
    header = machine()
    keys = ("cpu", "threads", "isa", "torch", "date")
    print(", ".join(f"{header[key]}{' threads' * (key == 'threads')}" for key in keys) + "\n")
    print(table(rows))
    if args.out:
        write_whole(args.out, json.dumps({"machine": header, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
