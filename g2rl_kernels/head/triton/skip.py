"""Which tokens can be left out of a response's feature, with a certificate.

In: mass[t] = alpha_t (1 - p_y), which bounds the token's term: ||phi_t|| <= (1 - p_y) max_v ||W[y] - W[v]||.
Out: a token is left out if the tokens of its response whose mass is not larger than its own carry together at
most a share `most` of the response's mass.

Exact: a program owns a response and finds the largest such mass by bisection over the bits of a positive
float, which are ordered as the floats are: 31 steps, each a sum over its tokens in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel

BT = 512


@triton.jit
def bits_of(x):
    """Ordered as the floats are; a NaN of either sign is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def mass_up_to(mass, t_begin, t_end, bits, BT: tl.constexpr):
    """Sum of the masses whose bits are at most `bits`."""
    b_sum = tl.zeros([BT], dtype=tl.float32)
    for i_t in range(t_begin, t_end, BT):
        o_t = i_t + tl.arange(0, BT)
        b_mass = tl.load(mass + o_t, mask=o_t < t_end, other=0.0)
        b_sum += tl.where(bits_of(b_mass) <= bits, b_mass, 0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def head_skip_kernel(mass, cu_seqlens, most, keep, skipped_mass, skipped_tokens, BT: tl.constexpr):
    i_s = tl.program_id(0)
    t_begin, t_end = tl.load(cu_seqlens + i_s), tl.load(cu_seqlens + i_s + 1)
    infinity = 0x7F800000
    budget = most * mass_up_to(mass, t_begin, t_end, 0x7FFFFFFF, BT)  # NaN, if any mass is
    low, high = -1, infinity  # the threshold lies in [low, high)
    for _ in range(32):
        if high - low > 1:
            middle = low + (high - low) // 2
            if mass_up_to(mass, t_begin, t_end, middle, BT) <= budget:
                low = middle
            else:
                high = middle
    n_skipped = tl.zeros([BT], dtype=tl.int32)
    for i_t in range(t_begin, t_end, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < t_end
        b_bits = bits_of(tl.load(mass + o_t, mask=m_t, other=0.0))
        skip = m_t & (b_bits <= low)
        tl.store(keep + o_t, (b_bits > low).to(tl.int8), mask=m_t)
        n_skipped += skip.to(tl.int32)
    tl.store(skipped_mass + i_s, mass_up_to(mass, t_begin, t_end, low, BT))
    tl.store(skipped_tokens + i_s, tl.sum(n_skipped, axis=0).to(tl.int64))


def head_skip(mass: Tensor, cu_seqlens: Tensor, most: float) -> tuple[Tensor, Tensor, Tensor]:
    """mass [N] float32 >= 0, cu_seqlens [S + 1] int64, 0 <= most < 1 -> keep [N] int8 (1: kept), and for each
    response the mass left out [S] float32 and the number of tokens left out [S] int64."""
    S = cu_seqlens.shape[0] - 1
    keep = torch.empty_like(mass, dtype=torch.int8)
    skipped_mass = torch.empty(S, dtype=torch.float32, device=mass.device)
    skipped_tokens = torch.empty(S, dtype=torch.int64, device=mass.device)
    if S:
        launch_kernel(
            head_skip_kernel,
            (S,),
            mass,
            cu_seqlens,
            most,
            keep,
            skipped_mass,
            skipped_tokens,
            BT=BT,
            num_warps=8,
        )
    return keep, skipped_mass, skipped_tokens
