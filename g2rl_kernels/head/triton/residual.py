"""Second pass over the logits, or the only one: A[s, v] = sum over response s's tokens t of alpha_t p_tv.

In: hidden, weight, tokens, and `shift`, each token's logsumexp: exact, or seeded by the sampler's log-prob.
Out: partial, in which row j + s is A over strip j of response s's tokens. A seeded pass (`sums`) also writes
l = sum p and u = sum p (x - shift) of each token over each tile. A correction (`seed`) subtracts what the
seed had given: p = 2^(x - shift) - kappa 2^(x - seed).

Exact: the realised token is left out; along the tokens j and s only rise, so each number has one writer;
collect.py adds the strips in order. head/README.md has the derivation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .chunk import Chunk, TokenList
from .launch import launch_kernel
from .tile import TILE_FLAGS, HeadOperands, add_bias, dot_tile, given, programs, raw_logits
from .tuning import Config

RESIDUAL_FLAGS = {
    **TILE_FLAGS,
    **given("LISTED", "index"),
    **given("SUMS", "sums"),
    **given("CORRECT", "seed"),
    **given("WEIGHTED", "alpha"),
}


@triton.heuristics(RESIDUAL_FLAGS)
@triton.jit(do_not_specialize=["N", "V", "s_begin", "s_end", "i_tile0", "n_tiles", "n_strips", "R", "D"])
def head_residual_kernel(
    hidden, weight, low_hidden, low_weight, bias, tokens, response, alpha, shift, seed, kappa, index,
    cu_seqlens, partial, sums,
    N, V, s_begin, s_end, i_tile0, n_tiles, n_strips,
    scale, factor, factors,
    stride_hn, stride_hd, stride_wv, stride_wd,
    R, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_D: tl.constexpr, H_TMA: tl.constexpr, W_TMA: tl.constexpr, LISTED: tl.constexpr,
    SUMS: tl.constexpr, CORRECT: tl.constexpr, WEIGHTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    # How many tokens there are is known to the device alone: programs read it, and end at once without work.
    i_program, n_programs = tl.program_id(0), tl.num_programs(0)
    t_begin = tl.load(cu_seqlens + s_begin).to(tl.int32)
    t_end = tl.load(cu_seqlens + s_end).to(tl.int32)
    n_blocks = tl.cdiv(t_end - t_begin, BM)
    blocks_per_strip = tl.maximum(tl.cdiv(n_blocks, n_strips), 1)
    n_strips = tl.cdiv(n_blocks, blocks_per_strip)  # strips with tokens: a short list fills few of them
    n_mine = tl.cdiv(n_tiles * n_strips - i_program, n_programs)
    n_columns = (n_tiles * BN).to(tl.int64)
    if CORRECT:
        b_kappa = tl.load(kappa)

    i_current = -1  # the response that the block before ended with
    for i_step in range(n_mine * blocks_per_strip):
        i_item = i_program + (i_step // blocks_per_strip) * n_programs
        i_block = i_step % blocks_per_strip
        i_tile, i_strip = i_item // n_strips, i_item % n_strips
        i_row = t_begin + (i_strip * blocks_per_strip + i_block) * BM
        i_col = (i_tile0 + i_tile) * BN
        o_list = i_row + tl.arange(0, BM)
        m_row = o_list < t_end
        o_row = tl.load(index + o_list, mask=m_row, other=0) if LISTED else o_list

        b_acc = dot_tile(
            hidden, weight, low_hidden, low_weight, o_row, m_row, i_row, i_col, stride_hn, stride_hd,
            stride_wv, stride_wd, V, R, D, BM, BN, BK, EVEN_D, H_TMA, W_TMA, PRECISION, UPCAST, LOW,
        )  # fmt: skip
        b_y = tl.load(tokens + o_row, mask=m_row, other=0).to(tl.int32)
        b_shift = tl.load(shift + o_row, mask=m_row, other=0.0)
        b_response = tl.load(response + o_row, mask=m_row, other=-1)
        BRANCH: tl.constexpr = not (SUMS or CORRECT or SOFTCAP)
        b_factor = factor  # [BM, 1] if TEMPERED
        if TEMPERED:
            b_factor = tl.load(factors + o_row, mask=m_row, other=1.0)[:, None]
        b_x = add_bias(b_acc, b_y, bias, i_col, V, b_factor, BN, HAS_BIAS, BRANCH, TEMPERED)
        b_r = raw_logits(b_x, scale, b_factor, SOFTCAP)
        b_distance = b_r * b_factor - b_shift[:, None]
        b_p = tl.exp2(b_distance)
        if SUMS:
            b_l, b_u = tl.sum(b_p, axis=1), tl.sum(b_p * b_distance, axis=1)
            p_sums = sums + i_tile * 2 * N.to(tl.int64) + o_row
            tl.store(p_sums, b_l, mask=m_row)
            tl.store(p_sums + N, b_u, mask=m_row)
        if CORRECT:
            # kappa = 0 where a seed overflowed: avoid 0 times infinity
            b_seed = tl.where(b_kappa > 0, tl.load(seed + o_row, mask=m_row, other=0.0), float("inf"))
            b_p -= tl.exp2(b_r * b_factor - b_seed[:, None])
        if SOFTCAP:  # the slope 1 - tanh^2, off by a rounding error of 1 as p is; masked: tanh = -1
            b_tanh = tl.maximum(b_r, -1.0)
            b_p *= 1 - b_tanh * b_tanh
        if WEIGHTED:
            b_p *= tl.load(alpha + o_row, mask=m_row, other=0.0)[:, None]

        # The tokens of a block belong to consecutive responses, most often to one. The sum over a response's
        # earlier blocks is kept in memory: in registers it would take as many as half a tile of products.
        if i_row < t_end:
            i_last = tl.minimum(i_row + BM, t_end) - 1
            if LISTED:
                i_from = tl.load(response + tl.load(index + i_row))
                i_to = tl.load(response + tl.load(index + i_last))
            else:
                i_from = tl.load(response + i_row)
                i_to = tl.load(response + i_last)
            if i_block == 0:
                i_current = -1
            p_out = partial + (i_strip - s_begin) * n_columns + i_tile * BN + tl.arange(0, BN)
            for i_response in range(i_from, i_to + 1):
                b_sum = tl.sum(tl.where((b_response == i_response)[:, None], b_p, 0.0), axis=0)
                if i_response == i_current:
                    tl.debug_barrier()  # after the store of the block before
                    b_sum += tl.load(p_out + i_response * n_columns)
                tl.store(p_out + i_response * n_columns, b_sum)
            i_current = i_to


def head_residual(
    chunk: Chunk,
    head: HeadOperands,
    shift: Tensor,
    *,
    partial: Tensor,
    responses: range,
    tiles: range,
    n_strips: int,
    config: Config,
    sums: Tensor | None = None,
    listed: TokenList | None = None,
    seed: Tensor | None = None,
    kappa: Tensor | None = None,
) -> None:
    """Fills partial [len(responses) + n_strips - 1, len(tiles) BN].

    shift [n], of the chunk's tokens. `listed`: some of them alone, whose number only the device knows.
    `sums` [len(tiles), 2, n] makes it a seeded pass; `seed` [n] and `kappa` [1] make it a correction.
    """
    n_programs = programs(shift.device) * config.programs_per_sm
    launch_kernel(
        head_residual_kernel,
        (min(n_programs, len(tiles) * n_strips),),
        **head.tiled(chunk.hidden, config, gather=listed is not None),
        tokens=chunk.tokens,
        response=chunk.response,
        alpha=chunk.alpha,
        shift=shift,
        seed=seed,
        kappa=kappa,
        index=None if listed is None else listed.rows,
        cu_seqlens=chunk.cu_seqlens if listed is None else listed.cu_seqlens,
        partial=partial,
        sums=sums,
        N=shift.shape[0],
        s_begin=responses.start,
        s_end=responses.stop,
        i_tile0=tiles.start,
        n_tiles=len(tiles),
        n_strips=n_strips,
    )
