"""Logits that the forward pass leaves to the backward pass, of the last entries of the vocabulary.

Exact: where all gradients are rounded to bfloat16, a code of 16 bits keeps the distance to the largest logit
of its strip so far, in steps that are fine near it (`code_of`; csrc/cpu/kernels/kept.h has the same). Else
W h itself is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Kept
from ..spec import HeadSpec
from .tile import descriptor
from .tuning import Config

UNIT = 256  # vocabulary entries that are kept together or not at all: every tile's BN divides it
LARGEST = 32  # entries that share a largest logit; divides every tile's BN

# c = round(65534 sqrt(-y / 100)) for y = log2 of exp((z - largest) / temperature) from -100 to 0, else NONE:
# the exponential's relative error is at most 1.1e-4 sqrt(-y).
STEPS, NONE, RANGE = tl.constexpr(65534.0), tl.constexpr(65535), tl.constexpr(100.0)


@triton.jit
def code_of(distance):
    """int16 from base-2 distances <= 0; NaN becomes NONE, since the normaliser keeps it."""
    b_root = tl.sqrt(tl.minimum(tl.maximum(-distance, 0.0), RANGE) / RANGE)
    b_code = tl.where(distance >= -RANGE, (b_root * STEPS + 0.5).to(tl.int32), NONE)
    return b_code.to(tl.int16)


@triton.jit
def distance_of(code):
    """The distances back; -1e30 for NONE."""
    b_code = code.to(tl.int32) & 0xFFFF
    b_root = b_code.to(tl.float32) * (1 / STEPS)
    return tl.where(b_code == NONE, -1e30, b_root * b_root * -RANGE)


@triton.jit
def store_kept(kept, tile, i_row, i_col, b_rows, m_rows, stride_kn, BN: tl.constexpr, K_TMA: tl.constexpr):
    """Keeps a tile [BM, BN] of rows `b_rows`, which are i_row and on, and kept columns i_col and on."""
    if K_TMA:
        kept.store([i_row, i_col], tile)
    else:
        p_kept = kept + b_rows.to(tl.int64)[:, None] * stride_kn + (i_col + tl.arange(0, BN))[None, :]
        tl.store(p_kept, tile, mask=m_rows[:, None])


@triton.jit
def load_kept(kept, i_row, i_col, b_rows, m_rows, stride_kn, BN: tl.constexpr, K_TMA: tl.constexpr):
    """The tile that `store_kept` kept."""
    if K_TMA:
        return kept.load([i_row, i_col])
    else:
        p_kept = kept + b_rows.to(tl.int64)[:, None] * stride_kn + (i_col + tl.arange(0, BN))[None, :]
        return tl.load(p_kept, mask=m_rows[:, None], other=0)


class KeptLogits(NamedTuple):
    """Kept logits as kernels take them: of entries `first` and on, up to V and beyond, to whole units."""

    logits: Tensor  # [N, W] int16 codes, or W h in float32
    largest: Tensor | None  # [N, W / LARGEST] float32, base 2: what codes are distances to
    first: int  # a multiple of UNIT

    @classmethod
    def of(cls, kept: Kept, head: HeadSpec, dtype: torch.dtype) -> KeptLogits:
        """Views of what `kept_bytes` made room for, from token `kept.first` on."""
        N, size = kept.tokens, head.bytes_of_logit(dtype)
        width = kept.data.numel() // _unit_bytes(N, size) * UNIT
        logits = kept.data[: N * width * size].view(torch.int16 if size == 2 else torch.float32)
        largest = kept.data[N * width * size :].view(torch.float32) if size == 2 else None
        first = triton.cdiv(head.weight.shape[0], UNIT) * UNIT - width
        found = cls(logits.view(N, width), None if largest is None else largest.view(N, -1), first)
        return found.at(slice(kept.first, N))

    def at(self, rows: slice) -> KeptLogits:
        """The same for some of the tokens."""
        largest = None if self.largest is None else self.largest[rows]
        return self._replace(logits=self.logits[rows], largest=largest)


def kept_arguments(kept: KeptLogits | None, config: Config) -> dict[str, Any]:
    """Arguments of the kernels that keep tiles of logits, or take them."""
    if kept is None:
        return {
            "kept": None, "largest": None, "i_kept": 0, "stride_kn": 0, "stride_ln": 0,
            "KEPT": 0, "LARGEST": LARGEST,
        }  # fmt: skip
    logits, largest, first = kept
    return {
        "kept": descriptor(logits, (config.BM, config.BN)) or logits,
        "largest": largest,
        "i_kept": first,
        "stride_kn": logits.stride(0),
        "stride_ln": 0 if largest is None else largest.stride(0),
        "KEPT": logits.element_size(),
        "LARGEST": LARGEST,
    }


def _unit_bytes(N: int, size: int) -> int:
    return N * (UNIT * size + (4 * UNIT // LARGEST if size == 2 else 0))


def kept_bytes(hidden: Tensor, head: HeadSpec, most: int) -> int:
    """See `Backend.kept_bytes`: whole units of the vocabulary, from its end."""
    N, size = hidden.shape[0], head.bytes_of_logit(hidden.dtype)
    fit = most // _unit_bytes(torch.sym_max(N, 1), size)
    return torch.sym_min(-(-head.weight.shape[0] // UNIT), fit) * _unit_bytes(N, size)
