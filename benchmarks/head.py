"""Time, memory and error of the head op beside torch's bare logits product, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from g2rl_kernels.head import reference
from g2rl_kernels.head.spec import HeadSpec, Responses

from .floor import (
    Floor,
    described,
    digit,
    first_call,
    floor_notes,
    megabytes,
    prepared,
    time_cells,
    timing,
    warm_up,
)
from .measure import attempts, in_turns, markdown
from .methods import METHODS, Outputs
from .registry import Case, Problem, problem
from .rows import HeadFirstCall, HeadRow, LeftOut

FLOOR = "logits product"
ROUNDS = {"cpu": 15, "cuda": 11}


def exact(p: Problem) -> tuple[Tensor, ...]:
    """The reference in float64 on the tokens of the first response."""
    n = p.cuts[1]
    head = HeadSpec(p.weight.double(), logit_softcap=p.softcap or 0.0)
    responses = Responses(p.cu_seqlens[:2])
    return reference.head_features(p.hidden[:n].double(), p.tokens[:n], head, responses, chunk=64)


def errors(out: Outputs, truth: tuple[Tensor, ...]) -> dict[str, float]:
    """Errors of the first response: its feature's, relative to the feature; the others', the largest in
    nats."""
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
) -> tuple[list[HeadRow], list[LeftOut]]:
    """Rows of the table for one case, and what is left out of it and why.

    Fewer rounds, at least 3, where they would take more than `budget` seconds.
    """
    base, truth, floor = prepared(case, device, exact, with_error)
    floor.logits(base)  # allocates torch's own workspace before any method's memory is counted
    cuts = {name: METHODS[name].responses or case.responses for name in methods}
    problems = {count: base.cut(count) for count in {*cuts.values()}}

    def first(name: str) -> HeadFirstCall:
        p, method = problems[cuts[name]], METHODS[name]
        facts, out = first_call(device, method.call, p, warm_up(p))
        found: HeadFirstCall = {**facts, "error": None}
        if truth is not None and not method.responses:
            found["errors"] = errors(out, truth)
            found["error"] = found["errors"].get("features")
        if out.skipped_tokens is not None and out.skipped_mass is not None:
            found["skipped_tokens"] = round(float(out.skipped_tokens.sum()) / len(p.tokens), 4)
            found["skipped_mass"] = float(out.skipped_mass.max())
        return found

    def timed() -> dict[str, Callable[[], Any]]:
        found: dict[str, Callable[[], Any]] = {"floor": partial(floor.logits, base)}
        return found | {name: partial(METHODS[name].call, problems[cuts[name]]) for name in known}

    def moved() -> dict[str, Callable[[], Any]]:
        nonlocal base, problems
        base = base.moved()
        problems = {count: base.cut(count) for count in problems}
        floor.move()
        return timed()

    known, left_out = attempts(device, case.label, {name: partial(first, name) for name in methods})
    times = in_turns(device, case.label, timed(), rounds, budget, moved)
    rows: list[HeadRow] = [
        {
            **described(case, base, name),
            "responses": cuts[name],
            "leaves_out": METHODS[name].leaves_out,
            **timing(case, floor, times[name], times["floor"]),
            **facts,
        }
        for name, facts in known.items()
    ]
    return rows, left_out


def calls(case: Case, device: str, methods: list[str]) -> dict[str, Callable[[], Any]]:
    """Calls to profile: the floor, and each method."""
    p = problem(case, device)
    floor = Floor(p)
    found: dict[str, Callable[[], Any]] = {"torch.mm(hidden, weight.T, out=logits)": partial(floor.logits, p)}
    return found | {name: partial(METHODS[name].call, p) for name in methods}


def table(rows: list[HeadRow]) -> str:
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
                "log p error, nats": digit(row.get("errors", {}).get("logprobs")),
                "leaves out": leaves_out,
            }
        )
    return markdown(cells)


def notes(rows: list[HeadRow], machine: Mapping[str, Any]) -> str:
    return floor_notes(rows, machine, "The bare product runs")
