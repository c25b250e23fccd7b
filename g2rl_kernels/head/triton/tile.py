"""What the head's kernels share: their arguments and flags, and one tile of base-2 logits.

A tile is BM tokens x BN vocabulary entries, accumulated in float32 over blocks of BK of the hidden size.
Operands come through tensor descriptors (TMA on Hopper and later: hardware copies, zeros beyond the edge)
where their layout permits (`descriptor`), else through masked pointers.

Logits are kept in base 2, x = z / temperature * log2(e), since exp2 is what the hardware has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..spec import HeadSpec
from . import tuning
from .tuning import Config, aligned, choose

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Stands for -inf in running maxima: a masked entry stays finite, so that 0 times its distance is 0 and not
# NaN. Sums relative to it vanish (2^-1e30) as soon as any true logit is seen.
MASKED = tl.constexpr(-1e30)

# exp x is exp2(LOG2_E x) throughout: compiled, tl.exp guards denormal results, four instructions more.
LOG2_E = tl.constexpr(LOG2E)


LOW_BLOCK = tl.constexpr(16)  # columns of the low-rank part at a time: the least that tl.dot takes


@triton.jit
def dot_tile(
    hidden, weight, low_hidden, low_weight, b_rows, m_rows,
    i_row, i_col,
    stride_hn, stride_hd, stride_wv, stride_wd,
    V, R, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_D: tl.constexpr, H_TMA: tl.constexpr, W_TMA: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """[BM, BN] float32: hidden[rows] @ weight[i_col : i_col + BN]^T. With H_TMA, rows are i_row and on.
    EVEN_D: BK divides D. With LOW, low_hidden[rows] @ low_weight[...]^T is added, of R contiguous columns."""
    o_col = i_col + tl.arange(0, BN)
    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    for i_k in range(0, D, BK):
        o_k = i_k + tl.arange(0, BK)
        if H_TMA:
            b_h = hidden.load([i_row, i_k])
        else:
            p_h = hidden + b_rows.to(tl.int64)[:, None] * stride_hn + o_k.to(tl.int64)[None, :] * stride_hd
            m_k = tl.full([BK], True, dtype=tl.int1) if EVEN_D else o_k < D
            b_h = tl.load(p_h, mask=m_rows[:, None] & m_k[None, :], other=0.0)
        if W_TMA:
            b_w = weight.load([i_col, i_k])
        else:
            p_w = weight + o_col.to(tl.int64)[:, None] * stride_wv + o_k.to(tl.int64)[None, :] * stride_wd
            m_k = tl.full([BK], True, dtype=tl.int1) if EVEN_D else o_k < D
            b_w = tl.load(p_w, mask=(o_col < V)[:, None] & m_k[None, :], other=0.0)
        if UPCAST:  # Triton's interpreter multiplies the raw bits of bfloat16
            b_h = b_h.to(tl.float32)
            b_w = b_w.to(tl.float32)
        b_acc = tl.dot(b_h, tl.trans(b_w), b_acc, input_precision=PRECISION)
    if LOW:
        for i_k in range(0, R, LOW_BLOCK):
            o_k = i_k + tl.arange(0, LOW_BLOCK)
            p_h = low_hidden + b_rows.to(tl.int64)[:, None] * R + o_k[None, :]
            p_w = low_weight + o_col.to(tl.int64)[:, None] * R + o_k[None, :]
            b_h = tl.load(p_h, mask=m_rows[:, None] & (o_k < R)[None, :], other=0.0)
            b_w = tl.load(p_w, mask=(o_col < V)[:, None] & (o_k < R)[None, :], other=0.0)
            if UPCAST:
                b_h = b_h.to(tl.float32)
                b_w = b_w.to(tl.float32)
            b_acc = tl.dot(b_h, tl.trans(b_w), b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def tanh(x):
    """Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    u = tl.abs(x)
    s = x * x
    near = -5.70498872745e-3
    near = near * s + 2.06390887954e-2
    near = near * s - 5.37397155531e-2
    near = near * s + 1.33314422036e-1
    near = near * s - 3.33332819422e-1
    near = near * s * x + x
    far = 1 - 2 / (tl.exp2(u * (2 * LOG2_E)) + 1)
    return tl.where(u < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def masked_raw(factor):
    """A raw logit r with factor r about MASKED, or nearer to 0 where that would overflow."""
    return tl.maximum(-1e30 / factor, -3e38)  # interpreted, a constexpr cannot be divided by a tensor


@triton.jit
def plus_bias(b_acc, bias, i_col, V, factor, BN: tl.constexpr, TEMPERED: tl.constexpr):
    """W h + b, and masked_raw where b is -inf. TEMPERED: factor is [BM, 1], else a number."""
    o_col = i_col + tl.arange(0, BN)
    b_bias = tl.load(bias + o_col, mask=o_col < V, other=float("-inf")).to(tl.float32)
    if TEMPERED:
        b_bias = tl.where((b_bias == float("-inf"))[None, :], masked_raw(factor), b_bias[None, :])
    else:
        b_bias = tl.where(b_bias == float("-inf"), masked_raw(factor), b_bias)[None, :]
    return b_acc + b_bias


@triton.jit
def add_bias(
    b_acc, b_y, bias, i_col, V, factor,
    BN: tl.constexpr, HAS_BIAS: tl.constexpr, BRANCH: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """W h + b, and masked_raw where the column is beyond V, its bias is -inf, or it is the realised one.

    Most tiles hold no realised token and no ragged end: with BRANCH they skip both, for some more registers.
    """
    o_col = i_col + tl.arange(0, BN)
    if HAS_BIAS:
        b_acc = plus_bias(b_acc, bias, i_col, V, factor, BN, TEMPERED)
        b_acc = tl.where(o_col[None, :] != b_y[:, None], b_acc, masked_raw(factor))
    elif BRANCH:
        n_here = tl.sum(((b_y >= i_col) & (b_y < i_col + BN)).to(tl.int32), axis=0)
        if (n_here > 0) | (i_col + BN > V):
            m_others = (o_col < V)[None, :] & (o_col[None, :] != b_y[:, None])
            b_acc = tl.where(m_others, b_acc, masked_raw(factor))
    else:
        m_others = (o_col < V)[None, :] & (o_col[None, :] != b_y[:, None])
        b_acc = tl.where(m_others, b_acc, masked_raw(factor))
    return b_acc


@triton.jit
def raw_logits(b_x, scale, factor, SOFTCAP: tl.constexpr):
    """From W h + b (as `add_bias` returns it) to r with x = factor r.

    The caller multiplies: a maximum needs no scaling, and then x - maximum is one fused operation.
    """
    return tl.where(b_x * factor <= MASKED / 2, b_x, tanh(b_x * scale)) if SOFTCAP else b_x


@triton.jit
def softcap_slope(x):
    """1 - tanh(x)^2, without cancellation."""
    b_e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    return 4 * b_e / ((1 + b_e) * (1 + b_e))


class HeadOperands(NamedTuple):
    """The head as kernels are given it. T is the temperature.

    Without softcap x = factor (W h + b), factor = logit_scale / T * log2(e). With a softcap c,
    x = factor tanh(scale (W h + b)), scale = logit_scale / c and factor = c / T * log2(e). With `nats` for
    `factor`, x is z / T. Where each token has a T of its own, T is 1 above, and kernels get `factors` too.
    """

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V], contiguous
    logit_scale: float
    has_softcap: bool
    scale: float
    nats: float
    factor: float
    precision: str  # of float32 products
    low_hidden: Tensor | None = None  # [N, r] and
    low_weight: Tensor | None = None  # [V, r], contiguous: the low-rank part
    temperatures: Tensor | None = None  # [N]

    @classmethod
    def of(cls, spec: HeadSpec) -> HeadOperands:
        cap, nats = spec.logit_softcap, (spec.logit_softcap or spec.logit_scale) / spec.temperature
        return cls(
            weight=spec.weight,
            bias=None if spec.bias is None else spec.bias.contiguous(),
            logit_scale=spec.logit_scale,
            has_softcap=bool(cap),
            scale=spec.logit_scale / cap if cap else 1.0,
            nats=nats,
            factor=nats * LOG2E,
            precision=tuning.precision(),
            low_hidden=None if spec.low_hidden is None else spec.low_hidden.contiguous(),
            low_weight=None if spec.low_weight is None else spec.low_weight.contiguous(),
            temperatures=spec.temperatures,
        )

    def at(self, rows: slice) -> HeadOperands:
        """The same for some of the tokens."""
        temperatures, low_hidden = (
            None if t is None else t[rows] for t in (self.temperatures, self.low_hidden)
        )
        return self._replace(temperatures=temperatures, low_hidden=low_hidden)

    @property
    def parts(self) -> tuple[HeadOperands, ...]:
        """The head with each of the matrices that features are sums of rows of, as the weight."""
        return (self,) if self.low_weight is None else (self, self._replace(weight=self.low_weight))

    def config(self, kind: str, hidden: Tensor, more: bool = False) -> Config:
        """Tiles for one of tuning.KINDS. `more`: with what `statistics=` asks for."""
        V, D = self.weight.shape
        # Behind a plain head's large tiles a bias leaves no room for factors, nor a bias or statistics for
        # logits that are kept: a softcap's tiles have it. Whether any are kept must not change the tile, and
        # with it a token's bits. On AMD's consumer GPUs a low-rank part needs the room.
        crowded = self.bias is not None and (self.temperatures is not None or kind == "stats")
        crowded |= more or (self.low_weight is not None and tuning.is_hip())
        form = tuning.form(hidden, self.weight, self.has_softcap or crowded)
        return choose(kind, hidden.device, hidden.dtype, V, D, form)

    def arguments(self, hidden: Tensor, factor: float | None = None) -> dict[str, Any]:
        """Arguments of every kernel that multiplies hidden with the weight. `factor`: see above."""
        factor = self.factor if factor is None else factor
        factors = None  # [N], of the tokens; divided here, since a kernel's division is not rounded correctly
        if self.temperatures is not None:
            factors = (factor / self.temperatures.double()).float()
        return {
            "hidden": hidden,
            **weight_arguments(self.weight),
            "bias": self.bias,
            "low_hidden": self.low_hidden,
            "low_weight": self.low_weight,
            "R": None if self.low_weight is None else self.low_weight.shape[1],
            "scale": self.scale,
            "factor": factor,
            "factors": factors,
            "stride_hn": hidden.stride(0),
            "stride_hd": hidden.stride(1),
            "SOFTCAP": self.has_softcap,
        }

    def tiled(
        self, hidden: Tensor, config: Config, *, gather: bool = False, factor: float | None = None
    ) -> dict[str, Any]:
        """Arguments of a kernel that computes tiles by `dot_tile`. With `gather` it picks single rows of
        hidden, through pointers."""
        d_hidden = None if gather else descriptor(hidden, (config.BM, config.BK))
        return self.arguments(hidden, factor) | {
            "hidden": d_hidden or hidden,
            "weight": descriptor(self.weight, (config.BN, config.BK)) or self.weight,
            "PRECISION": self.precision,
            **config.launch(),
        }


def weight_arguments(weight: Tensor) -> dict[str, Any]:
    """Arguments of every kernel that reads the weight [V, d]."""
    (V, D), (stride_wv, stride_wd) = weight.shape, weight.stride()
    return {"weight": weight, "V": V, "D": D, "stride_wv": stride_wv, "stride_wd": stride_wd}


def given(flag: str, argument: str) -> dict[str, Callable[[dict[str, Any]], bool]]:
    """For `triton.heuristics`: the flag says whether the argument was given."""
    return {flag: lambda arguments: arguments[argument] is not None}


def by_tma(flag: str, argument: str) -> dict[str, Callable[[dict[str, Any]], bool]]:
    """For `triton.heuristics`: the flag says whether the argument is a tensor descriptor."""
    return {flag: lambda arguments: isinstance(arguments[argument], TensorDescriptor)}


UPCAST = {"UPCAST": lambda _: INTERPRETED}

# Flags of the kernels that compute tiles by `dot_tile`, from their other arguments.
TILE_FLAGS = {
    "EVEN_D": lambda arguments: arguments["D"] % arguments["BK"] == 0,
    **by_tma("H_TMA", "hidden"),
    **by_tma("W_TMA", "weight"),
    **given("HAS_BIAS", "bias"),
    **given("LOW", "low_weight"),
    **given("TEMPERED", "factors"),
    **UPCAST,
}


@lru_cache
def _has_tma(device: torch.device) -> bool:
    return not tuning.is_hip() and torch.cuda.get_device_capability(device)[0] >= 9


def descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor | None:
    """A tensor descriptor that loads `block`; None where TMA is missing or cannot address the matrix."""
    if matrix.numel() == 0 or not aligned(matrix) or block[1] * matrix.element_size() < 16:
        return None
    if not INTERPRETED and not _has_tma(matrix.device):
        return None
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one for each multiprocessor."""
    if device.type != "cuda":
        return 3  # the interpreter runs them one after the other; 3 makes each take several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count
