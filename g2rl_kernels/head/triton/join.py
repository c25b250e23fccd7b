"""The strips of stats.py as one part of the vocabulary, in nats: what `finish` of tiled.py takes.

In: partial [strips, 3, N], base 2. Out: m, s, u [1, 3, N]; ranks that share a vocabulary exchange these.
Where asked for, [1, 4, N] with q, and the first entry at m.

    m* = max m_j;   l* = sum l_j 2^(m_j - m*);   u* = sum (u_j + l_j (m_j - m*)) 2^(m_j - m*)

Exact: strips are added in order, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel
from .tile import LN2, MASKED, given

BT = 256


@triton.jit
def joined(partial, o_t, m_t, N, n_strips, ROWS: tl.constexpr, BT: tl.constexpr):
    """m*, l* and u* of tokens o_t, in base 2."""
    N = N.to(tl.int64)
    b_m = tl.load(partial + o_t, mask=m_t, other=0.0)
    for i_strip in range(1, n_strips):
        b_m = tl.maximum(b_m, tl.load(partial + i_strip * ROWS * N + o_t, mask=m_t, other=0.0))
    b_l = tl.zeros([BT], dtype=tl.float32)
    b_u = tl.zeros([BT], dtype=tl.float32)
    for i_strip in range(n_strips):
        p_strip = partial + i_strip * ROWS * N + o_t
        b_distance = tl.load(p_strip, mask=m_t, other=0.0) - b_m
        b_lj = tl.load(p_strip + N, mask=m_t, other=0.0)
        b_uj = tl.load(p_strip + 2 * N, mask=m_t, other=0.0)
        b_shrink = tl.exp2(b_distance)
        b_l += b_lj * b_shrink
        b_u += (b_uj + b_lj * b_distance) * b_shrink
    return b_m, b_l, b_u


@triton.jit
def joined_more(partial, top, b_m, o_t, m_t, N, n_strips, BT: tl.constexpr):
    """q* of tokens o_t, relative to m*, and the first entry at m*."""
    N = N.to(tl.int64)
    b_best = tl.full([BT], float("-inf"), dtype=tl.float32)
    b_q = tl.zeros([BT], dtype=tl.float32)
    b_top = tl.full([BT], -1, dtype=tl.int32)
    for i_strip in range(n_strips):
        p_strip = partial + i_strip * 4 * N + o_t
        b_mj = tl.load(p_strip, mask=m_t, other=0.0)
        b_shrink = tl.exp2(b_mj - b_m)
        b_q += tl.load(p_strip + 3 * N, mask=m_t, other=0.0) * b_shrink * b_shrink
        b_here = tl.load(top + i_strip * N + o_t, mask=m_t, other=-1)
        b_top = tl.where(b_mj > b_best, b_here, b_top)
        b_best = tl.maximum(b_best, b_mj)
    return b_q, b_top


@triton.heuristics(given("MORE", "top"))
@triton.jit(do_not_specialize=["N", "n_strips"])
def head_join_kernel(
    partial, out, top, first, N, n_strips, MORE: tl.constexpr, LN2: tl.constexpr, BT: tl.constexpr
):
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < N
    b_m, b_l, b_u = joined(partial, o_t, m_t, N, n_strips, 4 if MORE else 3, BT)
    if MORE:
        b_q, b_top = joined_more(partial, top, b_m, o_t, m_t, N, n_strips, BT)
    nothing = b_m < 1e-5 * MASKED  # every entry is masked or NaN; a NaN stays in the sums
    b_m = tl.where(nothing, float("-inf"), b_m * LN2)
    b_l = tl.where(nothing & (b_l == b_l), 0.0, b_l)
    b_u = tl.where(nothing & (b_u == b_u), 0.0, b_u * LN2)
    N = N.to(tl.int64)
    tl.store(out + o_t, b_m, mask=m_t)
    tl.store(out + N + o_t, b_l, mask=m_t)
    tl.store(out + 2 * N + o_t, b_u, mask=m_t)
    if MORE:
        tl.store(out + 3 * N + o_t, tl.where(nothing & (b_q == b_q), 0.0, b_q), mask=m_t)
        tl.store(first + o_t, b_top.to(tl.int64), mask=m_t)


def head_join(partial: Tensor, top: Tensor | None) -> tuple[Tensor, Tensor]:
    """partial [strips, 3, N] as head_stats gives it -> m, s, u [1, 3, N], and [1, 0] int64. Where every entry
    is masked, m = -inf and s = u = 0. With partial [strips, 4, N] and top [strips, N]: m, s, u, q [1, 4, N],
    and the first entry at m [1, N]."""
    n_strips, _, N = partial.shape
    out = torch.empty_like(partial[:1])
    first = torch.empty(1, N if top is not None else 0, dtype=torch.int64, device=partial.device)
    launch_kernel(
        head_join_kernel,
        (triton.cdiv(N, BT),),
        partial,
        out,
        top,
        None if top is None else first,
        N,
        n_strips,
        LN2=LN2,
        BT=BT,
        num_warps=4,
    )
    return out, first
