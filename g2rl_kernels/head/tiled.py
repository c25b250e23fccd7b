"""Backend "reference": the head in PyTorch, tile by tile, on any device and in float64 too.

A tile is a chunk of tokens x a block of the vocabulary, of bounded size, in the dtype of the sums. No tensor
of N x V is made, and a 16-bit weight is never copied whole. backend.py says what each function returns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .backend import NO_HINTS, FeatureOutputs, Hints, Incoming, Kept, Sums, TokenLogprobs, empty_statistics
from .certified import certified_features
from .spec import HeadSpec, Responses

TOKENS = 512  # tokens of a tile


def elements(tensor: Tensor) -> int:
    """Most elements of a tile: few on a CPU, to save memory; many elsewhere, for full products."""
    return 2**20 if tensor.device.type == "cpu" else 2**25


def slices(begin: int, end: int, step: int) -> Iterator[slice]:
    for start in range(begin, end, max(1, step)):
        yield slice(start, min(start + step, end))


def _blocks(hidden: Tensor, begin: int, end: int) -> list[slice]:
    """Blocks of the vocabulary small enough that neither a tile nor a block's weight exceeds `elements`."""
    return [*slices(begin, end, max(1, elements(hidden) // max(TOKENS, hidden.shape[1])))]


def _entries(head: HeadSpec, block: slice) -> HeadSpec:
    """The head restricted to a block of the vocabulary."""
    bias, low_weight = (None if t is None else t[block] for t in (head.bias, head.low_weight))
    return head._replace(weight=head.weight[block], bias=bias, low_weight=low_weight)


def _index(tokens: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Each token's column in the block [n, 1], any for a token outside; and whether it lies inside."""
    inside = (tokens >= block.start) & (tokens < block.stop)
    return (tokens - block.start).clamp(0, block.stop - block.start - 1)[:, None], inside[:, None]


def kept_bytes(hidden: Tensor, head: HeadSpec, most: int) -> int:
    """See `Backend.kept_bytes`: keeps nothing."""
    return 0


def statistics(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, kept: Kept | None = None, more: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.statistics`, of one strip."""
    N, dtype = hidden.shape[0], reference.accumulation_dtype(hidden)
    partial, target = (
        hidden.new_empty((1, 4 if more else 3, N), dtype=dtype),
        hidden.new_empty(N, dtype=dtype),
    )
    top = tokens.new_empty((1, N if more else 0))
    for rows in slices(0, N, TOKENS):
        h, y, here = hidden[rows].to(dtype), tokens[rows], head.at(rows)
        m = h.new_full((h.shape[0], 1), -torch.inf)
        s, u, z_y = torch.zeros_like(m), torch.zeros_like(m), m.clone()
        q, v = torch.zeros_like(m), torch.full_like(m, -1, dtype=torch.int64)
        for block in _blocks(hidden, 0, len(head.weight)):
            z, _ = reference.logits(h, _entries(here, block))
            index, inside = _index(y, block)
            z_index = z.gather(1, index)
            z_y = torch.where(inside, z_index, z_y)
            z.scatter_(1, index, torch.where(inside, -torch.inf, z_index))

            block_m = z.amax(1, keepdim=True)
            new_m = torch.maximum(m, block_m)
            if more:
                v = torch.where(
                    block_m > m, block.start + z.argmax(1, keepdim=True), v
                )  # of equals the first
                q = q * shift_factor(m, new_m).square()
            s, u = shifted(m, s, u, new_m)
            z.sub_(new_m.masked_fill(new_m == -torch.inf, 0.0))
            e = z.exp()
            s += e.sum(1, keepdim=True)
            if more:
                q += e.square().sum(1, keepdim=True)
            u += e.mul_(z.masked_fill_(e == 0, 0.0)).sum(1, keepdim=True)
            m = new_m
        partial[0, :, rows] = torch.cat([m, s, u, q], dim=1).T[: partial.shape[1]]
        target[rows] = z_y.squeeze(1)
        if more:
            top[0, rows] = v.squeeze(1)
    return partial, target, top


def shifted(m: Tensor, s: Tensor, u: Tensor, new_m: Tensor) -> tuple[Tensor, Tensor]:
    """The sums s and u relative to new_m >= m instead of m."""
    delta = (m - new_m).masked_fill(m == -torch.inf, 0.0)  # nothing seen yet: s = u = 0
    factor = delta.exp()
    return s * factor, factor * (u + s * delta)


def shift_factor(m: Tensor, new_m: Tensor) -> Tensor:
    """`factor` of `shifted`."""
    return (m - new_m).masked_fill(m == -torch.inf, 0.0).exp()


def finish(partial: Tensor, target: Tensor, tokens: Tensor, top: Tensor) -> TokenLogprobs:
    """See `Backend.finish`. y is put back last: 1 - p_y is a sum over the others, and does not cancel."""
    m, s, u = joined(partial)
    largest = torch.maximum(m, target)
    s, u = shifted(m, s, u, largest)
    e_y = torch.exp(target - largest)
    total, log_total = s + e_y, torch.where(target >= m, torch.log1p(s), torch.log(s + e_y))
    u = u + torch.where(e_y == 0, 0, e_y * (target - largest))
    logprobs, normaliser = target - largest - log_total, torch.stack([largest, log_total])
    found = logprobs, log_total - u / total, normaliser, s / total
    if partial.shape[1] == 3:
        return TokenLogprobs(*found, *empty_statistics(m, 0, m.dtype))
    best, v, q = torch.full_like(m, -torch.inf), torch.full_like(tokens, -1), e_y.square()
    for (strip_m, _, _, strip_q), strip_v in zip(partial, top):
        v = torch.where(strip_m > best, strip_v, v)  # of equals the first
        best = torch.maximum(best, strip_m)
        q = q + strip_q * shift_factor(strip_m, largest).square()
    mine = (target > m) | ((target == m) & (tokens < v))
    top_logprob = torch.where(mine, logprobs, m - largest - log_total)
    unknown = total.isnan()
    top_token = torch.where(mine, tokens, v).masked_fill(unknown, -1)
    return TokenLogprobs(*found, q / total.square(), top_token, top_logprob.masked_fill(unknown, torch.nan))


def terms(g: Tensor, e: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """See `Backend.terms`."""
    p_y = logprobs.exp()
    own = torch.where(p_y == 0, 0.0, p_y * (logprobs + entropy))
    found = torch.stack([g + e * entropy, e, -g * torch.expm1(logprobs) - e * own])
    # An out-of-range token, where values are not checked, has NaN terms; zero them if its gradient is zero.
    return found.masked_fill_((g == 0) & (e == 0), 0.0)


def joined(strips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, s and u [N] of all strips of the vocabulary [R, 3, N], added in order: the same bits every time."""
    m = strips[0, 0]
    for other in strips[1:, 0]:
        m = torch.maximum(m, other)
    s, u = torch.zeros_like(m), torch.zeros_like(m)
    for strip in strips:
        strip_s, strip_u = shifted(strip[0], strip[1], strip[2], m)
        s, u = s + strip_s, u + strip_u
    return m, s, u


def features(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    responses: Responses,
    hints: Hints = NO_HINTS,
    more: bool = False,
) -> FeatureOutputs:
    """The reference's features, some tokens at a time; known_logprobs are not used."""
    if hints.max_skipped is not None:
        return certified_features(features, hidden, tokens, head, responses, hints.max_skipped)
    chunk = max(1, elements(hidden) // len(head.weight))
    found = reference.head_features(hidden, tokens, head, responses, chunk=chunk, more=more)
    phi, logprobs, logsumexp, entropy, *asked = (t.clone() for t in found)  # an op's outputs share no memory
    skipped = hidden.new_zeros(len(responses.cu_seqlens) - 1, dtype=torch.float32)
    if not more:
        asked = [*empty_statistics(phi, 0, phi.dtype)]
    return FeatureOutputs(phi, logprobs, logsumexp, entropy, skipped, skipped.long(), *asked)


def features_of_part(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, responses: Responses, lse: Tensor, rest: Tensor
) -> Tensor:
    """[S, d + r], eq. 8 with the sums of eq. 7 over these rows of a larger vocabulary alone."""
    cu_seqlens, token_weights = responses
    (N, d), V, dtype = hidden.shape, len(head.weight), reference.accumulation_dtype(hidden)
    top, rest = lse.to(dtype), rest.to(dtype)
    normaliser = torch.stack([top, (lse - top).to(dtype)])
    terms = torch.stack([torch.ones_like(rest), torch.zeros_like(rest), rest])
    alpha = torch.ones_like(rest) if token_weights is None else token_weights.to(dtype)
    sums = hidden.new_zeros(cu_seqlens.shape[0] - 1, d + head.rank, dtype=dtype)
    for rows in slices(0, N, TOKENS):
        # of log p by [hidden, low_hidden]
        gradient = hidden.new_zeros(rows.stop - rows.start, d + head.rank, dtype=dtype)
        own = Sums(gradient[:, :d], low_hidden=gradient[:, d:] if head.rank else None)
        incoming, here = Incoming(normaliser, terms).rows(rows), head.at(rows)
        sweep(hidden[rows], tokens[rows], here, incoming, slice(0, V), own)
        phi = here.temperature_of_tokens(dtype) * gradient
        sums += reference.segment_sum(alpha[rows, None] * phi, cu_seqlens, rows.start, rows.stop)
    total = reference.segment_sum(alpha, cu_seqlens, 0, N) + reference.WEIGHT_EPS
    return sums / total[:, None]


def sweep(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    incoming: Incoming,
    block: slice,
    sums: Sums,
    kept: Kept | None = None,
) -> None:
    """Adds the share of a block of the vocabulary to the gradients; logprobs.py has the equations."""
    dtype = incoming.normaliser.dtype
    top, log_total = incoming.normaliser[:, :, None]
    a, g_entropy, at_token = incoming.terms[:, :, None]
    for columns in _blocks(hidden, block.start, block.stop):
        entries = _entries(head, columns)
        w = entries.weight.to(dtype)
        sum_weight = None if sums.weight is None else torch.zeros_like(w)
        for rows in slices(0, hidden.shape[0], TOKENS):
            h, here = hidden[rows].to(dtype), entries.at(rows)
            z, slope = reference.logits(h, here._replace(weight=w))
            log_p = z.sub_(top[rows]).sub_(log_total[rows])
            p = log_p.exp()
            grad_z = -p * (a[rows] + g_entropy[rows] * log_p.masked_fill_(p == 0, 0.0))
            index, inside = _index(tokens[rows], columns)
            grad_z.scatter_(1, index, torch.where(inside, at_token[rows], grad_z.gather(1, index)))
            if slope is not None:
                grad_z *= slope
            grad_z *= head.logit_scale / here.temperature_of_tokens(dtype)
            if sums.hidden is not None:
                sums.hidden[rows] += grad_z @ w
            if sum_weight is not None:
                sum_weight += grad_z.T @ h
            if sums.bias is not None:
                sums.bias[columns] += grad_z.sum(0)
            if sums.low_hidden is not None and entries.low_weight is not None:
                sums.low_hidden[rows] += grad_z @ entries.low_weight.to(dtype)
            if sums.low_weight is not None and head.low_hidden is not None:
                sums.low_weight[columns] += grad_z.T @ head.low_hidden[rows].to(dtype)
        if sums.weight is not None and sum_weight is not None:
            sums.weight[columns] = sum_weight
