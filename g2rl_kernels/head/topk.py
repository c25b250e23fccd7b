"""Features from a sampler's top log-probabilities and the head's weight alone: `topk_features`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..arguments import check_scale, check_shape, check_tensor, check_token_values, may_read_values, sizes
from .lora import Lora, folded, with_lora
from .reference import WEIGHT_EPS, in_bounds, segment_sum
from .spec import DTYPES, HeadSpec, Responses
from .tiled import elements, slices

INTEGERS = (torch.int64, torch.int32)
PADDING = -1  # an id that stands for no token
LARGEST_LOGPROB = 0.01  # rounding in a sampler may give slightly more than 0


class TopkFeatures(NamedTuple):
    """What `topk_features` returns; all float32, without gradients."""

    features: Tensor  # [S, d]
    missing_mass: Tensor  # [S], sum of a_t m_t
    token_missing_mass: Tensor  # [N], m_t: the probability that was not reported


@torch.no_grad()
def topk_features(
    weight: Tensor, tokens: Tensor, top_ids: Tensor, top_logprobs: Tensor, token_logprobs: Tensor,
    cu_seqlens: Tensor, *,
    renormalise: bool = True,
    logit_scale: float = 1.0,
    lora: Lora | None = None,
    token_weights: Tensor | None = None,
) -> TopkFeatures:  # fmt: skip
    """Features of responses from the log-probabilities that their sampler reported, with a bound.

    It needs neither hidden states nor logits, so that a group can be scored before any forward pass. Let R_t
    be the ids reported for token t and tokens[t] itself, p their probabilities, and m_t = 1 - sum_{R_t} p the
    mass that is missing. With q = p / (1 - m_t), or q = p without `renormalise`,

        phi_t       = logit_scale (W[tokens[t]] - sum_{v in R_t} q_v W[v])
        features[s] = sum_t alpha_t phi_t / (sum_t alpha_t + 1e-8)     (t over the tokens of response s).

    With all of the vocabulary reported this is the feature of `head_features` at the log-probabilities'
    temperature: eq. 7 of arXiv 2512.15687. Else, for exact[s] that feature,

        ||features[s] - exact[s]|| <= missing_mass[s] diameter,      missing_mass[s] = sum_t a_t m_t,

    with a_t = alpha_t / sum alpha and diameter = logit_scale max_v,w ||W[v] - W[w]|| as in
    `certified_head_features`: phi_t is off by m_t times the difference between the mean row of the missing
    entries and that of the reported ones. Without `renormalise` it is off by m_t times the former, and
    radius = logit_scale max_v ||W[v]|| takes the place of the diameter; the exact feature is the same for
    W[v] - c, with any row c, so that this c may be taken off `weight` first. The function computes neither
    constant. What rounding in the sampler moves the probabilities by comes on top.

    Sums over a token's entries are in float32, over tokens in float64; results do not depend on the number of
    threads. Extra memory: a few times [S, d], and rows of W for a chunk of tokens, 4 MiB on a CPU.

    Args:
        weight: [V, d] float32, bfloat16 or float16, need not be contiguous. A bias changes nothing here.
        tokens: [N] int64 or int32 in [0, V): the realised tokens of all responses, packed.
        top_ids: [N, k] int64 or int32: the reported ids of each token, in any order and each once; tokens[t]
            may be among them. -1 stands for no id, where a sampler reports fewer than k.
        top_logprobs: [N, k] their log-probabilities in nats, any float dtype: at the temperature that sampled
            them, and after every other change of the logits that the feature should see (vLLM:
            logprobs_mode="processed_logprobs"; "raw_logprobs" are at temperature 1). Those of id -1 and of
            tokens[t] are ignored.
        token_logprobs: [N] log p(tokens[t]), like top_logprobs.
        cu_seqlens: [S + 1] int32 or int64, from 0 up to N: response s owns rows
            cu_seqlens[s]:cu_seqlens[s + 1]. A response may be empty; its feature is zero.
        renormalise: the reported probabilities are divided by their sum. This does not depend on where the
            rows of W lie, and is the better estimate for language models (docs/topk.md).
        logit_scale: positive, from 1e-8 to 1e8. A softcap on logits cannot be taken into account: its slope
            depends on the logits, which log-probabilities give only up to a constant.
        lora: (A [r, d], B [V, r], scaling): the rows are W + scaling B A, never formed; see `head_features`.
        token_weights: [N] alpha_t >= 0, any float dtype; None for all 1. Weights that sum to 0 give zeros.

    Returns:
        features [S, d]; missing_mass [S]; token_missing_mass [N], m_t, from 0 to 1. NaN in a log-probability
        makes its response NaN, and no other.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit, cu_seqlens does not rise from 0 to N, an id lies outside the
            vocabulary or is reported twice for a token, a log-probability is above 0.01, a token weight is
            negative or NaN, or logit_scale is out of range.

    Values of tensors are checked on the CPU. On other devices that would wait for the device: set
    G2RL_CHECK=1 in the environment to ask for it. Unchecked, an id outside the vocabulary makes its response
    NaN, an id that is reported twice counts twice, and nothing is read out of bounds.
    """
    responses, tables = _check(
        weight, tokens, top_ids, top_logprobs, token_logprobs, cu_seqlens, token_weights, lora
    )
    if not isinstance(renormalise, bool):
        raise TypeError(f"renormalise: got {type(renormalise).__name__}, needs True or False")
    check_scale("logit_scale", logit_scale)
    N, (V, d) = tokens.shape[0], weight.shape
    alpha = responses.token_weights
    alpha = weight.new_ones(N, dtype=torch.float64) if alpha is None else alpha.double()
    offsets = in_bounds(responses.cu_seqlens, N)
    S = offsets.shape[0] - 1
    sums = weight.new_zeros((S, sum(table.shape[1] for table in tables)), dtype=torch.float64)
    masses = weight.new_empty(N, dtype=torch.float64)
    step = max(1, elements(weight) // (d * (top_ids.shape[1] + 1)))
    for rows in slices(0, N, step):
        index, coefficients, masses[rows] = _coefficients(
            V, tokens[rows], top_ids[rows], top_logprobs[rows], token_logprobs[rows], renormalise
        )
        phi = torch.cat([_weighted_rows(table, index, coefficients) for table in tables], dim=1)
        here = _responses_of(rows, offsets, may_read_values(weight))
        bounds = offsets[here.start : here.stop + 1]
        sums[here] += segment_sum(alpha[rows, None] * phi, bounds, rows.start, rows.stop)
    totals = torch.stack([alpha, alpha * masses], dim=1)
    alpha_sum, mass = segment_sum(totals, offsets, 0, N).unbind(1) if N else sums.new_zeros(2, S)
    features = folded((sums / (alpha_sum + WEIGHT_EPS)[:, None]).float(), lora)
    return TopkFeatures(
        float(logit_scale) * features, (mass / (alpha_sum + WEIGHT_EPS)).float(), masses.float()
    )


def _coefficients(
    V: int,
    tokens: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    token_logprobs: Tensor,
    renormalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows each token is made of [n, 1 + k], their coefficients [n, 1 + k] float32, and m [n] float64.

    The realised token comes first. An entry that does not count has its row, and coefficient 0.
    """
    y, ids = tokens.long()[:, None], top_ids.long()
    wrong_y, wrong = (y < 0) | (y >= V), (ids < PADDING) | (ids >= V)
    own_logprob = token_logprobs.double()[:, None].masked_fill(wrong_y, torch.nan)
    absent = (ids == PADDING) | (ids == y)
    p = top_logprobs.double().exp().masked_fill(absent, 0.0).masked_fill(wrong, torch.nan)
    others, rest = p.sum(1, keepdim=True), -torch.expm1(own_logprob)  # 1 - p_y without cancellation
    missing = (rest - others).clamp(min=0.0)
    if renormalise:
        reported = (own_logprob.exp() + others).clamp(min=torch.finfo(torch.float64).tiny)
        rest, p = others / reported, p / reported
    y = y.masked_fill(wrong_y, 0)
    index = torch.cat([y, torch.where(absent | wrong, y, ids)], dim=1)
    return index, torch.cat([rest, -p], dim=1).float(), missing.squeeze(1)


