"""Second pass over the logits, or the only one: A[s, v] = sum of alpha_t p_tv over response s's tokens t.

The feature of a response is a product with the weight, Phi_s ~ sum_t alpha_t (1 - p_y) W[y_t] - A[s] W over
the vocabulary without y_t (head_project.py, head_gather.py): as it is linear in the probabilities, they are
summed over tokens first, and the second matrix product has a row for each response instead of one for each
token.

Items of work are (vocabulary tile, token strip) pairs, strips being whole token blocks. A program walks the
strip's blocks: logits, then p = 2^(x - shift), then sums over the tokens of each response. Strip j's part of
response s is row j + s of `partial`: along the tokens j and s only ever rise, so no two pairs share a row,
and each number has one program that writes it. head_collect.py adds the strips of a response in order: the
same bits every time.

`shift` is the token's logsumexp: exact, from the first pass, or seeded by the sampler's log-probability. A
seeded pass also writes l = sum p and u = sum p (x - shift) of each token over each tile (the realised token
left out), from which the exact values follow. A correction subtracts what the seed had given: p = 2^(x -
shift) - kappa 2^(x - seed).

Tokens come from a list (`index`) where some were left out, else in order. `cu_seqlens` counts positions in
that list, and lives on the device: how many tokens there are is not known where kernels are launched, so
programs find out for themselves, and do nothing where there are none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tile import INTERPRETED, Head, add_bias, descriptor, dot_tile, programs, raw_logits
from .tuning import Config


@triton.jit(do_not_specialize=["N", "V", "s_begin", "s_end", "i_tile0", "n_tiles", "n_strips", "D"])
def head_residual_kernel(
    hidden, weight, bias, tokens, response, alpha, shift, seed, kappa, index, cu_seqlens,
    partial, sums, N, V, s_begin, s_end, i_tile0, n_tiles, n_strips, scale, factor,
    stride_hn, stride_hd, stride_wv, stride_wd,
    D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_D: tl.constexpr,
    H_TMA: tl.constexpr, W_TMA: tl.constexpr, LISTED: tl.constexpr, SUMS: tl.constexpr, CORRECT: tl.constexpr,
    WEIGHTED: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_program, n_programs = tl.program_id(0), tl.num_programs(0)
    t_begin = tl.load(cu_seqlens + s_begin).to(tl.int32)
    t_end = tl.load(cu_seqlens + s_end).to(tl.int32)
    n_blocks = tl.cdiv(t_end - t_begin, BM)
    blocks_per_strip = tl.maximum(tl.cdiv(n_blocks, n_strips), 1)
    n_strips = tl.cdiv(n_blocks, blocks_per_strip)  # those that hold tokens: a short list fills few, or none
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
            hidden, weight, o_row, m_row, i_row, i_col, stride_hn, stride_hd, stride_wv, stride_wd, V,
            D, BM, BN, BK, EVEN_D, H_TMA, W_TMA, PRECISION, UPCAST,
        )  # fmt: skip
        b_y = tl.load(tokens + o_row, mask=m_row, other=0).to(tl.int32)
        b_shift = tl.load(shift + o_row, mask=m_row, other=0.0)
        b_response = tl.load(response + o_row, mask=m_row, other=-1)
        BRANCH: tl.constexpr = not (SUMS or CORRECT or SOFTCAP)
        b_x = add_bias(b_acc, b_y, bias, i_col, V, factor, BN, HAS_BIAS, BRANCH)
        b_r = raw_logits(b_x, scale, factor, SOFTCAP)
        b_distance = b_r * factor - b_shift[:, None]
        b_p = tl.exp2(b_distance)
        if SUMS:
            b_l, b_u = tl.sum(b_p, axis=1), tl.sum(b_p * b_distance, axis=1)
            p_sums = sums + i_tile * 2 * N.to(tl.int64) + o_row
            tl.store(p_sums, b_l, mask=m_row)
            tl.store(p_sums + N, b_u, mask=m_row)
        if CORRECT:
            # kappa = 0 where a seed overflowed: 0 times infinity must not come of it
            b_seed = tl.where(b_kappa > 0, tl.load(seed + o_row, mask=m_row, other=0.0), float("inf"))
            b_p -= tl.exp2(b_r * factor - b_seed[:, None])
        if SOFTCAP:  # the slope 1 - tanh^2: off by rounding of 1, as little as p is; -1 for what is masked
            b_tanh = tl.maximum(b_r, -1.0)
            b_p *= 1 - b_tanh * b_tanh
        if WEIGHTED:
            b_p *= tl.load(alpha + o_row, mask=m_row, other=0.0)[:, None]

        # The tokens of a block belong to consecutive responses, most often to one. The sum over a response's
        # earlier blocks lies in memory: in registers it would take as many as half a tile of products.
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
                b_part = tl.sum(tl.where((b_response == i_response)[:, None], b_p, 0.0), axis=0)
                if i_response == i_current:
                    tl.debug_barrier()  # after the store of the block before
                    b_part += tl.load(p_out + i_response * n_columns)
                tl.store(p_out + i_response * n_columns, b_part)
            i_current = i_to


def head_residual(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    response: Tensor,
    alpha: Tensor | None,
    shift: Tensor,
    cu_seqlens: Tensor,
    *,
    partial: Tensor,
    responses: range,
    tiles: range,
    n_strips: int,
    config: Config,
    precision: str,
    sums: Tensor | None = None,
    index: Tensor | None = None,
    seed: Tensor | None = None,
    kappa: Tensor | None = None,
) -> None:
    """Fills partial [len(responses) + n_strips - 1, len(tiles) BN]; see above for what it holds.

    hidden [N, d], tokens, shift [N], response [N] int32, alpha [N] or None for all 1; cu_seqlens [S + 1]
    int64 over `index` [K] int64 if that is given (K <= N, known to the device alone), else over rows. sums
    [len(tiles), 2, N] makes it a seeded pass; seed [N] and kappa [1] make it a correction.
    """
    N, D = hidden.shape
    n_programs = programs(hidden.device) * config.programs_per_sm
    d_hidden = None if index is not None else descriptor(hidden, (config.BM, config.BK))
    d_weight = descriptor(head.weight, (config.BN, config.BK))
    head_residual_kernel[(min(n_programs, len(tiles) * n_strips),)](
        d_hidden or hidden, d_weight or head.weight, head.bias, tokens, response, alpha, shift, seed, kappa,
        index, cu_seqlens, partial, sums, N, head.weight.shape[0], responses.start, responses.stop,
        tiles.start, len(tiles), n_strips, head.scale, head.factor, *hidden.stride(), *head.weight.stride(),
        D=D, BM=config.BM, BN=config.BN, BK=config.BK, EVEN_D=D % config.BK == 0,
        H_TMA=d_hidden is not None, W_TMA=d_weight is not None, LISTED=index is not None,
        SUMS=sums is not None, CORRECT=seed is not None, WEIGHTED=alpha is not None,
        HAS_BIAS=head.bias is not None, SOFTCAP=head.has_softcap, PRECISION=precision, UPCAST=INTERPRETED,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
