"""Gradient of the logits of some tokens and vocabulary entries: dz of head/logprobs.py.

In: hidden, weight, tokens; per token the logsumexp in two numbers and a, e, at_token, times their common
factors. Out: dz [rows, columns], rounded to the dtype of hidden for the two products that follow:

    dz_v = -p_v (a + e log p_v), at the realised token at_token;   times the softcap's slope

Exact: a program takes one tile of logits, computed anew or kept by the forward pass (kept.py), and writes its
gradient once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .kept import KeptLogits, distance_of, kept_arguments, load_kept
from .launch import launch_kernel
from .tile import (
    LOG2_E,
    TILE_FLAGS,
    HeadOperands,
    by_tma,
    descriptor,
    dot_tile,
    plus_bias,
    raw_logits,
    softcap_slope,
)
from .tuning import Config


@triton.heuristics(TILE_FLAGS | by_tma("G_TMA", "gradient") | by_tma("K_TMA", "kept"))
@triton.jit(
    do_not_specialize=[
        *("N", "V", "i_row0", "n_rows", "i_col0", "n_columns", "n_blocks", "i_kept", "stride_ln", "R", "D")
    ]
)
def head_gradient_kernel(
    hidden, weight, low_hidden, low_weight, bias, tokens, numbers, gradient, kept, largest,
    N, V, i_row0, n_rows, i_col0, n_columns, n_blocks, i_kept,
    scale, factor, factors,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_gn, stride_kn, stride_ln,
    R, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_D: tl.constexpr, H_TMA: tl.constexpr, W_TMA: tl.constexpr, G_TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, KEPT: tl.constexpr, K_TMA: tl.constexpr, LARGEST: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    # Consecutive programs take the token blocks of one vocabulary tile: their rows of hidden and weight, and
    # dz, meet in the L2 cache.
    i_program = tl.program_id(0)
    i_r, i_c = (i_program % n_blocks) * BM, (i_program // n_blocks) * BN
    i_row, i_col = i_row0 + i_r, i_col0 + i_c
    o_row, o_col = i_row + tl.arange(0, BM), i_col + tl.arange(0, BN)
    m_row = o_row < i_row0 + n_rows

    if KEPT == 0:
        b_acc = dot_tile(
            hidden, weight, low_hidden, low_weight, o_row, m_row, i_row, i_col, stride_hn, stride_hd,
            stride_wv, stride_wd, V, R, D, BM, BN, BK, EVEN_D, H_TMA, W_TMA, PRECISION, UPCAST, LOW,
        )  # fmt: skip
    else:
        b_kept = load_kept(kept, i_row, i_col - i_kept, o_row, m_row, stride_kn, BN, K_TMA)
    b_y = tl.load(tokens + o_row, mask=m_row, other=-1).to(tl.int32)
    p_numbers = numbers + o_row
    N = N.to(tl.int64)
    b_top = tl.load(p_numbers, mask=m_row, other=0.0)
    b_log_total = tl.load(p_numbers + N, mask=m_row, other=0.0)
    b_a = tl.load(p_numbers + 2 * N, mask=m_row, other=0.0)
    b_e = tl.load(p_numbers + 3 * N, mask=m_row, other=0.0)
    b_at_token = tl.load(p_numbers + 4 * N, mask=m_row, other=0.0)

    b_factor = factor  # [BM, 1] if TEMPERED
    if TEMPERED:
        b_factor = tl.load(factors + o_row, mask=m_row, other=1.0)[:, None]
    if KEPT == 2:
        p_largest = largest + o_row.to(tl.int64)[:, None] * stride_ln + ((o_col - i_kept) // LARGEST)[None, :]
        b_largest = tl.load(p_largest, mask=m_row[:, None], other=0.0)
        b_z = (b_largest + distance_of(b_kept)) * (1 / LOG2_E)
    else:
        b_acc = b_acc if KEPT == 0 else b_kept
        b_x = plus_bias(b_acc, bias, i_col, V, b_factor, BN, TEMPERED) if HAS_BIAS else b_acc
        b_z = raw_logits(b_x, scale, b_factor, SOFTCAP) * b_factor
    b_log_p = b_z - b_top[:, None] - b_log_total[:, None]
    b_p = tl.exp2(b_log_p * LOG2_E)
    if HAS_BIAS or KEPT == 2:  # a masked entry: e times this must not overflow, as 0 times infinity is NaN
        b_log_p = tl.maximum(b_log_p, -150.0)
    b_g = -b_p * (b_a[:, None] + b_e[:, None] * b_log_p)
    is_token = o_col[None, :] == b_y[:, None]
    if SOFTCAP:
        b_g = tl.where(is_token, b_at_token[:, None], b_g) * softcap_slope(b_x * scale)
    else:  # most tiles hold no realised token
        n_here = tl.sum(((b_y >= i_col) & (b_y < i_col + BN)).to(tl.int32), axis=0)
        if n_here > 0:
            b_g = tl.where(is_token, b_at_token[:, None], b_g)

    if G_TMA:
        gradient.store([i_r, i_c], b_g.to(gradient.dtype))
    else:
        o_r, o_c = i_r + tl.arange(0, BM), i_c + tl.arange(0, BN)
        p_g = gradient + o_r.to(tl.int64)[:, None] * stride_gn + o_c[None, :]
        m_g = (o_r < n_rows)[:, None] & (o_c < n_columns)[None, :]
        tl.store(p_g, b_g.to(gradient.dtype.element_ty), mask=m_g)


def head_gradient(
    hidden: Tensor,
    head: HeadOperands,
    tokens: Tensor,
    numbers: Tensor,
    rows: slice,
    columns: slice,
    gradient: Tensor,
    config: Config,
    kept: KeptLogits | None = None,
) -> None:
    """Fills gradient [rows, columns], of the dtype of hidden, with rows a multiple of 16 numbers apart.

    hidden [N, d], tokens [N] int64 that fit an int32, numbers [5, N] float32: the logsumexp in two numbers
    (nats), a, e and at_token. `kept`: the logits of these columns; None: they are computed.
    """
    n_rows, n_columns = gradient.shape
    if kept is not None:
        config = config.for_kept()
    n_blocks = triton.cdiv(n_rows, config.BM)
    launch_kernel(
        head_gradient_kernel,
        (n_blocks * triton.cdiv(n_columns, config.BN),),
        **head.tiled(hidden, config, factor=head.nats),
        tokens=tokens,
        numbers=numbers,
        gradient=descriptor(gradient, (config.BM, config.BN)) or gradient,
        N=hidden.shape[0],
        i_row0=rows.start,
        n_rows=n_rows,
        i_col0=columns.start,
        n_columns=n_columns,
        n_blocks=n_blocks,
        stride_gn=gradient.stride(0),
        **kept_arguments(kept, config),
    )
