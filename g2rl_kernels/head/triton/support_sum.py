"""Sums of a matrix's rows over lists: out[i] = sum of coefficient[k] weight[index[k]] over list i's entries.

In: entries k with a coefficient and a row each, the lists' offsets [n + 1], the weight (or hidden, for the
weight's gradient). Out: every row of out, rounded once; zeros for an empty list. A row outside of the matrix
counts as zeros and is not read.

Exact: a program owns a list and a block of columns and takes the entries in order, STRIP of them in one sum,
so that a list as long as the vocabulary keeps its digits. No other list changes a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel
from .tile import weight_arguments

STRIP = 256  # entries
# Entries at a time x columns. Most lists of the weight's gradient are empty or short: few programs a list.
WIDE, NARROW = (2, 1024), (8, 256)


# D is specialized: with a mask that ends at a multiple of 16, loads take 16 bytes.
@triton.jit(do_not_specialize=["V"])
def head_support_sum_kernel(
    coefficient, index, offsets, weight, out,
    V,
    stride_wv, stride_wd, stride_on,
    D,
    BK: tl.constexpr, BD: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    i_begin, i_end = tl.load(offsets + i_n), tl.load(offsets + i_n + 1)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_total = tl.zeros([BD], dtype=tl.float32)
    for i_strip in range(i_begin, i_end, STRIP):
        i_stop = tl.minimum(i_strip + STRIP, i_end)
        b_acc = tl.zeros([BK, BD], dtype=tl.float32)
        for i_k in range(i_strip, i_stop, BK):
            o_k = i_k + tl.arange(0, BK)
            b_c = tl.load(coefficient + o_k, mask=o_k < i_stop, other=0.0)
            b_v = tl.load(index + o_k, mask=o_k < i_stop, other=-1)
            p_w = weight + b_v[:, None] * stride_wv + o_d[None, :] * stride_wd
            m_w = ((b_v >= 0) & (b_v < V))[:, None] & m_d[None, :]
            b_w = tl.load(p_w, mask=m_w, other=0.0)
            b_acc += b_c[:, None] * b_w.to(tl.float32)
        b_total += tl.sum(b_acc, axis=0)
    tl.store(out + i_n * stride_on + o_d, b_total.to(out.dtype.element_ty), mask=m_d)


def head_support_sum(
    coefficients: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, out: Tensor
) -> None:
    """coefficients [K] float32, index [K] and offsets [n + 1] int64, matrix [M, d] with any strides ->
    out [n, d] of any dtype, columns contiguous. offsets lie in [0, K] and do not fall."""
    n, D = out.shape
    BK, BD = NARROW if NARROW[1] >= D else WIDE
    launch_kernel(
        head_support_sum_kernel,
        (n, triton.cdiv(D, BD)),
        **weight_arguments(matrix),
        coefficient=coefficients,
        index=index,
        offsets=offsets,
        out=out,
        stride_on=out.stride(0),
        BK=BK,
        BD=BD,
        STRIP=STRIP,
        num_warps=4,
    )
