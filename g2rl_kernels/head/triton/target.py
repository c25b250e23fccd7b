"""Logit of the realised token, x[t] = factor times the raw logit of tokens[t], and the softcap's slope there.

In: hidden, weight, tokens. Out: one float32 per token; `outside` for a token outside of [0, V).

Exact: one float32 dot product per token. With it known, tiles leave the realised token out of their sums, so
1 - p is itself a sum of exponentials and keeps its digits however near p comes to 1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel
from .tile import LOW_BLOCK, HeadOperands, given, raw_logits, softcap_slope

BT, BD = 16, 256


@triton.heuristics(given("HAS_BIAS", "bias") | given("TEMPERED", "factors") | given("LOW", "low_weight"))
@triton.jit(do_not_specialize=["N", "V", "R", "D"])
def head_target_kernel(
    hidden, weight, low_hidden, low_weight, bias, tokens, target, slope,
    N, V,
    scale, factor, factors, outside,
    stride_hn, stride_hd, stride_wv, stride_wd,
    R, D,
    BT: tl.constexpr, BD: tl.constexpr,
    HAS_BIAS: tl.constexpr, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < N
    b_y = tl.load(tokens + o_t, mask=m_t, other=0)
    m_y = m_t & (b_y >= 0) & (b_y < V)  # a token outside of the vocabulary reads nothing
    b_sum = tl.zeros([BT, BD], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = (i_d + tl.arange(0, BD)).to(tl.int64)
        m = m_y[:, None] & (o_d < D)[None, :]
        p_h = hidden + o_t.to(tl.int64)[:, None] * stride_hn + o_d[None, :] * stride_hd
        p_w = weight + b_y[:, None] * stride_wv + o_d[None, :] * stride_wd
        b_h = tl.load(p_h, mask=m, other=0.0).to(tl.float32)
        b_w = tl.load(p_w, mask=m, other=0.0).to(tl.float32)
        b_sum += b_h * b_w
    b_bias = tl.zeros([BT], dtype=tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + b_y, mask=m_y, other=0.0).to(tl.float32)
    b_x = tl.sum(b_sum, axis=1) + b_bias
    if LOW:
        b_low = tl.zeros([BT, LOW_BLOCK], dtype=tl.float32)
        for i_k in range(0, R, LOW_BLOCK):
            o_k = i_k + tl.arange(0, LOW_BLOCK)
            m = m_y[:, None] & (o_k < R)[None, :]
            p_h = low_hidden + o_t.to(tl.int64)[:, None] * R + o_k[None, :]
            b_h = tl.load(p_h, mask=m, other=0.0).to(tl.float32)
            b_w = tl.load(low_weight + b_y[:, None] * R + o_k[None, :], mask=m, other=0.0).to(tl.float32)
            b_low += b_h * b_w
        b_x += tl.sum(b_low, axis=1)
    b_factor = factor
    if TEMPERED:
        b_factor = tl.load(factors + o_t, mask=m_t, other=1.0)
    b_r = raw_logits(b_x, scale, b_factor, SOFTCAP)
    tl.store(target + o_t, tl.where(m_y, b_r * b_factor, outside), mask=m_t)
    if SOFTCAP:
        tl.store(slope + o_t, softcap_slope(b_x * scale), mask=m_t)


def head_target(
    hidden: Tensor, head: HeadOperands, tokens: Tensor, factor: float | None = None, outside: float = math.nan
) -> tuple[Tensor, Tensor | None]:
    """hidden [N, d], tokens [N] -> logit of each token [N], in base 2 unless another `factor` is given, and
    `outside` for a token outside of [0, V); the softcap's slope there [N], or None without softcap."""
    N = hidden.shape[0]
    target = torch.empty(N, dtype=torch.float32, device=hidden.device)
    slope = torch.empty_like(target) if head.has_softcap else None
    launch_kernel(
        head_target_kernel,
        (triton.cdiv(N, BT),),
        **head.arguments(hidden, factor),
        tokens=tokens,
        target=target,
        slope=slope,
        N=N,
        outside=outside,
        BT=BT,
        BD=BD,
        num_warps=4,
    )
    return target, slope
