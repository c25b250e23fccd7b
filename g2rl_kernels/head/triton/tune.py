"""Times the configurations of tuning.py on this machine's GPU, for `g2rl tune` (cli/tune.py).

They are timed through the functions of driver.py. A configuration may win only if its results are those of
the shipped one up to rounding, and the same bits when it is run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..backend import Incoming, Sums
from . import tuning
from .tuning import KINDS, Config

if TYPE_CHECKING:
    from .finish import TokenStatistics

TOLERANCE = 1e-3  # relative to the largest number: above rounding in another order, below a wrong tile
WORTHWHILE = 0.99  # relative to the shipped choice's time: a gain of less than 1 % may be chance
FLUSH_BYTES = 256 << 20  # several times any L2
LOGITS_BYTES = 1 << 30  # most logits of one torch.mm, which takes the tokens in steps


class Size(NamedTuple):
    """Size of an LM head; a tuned configuration holds for one size."""

    V: int
    D: int
    dtype: torch.dtype
    softcap: float | None = None

    @property
    def form(self) -> str:
        """`tuning.form` of contiguous tensors of this size."""
        rows = torch.empty(1, self.D, dtype=self.dtype)
        return tuning.form(rows, rows, self.softcap is not None)


class Timed(NamedTuple):
    """One configuration of one kind."""

    config: Config
    seconds: float  # NaN if it was not timed
    obstacle: str  # why it may not be stored; "" if it may


# --- timing -------------------------------------------------------------------------------------------------


def gpu_seconds(call: Callable[[], object], flush: Tensor) -> float:
    """Time of one call between two events, after a write that empties the L2 cache."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def medians(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: Callable[[Callable[[], object]], float],
) -> dict[str, float]:
    """Median time of each call. Calls take turns, so that a falling GPU clock slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: median(values) for name, values in times.items()}


def obstacle(call: Callable[[], Sequence[Tensor]], shipped: Sequence[Tensor]) -> str:
    """Why `call` may not be stored; "" if its results are repeatable and right."""
    try:
        once, again = call(), call()
    except Exception as error:  # too large for this GPU, or beyond this version of Triton
        lines = str(error).strip().splitlines() or [""]
        return f"fails: {type(error).__name__}: {lines[-1]}"[:100]
    if not all(torch.equal(a, b) for a, b in zip(once, again)):
        return "other bits when run again"
    for found, wanted in zip(once, shipped):
        off = (found - wanted).abs().max() / wanted.abs().max()
        if not off <= TOLERANCE:
            return f"off by {off.item():.1e}"
    return ""


def time_kind(
    calls: Mapping[Config, Callable[[], Sequence[Tensor]]],
    product: Callable[[], object],
    rounds: int,
    seconds: Callable[[Callable[[], object]], float],
) -> tuple[list[Timed], float]:
    """All configurations of a kind, the shipped one first, and the time of `product`."""
    first, *_ = calls
    shipped = calls[first]()
    obstacles = {config: obstacle(call, shipped) for config, call in calls.items()}
    turns: dict[str, Callable[[], object]] = {"product": product}
    turns |= {str(config): call for config, call in calls.items() if not obstacles[config]}
    found = medians(turns, rounds, seconds)
    nan = float("nan")
    return [Timed(c, found.get(str(c), nan), why) for c, why in obstacles.items()], found["product"]


def winner(rows: Sequence[Timed]) -> Config | None:
    """The fastest configuration that may be stored; the shipped one (the first row) unless another is clearly
    faster."""
    able = [row for row in rows if not row.obstacle]
    if not able:
        return None
    best = min(able, key=lambda row: row.seconds)
    shipped = rows[0]
    return best.config if shipped.obstacle or best.seconds < WORTHWHILE * shipped.seconds else shipped.config


# --- what is timed ------------------------------------------------------------------------------------------


class Bench:
    """Tensors of one head, and the calls that the driver would make on them."""

    def __init__(self, size: Size, n_tokens: int, device: torch.device):
        from ..spec import HeadSpec
        from . import driver
        from .chunk import CHUNK, Chunk, pick
        from .tile import HeadOperands

        self.size, self.device, self.driver = size, device, driver
        N = self.N = min(n_tokens, CHUNK)  # longer batches go through the kernels in such chunks
        S = self.S = max(1, N // 1024)
        generator = torch.Generator(device).manual_seed(0)
        self.hidden = torch.empty(N, size.D, device=device, dtype=size.dtype)
        self.hidden.normal_(generator=generator)
        weight = torch.empty(size.V, size.D, device=device, dtype=size.dtype)
        weight.normal_(0.0, 2.0 / size.D**0.5, generator=generator)  # logits spread by 2, as a model's do
        self.spec = HeadSpec(weight, logit_softcap=size.softcap or 0.0)
        self.operands = HeadOperands.of(self.spec)
        tokens = torch.randint(size.V, (N,), device=device, generator=generator)
        cu_seqlens = torch.tensor([N * s // S for s in range(S + 1)], device=device)
        response = torch.searchsorted(cu_seqlens[1:], torch.arange(N, device=device), right=True).int()
        self.chunk = Chunk(self.hidden, tokens, None, response, cu_seqlens)
        self.half = pick(torch.rand(N, device=device, generator=generator) < 0.5, cu_seqlens)
        self.target, _ = driver.head_target(self.hidden, self.operands, tokens)
        self.found = self.token_statistics(tuning.candidates_on(device, size.form)[0])
        most = max(1024, LOGITS_BYTES // (size.V * weight.element_size()))
        self.logits = torch.empty(min(N, most), size.V, device=device, dtype=size.dtype)

    def token_statistics(self, config: Config) -> TokenStatistics:
        partial, _ = self.driver.head_stats(self.hidden, self.operands, self.chunk.tokens, config)
        return self.driver.head_finish(partial, self.target)

    def call(self, kind: str, config: Config) -> Sequence[Tensor]:
        """One kind's work with one configuration, as the driver does it."""
        if kind == "stats":
            return self.token_statistics(config)[:5]
        if kind == "gradient":
            return (self.gradient(config),)
        chunk = self.chunk
        n = chunk.hidden.shape[0]
        totals = torch.zeros(2, n, dtype=torch.float64, device=self.device) if kind == "seeded" else None
        features = torch.zeros(self.S, self.size.D, device=self.device)
        listed = self.half if kind == "listed" else None
        with tuning.trial(config):
            shift = self.found.lse2[:n]
            self.driver._accumulate(chunk, self.operands, [features], shift, totals=totals, listed=listed)
        return (features,) if totals is None else (features, totals)

    def gradient(self, config: Config) -> Tensor:
        """[N, d], the gradient of the sum of the log-probabilities."""
        found, nothing = self.found, torch.zeros_like(self.found.rest)
        total = torch.zeros(self.N, self.size.D, device=self.device)
        normaliser = torch.stack([found.logsumexp, nothing])
        terms = torch.stack([nothing + 1, nothing, found.rest])
        with tuning.trial(config):
            incoming, vocabulary = Incoming(normaliser, terms), slice(0, self.size.V)
            self.driver.sweep(self.hidden, self.chunk.tokens, self.spec, incoming, vocabulary, Sums(total))
        return total

    def product(self, kind: str) -> None:
        """torch.mm of the logits that this kind computes."""
        n = self.N // 2 if kind == "listed" else self.N
        for start in range(0, n, len(self.logits)):
            rows = self.hidden[start : min(n, start + len(self.logits))]
            torch.mm(rows, self.spec.weight.T, out=self.logits[: len(rows)])


# Kind -> the times of its configurations, and that of torch.mm of the same logits.
Measured = dict[str, tuple[list[Timed], float]]
Measure = Callable[[Size, int, int, torch.device], Measured]


def measure(size: Size, n_tokens: int, rounds: int, device: torch.device) -> Measured:
    bench = Bench(size, n_tokens, device)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    found: Measured = {}
    for kind in KINDS:
        configs = tuning.candidates_on(device, size.form)
        print(f"{kind}: {len(configs)} configurations", file=sys.stderr, flush=True)
        calls = {config: partial(bench.call, kind, config) for config in configs}
        seconds = partial(gpu_seconds, flush=flush)
        found[kind] = time_kind(calls, partial(bench.product, kind), rounds, seconds)
    return found
