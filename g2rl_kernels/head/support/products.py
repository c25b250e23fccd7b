"""The two products of a restricted head, in PyTorch: any device, float64 too. triton.py has the same.

Each gathers only the rows of a matrix that it needs. Rows outside the matrix count as zeros: no out-of-bounds
read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from ..tiled import elements, slices


def _gathered(matrix: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the matrix, [n, d]; zeros where the index lies outside."""
    M = matrix.shape[0]
    inside = (index >= 0) & (index < M)
    found = matrix[index.clamp(0, M - 1)].to(dtype)
    return found.masked_fill_(~inside[:, None], 0.0)


def gather_dot(left: Tensor, rows: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """left[rows[k]] . right[index[k]], [K] float32 (float64 for float64)."""
    dtype = reference.accumulation_dtype(left, right)
    found = left.new_empty(index.shape[0], dtype=dtype)
    for part in slices(0, index.shape[0], elements(left) // left.shape[1]):
        w = _gathered(right, index[part], dtype)
        found[part] = (left[rows[part]].to(dtype) * w).sum(1)
    return found


def gather_sum(coefficients: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out[i] = sum of coefficients[k] matrix[index[k]] over k in offsets[i]:offsets[i + 1], in order of k, in
    the dtype of the coefficients, rounded once. out [n, d]; offsets [n + 1] may begin behind 0. Reads the
    offsets."""
    for lists, entries in _parts(offsets.tolist(), max(1, elements(matrix) // matrix.shape[1])):
        sums = coefficients.new_zeros(lists.stop - lists.start, matrix.shape[1])
        for part in slices(entries.start, entries.stop, max(1, elements(matrix) // matrix.shape[1])):
            values = _gathered(matrix, index[part], coefficients.dtype).mul_(coefficients[part, None])
            bounds = offsets[lists.start : lists.stop + 1] - part.start
            sums += reference.segment_sum(values, bounds, 0, len(values))
        out[lists] = sums


def _parts(offsets: list[int], most: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive lists with at most `most` entries together, or one longer list: (lists, entries)."""
    n, first = len(offsets) - 1, 0
    while first < n:
        stop = first + 1
        while stop < n and stop - first < most and offsets[stop + 1] - offsets[first] <= most:
            stop += 1
        yield slice(first, stop), slice(offsets[first], offsets[stop])
        first = stop
