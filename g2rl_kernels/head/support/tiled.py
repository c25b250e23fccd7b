"""Backend "reference" of the restricted head; and, for any pair of products, everything around them.

What is computed of each kept id is in float64: those are K numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference, tiled
from ..backend import FeatureOutputs, Incoming, TokenLogprobs
from ..spec import HeadSpec, Responses
from ..tiled import terms as token_terms
from .backend import backend as implementation
from .products import gather_dot, gather_sum
from .spec import Support

__all__ = ["features", "finish", "gather_dot", "gather_sum", "statistics", "terms", "token_terms"]

CHUNK = 4096  # tokens whose features are held at a time


def statistics(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, support: Support, more: bool, by: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `SupportBackend.statistics`. by: the module of the two products; None for this one."""
    by = by or implementation("reference")
    support = support.within()
    ids, offsets, _ = support
    rows = support.rows()
    x = _logits(hidden, head, ids, rows, by)
    z, _ = _tempered(x, head, rows)
    own = ids == tokens[rows]
    held = _segments(own.double(), offsets) > 0
    missed = (tokens >= 0) & (tokens < head.weight.shape[0]) & ~held
    target = _segments(z.masked_fill(~own, -torch.inf), offsets, "max").masked_fill(missed, torch.nan)
    others = z.masked_fill(own, -torch.inf)
    m = _segments(others, offsets, "max")
    below = others - m.masked_fill(m == -torch.inf, 0.0)[rows]
    e = below.exp()
    sums = [m, _segments(e, offsets), _segments(e * below.masked_fill(e == 0, 0.0), offsets)]
    if not more:
        return torch.stack(sums)[None], target, tokens.new_empty(1, 0), x
    sums.append(_segments(e.square(), offsets))
    largest = (others == m[rows]) & (others != -torch.inf)
    first = _segments(ids.double().masked_fill(~largest, torch.inf), offsets, "min")
    top = first.masked_fill(first == torch.inf, -1).long()
    return torch.stack(sums)[None], target, top[None], x


def known_targets(target: Tensor, tokens: Tensor, V: int) -> Tensor:
    """NaN for tokens that lie in no row of the weight, where it holds the whole vocabulary."""
    return target.masked_fill((tokens < 0) | (tokens >= V), torch.nan)


def finish(partial: Tensor, target: Tensor, tokens: Tensor, top: Tensor, dtype: torch.dtype) -> TokenLogprobs:
    """See `SupportBackend.finish`. In float64, then rounded to dtype; the normaliser stays a sum of two."""
    logprobs, entropy, normaliser, rest, squares, top_token, top_logprob = tiled.finish(
        partial, target, tokens, top
    )
    lse = normaliser.sum(0)
    rough = normaliser[0].to(dtype)
    two = torch.stack([rough, (lse - rough).to(dtype)])
    rest, squares, top_logprob = (t.to(dtype) for t in (rest, squares, top_logprob))
    return TokenLogprobs(logprobs.to(dtype), entropy.to(dtype), two, rest, squares, top_token, top_logprob)


def features(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    support: Support,
    responses: Responses,
    more: bool,
    by: Any = None,
) -> FeatureOutputs:
    """See `SupportBackend.features`."""
    by = by or implementation("reference")
    partial, target, top, x = statistics(hidden, tokens, head, support, more, by)
    target = known_targets(target, tokens, head.weight.shape[0])
    found = finish(partial, target, tokens, top, x.dtype)
    phi = features_of_part(tokens, head, support, responses, x, found, by)
    skipped = phi.new_zeros(phi.shape[0])
    asked = found.sum_p_squared, found.top_token, found.top_logprob
    lse = found.normaliser.double().sum(0).to(x.dtype)
    return FeatureOutputs(phi, found.logprobs, lse, found.entropy, skipped, skipped.long(), *asked)


