"""Equations 9-13 and 2 on groups of at most 32, in one launch: the Triton twin of csrc/cuda/group.cu.

In: features, rewards, members. Out: similarity, exploration scores, shaped rewards, advantages; zeros in rows
that no group names. A second, one-program kernel runs only for the batch's deviation.

Exact: float32 products are exact in float64; sums are in float64, in an order that depends on shapes alone.
A program owns a group. BW blocks of d are multiplied side by side, so that all warps work although the Gram
matrix is as small as 16 x 16; the rest is in registers. float64 products use tensor cores on sm_80, sm_90 and
CDNA, plain multiply-adds elsewhere. group/geometry.py chooses: the C++ kernel where it was built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head.triton.launch import launch_kernel
from ..head.triton.tuning import is_hip
from ..versions import minor

MAX_M = 32  # several [64, 64] matrices of doubles do not fit the registers
BR, BC = 256, 16  # zero_unnamed: rows of a program; members compared with them at once
BP = 1024  # places of members that batch_scale_kernel takes at a time


class Config(NamedTuple):
    BM: int  # places of a group, a power of two
    BK: int  # columns of one product
    BW: int  # products side by side
    num_warps: int
    num_stages: int = 2

    def constants(self) -> dict[str, int]:
        return {"BM": self.BM, "BK": self.BK, "BW": self.BW, "BR": BR, "BC": BC}

    def launch(self) -> dict[str, int]:
        return {**self.constants(), "num_warps": self.num_warps, "num_stages": self.num_stages}


# As large as fits: in the 99 KiB of shared memory of NVIDIA's consumer GPUs, where the operands of plain
# multiply-adds take 80; and in the registers of RDNA, which multiplies no matrices of float64, and of
# Blackwell's consumer GPUs (Triton 3.6 spills with more than one product of 32 x 32).
CONFIGS = (Config(16, 32, 4, 8), Config(32, 16, 4, 4))
BLACKWELL_CONFIGS = (Config(16, 32, 4, 8), Config(32, 16, 1, 8))
HIP_CONFIGS = (Config(16, 16, 8, 8), Config(32, 16, 2, 8))


def takes(M: int) -> bool:
    """Whether the kernel takes groups of at most M here. On AMD Triton multiplies float64 from 3.8 on."""
    return M <= MAX_M and not (is_hip() and minor(triton.__version__) < (3, 8))


def configs_of(capability: int) -> tuple[Config, ...]:
    """Those of NVIDIA's GPUs of compute capability `capability`.x."""
    return BLACKWELL_CONFIGS if capability == 12 else CONFIGS


