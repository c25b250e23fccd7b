"""Adds up the strips that residual.py left, into the row of each response's first strip.

In: partial, in which row j + s is strip j of response s. Out, in place: partial[j_0 + s] = the sum over the
response's strips j, of which j_0 is the first.

Exact: no other response touches these rows, and strips are added in order. This kernel is separate from
project.py because that one reads the weight at full speed only with nothing else in its loop.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .chunk import response_arguments
from .launch import launch_kernel

BC = 1024


@triton.jit
def strips_of(cu_seqlens, s_begin, n_responses, o_s, m_s, n_strips, BM: tl.constexpr):
    """First and last strip of responses s_begin + o_s; n_strips and -1 for a response without tokens. Tokens
    are cut into strips as in residual.py."""
    t_begin = tl.load(cu_seqlens + s_begin)
    t_end = tl.load(cu_seqlens + s_begin + n_responses)
    strip = tl.maximum(tl.cdiv(tl.cdiv(t_end - t_begin, BM), n_strips), 1) * BM
    b_begin = tl.load(cu_seqlens + s_begin + o_s, mask=m_s, other=0) - t_begin
    b_end = tl.load(cu_seqlens + s_begin + o_s + 1, mask=m_s, other=0) - t_begin
    some = m_s & (b_begin < b_end)
    return tl.where(some, b_begin // strip, n_strips), tl.where(some, (b_end - 1) // strip, -1)


@triton.jit(do_not_specialize=["s_begin", "n_responses", "n_strips"])
def head_collect_kernel(
    partial,
    cu_seqlens,
    s_begin,
    n_responses,
    n_columns,
    n_strips,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    j_from, j_to = strips_of(cu_seqlens, s_begin, n_responses, i_s, True, n_strips, BM)
    if j_from >= j_to:  # at most one strip: there is nothing to add
        return
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < n_columns
    p_first = partial + (j_from + i_s) * n_columns + o_c
    b_sum = tl.load(p_first, mask=m_c, other=0.0)
    for j in range(j_from + 1, j_to + 1):
        b_sum += tl.load(partial + (j + i_s) * n_columns + o_c, mask=m_c, other=0.0)
    tl.store(p_first, b_sum, mask=m_c)


def head_collect(partial: Tensor, cu_seqlens: Tensor, responses: range, n_strips: int, BM: int) -> None:
    """partial [rows, columns] float32, the columns a multiple of 16; cu_seqlens [S + 1] int64."""
    n_columns = partial.shape[1]
    launch_kernel(
        head_collect_kernel,
        (len(responses), triton.cdiv(n_columns, BC)),
        **response_arguments(cu_seqlens, responses),
        partial=partial,
        n_columns=n_columns,
        n_strips=n_strips,
        BM=BM,
        BC=BC,
        num_warps=4,
    )
