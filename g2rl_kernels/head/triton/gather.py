"""The realised tokens' own term: slots[k, s] = sum over strip k of response s of c_t W[tokens[t]].

In: the weight and a coefficient c_t per token. Out: one slot for each of the equal strips that a response's
tokens are cut into.

Exact: a program owns a response, a block of the hidden size and a strip, and walks the strip's tokens in
order; reduce.py adds the slots in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk import response_arguments
from .launch import launch_kernel
from .tile import programs, weight_arguments

BT, BD = 32, 128


@triton.jit(do_not_specialize=["V", "s_begin", "n_responses", "n_strips", "D"])
def head_gather_kernel(
    weight, tokens, coefficient, cu_seqlens, slots,
    V, s_begin, n_responses, n_strips,
    stride_wv, stride_wd,
    D,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_s, i_d, i_strip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t_begin, t_end = tl.load(cu_seqlens + s_begin + i_s), tl.load(cu_seqlens + s_begin + i_s + 1)
    strip = tl.cdiv(t_end - t_begin, n_strips)
    t_begin = t_begin + i_strip * strip
    t_end = tl.minimum(t_end, t_begin + strip)
    o_d = (i_d * BD + tl.arange(0, BD)).to(tl.int64)
    b_acc = tl.zeros([BT, BD], dtype=tl.float32)
    for i_t in range(t_begin, t_end, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < t_end
        b_y = tl.load(tokens + o_t, mask=m_t, other=0)
        m_y = m_t & (b_y >= 0) & (b_y < V)  # the coefficient of any other token is NaN
        b_c = tl.load(coefficient + o_t, mask=m_t, other=0.0)
        p_w = weight + b_y[:, None] * stride_wv + o_d[None, :] * stride_wd
        b_w = tl.load(p_w, mask=m_y[:, None] & (o_d < D)[None, :], other=0.0)
        b_acc += b_c[:, None] * b_w.to(tl.float32)
    p_out = slots + (i_strip.to(tl.int64) * n_responses + i_s) * D + o_d
    tl.store(p_out, tl.sum(b_acc, axis=0), mask=o_d < D)


def head_gather(
    weight: Tensor, tokens: Tensor, coefficient: Tensor, cu_seqlens: Tensor, responses: range, most_slots: int
) -> Tensor:
    """weight [V, d], tokens and coefficient [N], cu_seqlens [S + 1] int64 -> slots [k, len(responses), d]."""
    D, S = weight.shape[1], len(responses)
    cells = S * triton.cdiv(D, BD)
    n_strips = max(1, min(most_slots, 16, triton.cdiv(4 * programs(weight.device), cells)))
    slots = torch.empty(n_strips, S, D, dtype=torch.float32, device=weight.device)
    launch_kernel(
        head_gather_kernel,
        (S, triton.cdiv(D, BD), n_strips),
        **weight_arguments(weight),
        **response_arguments(cu_seqlens, responses),
        tokens=tokens,
        coefficient=coefficient,
        slots=slots,
        n_strips=n_strips,
        BT=BT,
        BD=BD,
        num_warps=4,
    )
    return slots
