"""From the sums over vocabulary strips to log-probability, logsumexp and entropy of each token.

In: partial [strips, 3, N], joined in order to m*, l*, u* (join.py), and the realised token's logit x_y.
Out: TokenStatistics. Exact: nothing near 1 is subtracted from 1. With k = log2(l* + 2^(x_y - m*)),

    logsumexp   = m* + k, or x_y + log1p(...) where y is likely     (base 2)
    1 - p_y     = l* 2^(m* - M) / (l* 2^(m* - M) + 2^(x_y - M)),    M = max(m*, x_y)
    log p_y     = -log1p(rest / 2^(x_y - M)) where y is likely, else x_y - logsumexp
    entropy     = -p_y log p_y + 2^-k (k l* - u*)

Where asked for, sum p^2 from q*, and the likeliest token: y, or the first entry at m*, of log-probability -k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .join import BT, joined, joined_more
from .launch import launch_kernel
from .tile import LN2, MASKED, given


class TokenStatistics(NamedTuple):
    """[N] float32 each; log-probability, logsumexp and entropy in nats, of z / temperature."""

    logprobs: Tensor
    logsumexp: Tensor
    entropy: Tensor
    lse2: Tensor  # logsumexp in base 2, unrounded by the change of base
    rest: Tensor  # 1 - p(tokens[t])
    sum_p_squared: Tensor | None = None  # where asked for
    top_token: Tensor | None = None  # int64
    top_logprob: Tensor | None = None  # nats


@triton.jit
def log1p(x):
    """Kahan's formula: the rounding of 1 + x cancels between the logarithm and the denominator."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))


@triton.heuristics(given("GATED", "gate") | given("MORE", "top"))
@triton.jit(do_not_specialize=["N", "n_strips"])
def head_finish_kernel(
    partial, target, gate, tokens, top, logprobs, logsumexp, entropy, lse2, rest,
    sum_p_squared, top_token, top_logprob,
    N, n_strips,
    GATED: tl.constexpr, MORE: tl.constexpr, LN2: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < N
    if GATED:
        m_t = m_t & (tl.load(gate) != 0)
    b_m, b_l, b_u = joined(partial, o_t, m_t, N, n_strips, 4 if MORE else 3, BT)
    b_x = tl.load(target + o_t, mask=m_t, other=0.0)
    b_top = tl.maximum(b_m, b_x)
    b_others = b_l * tl.exp2(b_m - b_top)
    b_y = tl.exp2(b_x - b_top)
    nothing = (b_m < 1e-5 * MASKED) & (b_x == float("-inf"))  # every entry is masked
    b_total = tl.where(nothing, float("nan"), b_others + b_y)
    likely = b_y >= b_others
    # log(a + b) = log(a) + log1p(b / a), a the larger
    b_ratio = log1p(tl.where(likely, b_others / b_y, b_y / b_others))
    b_k = tl.where(likely, b_x - b_m, tl.log2(b_l)) + b_ratio / LN2
    b_lse = tl.where(likely, b_x, b_m + tl.log2(b_l)) + b_ratio / LN2
    b_lse = tl.where(nothing, float("nan"), b_lse)
    b_logp = tl.where(likely, -b_ratio, (b_x - b_lse) * LN2)
    b_py = b_y / b_total
    b_own = tl.where(b_py == 0, 0.0, b_py * b_logp)
    b_entropy = tl.exp2(-b_k) * (b_k * b_l - b_u) * LN2 - b_own
    b_entropy = tl.where(b_total == b_total, b_entropy, b_total)

    tl.store(logprobs + o_t, b_logp, mask=m_t)
    tl.store(logsumexp + o_t, b_lse * LN2, mask=m_t)
    tl.store(entropy + o_t, b_entropy, mask=m_t)
    tl.store(lse2 + o_t, b_lse, mask=m_t)
    tl.store(rest + o_t, b_others / b_total, mask=m_t)
    if MORE:
        b_q, b_v = joined_more(partial, top, b_m, o_t, m_t, N, n_strips, BT)
        b_lift = tl.exp2(b_m - b_top)
        b_own = tl.load(tokens + o_t, mask=m_t, other=0)
        is_own = (b_x > b_m) | ((b_x == b_m) & (b_own < b_v))
        b_first = tl.where(is_own, b_own, b_v.to(tl.int64))
        b_squares = (b_q * b_lift * b_lift + b_y * b_y) / (b_total * b_total)
        b_top_logp = tl.where(is_own, b_logp, -b_k * LN2)
        known = b_total == b_total
        tl.store(sum_p_squared + o_t, b_squares, mask=m_t)
        tl.store(top_token + o_t, tl.where(known, b_first, -1), mask=m_t)
        tl.store(top_logprob + o_t, tl.where(known, b_top_logp, b_total), mask=m_t)


def head_finish(
    partial: Tensor,
    target: Tensor,
    out: TokenStatistics | None = None,
    gate: Tensor | None = None,
    tokens: Tensor | None = None,
    top: Tensor | None = None,
) -> TokenStatistics:
    """partial [strips, 3, N], target [N]. With `gate` (see head_stats), `out` is written only if it is 1.
    With partial [strips, 4, N] and top [strips, N] of head_stats, and tokens [N], all of TokenStatistics."""
    n_strips, _, N = partial.shape
    if out is None:
        out = TokenStatistics(*(torch.empty_like(target) for _ in range(5)))
        if tokens is not None:
            own = torch.empty_like(target), torch.empty_like(tokens), torch.empty_like(target)
            out = TokenStatistics(*out[:5], *own)
    launch_kernel(
        head_finish_kernel,
        (triton.cdiv(N, BT),),
        partial,
        target,
        gate,
        tokens,
        top,
        *out,
        N,
        n_strips,
        LN2=LN2,
        BT=BT,
        num_warps=4,
    )
    return out
