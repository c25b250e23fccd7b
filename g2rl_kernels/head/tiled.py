"""`linear_logprobs` in PyTorch, tile by tile: backend "reference", on any device and in float64 too.

A tile is a block of tokens x a block of vocabulary, of bounded size, in the dtype that is accumulated in: no
tensor of N x V is made, and 16-bit weights are never copied whole. The functions are those that each backend
has; `logprobs.py` says what they compute.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference

TOKENS = 512  # of a tile


def elements(tensor: Tensor) -> int:
    """Of a tile: few on the CPU, for its memory; many elsewhere, for full matrix products."""
    return 2**20 if tensor.device.type == "cpu" else 2**25


def slices(begin: int, end: int, step: int) -> Iterator[slice]:
    for start in range(begin, end, max(1, step)):
        yield slice(start, min(start + step, end))


def _blocks(hidden: Tensor, begin: int, end: int) -> list[slice]:
    """Of the vocabulary, such that neither a tile nor the block's weight has more elements than it may."""
    return [*slices(begin, end, max(1, elements(hidden) // max(TOKENS, hidden.shape[1])))]


def _index(tokens: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Column [n, 1] of each token in the block, any if it is elsewhere; and whether it lies in the block."""
    inside = (tokens >= block.start) & (tokens < block.stop)
    return (tokens - block.start).clamp(0, block.stop - block.start - 1)[:, None], inside[:, None]


def statistics(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float,
) -> tuple[Tensor, Tensor]:
    """m, s and u [1, 3, N] of each token, and the logit of the realised token [N]."""
    N, dtype = hidden.shape[0], reference.accumulation_dtype(hidden)
    partial, target = hidden.new_empty((1, 3, N), dtype=dtype), hidden.new_empty(N, dtype=dtype)
    for rows in slices(0, N, TOKENS):
        h, y = hidden[rows].to(dtype), tokens[rows]
        m = h.new_full((h.shape[0], 1), -torch.inf)
        s, u, z_y = torch.zeros_like(m), torch.zeros_like(m), m.clone()
        for block in _blocks(hidden, 0, weight.shape[0]):
            b = None if bias is None else bias[block]
            z, _ = reference.logits(h, weight[block], b, temperature, logit_scale, logit_softcap or None)
            index, inside = _index(y, block)
            z_index = z.gather(1, index)
            z_y = torch.where(inside, z_index, z_y)
            z.scatter_(1, index, torch.where(inside, -torch.inf, z_index))

            new_m = torch.maximum(m, z.amax(1, keepdim=True))
            s, u = shifted(m, s, u, new_m)
            z.sub_(new_m.masked_fill(new_m == -torch.inf, 0.0))
            e = z.exp()
            s += e.sum(1, keepdim=True)
            u += e.mul_(z.masked_fill_(e == 0, 0.0)).sum(1, keepdim=True)
            m = new_m
        partial[0, :, rows] = torch.cat([m, s, u], dim=1).T
        target[rows] = z_y.squeeze(1)
    return partial, target


def shifted(m: Tensor, s: Tensor, u: Tensor, new_m: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums relative to new_m >= m instead of m."""
    delta = (m - new_m).masked_fill(m == -torch.inf, 0.0)  # nothing seen yet: s = u = 0
    factor = delta.exp()
    return s * factor, factor * (u + s * delta)


def joined(partial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, s and u [N] of all parts of the vocabulary [R, 3, N], added in order: the same bits every time."""
    m = partial[0, 0]
    for other in partial[1:, 0]:
        m = torch.maximum(m, other)
    s, u = torch.zeros_like(m), torch.zeros_like(m)
    for part in partial:
        part_s, part_u = shifted(part[0], part[1], part[2], m)
        s, u = s + part_s, u + part_u
    return m, s, u


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
    """[S, d], eq. 8 with the sums of eq. 7 over these rows of the vocabulary alone.

    logsumexp [N] float64 and rest = 1 - p(tokens[t]) [N] are those of the whole vocabulary. A token that
    lies elsewhere has its rest added there.
    """
    (N, d), V, dtype = hidden.shape, weight.shape[0], reference.accumulation_dtype(hidden)
    top, rest = logsumexp.to(dtype), rest.to(dtype)
    normaliser = torch.stack([top, (logsumexp - top).to(dtype)])
    terms = torch.stack([torch.ones_like(rest), torch.zeros_like(rest), rest])
    alpha = torch.ones_like(rest) if token_weights is None else token_weights.to(dtype)
    sums = hidden.new_zeros(cu_seqlens.shape[0] - 1, d, dtype=dtype)
    for rows in slices(0, N, TOKENS):
        gradient = hidden.new_zeros(rows.stop - rows.start, d, dtype=dtype)  # of log p; phi / temperature
        sweep(
            hidden[rows], weight, tokens[rows], bias, normaliser[:, rows], terms[:, rows],
            temperature, logit_scale, logit_softcap, 0, V, gradient, None, None,
        )  # fmt: skip
        sums += reference.segment_sum(alpha[rows, None] * gradient, cu_seqlens, rows.start, rows.stop)
    total = reference.segment_sum(alpha, cu_seqlens, 0, N) + reference.WEIGHT_EPS
    return sums * (temperature / total)[:, None]


def sweep(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    normaliser: Tensor,
    terms: Tensor,
    temperature: float,
    logit_scale: float,
    logit_softcap: float,
    begin: int,
    end: int,
    sum_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """What the vocabulary entries [begin, end) give to the gradients: see `logprobs.py`."""
    dtype = normaliser.dtype
    top, log_total = normaliser[:, :, None]
    a, g_entropy, at_token = terms[:, :, None]
    for block in _blocks(hidden, begin, end):
        w = weight[block].to(dtype)
        b = None if bias is None else bias[block]
        sum_weight = None if grad_weight is None else torch.zeros_like(w)
        for rows in slices(0, hidden.shape[0], TOKENS):
            h = hidden[rows].to(dtype)
            z, slope = reference.logits(h, w, b, temperature, logit_scale, logit_softcap or None)
            log_p = z.sub_(top[rows]).sub_(log_total[rows])
            p = log_p.exp()
            grad_z = -p * (a[rows] + g_entropy[rows] * log_p.masked_fill_(p == 0, 0.0))
            index, inside = _index(tokens[rows], block)
            grad_z.scatter_(1, index, torch.where(inside, at_token[rows], grad_z.gather(1, index)))
            if slope is not None:
                grad_z *= slope
            grad_z *= logit_scale / temperature
            if sum_hidden is not None:
                sum_hidden[rows] += grad_z @ w
            if sum_weight is not None:
                sum_weight += grad_z.T @ h
            if grad_bias is not None:
                grad_bias[block] += grad_z.sum(0)
        if grad_weight is not None and sum_weight is not None:
            grad_weight[block] = sum_weight
