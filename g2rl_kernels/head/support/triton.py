"""Backend "triton" of the restricted head: its two products are kernels (../triton), the rest is tiled.py's.

Nothing waits for the device.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..backend import FeatureOutputs
from ..reference import in_bounds
from ..spec import HeadSpec, Responses
from ..triton.support_dot import head_support_dot
from ..triton.support_sum import head_support_sum
from . import tiled
from .spec import Support
from .tiled import finish, terms, token_terms

__all__ = ["features", "finish", "gather_dot", "gather_sum", "statistics", "terms", "token_terms"]

PRODUCTS = sys.modules[__name__]


def statistics(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, support: Support, more: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `SupportBackend.statistics`."""
    return tiled.statistics(hidden, tokens, head, support, more, PRODUCTS)


def features(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, support: Support, responses: Responses, more: bool
) -> FeatureOutputs:
    """See `SupportBackend.features`."""
    return tiled.features(hidden, tokens, head, support, responses, more, PRODUCTS)


def gather_dot(left: Tensor, rows: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """left[rows[k]] . right[index[k]], [K] float32; 0 where a row lies outside of its matrix."""
    with torch.cuda.device_of(left):  # Triton launches on the current device
        return head_support_dot(left, rows, right, index)


def gather_sum(coefficients: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, out: Tensor) -> None:
    """See products.gather_sum. The offsets are clamped, as they may be unchecked."""
    offsets = in_bounds(offsets, index.shape[0])
    with torch.cuda.device_of(matrix):
        head_support_sum(coefficients, index, offsets, matrix, out)
