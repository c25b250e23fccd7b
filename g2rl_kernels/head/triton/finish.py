"""From the sums over vocabulary strips to log-probability, logsumexp and entropy of each token.

In: partial [strips, 3, N], joined in order to m*, l*, u* (join.py), and the realised token's logit x_y.
Out: TokenStatistics. Exact: nothing near 1 is subtracted from 1. With k = log2(l* + 2^(x_y - m*)),

    logsumexp   = m* + k, or x_y + log1p(...) where y is likely     (base 2)
    1 - p_y     = l* 2^(m* - M) / (l* 2^(m* - M) + 2^(x_y - M)),    M = max(m*, x_y)
    log p_y     = -log1p(rest / 2^(x_y - M)) where y is likely, else x_y - logsumexp
    entropy     = -p_y log p_y + 2^-k (k l* - u*)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .join import BT, joined
from .launch import launch_kernel
from .tile import LN2, MASKED, given


class TokenStatistics(NamedTuple):
    """[N] float32 each; log-probability, logsumexp and entropy in nats, of z / temperature."""

    logprobs: Tensor
    logsumexp: Tensor
    entropy: Tensor
    lse2: Tensor  # logsumexp in base 2, unrounded by the change of base
    rest: Tensor  # 1 - p(tokens[t])


@triton.jit
def log1p(x):
    """Kahan's formula: the rounding of 1 + x cancels between the logarithm and the denominator."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))


@triton.heuristics(given("GATED", "gate"))
@triton.jit(do_not_specialize=["N", "n_strips"])
def head_finish_kernel(
    partial, target, gate, logprobs, logsumexp, entropy, lse2, rest,
    N, n_strips,
    GATED: tl.constexpr, LN2: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < N
    if GATED:
        m_t = m_t & (tl.load(gate) != 0)
    b_m, b_l, b_u = joined(partial, o_t, m_t, N, n_strips, BT)
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


def head_finish(
    partial: Tensor, target: Tensor, out: TokenStatistics | None = None, gate: Tensor | None = None
) -> TokenStatistics:
    """partial [strips, 3, N], target [N]. With `gate` (see head_stats), `out` is written only if it is 1."""
    n_strips, _, N = partial.shape
    if out is None:
        out = TokenStatistics(*(torch.empty_like(target) for _ in TokenStatistics._fields))
    launch_kernel(
        head_finish_kernel,
        (triton.cdiv(N, BT),),
        partial,
        target,
        gate,
        *out,
        N,
        n_strips,
        LN2=LN2,
        BT=BT,
        num_warps=4,
    )
    return out
