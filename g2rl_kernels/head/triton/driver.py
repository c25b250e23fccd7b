"""The head on a GPU: backend "triton". Launches this folder's kernels, in two passes over the logits or one.

    nothing known       head_stats over all tokens; head_residual with the exact logsumexp
    known_logprobs      head_residual with logsumexp = x_y - log p_y, which also yields the exact one; then
                        head_residual again for the tokens whose seed was off
    max_skipped         as with nothing known, but the second pass leaves confident tokens out (skip.py)
    part of vocabulary  head_residual alone, with the logsumexp of the whole (features_of_part)

Nothing waits for the device; extra memory stays below 64 MiB. head/README.md has the dataflow and the bounds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..backend import KNOWN_TOLERANCE, NO_HINTS, FeatureOutputs, Hints, empty_statistics
from ..reference import WEIGHT_EPS, in_bounds, segment_sum
from ..spec import HeadSpec, Responses
from ..tiled import finish, slices, terms
from .chunk import CHUNK, Chunk, TokenList, chunks, pick
from .collect import head_collect
from .finish import TokenStatistics, head_finish
from .gather import head_gather
from .kept import kept_bytes
from .logprobs import statistics, sweep
from .project import head_project
from .reduce import head_reduce
from .residual import head_residual
from .skip import head_skip
from .stats import head_stats
from .target import head_target
from .tile import LOG2E, HeadOperands, programs
from .total import head_total
from .tuning import Config

__all__ = [
    "features",
    "features_of_part",
    "finish",
    "kept_bytes",
    "statistics",
    "sweep",
    "terms",
    "token_statistics",
]

GROSS = (-60.0, 10.0)  # log2 l outside: start afresh

WORKSPACE = 8 << 20  # bytes: A and per-token sums of a slab
SLOTS = 6 << 20  # bytes: partial features


def token_statistics(hidden: Tensor, tokens: Tensor, spec: HeadSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, logsumexp and entropy alone, [N] float32 in nats. hidden [N, d], tokens [N]."""
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        operands = HeadOperands.of(spec)
        config = operands.config("stats", hidden)
        found = []
        for rows in slices(0, hidden.shape[0], CHUNK):
            h, y, here = hidden[rows], tokens[rows].contiguous(), operands.at(rows)
            target, _ = head_target(h, here, y)
            found.append(head_finish(head_stats(h, here, y, config)[0], target)[:3])
        logprobs, logsumexp, entropy = _concatenated(found, hidden.device)
        return logprobs, logsumexp, entropy


def features(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    responses: Responses,
    hints: Hints = NO_HINTS,
    more: bool = False,
) -> FeatureOutputs:
    """See `Backend.features`. With `max_skipped` or `more`, `known_logprobs` are not used."""
    N, S, device = hidden.shape[0], responses.cu_seqlens.shape[0] - 1, hidden.device
    known, max_skipped = hints
    if max_skipped is not None or more:
        known = None
    with torch.cuda.device_of(hidden):
        operands = HeadOperands.of(head)
        cu_seqlens, alpha = _in_bounds(responses, N)
        sums = [torch.zeros(S, part.weight.shape[1], device=device) for part in operands.parts]
        skipped_mass, skipped_tokens = torch.zeros(S, device=device), cu_seqlens.new_zeros(S)
        columns = []
        for rows, chunk in chunks(hidden, tokens.contiguous(), cu_seqlens, alpha, CHUNK):
            if known is not None:
                found = _one_pass(chunk, operands.at(rows), known[rows].float(), sums)
            else:
                found, mass, count = _two_passes(chunk, operands.at(rows), max_skipped, sums, more)
                skipped_mass += mass
                skipped_tokens += count
            columns.append(found[:3] + (found[5:] if more else ()))
        total = _to_means(sums, operands, cu_seqlens, alpha)
        logprobs, logsumexp, entropy, *asked = _concatenated(columns, device, more)
        if not more:
            asked = [*empty_statistics(hidden, 0)]
        phi = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
        skipped = skipped_mass / total, skipped_tokens
        return FeatureOutputs(phi, logprobs, logsumexp, entropy, *skipped, *asked)


def features_of_part(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, responses: Responses, lse: Tensor, rest: Tensor
) -> Tensor:
    """See `Backend.features_of_part`: the second pass alone."""
    with torch.cuda.device_of(hidden):
        operands = HeadOperands.of(head)
        cu_seqlens, alpha = _in_bounds(responses, hidden.shape[0])
        lse2 = (lse * LOG2E).float()
        S, device = cu_seqlens.shape[0] - 1, hidden.device
        sums = [torch.zeros(S, part.weight.shape[1], device=device) for part in operands.parts]
        for rows, chunk in chunks(hidden, tokens.contiguous(), cu_seqlens, alpha, CHUNK):
            here = operands.at(rows)
            _accumulate(chunk, here, sums, lse2[rows])
            _, slope = head_target(chunk.hidden, here, chunk.tokens)
            _add_realised(chunk, here, sums, _weighted(_weighted(rest[rows], chunk.alpha), slope))
        _to_means(sums, operands, cu_seqlens, alpha)
        return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)


def _in_bounds(responses: Responses, N: int) -> tuple[Tensor, Tensor | None]:
    """cu_seqlens [S + 1] int64, clamped as they may be unchecked, and alpha [N] float32."""
    alpha = responses.token_weights
    return in_bounds(responses.cu_seqlens, N), None if alpha is None else alpha.float().contiguous()


def _to_means(out: list[Tensor], head: HeadOperands, cu_seqlens: Tensor, alpha: Tensor | None) -> Tensor:
    """out, [S, d] and [S, r], from sums to means, in place. Returns the sums of alpha [S]."""
    total = cu_seqlens.diff().float() if alpha is None else segment_sum(alpha, cu_seqlens, 0, len(alpha))
    total += WEIGHT_EPS
    for sums in out:
        sums *= (head.logit_scale / total)[:, None]
    return total