def features_of_part(
    tokens: Tensor,
    head: HeadSpec,
    support: Support,
    responses: Responses,
    x: Tensor,
    found: TokenLogprobs,
    by: Any,
) -> Tensor:
    """Eq. 8 with the sums of eq. 7 over the ids among the weight's rows, [S, d + r] in x's dtype."""
    dtype, N = x.dtype, tokens.shape[0]
    cu_seqlens, token_weights = reference.in_bounds(responses.cu_seqlens, N), responses.token_weights
    alpha = x.new_ones(N) if token_weights is None else token_weights.to(dtype)
    one, zero = torch.ones_like(found.rest), torch.zeros_like(found.rest)
    incoming = Incoming(found.normaliser, torch.stack([one, zero, found.rest]))
    dz = by.terms(tokens, head, support, x, incoming)  # of log p
    temperature = head.temperature_of_tokens(dtype)
    weights = [weight for weight in (head.weight, head.low_weight) if weight is not None]
    sums = x.new_zeros(cu_seqlens.shape[0] - 1, sum(weight.shape[1] for weight in weights))
    for chunk in tiled.slices(0, N, CHUNK):
        lists = support.offsets[chunk.start : chunk.stop + 1]
        phi = sums.new_empty(lists.shape[0] - 1, sums.shape[1])
        for weight, columns in zip(weights, phi.split([weight.shape[1] for weight in weights], dim=1)):
            by.gather_sum(dz, support.ids, lists, weight, columns)
        phi *= temperature[chunk] if isinstance(temperature, Tensor) else temperature
        sums += reference.segment_sum(alpha[chunk, None] * phi, cu_seqlens, chunk.start, chunk.stop)
    total = reference.segment_sum(alpha, cu_seqlens, 0, N) + reference.WEIGHT_EPS
    return sums / total[:, None]


def terms(tokens: Tensor, head: HeadSpec, support: Support, x: Tensor, incoming: Incoming) -> Tensor:
    """See `SupportBackend.terms`."""
    support = support.within()
    rows = support.rows()
    z, slope = _tempered(x, head, rows)
    top, log_total = incoming.normaliser.double()
    a, e, own = incoming.terms.double()
    log_p = z - (top + log_total)[rows]
    p = log_p.exp()
    dz = -p * (a[rows] + e[rows] * log_p.masked_fill(p == 0, 0.0))
    mine = support.ids == tokens[rows]
    counts = torch.nn.functional.pad(mine.cumsum(0), (1, 0))
    first = mine & (counts[:-1] == counts[support.offsets[rows]])
    # The realised token counts once, as in `statistics`, even where unchecked lists hold it twice.
    dz = torch.where(first, own[rows], dz.masked_fill_(mine, 0.0))
    # A token without its own id, where values are not checked, has NaN; none where nothing comes in.
    dz.masked_fill_(((a == 0) & (e == 0) & (own == 0))[rows], 0.0)
    if slope is not None:
        dz *= slope
    dz *= head.logit_scale / _temperature(head, rows)
    return dz.to(x.dtype)


def _logits(hidden: Tensor, head: HeadSpec, ids: Tensor, rows: Tensor, by: Any) -> Tensor:
    """x of `SupportBackend`, [K]."""
    V = head.weight.shape[0]
    x: Tensor = by.gather_dot(hidden, rows, head.weight, ids)
    if head.low_hidden is not None and head.low_weight is not None:
        x += by.gather_dot(head.low_hidden, rows, head.low_weight, ids)
    masked = (ids < 0) | (ids >= V)
    if head.bias is not None:
        bias = head.bias[ids.clamp(0, V - 1)].to(x.dtype)
        x += bias
        masked |= bias == -torch.inf
    return x.mul_(head.logit_scale).masked_fill_(masked, -torch.inf)


def _tempered(x: Tensor, head: HeadSpec, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """The logits over temperature and the softcap's slope (None without), [K] float64."""
    z, slope, c = x.double(), None, head.logit_softcap
    if c:
        slope = reference.softcap_slope(z, c)
        z = (c * torch.tanh(z / c)).masked_fill_(x == -torch.inf, -torch.inf)
    return z / _temperature(head, rows), slope


def _temperature(head: HeadSpec, rows: Tensor) -> Any:
    """A number, or [K] float64."""
    return head.temperature if head.temperatures is None else head.temperatures.double()[rows]


def _segments(values: Tensor, offsets: Tensor, reduce: str = "sum") -> Tensor:
    """Sum, largest or smallest of each token's entries, [N]; 0, -inf or inf for an empty list."""
    initial = {"sum": 0.0, "max": -torch.inf, "min": torch.inf}[reduce]
    return torch.segment_reduce(values, reduce, lengths=offsets.diff(), initial=initial, unsafe=True)
