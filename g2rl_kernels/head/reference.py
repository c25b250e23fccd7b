"""The head in plain PyTorch, one function an equation, to be read beside the paper (arXiv 2512.15687).

It computes in the dtype of its inputs promoted to at least float32: float64 in, float64 throughout, which
makes it the oracle of the tests. It runs on any device and never synchronises with it.

Notation: N tokens, S responses, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .spec import HeadSpec, Responses

WEIGHT_EPS = 1e-8  # eq. 8


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _vocabulary_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of `weight` in `dtype`: whole if nothing is to be converted, else in blocks of 16 MB."""
    rows = weight.shape[0] if weight.dtype == dtype else max(1, 2**22 // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], max(1, rows)):
        block = slice(start, min(start + rows, weight.shape[0]))
        yield block, weight[block].to(dtype)


def logits(hidden: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor | None]:
    """Eq. 5: z = softcap(logit_scale (W h + b)), softcap(x) = c tanh(x / c), divided by the temperature.

    Returns z / T [N, V] and the softcap's slope 1 - tanh(x / c)^2 [N, V], or None without softcap. A bias of
    -inf takes its entry out of the vocabulary: z = -inf there, behind a softcap too.
    """
    weight, bias, _, logit_scale, logit_softcap, _, low_hidden, low_weight = head
    dtype = accumulation_dtype(hidden, weight)
    h = hidden.to(dtype)
    x = torch.cat([h @ rows.T for _, rows in _vocabulary_blocks(weight, dtype)], dim=1)
    if low_hidden is not None and low_weight is not None:
        x = x + low_hidden.to(dtype) @ low_weight.to(dtype).T
    masked = None
    if bias is not None:
        x = x + bias.to(dtype)
        masked = bias == -torch.inf
    x = x * logit_scale
    slope = None
    if logit_softcap:
        slope = softcap_slope(x, logit_softcap)
        x = logit_softcap * torch.tanh(x / logit_softcap)
        if masked is not None:
            x = x.masked_fill(masked, -torch.inf)
    return x / head.temperature_of_tokens(dtype), slope


def softcap_slope(x: Tensor, softcap: float) -> Tensor:
    """d softcap(x) / dx = 1 - tanh(x / c)^2, as 4 e^-2u / (1 + e^-2u)^2 with u = |x / c|: nothing cancels."""
    e = torch.exp(-2 * (x / softcap).abs())
    return 4 * e / (1 + e) ** 2


def token_statistics(z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p = softmax(z), with z [N, V] already divided by the temperature.

    Returns log p(tokens) [N], logsumexp [N], entropy in nats [N], and onehot(tokens) - p [N, V]. The largest
    exponential, which is 1, is kept apart from the rest, so that log p and 1 - p keep their digits as p
    approaches 1.
    """
    z_max, top = z.max(dim=1, keepdim=True)
    index = tokens[:, None]
    exponential = torch.exp(z - z_max)
    rest = exponential.scatter(1, top, 0.0).sum(dim=1, keepdim=True)
    rest = rest + (z_max - z_max)  # NaN if the largest logit is infinite
    total, log_total = 1 + rest, torch.log1p(rest)
    others = torch.where(index == top, rest, total - exponential.gather(1, index))
    weighted = torch.where(exponential == 0, 0, exponential * (z - z_max)).sum(dim=1, keepdim=True)
    entropy = log_total - weighted / total
    residual = (-exponential / total).scatter(1, index, others / total)
    token_z = z.gather(1, index)
    return (
        (token_z - z_max - log_total).squeeze(1),
        (z_max + log_total).squeeze(1),
        entropy.squeeze(1),
        residual,
    )


def more_statistics(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of p = softmax(z), z [N, V]: sum_v p_v^2, the likeliest token (int64, the first of equals; -1 where p
    is NaN) and its log-probability, [N] each."""
    z_max, top = z.max(dim=1, keepdim=True)
    others = torch.exp(z - z_max).scatter(1, top, 0.0)
    rest = others.sum(dim=1) + (z_max - z_max).squeeze(1)  # NaN if the largest logit is infinite
    squares = (1 + others.square().sum(dim=1)) / (1 + rest) ** 2
    return squares, top.squeeze(1).masked_fill(rest.isnan(), -1), -torch.log1p(rest)


def token_features(
    residual: Tensor, weight: Tensor, slope: Tensor | None = None, logit_scale: float = 1.0
) -> Tensor:
    """Eq. 7: phi_t = W^T (onehot(y_t) - p_t) [N, d], times logit scale and softcap slope.

    By eq. 6 that is temperature * d log p(y_t) / d h_t.
    """
    if slope is not None:
        residual = residual * slope
    phi = residual.new_zeros(residual.shape[0], weight.shape[1])
    for block, rows in _vocabulary_blocks(weight, residual.dtype):
        phi = phi + residual[:, block] @ rows
    return logit_scale * phi


def in_bounds(offsets: Tensor, most: int) -> Tensor:
    """Offsets, int64, that rise within [0, most] whatever they are: those that were not checked read nothing
    out of bounds. A check would wait for the device."""
    return offsets.long().clamp(0, most).cummax(0).values


def segment_sum(values: Tensor, cu_seqlens: Tensor, start: int, stop: int) -> Tensor:
    """Sums over each response, [S, ...], of `values`: rows start:stop of a packed [N, ...] tensor."""
    lengths = cu_seqlens.clamp(start, stop).diff()
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)


def head_features(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    responses: Responses,
    *,
    chunk: int | None = None,
    more: bool = False,
) -> tuple[Tensor, ...]:
    """Eq. 8: Phi_s = sum_t alpha_t phi_t / (sum_t alpha_t + 1e-8) over the tokens of each response.

    hidden [N, d], tokens [N] int64. Returns features [S, d], logprobs [N], logsumexp [N] and entropy [N], the
    last three of z / temperature; with `more` those of `more_statistics` behind them. With a low-rank part,
    features are those of [W, low_weight], [S, d + r].
    `chunk` tokens are worked on at a time (all when None): the tensors made are [chunk, V].
    """
    cu_seqlens, token_weights = responses
    N, S, d = hidden.shape[0], cu_seqlens.shape[0] - 1, hidden.shape[1]
    dtype = accumulation_dtype(hidden, head.weight)
    alpha = hidden.new_ones(N, dtype=dtype) if token_weights is None else token_weights.to(dtype)
    weights = [weight for weight in (head.weight, head.low_weight) if weight is not None]
    features = hidden.new_zeros(S, d + head.rank, dtype=dtype)
    alpha_sum = hidden.new_zeros(S, dtype=dtype)
    columns, asked = [], []
    step = max(1, N if chunk is None else chunk)
    for start in range(0, N, step):
        stop = min(start + step, N)
        rows = slice(start, stop)
        z, slope = logits(hidden[rows], head.at(rows))
        logprobs, logsumexp, entropy, residual = token_statistics(z, tokens[rows])
        phi = torch.cat([token_features(residual, w, slope, head.logit_scale) for w in weights], dim=1)
        features = features + segment_sum(alpha[rows, None] * phi, cu_seqlens, start, stop)
        alpha_sum = alpha_sum + segment_sum(alpha[rows], cu_seqlens, start, stop)
        columns.append(torch.stack([logprobs, logsumexp, entropy]))
        if more:
            asked.append(more_statistics(z))
    per_token = torch.cat(columns, dim=1) if columns else hidden.new_zeros(3, 0, dtype=dtype)
    found = features / (alpha_sum + WEIGHT_EPS)[:, None], *per_token
    if not more:
        return found
    empty = per_token.new_zeros(0)
    return *found, *(torch.cat(part) for part in zip(*(asked or [(empty, empty.long(), empty)])))


def skipped_tokens(mass: Tensor, cu_seqlens: Tensor, most: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens certified_head_features leaves out: mass [N] >= 0 is alpha_t (1 - p(tokens[t])).

    A token is left out if the tokens of its response whose mass is not larger than its own carry together at
    most the share `most` of the response's mass. Returns keep [N] bool, and of each response the mass left
    out [S] and the number of tokens left out [S] int64. A NaN keeps its whole response.
    """
    S = cu_seqlens.shape[0] - 1
    response = torch.searchsorted(cu_seqlens[1:], torch.arange(mass.shape[0], device=mass.device), right=True)
    order = torch.argsort(mass, stable=True)
    order = order[torch.argsort(response[order], stable=True)]  # by response, and by mass within it
    sorted_mass, sorted_response = mass[order].double(), response[order]
    sums = torch.nn.functional.pad(sorted_mass.nan_to_num(0.0).cumsum(0), (1, 0))
    upto = sums[1:] - sums[cu_seqlens[sorted_response]]
    # of equal masses all stay or all go: each takes the sum up to the last of them
    last = torch.ones_like(sorted_response, dtype=torch.bool)
    last[:-1] = (sorted_mass.diff() != 0) | (sorted_response.diff() != 0)
    place = torch.arange(mass.shape[0], device=mass.device).masked_fill(~last, mass.shape[0])
    upto = upto[place.flip(0).cummin(0).values.flip(0)] if mass.shape[0] else upto
    total = segment_sum(mass.double(), cu_seqlens, 0, mass.shape[0]) if mass.shape[0] else mass.new_zeros(S)
    skip = torch.zeros_like(mass, dtype=torch.bool).index_copy(
        0, order, upto <= most * total[sorted_response]
    )
    skipped = torch.where(skip, mass, 0.0)
    left_out = segment_sum(torch.stack([skipped.double(), skip.double()], 1), cu_seqlens, 0, mass.shape[0])
    return ~skip, left_out[:, 0].to(mass.dtype), left_out[:, 1].long()