def _concatenated(columns: list[Any], device: torch.device, more: bool = False) -> list[Tensor]:
    """Log-probabilities, logsumexp and entropy of consecutive chunks, statistics with `more`, [N] each."""
    if not columns:
        empty = torch.empty(0, device=device)
        return [empty.clone() for _ in range(3)] + [*empty_statistics(empty, 0)] * more
    return [torch.cat(column) for column in zip(*columns)]


def _two_passes(
    chunk: Chunk, head: HeadOperands, max_skipped: float | None, out: list[Tensor], more: bool
) -> tuple[TokenStatistics, Tensor | float, Tensor | int]:
    target, slope = head_target(chunk.hidden, head, chunk.tokens)
    config = head.config("stats", chunk.hidden, more)
    partial, top = head_stats(chunk.hidden, head, chunk.tokens, config, more=more)
    found = head_finish(partial, target, tokens=chunk.tokens if more else None, top=top)
    mass = _weighted(found.rest, chunk.alpha)
    coefficient = _weighted(mass, slope)
    if max_skipped is None:
        _accumulate(chunk, head, out, found.lse2)
        _add_realised(chunk, head, out, coefficient)
        return found, 0.0, 0
    keep, skipped_mass, skipped_tokens = head_skip(mass, chunk.cu_seqlens, max_skipped)
    _accumulate(chunk, head, out, found.lse2, listed=pick(keep > 0, chunk.cu_seqlens))
    _add_realised(chunk, head, out, torch.where(keep > 0, coefficient, 0.0))
    return found, skipped_mass, skipped_tokens


def _one_pass(chunk: Chunk, head: HeadOperands, known: Tensor, out: list[Tensor]) -> TokenStatistics:
    target, slope = head_target(chunk.hidden, head, chunk.tokens)
    seed = target - known.clamp(max=0.0) * LOG2E
    sums = torch.zeros(2, seed.shape[0], dtype=torch.float64, device=seed.device)
    _accumulate(chunk, head, out, seed, totals=sums)
    # As one strip of head_finish: m = seed, and l and u relative to it.
    totals = torch.cat([seed[None], sums.float()])[None]
    found = head_finish(totals, target)

    log2_l = found.lse2 - seed
    good = (torch.exp2(log2_l) - 1).abs() <= KNOWN_TOLERANCE
    afresh = ~((log2_l >= GROSS[0]) & (log2_l <= GROSS[1])).all(0, keepdim=True)
    config = head.config("stats", chunk.hidden)
    gate = afresh.int()
    again, _ = head_stats(chunk.hidden, head, chunk.tokens, config, gate=gate)
    found = head_finish(again, target, found, gate)
    wrong = ~good | afresh
    listed = pick(wrong, chunk.cu_seqlens)
    _accumulate(chunk, head, out, found.lse2, listed=listed, seed=seed, kappa=1.0 - afresh.float())

    mass = _weighted(torch.where(wrong, found.rest, totals[0, 1]), chunk.alpha)
    _add_realised(chunk, head, out, _weighted(mass, slope))
    return found


def _accumulate(
    chunk: Chunk,
    head: HeadOperands,
    out: list[Tensor],
    shift: Tensor,
    *,
    totals: Tensor | None = None,
    listed: TokenList | None = None,
    seed: Tensor | None = None,
    kappa: Tensor | None = None,
) -> None:
    """out -= A W, and A low_weight, where A[s, v] = sum_t alpha_t slope_tv 2^(x_tv - shift_t) over
    v != tokens[t].

    `listed` picks the tokens. With `totals` [2, n] float64, each token's sums are added there
    (head_residual's l and u); with `seed` and `kappa`, what an earlier call with shift=seed had given is
    taken back, or all of it if kappa is 0.
    """
    n, D = chunk.hidden.shape
    V, S = head.weight.shape[0], out[0].shape[0]
    device = chunk.hidden.device
    kind = "seeded" if totals is not None else "listed" if listed is not None else "residual"
    config = head.config(kind, chunk.hidden)
    if seed is not None:
        config = config.for_correction()
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
                chunk,
                head,
                shift,
                partial=here,
                responses=responses,
                tiles=tiles,
                n_strips=n_strips,
                config=config,
                sums=here_sums,
                listed=listed,
                seed=seed,
                kappa=kappa,
            )
            if totals is not None and here_sums is not None:
                head_total(here_sums, totals)
            head_collect(here, cu_seqlens, responses, n_strips, config.BM)
            most = max(1, SLOTS // (4 * D * len(responses)))
            for part, features in zip(head.parts, out):
                slots = head_project(here, part, cu_seqlens, responses, columns, n_strips, config.BM, most)
                head_reduce(slots, features, cu_seqlens, responses, -1.0, kappa if tiles.start == 0 else None)
                del slots  # before the next are made
        del partial, here, sums, here_sums


def _add_realised(chunk: Chunk, head: HeadOperands, out: list[Tensor], coefficient: Tensor) -> None:
    """out[s] += sum_t coefficient_t W[tokens[t]], and low_weight[tokens[t]]."""
    for part, features in zip(head.parts, out):
        S, D = features.shape
        for responses in _ranges(S, max(16, SLOTS // (4 * D))):
            most = max(1, SLOTS // (4 * D * len(responses)))
            slots = head_gather(part.weight, chunk.tokens, coefficient, chunk.cu_seqlens, responses, most)
            head_reduce(slots, features, chunk.cu_seqlens, responses, 1.0)


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else values * weights


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
