"""Time, memory and error of the head op beside torch's bare logits product, measured in the same run.

The second half is what `logprobs.py` shares: the floor, and what a row of either table says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from g2rl_kernels.head import reference
from g2rl_kernels.head.spec import HeadSpec, Responses

from .measure import (
    attempts,
    extra_memory,
    in_turns,
    least_seconds,
    markdown,
    progress,
    quantiles,
    released,
    span,
    spread,
    synchronize,
)
from .methods import METHODS, Outputs
from .registry import DTYPES, Case, Problem, case, problem

FLOOR = "logits product"
ROUNDS = {"cpu": 15, "cuda": 11}


def exact(p: Problem) -> tuple[Tensor, ...]:
    """The reference in float64 on the tokens of the first response."""
    n = p.cuts[1]
    head = HeadSpec(p.weight.double(), logit_softcap=p.softcap or 0.0)
    responses = Responses(p.cu_seqlens[:2])
    return reference.head_features(p.hidden[:n].double(), p.tokens[:n], head, responses, chunk=64)


def errors(out: Outputs, truth: tuple[Tensor, ...]) -> dict[str, float]:
    """Of the first response: its feature's error relative to the feature, the others' largest in nats."""
    found = {}
    if out.features is not None:
        found["features"] = float((out.features[0].double() - truth[0][0]).norm() / truth[0][0].norm())
    for name, right in zip(("logprobs", "logsumexp", "entropy"), truth[1:], strict=True):
        values = getattr(out, name)
        if values is not None:
            found[name] = float((values[: len(right)].double() - right).abs().max())
    return found


def measure(
    case: Case, device: str, methods: list[str], rounds: int, budget: float, with_error: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the table for one case, and what is left out of it and why. Fewer rounds, at least 3, where
    they would take more than `budget` seconds."""
    progress(f"{case.label}: inputs")
    with released(device):
        base = problem(case, device)
    with released(device):
        truth = exact(base) if with_error else None
    floor = Floor(base)
    floor.logits(base)  # torch's own workspace is in place before anybody's memory is counted
    cuts = {name: METHODS[name].responses or case.responses for name in methods}
    problems = {count: base.cut(count) for count in {*cuts.values()}}

    def first(name: str) -> dict[str, Any]:
        p, method = problems[cuts[name]], METHODS[name]
        found, out = first_call(device, method.call, p, warm_up(p))
        found["error"] = None
        if truth is not None and not method.responses:
            found["errors"] = errors(out, truth)
            found["error"] = found["errors"].get("features")
        if out.skipped_tokens is not None and out.skipped_mass is not None:
            found["skipped_tokens"] = round(float(out.skipped_tokens.sum()) / len(p.tokens), 4)
            found["skipped_mass"] = float(out.skipped_mass.max())
        return found

    def timed() -> dict[str, Callable[[], Any]]:
        found: dict[str, Callable[[], Any]] = {"floor": lambda: floor.logits(base)}
        for name in known:
            found[name] = lambda method=METHODS[name], p=problems[cuts[name]]: method.call(p)
        return found

    def moved() -> dict[str, Callable[[], Any]]:
        nonlocal base, problems
        base = base.moved()
        problems = {count: base.cut(count) for count in problems}
        floor.move()
        return timed()

    known, left_out = attempts(device, case.label, {name: lambda name=name: first(name) for name in methods})
    times = in_turns(device, case.label, timed(), rounds, budget, moved)
    rows = []
    for name, facts in known.items():
        row = described(case, base, METHODS[name].name) | {"responses": cuts[name]}
        row["leaves_out"] = METHODS[name].leaves_out
        rows.append(row | timing(case, times[name], times["floor"]) | {"floor_chunks": floor.chunks} | facts)
    return rows, left_out


def calls(case: Case, device: str, methods: list[str]) -> dict[str, Callable[[], Any]]:
    """What a profile is made of: the floor, and one call of each method."""
    p = problem(case, device)
    floor = Floor(p)
    found: dict[str, Callable[[], Any]] = {"torch.mm(hidden, weight.T, out=logits)": lambda: floor.logits(p)}
    return found | {name: lambda method=METHODS[name]: method.call(p) for name in methods}