def _responses_of(rows: slice, offsets: Tensor, readable: bool) -> slice:
    """The responses that rows of tokens belong to, where values may be read; else all."""
    if not readable:
        return slice(0, offsets.shape[0] - 1)
    first = int(torch.searchsorted(offsets, rows.start, right=True)) - 1
    return slice(first, int(torch.searchsorted(offsets, rows.stop)))


def _weighted_rows(table: Tensor, index: Tensor, coefficients: Tensor) -> Tensor:
    """sum_j coefficients[t, j] table[index[t, j]] of each token, [n, d] float64. table: [V, d]."""
    total = torch.zeros(index.shape[0], table.shape[1], dtype=torch.float64, device=table.device)
    for columns in slices(0, index.shape[1], max(1, elements(table) // table.shape[1])):
        rows, at, factors = table, index[:, columns], coefficients[:, columns].contiguous()
        if table.dtype != torch.float32:  # factors have the dtype of the rows, so these rows are copied
            rows = table[at.flatten()].float()
            at = torch.arange(at.numel(), device=table.device).view_as(at)
        total += embedding_bag(at.contiguous(), rows, per_sample_weights=factors, mode="sum")
    return total


def _check(
    weight: Tensor,
    tokens: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    token_logprobs: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    lora: Lora | None,
) -> tuple[Responses, list[Tensor]]:
    """The responses in their checked form, and the matrices whose rows are summed: W, and B of lora."""
    check_tensor("weight", weight, DTYPES)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight: got shape {sizes(weight)}, needs [V, d] with V > 0 and d > 0")
    device, V = weight.device, weight.shape[0]
    check_tensor("tokens", tokens, INTEGERS, device)
    if tokens.dim() != 1:
        raise ValueError(f"tokens: got shape {sizes(tokens)}, needs [N]")
    N = tokens.shape[0]
    check_tensor("top_ids", top_ids, INTEGERS, device)
    if top_ids.dim() != 2 or top_ids.shape[0] != N:
        raise ValueError(f"top_ids: got shape {sizes(top_ids)}, needs [{N}, k], a row for each token")
    check_tensor("top_logprobs", top_logprobs, None, device)
    check_shape("top_logprobs", top_logprobs, tuple(top_ids.shape), "[N, k], one for each of top_ids")
    check_tensor("token_logprobs", token_logprobs, None, device)
    check_shape("token_logprobs", token_logprobs, (N,), "[N], one for each token")
    if token_weights is not None:
        check_tensor("token_weights", token_weights, None, device)
        check_shape("token_weights", token_weights, (N,), "[N], one for each token")
    responses = Responses(cu_seqlens, token_weights).checked(token_logprobs)
    if may_read_values(weight):
        check_token_values(tokens, V)
        _check_logprobs("token_logprobs", token_logprobs)
        for rows in slices(0, N, max(1, elements(weight) // max(1, top_ids.shape[1]))):
            ids = top_ids[rows]
            _check_ids(ids, V, rows.start)
            ignored = (ids == PADDING) | (ids == tokens[rows, None])
            _check_logprobs("top_logprobs", top_logprobs[rows].masked_fill(ignored, 0.0))
    B = with_lora(HeadSpec(weight), weight[:0], lora).low_weight
    return responses, [weight] if B is None else [weight, B]


def _check_ids(ids: Tensor, V: int, start: int) -> None:
    """Ids [n, k] of tokens from `start` on lie in the vocabulary, each once a row, or are PADDING."""
    outside = ((ids < PADDING) | (ids >= V)).nonzero()
    if outside.numel():
        row, column = outside[0].tolist()
        raise ValueError(
            f"top_ids: row {start + row} has {int(ids[row, column])}, needs 0 to V - 1 = {V - 1}, or -1 for "
            "no id"
        )
    ordered = ids.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING)).nonzero()
    if twice.numel():
        row, column = twice[0].tolist()
        raise ValueError(
            f"top_ids: row {start + row} has {int(ordered[row, column])} twice, needs each id once"
        )


def _check_logprobs(name: str, logprobs: Tensor) -> None:
    """Raises ValueError for a value above LARGEST_LOGPROB; NaN beside it hides nothing."""
    above = logprobs > LARGEST_LOGPROB
    if above.any():
        largest = float(logprobs[above].max())
        raise ValueError(f"{name}: got {largest:g}, needs log-probabilities: at most 0")
