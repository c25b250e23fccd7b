"""First pass over the logits: per token, what its log-probability, logsumexp and entropy are made of.

In: hidden, weight, tokens. Out, for each token and vocabulary strip: the maximum m of its base-2 logits x,
l = sum 2^(x - m) and u = sum 2^(x - m) (x - m); and logits for the backward pass (kept.py). Where asked for,
q = sum 2^(2 (x - m)) and the first entry at m as well.

Exact: the realised token is left out of the sums (target.py has its logit), each (token block, vocabulary
strip) pair is computed by one program and written once, and finish.py merges the strips in order. Strips
depend on the vocabulary alone: a token has the same bits in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kept import KeptLogits, code_of, kept_arguments, store_kept
from .launch import launch_kernel
from .tile import (
    TILE_FLAGS,
    HeadOperands,
    add_bias,
    by_tma,
    dot_tile,
    given,
    masked_raw,
    programs,
    raw_logits,
)
from .tuning import Config

MAX_STRIPS = 128  # many, so that programs have much the same work with any number of tokens
BLOCKS = 16  # token blocks that are in use together


@triton.heuristics(TILE_FLAGS | given("GATED", "gate") | given("MORE", "top") | by_tma("K_TMA", "kept"))
@triton.jit(do_not_specialize=["N", "V", "n_strips", "tiles_per_strip", "i_kept", "stride_ln", "R", "D"])
def head_stats_kernel(
    hidden, weight, low_hidden, low_weight, bias, tokens, gate, partial, top, kept, largest,
    N, V, n_strips, tiles_per_strip, i_kept,
    scale, factor, factors,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_kn, stride_ln,
    R, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_D: tl.constexpr, H_TMA: tl.constexpr, W_TMA: tl.constexpr, GATED: tl.constexpr, MORE: tl.constexpr,
    HAS_BIAS: tl.constexpr, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    KEPT: tl.constexpr, K_TMA: tl.constexpr, BLOCKS: tl.constexpr, LARGEST: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    # Consecutive programs take BLOCKS token blocks of one strip, then those of the next strip: the tiles of
    # the weight and the rows of hidden that are in use together stay in the L2 cache.
    i_program, n_programs = tl.program_id(0), tl.num_programs(0)
    n_blocks = tl.cdiv(N, BM)
    n_items = n_blocks * n_strips
    n_mine = tl.cdiv(n_items - i_program, n_programs)
    if GATED:  # no work unless the flag is up
        n_mine = n_mine * tl.load(gate).to(tl.int32)

    # m starts half way to MASKED, so that it is never that of masked entries alone: x - m, compiled to one
    # fused multiply-add, would be the rounding error of 1e30 and not 0. This leaves them 2^(-5e29) = 0.
    start = 0.5 * factor * masked_raw(factor)
    b_m = tl.full([BM], 0.0, dtype=tl.float32) + start
    b_l = tl.zeros([BM], dtype=tl.float32)
    b_u = tl.zeros([BM], dtype=tl.float32)
    ROWS: tl.constexpr = 4 if MORE else 3
    if MORE:
        b_q = tl.zeros([BM], dtype=tl.float32)
        b_top = tl.full([BM], -1, dtype=tl.int32)
    for i_step in range(n_mine * tiles_per_strip):
        i_item = i_program + (i_step // tiles_per_strip) * n_programs
        i_tile = i_step % tiles_per_strip
        i_group = i_item // (BLOCKS * n_strips) * BLOCKS
        n_group = tl.minimum(n_blocks - i_group, BLOCKS)
        i_strip = (i_item - i_group * n_strips) // n_group
        i_block = i_group + (i_item - i_group * n_strips) % n_group
        i_row, i_col = i_block * BM, (i_strip * tiles_per_strip + i_tile) * BN
        o_row = i_row + tl.arange(0, BM)
        m_row = o_row < N

        b_acc = dot_tile(
            hidden, weight, low_hidden, low_weight, o_row, m_row, i_row, i_col, stride_hn, stride_hd,
            stride_wv, stride_wd, V, R, D, BM, BN, BK, EVEN_D, H_TMA, W_TMA, PRECISION, UPCAST, LOW,
        )  # fmt: skip
        if KEPT == 4 and i_col >= i_kept:
            store_kept(kept, b_acc, i_row, i_col - i_kept, o_row, m_row, stride_kn, BN, K_TMA)
        b_y = tl.load(tokens + o_row, mask=m_row, other=0).to(tl.int32)
        # of each row, as a number or [BM], and to go with tiles, as a number or [BM, 1]
        b_factor, t_factor, b_start = factor, factor, start
        if TEMPERED:
            b_factor = tl.load(factors + o_row, mask=m_row, other=1.0)
            t_factor = b_factor[:, None]
            b_start = 0.5 * b_factor * masked_raw(b_factor)
        b_x = add_bias(b_acc, b_y, bias, i_col, V, t_factor, BN, HAS_BIAS, not SOFTCAP, TEMPERED)
        b_r = raw_logits(b_x, scale, t_factor, SOFTCAP)

        is_first = i_tile == 0
        b_m = tl.where(is_first, b_start, b_m)
        b_l = tl.where(is_first, 0.0, b_l)
        b_u = tl.where(is_first, 0.0, b_u)
        b_most = tl.max(b_r, axis=1)  # passes over a NaN, which shows in l
        b_new = tl.maximum(b_m, b_most * b_factor)
        b_distance = b_r * t_factor - b_new[:, None]
        b_e = tl.exp2(b_distance)
        b_shrink = tl.exp2(b_m - b_new)
        if MORE:  # of equal entries the first
            b_at = tl.where(b_r == b_most[:, None], (i_col + tl.arange(0, BN))[None, :], 0x7FFFFFFF)
            b_top = tl.where(b_new > b_m, tl.min(b_at, axis=1), tl.where(is_first, -1, b_top))
            b_q = tl.where(is_first, 0.0, b_q) * b_shrink * b_shrink + tl.sum(b_e * b_e, axis=1)
        b_u = (b_u + b_l * (b_m - b_new)) * b_shrink + tl.sum(b_e * b_distance, axis=1)
        b_l = b_l * b_shrink + tl.sum(b_e, axis=1)
        b_m = b_new
        if KEPT == 2 and i_col >= i_kept:
            p_largest = largest + o_row.to(tl.int64)[:, None] * stride_ln + (i_col - i_kept) // LARGEST
            p_largest += tl.arange(0, BN // LARGEST)[None, :]
            b_largest = tl.broadcast_to(b_new[:, None], [BM, BN // LARGEST])
            tl.store(p_largest, b_largest, mask=m_row[:, None])
            b_code = code_of(b_distance)
            store_kept(kept, b_code, i_row, i_col - i_kept, o_row, m_row, stride_kn, BN, K_TMA)

        if i_tile == tiles_per_strip - 1:
            p_out = partial + i_strip.to(tl.int64) * ROWS * N + o_row
            tl.store(p_out, b_m, mask=m_row)
            tl.store(p_out + N, b_l, mask=m_row)
            tl.store(p_out + 2 * N.to(tl.int64), b_u, mask=m_row)
            if MORE:
                tl.store(p_out + 3 * N.to(tl.int64), b_q, mask=m_row)
                tl.store(top + i_strip.to(tl.int64) * N + o_row, b_top, mask=m_row)


def strips(n_tiles: int) -> tuple[int, int]:
    """(strips, tiles per strip) of a vocabulary."""
    tiles = triton.cdiv(n_tiles, MAX_STRIPS)
    return triton.cdiv(n_tiles, tiles), tiles


def head_stats(
    hidden: Tensor,
    head: HeadOperands,
    tokens: Tensor,
    config: Config,
    *,
    gate: Tensor | None = None,
    kept: KeptLogits | None = None,
    more: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """hidden [N, d], tokens [N] -> partial [strips, 3, N]: m, l, u of each token over each vocabulary strip.

    With `more` partial [strips, 4, N], its last row q, and the first entry at m [strips, N] int32, else None.
    With `gate`, a flag of one element on the device, nothing happens (and partial is garbage) unless it is 1.
    `kept` is filled.
    """
    N, V = hidden.shape[0], head.weight.shape[0]
    n_programs = programs(hidden.device) * config.programs_per_sm
    n_strips, tiles_per_strip = strips(triton.cdiv(V, config.BN))
    partial = torch.empty(n_strips, 4 if more else 3, N, dtype=torch.float32, device=hidden.device)
    top = torch.empty(n_strips, N, dtype=torch.int32, device=hidden.device) if more else None
    launch_kernel(
        head_stats_kernel,
        (min(n_programs, triton.cdiv(N, config.BM) * n_strips),),
        **head.tiled(hidden, config),
        **kept_arguments(kept, config),
        tokens=tokens,
        gate=gate,
        partial=partial,
        top=top,
        N=N,
        n_strips=n_strips,
        tiles_per_strip=tiles_per_strip,
        BLOCKS=BLOCKS,
    )
    return partial, top