def table(rows: list[dict[str, Any]]) -> str:
    several = len({row.get("distribution") for row in rows}) > 1
    cells = []
    for row in rows:
        leaves_out = row.get("leaves_out", "")
        if leaves_out and "skipped_tokens" in row:
            leaves_out += f" ({row['skipped_tokens']:.0%} of them)"
        cells.append(
            {
                **time_cells(row, several, FLOOR),
                "extra memory": megabytes(row["extra_bytes"]),
                "error": digit(row["error"]),
                "log p error, nats": digit((row.get("errors") or {}).get("logprobs")),
                "leaves out": leaves_out,
            }
        )
    return markdown(cells)


def notes(rows: list[dict[str, Any]], machine: Mapping[str, Any]) -> str:
    return floor_notes(rows, machine, "The bare product runs")


# --- the floor: the products that a head cannot do without --------------------------------------------------


class Floor:
    """logits = torch.mm(hidden, weight.T, out=), the least that anything which looks at all logits has to do;
    and the two products of its backward pass, dz W and dz^T hidden.

    Where the logits would take more than a quarter of the free memory, all go over chunks of tokens. The
    logits stand in for dz, whose values do not matter here. The gradients are fresh memory in each call, as
    they are in every method's.
    """

    def __init__(self, p: Problem, limit: float | None = None):
        N, V = len(p.tokens), len(p.weight)
        if limit is None and p.hidden.is_cuda:
            limit = torch.cuda.mem_get_info()[0] / 4
        self.rows = N if limit is None else min(N, max(1, int(limit / (V * p.hidden.element_size()))))
        if self.rows < N:  # chunks of the same size, as far as that goes
            self.rows = -(-N // -(-N // self.rows))
        self.out = torch.zeros(self.rows, V, dtype=p.hidden.dtype, device=p.hidden.device)
        self.chunks = -(-N // self.rows)

    def move(self) -> None:
        """Elsewhere in memory."""
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


# --- what a row says ----------------------------------------------------------------------------------------


def warm_up(p: Problem) -> Problem:
    """On a GPU the problem itself: kernels are compiled, and tuned, now. On a CPU a small one."""
    if p.hidden.is_cuda:
        return p
    return problem(case("tiny", next(name for name, dtype in DTYPES.items() if dtype == p.hidden.dtype)))


def first_call(
    device: str, call: Callable[[Problem], Any], p: Problem, warm: Problem
) -> tuple[dict[str, Any], Any]:
    """What the row says of memory and of the first call, and the call's result. Raises what the call does."""
    start = time.perf_counter()
    call(warm)
    synchronize(device)
    first = time.perf_counter() - start
    extra, out = extra_memory(device, lambda: call(p), lambda: call(warm))
    return {"extra_bytes": extra, "first_call_seconds": round(first, 3)}, out


def described(case: Case, p: Problem, method: str) -> dict[str, Any]:
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


def timing(case: Case, values: list[float], floor: list[float], products: int = 1) -> dict[str, Any]:
    """Of a method's seconds in each round and those of the floor, so many products of N x V x d."""
    ratios = [a / b for a, b in zip(values, floor, strict=True)]
    one = statistics.median(floor)
    tflops = 2e-12 * products * case.N * case.shape.V * case.shape.d / one
    return {
        "ratio_20_50_80": [round(q, 4) for q in quantiles(ratios)],
        "milliseconds": milliseconds(values),
        "floor_milliseconds": milliseconds(floor),
        "floor_tflops": float(f"{tflops:.4g}"),
        "rounds": len(ratios),
    }


def milliseconds(values: list[float]) -> float:
    return round(statistics.median(values) * 1e3, 4)


def time_cells(row: Mapping[str, Any], several: bool, floor: str) -> dict[str, str]:
    """The first cells of a row; `several`: distributions are in the table, so that it must be named."""
    name = f"{row['N']} x {row['V']} x {row['d']}, {row['dtype']}"
    distribution = row.get("distribution")
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


def floor_notes(rows: list[dict[str, Any]], machine: Mapping[str, Any], runs: str, products: int = 1) -> str:
    """What a reader of the table has to know of how its floor was measured; so many products are bare."""
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