def configs_on(device: torch.device) -> tuple[Config, ...]:
    """Those of this GPU, or of the interpreter."""
    if is_hip():
        return HIP_CONFIGS
    return configs_of(torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else CONFIGS


@triton.jit
def zero_unnamed(
    members,
    exploration_score,
    shaped_rewards,
    advantages,
    i_block,
    S,
    places,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_r = i_block.to(tl.int64) * BR + tl.arange(0, BR)
    b_named = tl.zeros([BR], dtype=tl.int32)
    for o in range(0, places, BC):
        o_p = o + tl.arange(0, BC).to(tl.int64)
        b_row = tl.load(members + o_p, mask=o_p < places, other=-1)
        b_named |= tl.max((o_r[:, None] == b_row[None, :]).to(tl.int32), axis=1)
    m_r = (o_r < S) & (b_named == 0)
    b_zero = tl.zeros([BR], dtype=tl.float32)
    tl.store(exploration_score + o_r, b_zero, mask=m_r)
    tl.store(shaped_rewards + o_r, b_zero, mask=m_r)
    tl.store(advantages + o_r, b_zero, mask=m_r)


@triton.jit(do_not_specialize=["S", "d", "B", "M"])
def group_kernel(
    features,
    rewards,
    members,
    similarity,
    exploration_score,
    shaped_rewards,
    advantages,
    values,
    S,
    d,
    B,
    M,
    lam: tl.float64,
    clip: tl.float64,
    eps: tl.float64,
    SHAPING: tl.constexpr,
    SCORE: tl.constexpr,
    SCALE: tl.constexpr,
    SKIP_UNIFORM: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BW: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    if tl.program_id(0) >= B:
        zero_unnamed(
            members, exploration_score, shaped_rewards, advantages, tl.program_id(0) - B, S, B * M, BR, BC
        )
        return
    i_b = tl.program_id(0).to(tl.int64)
    o_m = tl.arange(0, BM)
    b_row = tl.load(members + i_b * M + o_m, mask=o_m < M, other=-1)
    m_m = (b_row >= 0) & (b_row < S)
    b_r = tl.load(rewards + b_row, mask=m_m, other=0.0).to(tl.float64)

    # 1. inner products
    o_w = tl.arange(0, BW)[:, None, None] * BK + tl.arange(0, BK)[None, None, :]
    p_row = features + (b_row * d)[None, :, None]
    b_gram = tl.zeros([BW, BM, BM], dtype=tl.float64)
    for k in range(0, d, BW * BK):
        b_x = tl.load(p_row + (k + o_w), mask=m_m[None, :, None] & (k + o_w < d), other=0.0).to(tl.float64)
        b_gram = tl.dot(b_x, tl.permute(b_x, (0, 2, 1)), b_gram, out_dtype=tl.float64)
    b_g = tl.sum(b_gram, axis=0)

    # 2. eq. 9
    m_diagonal = o_m[:, None] == o_m[None, :]
    m_pair = m_m[:, None] & m_m[None, :]
    b_square = tl.where(m_diagonal, b_g, 0.0)
    b_norm_i, b_norm_j = tl.sqrt(tl.sum(b_square, axis=1)), tl.sqrt(tl.sum(b_square, axis=0))
    b_s = tl.where(m_pair, b_g / ((b_norm_i + eps)[:, None] * (b_norm_j + eps)[None, :]), 0.0)
    p_s = similarity + i_b * M * M + o_m[:, None] * M.to(tl.int64) + o_m[None, :]
    tl.store(p_s, b_s.to(tl.float32), mask=(o_m < M)[:, None] & (o_m < M)[None, :])

    # 3. eqs. 10-11, relative to the largest of the others' rewards, so that no exponential overflows
    m_other = m_pair & (o_m[:, None] != o_m[None, :])
    b_rj = tl.broadcast_to(b_r[None, :], [BM, BM])
    b_shift = tl.max(tl.where(m_other & (b_rj == b_rj), b_rj, -float("inf")), axis=1)
    b_shift = tl.where(b_shift == -float("inf"), 0.0, b_shift)  # a group of one, or no reward above -inf
    b_e = tl.where(m_other, tl.exp(b_rj - b_shift[:, None]), 0.0)
    b_sum = tl.sum(tl.where(m_other, b_e * b_s * b_s, 0.0), axis=1)
    b_nu = 1.0 - b_sum / (tl.sum(b_e, axis=1) + eps * tl.exp(-b_shift))
    b_nu = tl.where(b_nu < 0.0, 0.0, b_nu)  # a NaN stays
    if SCORE == 1:
        b_nu = tl.sqrt(b_nu)

    # 4. eqs. 12-13; one NaN nu makes all that are compared with it NaN
    if SHAPING == 0:
        b_value = b_r
    else:
        m_nu = m_m
        if SHAPING == 3:
            m_nu = m_m & (b_r > 0.0)
        b_known = m_nu & (b_nu == b_nu)
        b_low = tl.min(tl.where(b_known, b_nu, float("inf")), axis=0)
        b_spread = tl.max(tl.where(b_known, b_nu, -float("inf")), axis=0) - b_low
        b_spread = tl.where(tl.max((m_nu & (b_nu != b_nu)).to(tl.int32), axis=0) > 0, float("nan"), b_spread)
        b_nubar = tl.where(b_spread <= 1e-5, 0.5, (b_nu - b_low) / b_spread)
        if SHAPING == 2:
            b_value = b_r * (1.0 + lam * b_r * b_nubar)
        else:
            b_value = b_r * (1.0 + lam * (2.0 * b_nubar - 1.0))
        if SHAPING == 3:
            b_value = tl.where(m_nu, b_value, b_r)
        b_value = tl.where(b_value > clip, clip, tl.where(b_value < -clip, -clip, b_value))
        if SKIP_UNIFORM:
            b_first = tl.max(tl.where(m_m, b_r, -float("inf")), axis=0)
            m_uniform = tl.max((m_m & (b_r != b_first)).to(tl.int32), axis=0) == 0  # no NaN either
            b_value = tl.where(m_uniform, b_r, b_value)

    # 5. eq. 2
    b_n = tl.sum(m_m.to(tl.float64), axis=0)
    b_centred = tl.where(m_m, b_value - tl.sum(tl.where(m_m, b_value, 0.0), axis=0) / b_n, 0.0)
    b_advantage = b_centred
    if SCALE == 1:
        b_advantage = b_centred / tl.sqrt(tl.sum(b_centred * b_centred, axis=0) / b_n + eps)
    if SCALE == 2:
        tl.store(values + i_b * M + o_m, b_value, mask=o_m < M)
    tl.store(exploration_score + b_row, b_nu.to(tl.float32), mask=m_m)
    tl.store(shaped_rewards + b_row, b_value.to(tl.float32), mask=m_m)
    tl.store(advantages + b_row, b_advantage.to(tl.float32), mask=m_m)


@triton.jit(do_not_specialize=["S", "places"])
def batch_scale_kernel(members, values, advantages, S, places, eps: tl.float64, BP: tl.constexpr):
    """Eq. 2 with the batch's deviation: divides group_kernel's centred values by it. One program."""
    o_p = tl.arange(0, BP).to(tl.int64)
    b_total = tl.zeros([BP], dtype=tl.float64)
    b_count = tl.zeros([BP], dtype=tl.float64)
    for o in range(0, places, BP):
        b_row = tl.load(members + o + o_p, mask=o + o_p < places, other=-1)
        m_p = (b_row >= 0) & (b_row < S)
        b_total += tl.load(values + o + o_p, mask=m_p, other=0.0)
        b_count += m_p.to(tl.float64)
    b_n = tl.sum(b_count, axis=0)
    b_mean = tl.sum(b_total, axis=0) / b_n
    b_squares = tl.zeros([BP], dtype=tl.float64)
    for o in range(0, places, BP):
        b_row = tl.load(members + o + o_p, mask=o + o_p < places, other=-1)
        m_p = (b_row >= 0) & (b_row < S)
        b_centred = tl.where(m_p, tl.load(values + o + o_p, mask=m_p, other=0.0) - b_mean, 0.0)
        b_squares += b_centred * b_centred
    b_scale = tl.sqrt(tl.sum(b_squares, axis=0) / b_n + eps)
    for o in range(0, places, BP):
        b_row = tl.load(members + o + o_p, mask=o + o_p < places, other=-1)
        m_p = (b_row >= 0) & (b_row < S)
        b_advantage = tl.load(advantages + b_row, mask=m_p, other=0.0).to(tl.float64) / b_scale
        tl.store(advantages + b_row, b_advantage.to(tl.float32), mask=m_p)


def launch(
    features: Tensor, rewards: Tensor, members: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator g2rl::group_geometry: contiguous features [S, d] and rewards [S] in float32, members
    [B, M] int64, ShapingOptions.flat(). Returns similarity [B, M, M] and exploration scores, shaped rewards,
    advantages [S].

    Raises:
        ValueError: M is larger than MAX_M.
    """
    lam, clip, shaping, score, scale, skip_uniform, eps = flat
    (S, d), (B, M) = features.shape, members.shape
    if M > MAX_M:
        raise ValueError(f"members: got groups of {M}, the Triton kernel takes at most {MAX_M}")
    similarity = features.new_empty(B, M, M)
    if M == 0:
        B = 0  # all groups are empty
    nu, shaped, advantages = (features.new_empty(S) for _ in range(3))
    values = features.new_empty((B, M) if scale == 2 else 0, dtype=torch.float64)
    config = next(config for config in configs_on(features.device) if M <= config.BM)
    programs = B + triton.cdiv(S, BR)
    if programs:
        launch_kernel(
            group_kernel,
            (programs,),
            features=features,
            rewards=rewards,
            members=members,
            similarity=similarity,
            exploration_score=nu,
            shaped_rewards=shaped,
            advantages=advantages,
            values=values,
            S=S,
            d=d,
            B=B,
            M=M,
            lam=lam,
            clip=clip,
            eps=eps,
            SHAPING=shaping,
            SCORE=score,
            SCALE=scale,
            SKIP_UNIFORM=skip_uniform,
            **config.launch(),
        )
    if scale == 2 and B:
        launch_kernel(
            batch_scale_kernel, (1,), members, values, advantages, S, B * M, eps, BP=BP, num_warps=8
        )
    return similarity, nu, shaped, advantages


def aot_cases(
    configs: tuple[Config, ...],
) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """(kernel, signature, constexprs, num_warps, num_stages, label) of shipped kernels, to compile without a
    GPU."""
    inputs = {"features": "*fp32", "rewards": "*fp32", "members": "*i64"}
    outputs = dict.fromkeys(("similarity", "exploration_score", "shaped_rewards", "advantages"), "*fp32")
    sizes = dict.fromkeys(("S", "d", "B", "M"), "i32")
    scalars = dict.fromkeys(("lam", "clip", "eps"), "fp64")
    for config in configs:
        for shaping, score, scale in ((1, 0, 1), (2, 1, 2), (3, 0, 1), (0, 0, 0)):
            constexprs = {"SHAPING": shaping, "SCORE": score, "SCALE": scale, "SKIP_UNIFORM": True}
            constexprs |= config.constants()
            signature = inputs | outputs | {"values": "*fp64"} | sizes | scalars
            signature |= dict.fromkeys(constexprs, "constexpr")
            label = f"group M<={config.BM} shaping={shaping} score={score} scale={scale}"
            yield group_kernel, signature, constexprs, config.num_warps, config.num_stages, label
    signature = {"members": "*i64", "values": "*fp64", "advantages": "*fp32", "S": "i32", "places": "i32"}
    signature |= {"eps": "fp64", "BP": "constexpr"}
    yield batch_scale_kernel, signature, {"BP": BP}, 8, 2, "group batch_scale"
