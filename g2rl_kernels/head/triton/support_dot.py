"""Logits of the ids that a token is restricted to: out[k] = hidden[rows[k]] . weight[index[k]].

In: hidden [N, d], the weight [V, d], two row numbers an entry. Out: one float32 an entry; 0 for an entry that
names a row outside of either matrix, which is not read.

Exact: float32 products of the inputs, added up in float32. An entry's sum has an order of its own, whatever
entries come before it. Entries of one token share its row of hidden, which stays in the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel
from .tile import weight_arguments

BT, BD = 16, 256


# D is specialized: with a mask that ends at a multiple of 16, loads take 16 bytes.
@triton.jit(do_not_specialize=["K", "N", "V"])
def head_support_dot_kernel(
    hidden, weight, rows, index, out,
    K, N, V,
    stride_hn, stride_hd, stride_wv, stride_wd,
    D,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_k = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_k = o_k < K
    b_t = tl.load(rows + o_k, mask=m_k, other=-1)
    b_v = tl.load(index + o_k, mask=m_k, other=-1)
    m_rows = (b_t >= 0) & (b_t < N) & (b_v >= 0) & (b_v < V)
    b_sum = tl.zeros([BT, BD], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = (i_d + tl.arange(0, BD)).to(tl.int64)
        m = m_rows[:, None] & (o_d < D)[None, :]
        p_h = hidden + b_t[:, None] * stride_hn + o_d[None, :] * stride_hd
        p_w = weight + b_v[:, None] * stride_wv + o_d[None, :] * stride_wd
        b_h = tl.load(p_h, mask=m, other=0.0).to(tl.float32)
        b_w = tl.load(p_w, mask=m, other=0.0).to(tl.float32)
        b_sum += b_h * b_w
    tl.store(out + o_k, tl.sum(b_sum, axis=1), mask=m_k)


def head_support_dot(hidden: Tensor, rows: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """hidden [N, d], weight [V, d] with any strides, rows and index [K] int64 -> [K] float32."""
    K = index.shape[0]
    out = torch.empty(K, dtype=torch.float32, device=hidden.device)
    launch_kernel(
        head_support_dot_kernel,
        (triton.cdiv(K, BT),),
        **weight_arguments(weight),
        hidden=hidden,
        rows=rows,
        index=index,
        out=out,
        K=K,
        N=hidden.shape[0],
        stride_hn=hidden.stride(0),
        stride_hd=hidden.stride(1),
        BT=BT,
        BD=BD,
        num_warps=8,
    )
    return out
