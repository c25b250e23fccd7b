"""out += dz W, in an order that the number of tokens has no part in.

In: dz [n, columns] in the dtype of hidden, the weight's rows of these columns; out [n, d] float32.

Used with torch.use_deterministic_algorithms(True). cuBLAS is faster, but chooses the order of its sums by the
sizes of the product, so that hidden's gradient of a token depends on its batch. Here a program owns a tile of
`out` and takes the columns in order, one call after the other. float32 columns are added up BV at a time,
then to `out`: one sum of 150,000 terms would lose a digit. 16-bit results lose more when they are rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel
from .tile import UPCAST, HeadOperands, by_tma, descriptor, weight_arguments
from .tuning import Config, Family, aligned, family


@triton.heuristics(by_tma("G_TMA", "gradient") | by_tma("W_TMA", "weight") | UPCAST)
@triton.jit(do_not_specialize=["n_rows", "i_col0", "n_columns", "V", "D"])
def head_product_kernel(
    gradient, weight, out,
    n_rows, i_col0, n_columns, V, D,
    stride_gn, stride_wv, stride_wd, stride_on,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    G_TMA: tl.constexpr, W_TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_r, i_d = tl.program_id(0) * BM, tl.program_id(1) * BD
    o_r, o_d = i_r + tl.arange(0, BM), i_d + tl.arange(0, BD)
    m_r, m_d = o_r < n_rows, o_d < D
    p_out = out + o_r.to(tl.int64)[:, None] * stride_on + o_d[None, :]
    m_out = m_r[:, None] & m_d[None, :]
    b_total = tl.load(p_out, mask=m_out, other=0.0)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32) if BV else b_total
    for i_c in range(0, n_columns, BK):
        o_c = i_c + tl.arange(0, BK)
        o_v = i_col0 + o_c
        if G_TMA:
            b_g = gradient.load([i_r, i_c])
        else:
            p_g = gradient + o_r.to(tl.int64)[:, None] * stride_gn + o_c[None, :]
            b_g = tl.load(p_g, mask=m_r[:, None] & (o_c < n_columns)[None, :], other=0.0)
        if W_TMA:
            b_w = weight.load([i_col0 + i_c, i_d])
        else:
            p_w = weight + o_v.to(tl.int64)[:, None] * stride_wv + o_d.to(tl.int64)[None, :] * stride_wd
            b_w = tl.load(p_w, mask=((o_c < n_columns) & (o_v < V))[:, None] & m_d[None, :], other=0.0)
        if UPCAST:  # Triton's interpreter multiplies the raw bits of bfloat16
            b_g = b_g.to(tl.float32)
            b_w = b_w.to(tl.float32)
        b_acc = tl.dot(b_g, b_w, b_acc, input_precision=PRECISION)
        if BV:  # noqa: SIM102 (a constant)
            if (i_c + BK) % BV == 0:
                b_total += b_acc
                b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    tl.store(p_out, b_total + b_acc if BV else b_acc, mask=m_out)


def head_product(gradient: Tensor, head: HeadOperands, first: int, out: Tensor, strip: int) -> None:
    """out [n, d] float32 += gradient [n, columns] @ weight[first : first + columns].

    strip: BV of a float32 product. It divides first, and the number of columns unless they are the last.
    """
    (n, n_columns), D = gradient.shape, head.weight.shape[1]
    config = tile(gradient.element_size(), head, family(gradient.device) if gradient.is_cuda else None)
    launch_kernel(
        head_product_kernel,
        (triton.cdiv(n, config.BM), triton.cdiv(D, config.BN)),
        **weight_arguments(head.weight)
        | {"weight": descriptor(head.weight, (config.BK, config.BN)) or head.weight},
        gradient=descriptor(gradient, (config.BM, config.BK)) or gradient,
        out=out,
        n_rows=n,
        i_col0=first,
        n_columns=n_columns,
        stride_gn=gradient.stride(0),
        stride_on=out.stride(0),
        BV=strip if gradient.element_size() == 4 else 0,
        PRECISION=head.precision,
        BM=config.BM,
        BD=config.BN,
        BK=config.BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def tile(element_size: int, head: HeadOperands, which: Family | None) -> Config:
    """BM tokens x BN of the hidden size, BK columns of dz at a time. `which` family of GPUs; None: the
    interpreter. Neither the number of tokens nor that of columns has a part in it."""
    if which is None:
        return Config(32, 64, 32, 4, 2)
    large = which in (9, 10)
    if element_size == 4 and head.precision == "ieee":
        return Config(64, 64, 16, 8, 2)
    if element_size == 4:
        return Config(64, 32, 32, 8, 2) if large else Config(32, 32, 16, 8, 2)
    if not aligned(head.weight):
        return Config(64, 64, 32, 8, 2)
    if which == "hip":
        return Config(128, 128, 32, 8, 2)
    return Config(128, 128, 64, 8, 3) if large else Config(128, 64, 32, 8, 3)
