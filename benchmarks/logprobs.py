"""Time, memory and error of linear_logprobs, forward and backward, beside the products it is made of: logits,
dz W and dz^T hidden, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .floor import (
    Floor,
    described,
    digit,
    first_call,
    floor_notes,
    megabytes,
    milliseconds,
    ms,
    prepared,
    time_cells,
    timing,
    warm_up,
)
from .measure import attempts, in_turns, markdown
from .methods import TRAINING as METHODS
from .methods import Method, Outputs
from .registry import Case, Problem, problem
from .rows import FirstCall, LeftOut, LogprobsRow

FLOOR = "bare products"
ROUNDS = {"cpu": 9, "cuda": 11}
TOKENS, ROWS = 16, 32  # rows of hidden's and of the weight's gradient that are compared with float64, at most


class Training:
    """A method's forward and backward pass on a problem, apart, so that each can be timed.

    The incoming gradients are random: with ones, some errors would cancel.
    """

    def __init__(self, method: Method, p: Problem):
        weight = p.weight.detach().requires_grad_(not method.frozen)
        self.method, self.p = method, replace(p, hidden=p.hidden.detach().requires_grad_(), weight=weight)
        self.trained = [self.p.hidden] if method.frozen else [self.p.hidden, weight]
        g = torch.Generator(p.hidden.device).manual_seed(1)
        self.incoming = torch.randn(2, len(p.tokens), generator=g, device=p.hidden.device)
        self.out = Outputs()

    def forward(self) -> None:
        self.out = self.method.call(self.p)

    def backward(self) -> tuple[Tensor, ...]:
        """The gradients of hidden and, unless it is frozen, of the weight."""
        # warn_only: else torch refuses cuBLAS without a workspace that would change the others' times
        torch.use_deterministic_algorithms(self.method.any_batch, warn_only=True)
        try:
            return self._backward()
        finally:
            torch.use_deterministic_algorithms(False)

    def _backward(self) -> tuple[Tensor, ...]:
        out, self.out = self.out, Outputs()
        if out.total is not None:
            return torch.autograd.grad(out.total, self.trained)
        pairs = zip((out.logprobs, out.entropy), self.incoming)
        values, grads = zip(*((value, grad.to(value.dtype)) for value, grad in pairs if value is not None))
        return torch.autograd.grad(values, self.trained, grads)

    def __call__(self) -> tuple[Outputs, tuple[Tensor, ...]]:
        self.forward()
        out = self.out
        return out, self.backward()


class Exact:
    """The results in float64, a block of the vocabulary at a time: log-probs and entropy [N] and, for any
    incoming gradients, the gradients of hidden at the first tokens and of some rows of the weight."""

    def __init__(self, p: Problem):
        (N, d), V, device = p.hidden.shape, len(p.weight), p.hidden.device
        self.p, self.h = p, p.hidden.double()
        blocks = torch.arange(V, device=device).split(
            max(1, (2**26 if p.hidden.is_cuda else 2**22) // max(N, d))
        )

        self.lse = self.h.new_full((N,), -torch.inf)
        mean = self.h.new_zeros(N)  # mean logit under the softmax of the blocks so far
        for entries in blocks:
            z, _ = self._capped(self.h @ self._weight(entries).T)
            lse = torch.logaddexp(self.lse, z.logsumexp(1))
            mean = mean * (self.lse - lse).exp() + (z * (z - lse[:, None]).exp()).sum(1)
            self.lse = lse
        self.entropy = self.lse - mean
        self.logprobs = self._capped((self.h * self._weight(p.tokens)).sum(1))[0] - self.lse

        # [2, TOKENS, d]: derivatives of log-prob and entropy of the first tokens by hidden.
        by_hidden = [self._by_logits(TOKENS, entries) @ self._weight(entries) for entries in blocks]
        self.by_hidden = torch.stack(by_hidden).sum(0)
        # [2, N, n]: those of all tokens by the logits of a few entries, half of them realised tokens.
        others = torch.linspace(0, V - 1, ROWS // 2, device=device).long()
        self.rows = torch.cat([p.tokens[: ROWS // 2], others]).unique()
        self.by_logits = self._by_logits(N, self.rows)

    def _weight(self, entries: Tensor) -> Tensor:
        return self.p.weight[entries].double()

    def _capped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Softcap and its slope."""
        c = self.p.softcap
        return (x, torch.ones_like(x)) if c is None else (c * torch.tanh(x / c), 1 - torch.tanh(x / c) ** 2)

    def _by_logits(self, n: int, entries: Tensor) -> Tensor:
        """Derivatives of log-prob and entropy of the first n tokens by logits before the softcap."""
        z, slope = self._capped(self.h[:n] @ self._weight(entries).T)
        log_p = z - self.lse[:n, None]
        p = log_p.exp()
        chosen = (self.p.tokens[:n, None] == entries).double()
        return torch.stack([(chosen - p) * slope, -p * (log_p + self.entropy[:n, None]) * slope])

    def errors(self, out: Outputs, grads: tuple[Tensor, ...], incoming: Tensor) -> dict[str, float]:
        """Errors of the gradients, relative to their norm; of log-probs and entropy the largest, in nats."""
        given = incoming.double() * torch.tensor([[1.0], [out.entropy is not None]], device=incoming.device)
        if out.total is not None:
            given[0] = 1
        n = self.by_hidden.shape[1]
        truth = {"hidden": (given[:, :n, None] * self.by_hidden).sum(0)}
        truth["weight"] = (given[:, :, None] * self.by_logits).sum(0).T @ self.h
        compared = {"hidden": grads[0][:n]}
        if len(grads) > 1:
            compared["weight"] = grads[1][self.rows]
        found = {
            name: float((grad - truth[name]).norm() / truth[name].norm()) for name, grad in compared.items()
        }
        for name in ("logprobs", "entropy"):
            if (values := getattr(out, name)) is not None:
                found[name] = float((values.detach() - getattr(self, name)).abs().max())
        return found


