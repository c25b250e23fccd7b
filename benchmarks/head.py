"""Time, memory and error of the head op beside torch's bare logits product, measured in the same run."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from g2rl_kernels import reference

from .measure import Turns, extra_memory, out_of_memory, progress, quantiles, released, synchronize
from .methods import METHODS, Method, Outputs, Unavailable
from .registry import DTYPES, Case, Problem, case, problem

ROUNDS_A_PLACEMENT = 5
LEAST_ROUNDS = 3


class Floor:
    """torch.mm(hidden, weight.T, out=logits), the least that anything which looks at all logits has to do.

    Where the logits would take more than a quarter of the free memory, it goes over chunks of tokens.
    """

    def __init__(self, p: Problem, limit: float | None = None):
        N, V = len(p.tokens), len(p.weight)
        if limit is None and p.hidden.is_cuda:
            limit = torch.cuda.mem_get_info()[0] / 4
        self.rows = N if limit is None else min(N, max(1, int(limit / (V * p.hidden.element_size()))))
        if self.rows < N:  # chunks of the same size, as far as that goes
            self.rows = -(-N // -(-N // self.rows))
        self.logits = torch.empty(self.rows, V, dtype=p.hidden.dtype, device=p.hidden.device)
        self.chunks = -(-N // self.rows)

    def __call__(self, p: Problem) -> None:
        for hidden in p.hidden.split(self.rows):
            torch.mm(hidden, p.weight.T, out=self.logits[: len(hidden)])


def exact(p: Problem) -> tuple[Tensor, ...]:
    """The reference in float64 on the tokens of the first response."""
    n = p.cuts[1]
    cu = p.cu_seqlens[:2]
    inputs = p.hidden[:n].double(), p.weight.double(), p.tokens[:n], cu
    return reference.head_features(*inputs, logit_softcap=p.softcap, chunk=64)


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
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows of the table for one case, and what is left out of it and why. Fewer rounds, at least 3, where
    they would take more than `budget` seconds."""
    label = f"{case.shape.name} {case.N} {case.dtype} {case.distribution}"
    progress(f"{label}: inputs")
    with released(device):
        base = problem(case, device)
    with released(device):
        truth = exact(base) if with_error else None
    floor = Floor(base)
    floor(base)  # torch's own workspace is in place before anybody's memory is counted
    cuts = {name: METHODS[name].responses or case.responses for name in methods}
    problems = {count: base.cut(count) for count in {*cuts.values()}}

    found: dict[str, dict[str, Any]] = {}
    left_out = []
    for name in methods:
        progress(f"{label}: {name}, first call")
        with released(device):
            try:
                method, p = METHODS[name], problems[cuts[name]]
                found[name] = first_calls(method, p, device, None if method.responses else truth)
            except Exception as error:
                left_out.append({"case": label, "method": name, **why_not(error)})

    turns, times = Turns(device), {name: list[float]() for name in ("floor", *found)}
    calls = timed_calls(floor, problems, cuts, [*found])
    turns.round(calls)  # to warm up
    started = time.perf_counter()
    for round_ in range(rounds):
        spent = time.perf_counter() - started
        if round_ >= LEAST_ROUNDS and spent + spent / round_ > budget:
            break
        progress(f"{label}: round {round_ + 1}/{rounds}", often=True)
        if device == "cpu" and round_ and round_ % ROUNDS_A_PLACEMENT == 0:
            # where tensors lie in memory moves torch's product by 15 %
            base = base.moved()
            problems = {count: base.cut(count) for count in problems}
            floor.logits = torch.empty_like(floor.logits)
            calls = timed_calls(floor, problems, cuts, [*found])
            turns.round(calls)
        for name, value in turns.round(calls).items():
            times[name].append(value)
    progress("")

    one = statistics.median(times["floor"])
    rows = []
    for name, known in found.items():
        ratios = [a / b for a, b in zip(times[name], times["floor"], strict=True)]
        rows.append(
            {
                "shape": case.shape.name,
                "N": case.N,
                "V": case.shape.V,
                "d": case.shape.d,
                "softcap": case.shape.softcap,
                "responses": cuts[name],
                "dtype": case.dtype,
                "distribution": case.distribution,
                "entropy": round(base.entropy, 4),
                "method": name,
                "leaves_out": METHODS[name].leaves_out,
                "ratio_20_50_80": [round(q, 4) for q in quantiles(ratios)],
                "milliseconds": round(statistics.median(times[name]) * 1e3, 4),
                "floor_milliseconds": round(one * 1e3, 4),
                "floor_tflops": float(f"{2e-12 * case.N * case.shape.V * case.shape.d / one:.4g}"),
                "floor_chunks": floor.chunks,
                "rounds": len(ratios),
                **known,
            }
        )
    return rows, left_out


def timed_calls(
    floor: Floor, problems: dict[int, Problem], cuts: dict[str, int], names: list[str]
) -> dict[str, Callable[[], Any]]:
    any_problem = next(iter(problems.values()))
    calls: dict[str, Callable[[], Any]] = {"floor": lambda: floor(any_problem)}
    for name in names:
        calls[name] = lambda method=METHODS[name], p=problems[cuts[name]]: method.call(p)
    return calls


