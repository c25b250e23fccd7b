"""The head on a GPU: launches the kernels of this folder, in two passes over the logits or in one.

    nothing known       head_stats over all tokens; head_residual with the exact logsumexp
    known log-probs     head_residual with logsumexp = x_y - log p_y, which also yields the exact one;
                        tokens whose seed was off are corrected by a second head_residual over those alone
    max_skipped         as with nothing known, but the second pass leaves confident tokens out (head_skip.py)
    part of vocabulary  head_residual alone, with the logsumexp of the whole (features_of_part)

Then, in every mode, head_collect and head_project for A W, head_gather for the realised tokens' part, and

    features[s] = logit_scale / (sum alpha + 1e-8) (sum_t alpha_t (1 - p_y) slope_y W[y] - A[s] W).

**A seed's error.** With l = exp(lse - lse_seed), a seeded pass gives l p for each p it should, and the
realised token's part is given the coefficient l (1 - p_y) too, so the token's feature is exactly l phi_t.
Tokens with |l - 1| <= KNOWN_TOLERANCE are left so: the features are those of weights l_t alpha_t in place of
alpha_t, within KNOWN_TOLERANCE sum alpha ||phi_t|| / sum alpha of the exact ones. All others are made exact.
The correction subtracts what the seed gave, which costs digits only if that was much too large: if any l is
beyond 2^10 (a sampler that claims a thousand times the probability) or below 2^-60, or not a number,
everything is computed anew as if nothing had been known. All of this is decided on the device: nothing waits
for it, and kernels without work return at once.

**Memory.** Tokens are worked on in chunks, a chunk's responses in batches, and the vocabulary in slabs, so
that A and the sums of a slab take WORKSPACE bytes at most and the slots SLOTS; per-token numbers come to less
than 60 bytes a token of a chunk. All of it together stays below 64 MiB, whatever N, V and S.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference import WEIGHT_EPS, segment_sum
from ..tiled import slices
from . import tuning
from .collect import head_collect
from .finish import Statistics, head_finish
from .gather import head_gather
from .project import head_project
from .reduce import head_reduce
from .residual import head_residual
from .skip import head_skip
from .stats import head_stats
from .target import head_target
from .tile import LOG2E, Head, programs
from .tuning import Config, choose

KNOWN_TOLERANCE = 0.01
GROSS = (-60.0, 10.0)  # log2 l outside: start afresh

WORKSPACE = 8 << 20  # bytes: A and per-token sums of a slab
SLOTS = 6 << 20  # bytes: partial features
CHUNK = 1 << 17  # tokens at a time
SEEDED_CHUNK = 1 << 15  # with per-token sums, of which a slab has one for each tile


class Outputs(NamedTuple):
    features: Tensor  # [S, d]
    logprobs: Tensor  # [N]
    logsumexp: Tensor  # [N]
    entropy: Tensor  # [N]
    skipped_mass: Tensor  # [S]
    skipped_tokens: Tensor  # [S] int64


class Chunk(NamedTuple):
    """Some consecutive tokens, and the responses as far as they lie among them."""

    hidden: Tensor  # [n, d]
    tokens: Tensor  # [n]
    alpha: Tensor | None  # [n]; None: all 1
    response: Tensor  # [n] int32
    cu_seqlens: Tensor  # [S + 1] int64, over these tokens


class TokenList(NamedTuple):
    """Tokens picked on the device, in order."""

    rows: Tensor  # [n] int64; what lies beyond cu_seqlens[-1] means nothing
    cu_seqlens: Tensor  # [S + 1] int64, positions in rows


def statistics(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, logsumexp and entropy alone, [N] float32 in nats; arguments as for head_features."""
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        head = Head(weight, bias, temperature, logit_scale, logit_softcap)
        config, precision = choice("stats", hidden, head)
        parts = []
        for rows in slices(0, hidden.shape[0], CHUNK):
            h, y = hidden[rows], tokens[rows].contiguous()
            target, _ = head_target(h, head, y)
            parts.append(head_finish(head_stats(h, head, y, config, precision), target)[:3])
        return _join(parts, hidden.device)


