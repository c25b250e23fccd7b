"""What the head's kernels share: one tile of logits, from the product to base-2 logits.

A tile is BM tokens x BN vocabulary entries, accumulated in float32 over blocks of BK of the hidden size.
Operands come through tensor descriptors (TMA on Hopper and later: hardware copies, zeros beyond the edge)
where their layout permits (`descriptor`), else through masked pointers.

Logits are kept in base 2, x = z / temperature * log2(e), since exp2 is what the hardware has.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Stands for -inf in running maxima: a masked entry stays finite, so that 0 times its distance is 0 and not
# NaN. Whatever is summed relative to it vanishes (2^-1e30) as soon as any true logit is seen.
MASKED = tl.constexpr(-1e30)


@triton.jit
def dot_tile(
    hidden, weight, b_rows, m_rows, i_row, i_col,
    stride_hn, stride_hd, stride_wv, stride_wd, V,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    H_TMA: tl.constexpr, W_TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BM, BN] float32: hidden[rows] @ weight[i_col : i_col + BN]^T. With H_TMA, rows are i_row and on."""
    o_col = i_col + tl.arange(0, BN)
    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    for i_k in range(0, D, BK):
        o_k = i_k + tl.arange(0, BK)
        if H_TMA:
            b_h = hidden.load([i_row, i_k])
        else:
            p_h = hidden + b_rows.to(tl.int64)[:, None] * stride_hn + o_k.to(tl.int64)[None, :] * stride_hd
            b_h = tl.load(p_h, mask=m_rows[:, None] & (o_k < D)[None, :], other=0.0)
        if W_TMA:
            b_w = weight.load([i_col, i_k])
        else:
            p_w = weight + o_col.to(tl.int64)[:, None] * stride_wv + o_k.to(tl.int64)[None, :] * stride_wd
            b_w = tl.load(p_w, mask=(o_col < V)[:, None] & (o_k < D)[None, :], other=0.0)
        if UPCAST:  # Triton's interpreter multiplies the raw bits of bfloat16
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
    far = 1 - 2 / (tl.exp(2 * u) + 1)
    return tl.where(u < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def base2_logits(b_acc, b_bias, scale, softcap, SOFTCAP: tl.constexpr):
    """Products to x = softcap(logit_scale (W h + b)) / T * log2(e), `scale` and `softcap` as `Head` has them.

    Returns x and the softcap's slope, which is 1 without one. b_bias broadcasts against b_acc.
    """
    b_x = (b_acc + b_bias) * scale
    if SOFTCAP:
        b_e = tl.exp(-2 * tl.abs(b_x))
        return softcap * tanh(b_x), 4 * b_e / ((1 + b_e) * (1 + b_e))  # 1 - tanh^2, without cancellation
    else:
        return b_x, 1.0


@triton.jit
def load_bias(bias, o_col, V, HAS_BIAS: tl.constexpr):
    """Bias of some columns, and which of them are in the vocabulary: below V and not masked by -inf."""
    m_col = o_col < V
    if HAS_BIAS:
        b_bias = tl.load(bias + o_col, mask=m_col, other=0.0).to(tl.float32)
        m_col = m_col & (b_bias != float("-inf"))
        return tl.where(m_col, b_bias, 0.0), m_col
    else:
        return tl.zeros_like(o_col).to(tl.float32), m_col


class Head:
    """The head's weight, bias and scalars in the form that kernels take. T is the temperature.

    Without softcap x = (W h + b) * scale, scale = logit_scale / T * log2(e); with a softcap c,
    x = softcap * tanh((W h + b) * scale), scale = logit_scale / c and softcap = c / T * log2(e).
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        logit_scale: float,
        logit_softcap: float | None,
    ) -> None:
        self.weight = weight
        self.bias = None if bias is None else bias.contiguous()
        self.logit_scale = logit_scale
        self.has_softcap = bool(logit_softcap)
        self.scale = logit_scale / (logit_softcap if logit_softcap else temperature / LOG2E)
        self.softcap = (logit_softcap or 0.0) / temperature * LOG2E

    @property
    def scalars(self) -> dict[str, Any]:
        """Arguments that every kernel with an epilogue takes."""
        return {
            "bias": self.bias,
            "scale": self.scale,
            "softcap": self.softcap,
            "HAS_BIAS": self.bias is not None,
            "SOFTCAP": self.has_softcap,
        }


def descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor | None:
    """A tensor descriptor that loads `block`; None where TMA cannot address the matrix or does not exist."""
    size = matrix.element_size()
    if matrix.shape[0] == 0 or matrix.shape[1] == 0 or matrix.stride(1) != 1:
        return None
    if matrix.data_ptr() % 16 or matrix.stride(0) * size % 16 or block[1] * size < 16:
        return None
    if not INTERPRETED and torch.cuda.get_device_capability(matrix.device)[0] < 9:
        return None
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one for each multiprocessor."""
    if device.type != "cuda":
        return 3  # the interpreter runs them one after the other; 3 makes each take several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count
