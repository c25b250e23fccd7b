"""The product with a row for each response: slots[k, s] = A[s, columns of strip k] W.

In: A as collect.py leaves it, row j_0 + s of `partial` for response s with first strip j_0; the weight.
Out: one slot for each strip of the columns.

Exact: a program owns a block of responses, a block of the hidden size and a strip of the columns; reduce.py
adds the slots in order. For a bfloat16 weight A is split into two bfloat16 terms, 16 bits in two products.
float16 weights become float32 and the product is 3xTF32, IEEE on AMD: A's small entries would underflow in
float16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk import response_arguments
from .collect import strips_of
from .launch import launch_kernel
from .tile import UPCAST, HeadOperands, programs, weight_arguments
from .tuning import products_on_tensor_cores

# Most responses at a time, block of the hidden size, columns, stages: as much as fits in registers.
TILES = {
    torch.bfloat16: (64, 128, 32, 4),
    torch.float16: (32, 128, 32, 3),
    torch.float32: (16, 64, 32, 3),
}

SPLIT = {"SPLIT_BF16": lambda arguments: arguments["weight"].dtype == torch.bfloat16}


@triton.heuristics(SPLIT | UPCAST)
@triton.jit(
    do_not_specialize=["V", "s_begin", "n_responses", "i_col0", "n_strips", "blocks_per_strip", "D"],
)
def head_project_kernel(
    partial, weight, cu_seqlens, slots,
    V, s_begin, n_responses, i_col0, n_columns, n_strips, blocks_per_strip,
    stride_wv, stride_wd,
    D,
    BM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    SPLIT_BF16: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_s, i_d, i_strip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_s, o_d = i_s * BS + tl.arange(0, BS), i_d * BD + tl.arange(0, BD)
    m_s, m_d = o_s < n_responses, o_d < D
    if tl.load(cu_seqlens + s_begin) == tl.load(cu_seqlens + s_begin + n_responses):
        return  # these responses have no tokens: nothing was written, and nothing is added

    b_first, b_last = strips_of(cu_seqlens, s_begin, n_responses, o_s, m_s, n_strips, BM)
    m_s = m_s & (b_first <= b_last)
    p_row = partial + (b_first + o_s.to(tl.int64))[:, None] * n_columns
    b_acc = tl.zeros([BS, BD], dtype=tl.float32)
    for i_block in range(blocks_per_strip):
        o_c = (i_strip * blocks_per_strip + i_block) * BK + tl.arange(0, BK)
        o_v = i_col0 + o_c
        m_c = (o_c < n_columns) & (o_v < V)
        p_w = weight + o_v.to(tl.int64)[:, None] * stride_wv + o_d.to(tl.int64)[None, :] * stride_wd
        b_w = tl.load(p_w, mask=m_c[:, None] & m_d[None, :], other=0.0)
        b_a = tl.load(p_row + o_c[None, :], mask=m_s[:, None] & m_c[None, :], other=0.0)
        if SPLIT_BF16 and not UPCAST:
            b_high = b_a.to(tl.bfloat16)
            b_low = (b_a - b_high.to(tl.float32)).to(tl.bfloat16)
            b_acc = tl.dot(b_low, b_w, b_acc)
            b_acc = tl.dot(b_high, b_w, b_acc)
        else:
            b_acc = tl.dot(b_a, b_w.to(tl.float32), b_acc, input_precision=PRECISION)
    b_acc = tl.where(m_s[:, None], b_acc, 0.0)  # an empty response gets 0, even with NaN in the weight
    p_out = slots + (i_strip.to(tl.int64) * n_responses + o_s)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_acc, mask=(o_s < n_responses)[:, None] & m_d[None, :])


def head_project(
    partial: Tensor,
    head: HeadOperands,
    cu_seqlens: Tensor,
    responses: range,
    columns: range,
    n_strips: int,
    BM: int,
    most_slots: int,
) -> Tensor:
    """partial [rows, len(columns)], the weight [V, d] -> slots [k, len(responses), d], k <= most_slots.

    `columns` may end past V: residual.py fills whole tiles, with zeros there.
    """
    weight = head.weight
    D, S = weight.shape[1], len(responses)
    most, BD, BK, num_stages = TILES[weight.dtype]
    BS = min(most, 16 if S <= 16 else 32 if S <= 32 else 64)
    num_warps = 4 if weight.dtype == torch.bfloat16 and BS == 16 else 8
    n_blocks = triton.cdiv(len(columns), BK)
    cells = triton.cdiv(S, BS) * triton.cdiv(D, BD)
    n_column_strips = max(1, min(most_slots, n_blocks, triton.cdiv(4 * programs(weight.device), cells)))
    blocks_per_strip = triton.cdiv(n_blocks, n_column_strips)
    n_column_strips = triton.cdiv(n_blocks, blocks_per_strip)
    slots = torch.empty(n_column_strips, S, D, dtype=torch.float32, device=weight.device)
    launch_kernel(
        head_project_kernel,
        (triton.cdiv(S, BS), triton.cdiv(D, BD), n_column_strips),
        **weight_arguments(weight),
        **response_arguments(cu_seqlens, responses),
        partial=partial,
        slots=slots,
        i_col0=columns.start,
        n_columns=len(columns),
        n_strips=n_strips,
        blocks_per_strip=blocks_per_strip,
        BM=BM,
        BS=BS,
        BD=BD,
        BK=BK,
        PRECISION=products_on_tensor_cores() if weight.dtype == torch.float16 else head.precision,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return slots
