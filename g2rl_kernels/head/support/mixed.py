"""`support` where some tokens are `whole`: these take the full head, the others their ids."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._ops import ops
from ..reference import WEIGHT_EPS, segment_sum
from ..spec import HeadSpec, Responses
from .ops import support_logprobs
from .spec import Support


def features(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    support: Support,
    responses: Responses,
    backend: str,
    group: str,
    more: bool,
) -> tuple[Tensor, ...]:
    """features [S, d + r], logprobs, logsumexp, entropy and the statistics of `head_features`."""
    ids, offsets, whole = support
    if whole is None or not bool(whole.any()):
        return ops.support_features(hidden, tokens, *head, ids, offsets, *responses, backend, group, more)
    N = hidden.shape[0]
    cu_seqlens, alpha = responses.cu_seqlens.long(), responses.token_weights
    alpha = hidden.new_ones(N, dtype=torch.float32) if alpha is None else alpha
    outputs: list[Tensor] = []
    total = hidden.new_zeros(cu_seqlens.shape[0] - 1, dtype=torch.float64)
    sums = hidden.new_zeros(total.shape[0], hidden.shape[1] + head.rank, dtype=torch.float64)
    for all_ids, chosen in ((True, whole), (False, ~whole)):
        rows = chosen.nonzero().squeeze(1)
        ends = torch.nn.functional.pad(chosen.cumsum(0), (1, 0))[cu_seqlens]
        operands = hidden[rows], tokens[rows], *head.at(rows)
        if all_ids:
            out = ops.features(*operands, ends, alpha[rows], None, None, backend, group, more)
            found = *out[:4], *out[6:]
        else:
            mine = support.of(rows)
            found = ops.support_features(
                *operands, mine.ids, mine.offsets, ends, alpha[rows], backend, group, more
            )
        share = segment_sum(torch.where(chosen, alpha, 0.0).double(), cu_seqlens, 0, N)
        sums = sums + found[0].double() * (share + WEIGHT_EPS)[:, None]
        total = total + share
        outputs = outputs or [t.new_empty(N if len(t) == len(rows) else 0) for t in found[1:]]
        for out, part in zip(outputs, found[1:]):
            if out.numel():
                out[rows] = part
    return (sums / (total + WEIGHT_EPS)[:, None]).float(), *outputs


def logprobs(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    support: Support,
    backend: str,
    group: str,
    logits_memory: int,
    more: bool,
) -> tuple[Tensor, ...]:
    """logprobs and entropy, differentiable, and the statistics of `linear_logprobs`."""
    ids, offsets, whole = support
    rest = backend, group, logits_memory, more
    if whole is None or not bool(whole.any()):
        out = support_logprobs(hidden, tokens, *head, ids, offsets, *rest)
        return *out[:2], *out[4:]
    rows = whole.nonzero().squeeze(1), (~whole).nonzero().squeeze(1)
    first, second = ((hidden[r], tokens[r], *head.at(r)) for r in rows)
    mine = support.of(rows[1])
    found = ops.linear_logprobs(*first, *rest), support_logprobs(*second, mine.ids, mine.offsets, *rest)
    outputs: list[Tensor] = []
    for a, b in zip(*((*out[:2], *out[4:]) for out in found)):
        both = a.new_empty(hidden.shape[0] if more or len(outputs) < 2 else 0)
        outputs.append(both.index_copy(0, rows[0], a).index_copy(0, rows[1], b) if both.numel() else both)
    return tuple(outputs)
