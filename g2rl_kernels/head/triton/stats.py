"""First pass over the logits: per token, what its log-probability, logsumexp and entropy are made of.

In: hidden, weight, tokens. Out, for each token and vocabulary strip: the maximum m of its base-2 logits x,
l = sum 2^(x - m) and u = sum 2^(x - m) (x - m). Where asked for, q = sum 2^(2 (x - m)) and the first entry
at m as well.

Exact: the realised token is left out of the sums (target.py has its logit), each (token block, vocabulary
strip) pair is computed by one program and written once, and finish.py merges the strips in order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel
from .tile import TILE_FLAGS, HeadOperands, add_bias, dot_tile, given, masked_raw, programs, raw_logits
from .tuning import Config

MAX_STRIPS = 32


@triton.heuristics(TILE_FLAGS | given("GATED", "gate") | given("MORE", "top"))
@triton.jit(do_not_specialize=["N", "V", "n_strips", "tiles_per_strip", "D"])
def head_stats_kernel(
    hidden, weight, bias, tokens, gate, partial, top,
    N, V, n_strips, tiles_per_strip,
    scale, factor, factors,
    stride_hn, stride_hd, stride_wv, stride_wd,
    D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_D: tl.constexpr, H_TMA: tl.constexpr, W_TMA: tl.constexpr, GATED: tl.constexpr, MORE: tl.constexpr,
    HAS_BIAS: tl.constexpr, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # Consecutive programs take the strips of one token block, then those of the next: the tiles of the weight
    # and the rows of hidden that are in use together stay in the L2 cache.
    i_program, n_programs = tl.program_id(0), tl.num_programs(0)
    n_items = tl.cdiv(N, BM) * n_strips
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
        i_block, i_strip = i_item // n_strips, i_item % n_strips
        i_row, i_col = i_block * BM, (i_strip * tiles_per_strip + i_tile) * BN
        o_row = i_row + tl.arange(0, BM)
        m_row = o_row < N

        b_acc = dot_tile(
            hidden, weight, o_row, m_row, i_row, i_col, stride_hn, stride_hd, stride_wv, stride_wd, V,
            D, BM, BN, BK, EVEN_D, H_TMA, W_TMA, PRECISION, UPCAST,
        )  # fmt: skip
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
        b_largest = tl.max(b_r, axis=1)  # passes over a NaN, which shows in l
        b_new = tl.maximum(b_m, b_largest * b_factor)
        b_distance = b_r * t_factor - b_new[:, None]
        b_e = tl.exp2(b_distance)
        b_shrink = tl.exp2(b_m - b_new)
        if MORE:  # of equal entries the first
            b_at = tl.where(b_r == b_largest[:, None], (i_col + tl.arange(0, BN))[None, :], 0x7FFFFFFF)
            b_top = tl.where(b_new > b_m, tl.min(b_at, axis=1), tl.where(is_first, -1, b_top))
            b_q = tl.where(is_first, 0.0, b_q) * b_shrink * b_shrink + tl.sum(b_e * b_e, axis=1)
        b_u = (b_u + b_l * (b_m - b_new)) * b_shrink + tl.sum(b_e * b_distance, axis=1)
        b_l = b_l * b_shrink + tl.sum(b_e, axis=1)
        b_m = b_new

        if i_tile == tiles_per_strip - 1:
            p_out = partial + i_strip.to(tl.int64) * ROWS * N + o_row
            tl.store(p_out, b_m, mask=m_row)
            tl.store(p_out + N, b_l, mask=m_row)
            tl.store(p_out + 2 * N.to(tl.int64), b_u, mask=m_row)
            if MORE:
                tl.store(p_out + 3 * N.to(tl.int64), b_q, mask=m_row)
                tl.store(top + i_strip.to(tl.int64) * N + o_row, b_top, mask=m_row)


@lru_cache
def strips(n_blocks: int, n_tiles: int, n_programs: int, most: int) -> tuple[int, int]:
    """(strips, tiles per strip) with the fewest tiles for the busiest program; the first of equals.

    At least 8 strips: then the rows of hidden that are in use together, some 16 blocks, fit in the L2 cache.
    """

    def busiest(n_strips: int) -> int:
        return triton.cdiv(n_blocks * n_strips, n_programs) * triton.cdiv(n_tiles, n_strips)

    best = min(range(min(8, n_tiles), min(most, n_tiles) + 1), key=lambda n: (busiest(n), n))
    tiles = triton.cdiv(n_tiles, best)
    return triton.cdiv(n_tiles, tiles), tiles


def head_stats(
    hidden: Tensor,
    head: HeadOperands,
    tokens: Tensor,
    config: Config,
    gate: Tensor | None = None,
    more: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """hidden [N, d], tokens [N] -> partial [strips, 3, N]: m, l, u of each token over each vocabulary strip.

    With `more` partial [strips, 4, N], its last row q, and the first entry at m [strips, N] int32, else None.
    With `gate`, a flag of one element on the device, nothing happens (and partial is garbage) unless it is 1.
    """
    N, V = hidden.shape[0], head.weight.shape[0]
    n_programs = programs(hidden.device) * config.programs_per_sm
    n_blocks = triton.cdiv(N, config.BM)
    n_strips, tiles_per_strip = strips(n_blocks, triton.cdiv(V, config.BN), n_programs, MAX_STRIPS)
    partial = torch.empty(n_strips, 4 if more else 3, N, dtype=torch.float32, device=hidden.device)
    top = torch.empty(n_strips, N, dtype=torch.int32, device=hidden.device) if more else None
    launch_kernel(
        head_stats_kernel,
        (min(n_programs, n_blocks * n_strips),),
        **head.tiled(hidden, config),
        tokens=tokens,
        gate=gate,
        partial=partial,
        top=top,
        N=N,
        n_strips=n_strips,
        tiles_per_strip=tiles_per_strip,
    )
    return partial, top
