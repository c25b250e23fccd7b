"""Sums over the vocabulary of a seeded pass, from those over its tiles (residual.py).

In: sums [tiles, 2, N], l and u of each token over each tile. Out: totals [2, N], to which they are added.

Exact: float64, tile by tile in order. Neither the number of tokens nor the cut into slabs changes a bit,
which torch.sum does not promise.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel

BT = 256


@triton.jit(do_not_specialize=["n", "n_tiles"])
def head_total_kernel(sums, totals, n, n_tiles, BT: tl.constexpr):
    o_n = tl.program_id(0) * BT + tl.arange(0, BT)
    m_n = o_n < n
    b_total = tl.load(totals + o_n, mask=m_n, other=0.0)
    for i_tile in range(n_tiles):
        b_total += tl.load(sums + i_tile * n.to(tl.int64) + o_n, mask=m_n, other=0.0).to(tl.float64)
    tl.store(totals + o_n, b_total, mask=m_n)


def head_total(sums: Tensor, totals: Tensor) -> None:
    """sums [tiles, 2, N] float32, totals [2, N] float64, both contiguous."""
    n = totals.numel()
    launch_kernel(head_total_kernel, (triton.cdiv(n, BT),), sums, totals, n, len(sums), BT=BT, num_warps=4)