def first_calls(method: Method, p: Problem, device: str, truth: tuple[Tensor, ...] | None) -> dict[str, Any]:
    """Memory and error. Raises where the method cannot run."""
    warm = p if device == "cuda" else problem(case("tiny", _dtype(p)))  # kernels are compiled, and tuned, now
    start = time.perf_counter()
    method.call(warm)
    synchronize(device)
    first = time.perf_counter() - start
    extra, out = extra_memory(device, lambda: method.call(p), lambda: method.call(warm))
    found: dict[str, Any] = {"extra_bytes": extra, "first_call_seconds": round(first, 3), "error": None}
    if truth is not None:
        found["errors"] = errors(out, truth)
        found["error"] = found["errors"].get("features")
    if out.skipped_tokens is not None and out.skipped_mass is not None:
        found["skipped_tokens"] = round(float(out.skipped_tokens.sum()) / len(p.tokens), 4)
        found["skipped_mass"] = float(out.skipped_mass.max())
    return found


def _dtype(p: Problem) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == p.hidden.dtype)


def why_not(error: Exception) -> dict[str, Any]:
    """The reason in one line, and whether it is a fault: what is absent or does not fit is none."""
    text = re.sub(r"(/[\w.+-]+)+/", "", " ".join(str(error).split()))[:240]  # no paths of this machine
    absent = isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("g2rl")
    if absent or isinstance(error, (Unavailable, NotImplementedError)):
        return {"reason": text, "fault": False}
    if out_of_memory(error):
        return {"reason": "out of memory", "fault": False}
    return {"reason": f"{type(error).__name__}: {text}", "fault": True}


def table(rows: list[dict[str, Any]]) -> str:
    """Columns that no row fills are not there."""
    several = len({row.get("distribution") for row in rows}) > 1
    logprob_error = any((row.get("errors") or {}).get("logprobs") is not None for row in rows)
    leaves_out = any(row.get("leaves_out") for row in rows)
    columns = [
        "N x V x d, dtype",
        "method",
        "time / logits product (20 to 80 %)",
        "ms",
        "extra memory",
        "error",
    ]
    columns += ["log p error, nats"] * logprob_error + ["leaves out"] * leaves_out
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        name = f"{row['N']} x {row['V']} x {row['d']}, {row['dtype']}"
        distribution = row.get("distribution")
        if distribution and (several or distribution != "2.3 sigma"):
            name += f", {distribution}"
        if row.get("softcap"):
            name += f", softcap {row['softcap']:g}"
        low, mid, high = row["ratio_20_50_80"]
        memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.1f} MB"
        cells = [
            name,
            row["method"],
            f"**{mid:.2f}** ({low:.2f} to {high:.2f})",
            f"{row['milliseconds']:.0f}",
        ]
        if row["milliseconds"] < 100 and "distribution" in row:
            cells[-1] = f"{row['milliseconds']:.2f}"
        cells += [memory, "" if row["error"] is None else f"{row['error']:.0e}"]
        if logprob_error:
            error = (row.get("errors") or {}).get("logprobs")
            cells.append("" if error is None else f"{error:.0e}")
        if leaves_out:
            text = row.get("leaves_out", "")
            if "skipped_tokens" in row:
                text += f" ({row['skipped_tokens']:.0%} of them)"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(rows: list[dict[str, Any]]) -> str:
    """What a reader of the table has to know of how its floor was measured."""
    speeds = [row["floor_tflops"] for row in rows if "floor_tflops" in row]
    text = []
    if speeds:
        text.append(f"The bare product runs at {_span(speeds, '.3g')} TFLOP/s.")
    chunked = {(row["N"], row["floor_chunks"]) for row in rows if row.get("floor_chunks", 1) > 1}
    for N, chunks in sorted(chunked):
        text.append(
            f"Logits of {N} tokens do not fit: their product is the sum of {chunks} over chunks of tokens."
        )
    peaked = {
        (row["shape"], row["N"], row["distribution"]): row["entropy"] for row in rows if "entropy" in row
    }
    if peaked:
        text.append(f"Mean entropy, measured: {_span(peaked.values(), '.2f')} nats.")
    return " ".join(text)


def _span(values: Iterable[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def profile(case: Case, device: str, methods: list[str], path: Path) -> None:
    """Which kernels the time of one call goes to, by torch.profiler, for every method that runs."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    p = problem(case, device)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    parts = [f"{case.shape.name}, N = {case.N}, {case.dtype}, {case.distribution}: one call of each method\n"]
    floor = Floor(p)
    calls: dict[str, Callable[[], Any]] = {"torch.mm(hidden, weight.T, out=logits)": lambda: floor(p)}
    for name in methods:
        calls[name] = lambda method=METHODS[name]: method.call(p)
    for name, call in calls.items():
        progress(f"profile: {name}")
        with released(device):
            try:
                call()
                synchronize(device)
                with record(activities=kinds) as recorded:
                    call()
                    synchronize(device)
                text = recorded.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60)
            except Exception as error:
                text = why_not(error)["reason"]
        parts.append(f"== {name}\n{text}\n")
    progress("")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
