"""The floor that `head.py` and `logprobs.py` compare methods with, the bare products, and the columns that
their tables share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .measure import extra_memory, least_seconds, progress, quantiles, released, span, spread, synchronize
from .registry import DTYPES, Case, Problem, case, problem
from .rows import Described, FirstCall, MethodRow, Timing

T = TypeVar("T")


class Floor:
    """The products that a head cannot do without: logits = torch.mm(hidden, weight.T, out=), and in the
    backward pass dz W and dz^T hidden.

    Logits that would take more than `limit` bytes (default on a GPU: a quarter of the free memory) are made
    chunk by chunk. The logits stand in for dz, whose values do not matter here. Each call allocates the
    gradients, as every method does.
    """

    def __init__(self, p: Problem, limit: float | None = None):
        N, V = len(p.tokens), len(p.weight)
        if limit is None and p.hidden.is_cuda:
            limit = torch.cuda.mem_get_info()[0] / 4
        self.rows = N if limit is None else min(N, max(1, int(limit / (V * p.hidden.element_size()))))
        if self.rows < N:  # chunks of nearly the same size
            self.rows = -(-N // -(-N // self.rows))
        self.out = torch.zeros(self.rows, V, dtype=p.hidden.dtype, device=p.hidden.device)
        self.chunks = -(-N // self.rows)

    def move(self) -> None:
        """Moves the logits elsewhere in memory."""
        self.out = self.out.clone()

    def logits(self, p: Problem) -> None:
        for hidden in p.hidden.split(self.rows):
            torch.mm(hidden, p.weight.T, out=self.out[: len(hidden)])

    def grad_hidden(self, p: Problem) -> Tensor:
        grad = torch.empty_like(p.hidden)
        for rows in grad.split(self.rows):
            torch.mm(self.out[: len(rows)], p.weight, out=rows)
        return grad

    def grad_weight(self, p: Problem) -> Tensor:
        first, *others = p.hidden.split(self.rows)
        grad = torch.mm(self.out[: len(first)].T, first)
        for hidden in others:
            grad.addmm_(self.out[: len(hidden)].T, hidden)
        return grad


def prepared(
    case: Case, device: str, exact: Callable[[Problem], T], with_error: bool
) -> tuple[Problem, T | None, Floor]:
    """A case's tensors, their results in float64 (None unless wanted), and its floor."""
    progress(f"{case.label}: inputs")
    with released(device):
        base = problem(case, device)
    with released(device):
        truth = exact(base) if with_error else None
    return base, truth, Floor(base)


# --- what a row says ----------------------------------------------------------------------------------------


def warm_up(p: Problem) -> Problem:
    """On a GPU the problem itself: kernels are compiled, and tuned, now. On a CPU a small one."""
    if p.hidden.is_cuda:
        return p
    return problem(case("tiny", next(name for name, dtype in DTYPES.items() if dtype == p.hidden.dtype)))


def first_call(device: str, call: Callable[[Problem], T], p: Problem, warm: Problem) -> tuple[FirstCall, T]:
    """Memory and seconds of the first call, and its result. Raises what the call raises."""
    start = time.perf_counter()
    call(warm)
    synchronize(device)
    first = time.perf_counter() - start
    extra, out = extra_memory(device, lambda: call(p), lambda: call(warm))
    return {"extra_bytes": extra, "first_call_seconds": round(first, 3)}, out


def described(case: Case, p: Problem, method: str) -> Described:
    return {
        "shape": case.shape.name,
        "N": case.N,
        "V": case.shape.V,
        "d": case.shape.d,
        "softcap": case.shape.softcap,
        "dtype": case.dtype,
        "distribution": case.distribution,
        "entropy": round(p.entropy, 4),
        "method": method,
    }


def timing(
    case: Case, floor: Floor, values: Sequence[float], least: Sequence[float], products: int = 1
) -> Timing:
    """The columns of time, from seconds in each round: a method's `values`, and the floor's `least` for so
    many products of N x V x d."""
    ratios = [a / b for a, b in zip(values, least, strict=True)]
    tflops = 2e-12 * products * case.N * case.shape.V * case.shape.d / statistics.median(least)
    return {
        "ratio_20_50_80": [round(q, 4) for q in quantiles(ratios)],
        "milliseconds": milliseconds(values),
        "floor_milliseconds": milliseconds(least),
        "floor_tflops": float(f"{tflops:.4g}"),
        "floor_chunks": floor.chunks,
        "rounds": len(ratios),
    }


def milliseconds(values: Sequence[float]) -> float:
    """Median of seconds, in milliseconds."""
    return round(statistics.median(values) * 1e3, 4)


def time_cells(row: MethodRow, several: bool, floor: str) -> dict[str, str]:
    """The first cells of a row; `several`: the table has several distributions, so each row names its own."""
    name = f"{row['N']} x {row['V']} x {row['d']}, {row['dtype']}"
    distribution = row.get("distribution", "")
    if distribution and (several or distribution != "2.3 sigma"):
        name += f", {distribution}"
    if row.get("softcap"):
        name += f", softcap {row['softcap']:g}"
    return {
        "N x V x d, dtype": name,
        "method": row["method"],
        f"time / {floor} (20 to 80 %)": spread(row["ratio_20_50_80"], ".2f"),
        "ms": ms(row["milliseconds"]),
    }


def ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def megabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} MB"


def digit(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"


def floor_notes(rows: Sequence[MethodRow], machine: Mapping[str, Any], runs: str, products: int = 1) -> str:
    """How the floor of a table was measured; it has so many products."""
    speeds = [row["floor_tflops"] for row in rows if "floor_tflops" in row]
    text = []
    if speeds:
        text.append(f"{runs} at {span(speeds, '.3g')} TFLOP/s.")
    least = {}
    for row in rows:
        N, V, d, size = row["N"], row["V"], row["d"], DTYPES[row["dtype"]].itemsize
        flops, bytes_ = 2 * products * N * V * d, products * size * (N + V) * d
        if found := least_seconds(machine, row["dtype"], flops, bytes_):
            least[f"{N} x {V} x {d}, {row['dtype']}"] = f"{ms(found * 1e3)} ms"
    if least:
        what = "the product takes" if products == 1 else f"the {products} products take"
        times = ", ".join(f"{time} ({case})" for case, time in least.items())
        text.append(f"At the ceilings {what} {times}.")
    chunked = {(row["N"], row["floor_chunks"]) for row in rows if row.get("floor_chunks", 1) > 1}
    for N, chunks in sorted(chunked):
        text.append(
            f"Logits of {N} tokens do not fit: their product is the sum of {chunks} over chunks of tokens."
        )
    peaked = {
        (row["shape"], row["N"], row["distribution"]): row["entropy"] for row in rows if "entropy" in row
    }
    if peaked:
        text.append(f"Mean entropy, measured: {span(peaked.values(), '.2f')} nats.")
    return " ".join(text)