def head_features(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    token_weights: Tensor | None = None,
    known_logprobs: Tensor | None = None,
    max_skipped: float | None = None,
) -> Outputs:
    """hidden [N, d], weight [V, d], tokens [N], cu_seqlens [S + 1], and the rest as
    g2rl_kernels.head_features describes them and has checked them. With `max_skipped`, `known_logprobs` are
    not used."""
    with torch.cuda.device_of(hidden):
        return _head_features(
            Head(weight, bias, temperature, logit_scale, logit_softcap),
            hidden,
            tokens,
            cu_seqlens,
            token_weights,
            known_logprobs,
            max_skipped,
        )


def _head_features(
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    known_logprobs: Tensor | None,
    max_skipped: float | None,
) -> Outputs:
    (N, D), S = hidden.shape, cu_seqlens.shape[0] - 1
    device = hidden.device
    cu_seqlens = _safe(cu_seqlens, N)
    tokens = tokens.contiguous()
    alpha = None if token_weights is None else token_weights.float().contiguous()
    known = None if max_skipped is not None else known_logprobs
    features = torch.zeros(S, D, device=device)
    skipped_mass, skipped_tokens = torch.zeros(S, device=device), cu_seqlens.new_zeros(S)
    parts = []
    for rows, chunk in _chunks(hidden, tokens, cu_seqlens, alpha, CHUNK if known is None else SEEDED_CHUNK):
        if known is not None:
            found = _one_pass(chunk, head, known[rows].float(), features)
        else:
            found, mass, count = _two_passes(chunk, head, max_skipped, features)
            skipped_mass += mass
            skipped_tokens += count
        parts.append(found[:3])
    total = _finish(features, head, cu_seqlens, alpha)
    logprobs, logsumexp, entropy = _join(parts, device)
    return Outputs(features, logprobs, logsumexp, entropy, skipped_mass / total, skipped_tokens)


def features_of_part(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    logsumexp: Tensor,
    rest: Tensor,
    temperature: float,
    logit_scale: float,
    logit_softcap: float,
) -> Tensor:
    """[S, d], what these rows of a larger vocabulary give to the features: the second pass alone.

    logsumexp [N] float64, in nats, and rest = 1 - p(tokens[t]) [N] are those of the whole vocabulary. A token
    outside of [0, V) has its rest added where it lies.
    """
    with torch.cuda.device_of(hidden):
        head = Head(weight, bias, temperature, logit_scale, logit_softcap)
        cu_seqlens = _safe(cu_seqlens, hidden.shape[0])
        alpha = None if token_weights is None else token_weights.float().contiguous()
        lse2 = (logsumexp * LOG2E).float()
        features = torch.zeros(cu_seqlens.shape[0] - 1, hidden.shape[1], device=hidden.device)
        for rows, chunk in _chunks(hidden, tokens.contiguous(), cu_seqlens, alpha, CHUNK):
            _accumulate(chunk, head, features, lse2[rows])
            _, slope = head_target(chunk.hidden, head, chunk.tokens)
            _add_realised(chunk, head, features, _weighted(_weighted(rest[rows], chunk.alpha), slope))
        _finish(features, head, cu_seqlens, alpha)
        return features


def _safe(cu_seqlens: Tensor, N: int) -> Tensor:
    """Not checked on a GPU, where it would wait for the device: such that nothing reads out of bounds."""
    return cu_seqlens.to(torch.int64).clamp(0, N).cummax(0).values


def _chunks(
    hidden: Tensor, tokens: Tensor, cu_seqlens: Tensor, alpha: Tensor | None, most: int
) -> Iterator[tuple[slice, Chunk]]:
    for rows in slices(0, hidden.shape[0], most):
        cu = cu_seqlens.clamp(rows.start, rows.stop) - rows.start
        position = torch.arange(rows.stop - rows.start, device=hidden.device)
        response = torch.searchsorted(cu[1:], position, right=True).int()
        yield rows, Chunk(hidden[rows], tokens[rows], None if alpha is None else alpha[rows], response, cu)


def _finish(features: Tensor, head: Head, cu_seqlens: Tensor, alpha: Tensor | None) -> Tensor:
    """features [S, d] from sums to means, in place; the sums of alpha [S]."""
    total = cu_seqlens.diff().float() if alpha is None else segment_sum(alpha, cu_seqlens, 0, len(alpha))
    total += WEIGHT_EPS
    features *= (head.logit_scale / total)[:, None]
    return total