def measure(
    case: Case, device: str, methods: list[str], rounds: int, budget: float, with_error: bool
) -> tuple[list[LogprobsRow], list[LeftOut]]:
    """As head.measure."""
    base, truth, floor = prepared(case, device, Exact, with_error)
    for product in products(floor, base).values():
        product()  # allocates torch's own workspace before any method's memory is counted

    def timed() -> dict[str, Callable[[], Any]]:
        found = products(floor, base)
        for name in known:
            training = Training(METHODS[name], base)
            found |= {f"{name}, forward": training.forward, f"{name}, backward": training.backward}
        return found

    def moved() -> dict[str, Callable[[], Any]]:
        nonlocal base
        base = base.moved()
        floor.move()
        return timed()

    first = {name: partial(first_pass, METHODS[name], base, device, truth) for name in methods}
    known, left_out = attempts(device, case.label, first)
    times = in_turns(device, case.label, timed(), rounds, budget, moved)
    rows: list[LogprobsRow] = []
    for name, facts in known.items():
        method = METHODS[name]
        needed = [times[product] for product in products(floor, base, method.frozen)]
        least = [sum(turn) for turn in zip(*needed)]
        forward, backward = times[f"{name}, forward"], times[f"{name}, backward"]
        both = [sum(turn) for turn in zip(forward, backward)]
        rows.append(
            {
                **described(case, base, name),
                "leaves_out": method.leaves_out,
                "frozen": method.frozen,
                **timing(case, floor, both, least, len(needed)),
                "forward_milliseconds": milliseconds(forward),
                "backward_milliseconds": milliseconds(backward),
                "product_milliseconds": [milliseconds(values) for values in needed],
                **facts,
            }
        )
    return rows, left_out


def first_pass(method: Method, p: Problem, device: str, truth: Exact | None) -> FirstCall:
    """Memory beyond the gradients, and errors."""
    found, (out, grads) = first_call(device, lambda p: Training(method, p)(), p, warm_up(p))
    if found["extra_bytes"] is not None:
        found["extra_bytes"] = max(0.0, found["extra_bytes"] - sum(grad.nbytes for grad in grads))
    if truth is not None:
        found["errors"] = truth.errors(out, grads, Training(method, p).incoming)
    return found


def products(floor: Floor, p: Problem, frozen: bool = False) -> dict[str, Callable[[], Any]]:
    """The products that a head which holds its logits cannot do without."""
    found: dict[str, Callable[[], Any]] = {
        "logits": partial(floor.logits, p),
        "dX": partial(floor.grad_hidden, p),
    }
    return found if frozen else found | {"dW": partial(floor.grad_weight, p)}


def calls(case: Case, device: str, methods: list[str]) -> dict[str, Callable[[], Any]]:
    """Calls to profile: the bare products, and forward and backward of each method."""
    p = problem(case, device)
    floor = Floor(p)
    found = {f"torch.mm, {name}": product for name, product in products(floor, p).items()}
    return found | {name: Training(METHODS[name], p) for name in methods}


def table(rows: list[LogprobsRow]) -> str:
    several = len({row["distribution"] for row in rows}) > 1
    cells = []
    for row in rows:
        errors = row.get("errors", {})
        cells.append(
            {
                **time_cells(row, several, FLOOR),
                "forward, ms": ms(row["forward_milliseconds"]),
                "backward, ms": ms(row["backward_milliseconds"]),
                "extra memory": megabytes(row["extra_bytes"]),
                "error: hidden's gradient": digit(errors.get("hidden")),
                "weight's": digit(errors.get("weight")),
                "log p, nats": digit(errors.get("logprobs")),
                "leaves out": row["leaves_out"],
            }
        )
    return markdown(cells)


def notes(rows: list[LogprobsRow], machine: Mapping[str, Any]) -> str:
    text = floor_notes(rows, machine, "The bare products run", products=3)
    if any(row["frozen"] for row in rows):
        text += " With a frozen weight they are two: there is no dz^T hidden."
    return text