def _join(parts: list[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, logsumexp and entropy of consecutive chunks, [N] each."""
    empty = (torch.empty(0, device=device), torch.empty(0, device=device), torch.empty(0, device=device))
    logprobs, logsumexp, entropy = (torch.cat(column) for column in zip(*(parts or [empty])))
    return logprobs, logsumexp, entropy


def _two_passes(
    chunk: Chunk, head: Head, max_skipped: float | None, features: Tensor
) -> tuple[Statistics, Tensor | float, Tensor | int]:
    target, slope = head_target(chunk.hidden, head, chunk.tokens)
    config, precision = choice("stats", chunk.hidden, head)
    found = head_finish(head_stats(chunk.hidden, head, chunk.tokens, config, precision), target)
    mass = _weighted(found.rest, chunk.alpha)
    coefficient = _weighted(mass, slope)
    if max_skipped is None:
        _accumulate(chunk, head, features, found.lse2)
        _add_realised(chunk, head, features, coefficient)
        return found, 0.0, 0
    keep, skipped_mass, skipped_tokens = head_skip(mass, chunk.cu_seqlens, max_skipped)
    _accumulate(chunk, head, features, found.lse2, listed=_pick(keep > 0, chunk.cu_seqlens))
    _add_realised(chunk, head, features, torch.where(keep > 0, coefficient, 0.0))
    return found, skipped_mass, skipped_tokens


def _one_pass(chunk: Chunk, head: Head, known: Tensor, features: Tensor) -> Statistics:
    target, slope = head_target(chunk.hidden, head, chunk.tokens)
    seed = target - known.clamp(max=0.0) * LOG2E
    # As one strip of head_finish: m = seed, and l and u relative to it.
    totals = torch.zeros(1, 3, seed.shape[0], device=seed.device)
    totals[0, 0] = seed
    _accumulate(chunk, head, features, seed, totals=totals[0, 1:])
    found = head_finish(totals, target)

    log2_l = found.lse2 - seed
    good = (torch.exp2(log2_l) - 1).abs() <= KNOWN_TOLERANCE
    afresh = ~((log2_l >= GROSS[0]) & (log2_l <= GROSS[1])).all(0, keepdim=True)
    config, precision = choice("stats", chunk.hidden, head)
    gate = afresh.int()
    again = head_stats(chunk.hidden, head, chunk.tokens, config, precision, gate)
    found = head_finish(again, target, found, gate)
    wrong = ~good | afresh
    listed = _pick(wrong, chunk.cu_seqlens)
    _accumulate(chunk, head, features, found.lse2, listed=listed, seed=seed, kappa=1.0 - afresh.float())

    mass = _weighted(torch.where(wrong, found.rest, totals[0, 1]), chunk.alpha)
    _add_realised(chunk, head, features, _weighted(mass, slope))
    return found


def _accumulate(
    chunk: Chunk,
    head: Head,
    features: Tensor,
    shift: Tensor,
    *,
    totals: Tensor | None = None,
    listed: TokenList | None = None,
    seed: Tensor | None = None,
    kappa: Tensor | None = None,
) -> None:
    """features -= A W, where A[s, v] = sum_t alpha_t slope_tv 2^(x_tv - shift_t) over v != tokens[t].

    `listed` picks the tokens. With `totals` [2, n], each token's sums go there (head_residual's l and u);
    with `seed` and `kappa`, what an earlier call with shift=seed had given is taken back, or all of it if
    kappa is 0.
    """
    n, D = chunk.hidden.shape
    V, S = head.weight.shape[0], features.shape[0]
    device = chunk.hidden.device
    kind = "seeded" if totals is not None else "listed" if listed is not None else "residual"
    config, precision = choice(kind, chunk.hidden, head)
    cu_seqlens = chunk.cu_seqlens if listed is None else listed.cu_seqlens
    n_programs = programs(device) * config.programs_per_sm
    batches = _ranges(S, max(16, SLOTS // (4 * D)))
    for responses in batches:
        n_strips, slab = _slabs(n, len(responses), V, config, n_programs, totals is not None)
        partial = torch.empty(len(responses) + n_strips - 1, slab * config.BN, device=device)
        sums = None
        if totals is not None:  # tokens of other batches are not written
            sums = (torch.empty if len(batches) == 1 else torch.zeros)(slab, 2, n, device=device)
        for tiles in _ranges(triton.cdiv(V, config.BN), slab):
            columns = range(tiles.start * config.BN, tiles.stop * config.BN)
            here = partial.flatten()[: partial.shape[0] * len(columns)].view(-1, len(columns))
            here_sums = None if sums is None else sums[: len(tiles)]
            head_residual(
                chunk.hidden, head, chunk.tokens, chunk.response, chunk.alpha, shift, cu_seqlens,
                partial=here, responses=responses, tiles=tiles, n_strips=n_strips, config=config,
                precision=precision, sums=here_sums, index=None if listed is None else listed.rows,
                seed=seed, kappa=kappa,
            )  # fmt: skip
            if totals is not None and here_sums is not None:
                totals += here_sums.sum(0)
            head_collect(here, cu_seqlens, responses, n_strips, config.BM)
            slots = head_project(
                here, head.weight, cu_seqlens, responses, columns, n_strips, config.BM, precision,
                max(1, SLOTS // (4 * D * len(responses))),
            )  # fmt: skip
            head_reduce(slots, features, cu_seqlens, responses, -1.0, kappa if tiles.start == 0 else None)
            del slots  # before the next are made
        del partial, here, sums, here_sums


def _add_realised(chunk: Chunk, head: Head, features: Tensor, coefficient: Tensor) -> None:
    """features[s] += sum_t coefficient_t W[tokens[t]]."""
    D = features.shape[1]
    for responses in _ranges(features.shape[0], max(16, SLOTS // (4 * D))):
        most = max(1, SLOTS // (4 * D * len(responses)))
        slots = head_gather(head.weight, chunk.tokens, coefficient, chunk.cu_seqlens, responses, most)
        head_reduce(slots, features, chunk.cu_seqlens, responses, 1.0)


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else values * weights


def _pick(wanted: Tensor, cu_seqlens: Tensor) -> TokenList:
    """The tokens where `wanted` [n] is true. Their number stays on the device."""
    n = wanted.shape[0]
    count = wanted.cumsum(0)
    place = torch.where(wanted, count - 1, n)  # the others share a last place, which is not used
    index = torch.empty(n + 1, dtype=torch.int64, device=wanted.device)
    index.scatter_(0, place, torch.arange(n, device=wanted.device))
    return TokenList(index, torch.nn.functional.pad(count, (1, 0))[cu_seqlens])


def choice(kind: str, hidden: Tensor, head: Head) -> tuple[Config, str]:
    """Tiles and the precision of float32 products."""
    form = tuning.form(hidden, head.weight, head.has_softcap)
    V, D = head.weight.shape
    return choose(kind, hidden.device, hidden.dtype, V, D, form), tuning.precision()


@lru_cache
def _slabs(n: int, S: int, V: int, config: Config, n_programs: int, sums: bool) -> tuple[int, int]:
    """(token strips, tiles a slab): the least work for the busiest program within WORKSPACE.

    8 strips at least, as far as there are blocks: then some ten tiles of the weight are in use at a time,
    each for several token blocks, and stay in the L2 cache.
    """
    n_blocks, n_tiles = triton.cdiv(n, config.BM), triton.cdiv(V, config.BN)

    def plan(n_strips: int, more: int) -> tuple[int, int, int]:
        bytes_a_tile = 4 * config.BN * (S + n_strips - 1) + (8 * n if sums else 0)
        least = triton.cdiv(n_tiles, max(1, WORKSPACE // bytes_a_tile))
        slab = triton.cdiv(n_tiles, min(n_tiles, least + more))
        n_slabs = triton.cdiv(n_tiles, slab)
        busiest = n_slabs * triton.cdiv(slab * n_strips, n_programs) * triton.cdiv(n_blocks, n_strips)
        return busiest, n_strips, slab

    strips = range(min(8, n_blocks), min(24, n_blocks) + 1)
    _, n_strips, slab = min(plan(k, more) for k in strips for more in range(4))
    return n_strips, slab


def _ranges(n: int, step: int) -> list[range]:
    return [range(start, min(start + step, n)) for start in range(0, n, step)]
