"""Tokens as the kernels get them: in chunks, with the responses they belong to, and in lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tiled import slices

CHUNK = 1 << 14  # tokens at a time; each has three to five numbers for each strip of the vocabulary


class Chunk(NamedTuple):
    """Some consecutive tokens, and the responses as far as they lie among them."""

    hidden: Tensor  # [n, d]
    tokens: Tensor  # [n]
    alpha: Tensor | None  # [n]; None: all 1
    response: Tensor  # [n] int32
    cu_seqlens: Tensor  # [S + 1] int64, over these tokens


class TokenList(NamedTuple):
    """Tokens picked on the device, in order."""

    rows: Tensor  # [n] int64; entries from cu_seqlens[-1] on mean nothing
    cu_seqlens: Tensor  # [S + 1] int64, positions in rows


def chunks(
    hidden: Tensor, tokens: Tensor, cu_seqlens: Tensor, alpha: Tensor | None, most: int
) -> Iterator[tuple[slice, Chunk]]:
    """Rows and chunk, `most` tokens at a time."""
    for rows in slices(0, hidden.shape[0], most):
        cu = cu_seqlens.clamp(rows.start, rows.stop) - rows.start
        position = torch.arange(rows.stop - rows.start, device=hidden.device)
        response = torch.searchsorted(cu[1:], position, right=True).int()
        yield rows, Chunk(hidden[rows], tokens[rows], None if alpha is None else alpha[rows], response, cu)


def response_arguments(cu_seqlens: Tensor, responses: range) -> dict[str, Any]:
    """Arguments of every kernel that works on a batch of responses."""
    return {"cu_seqlens": cu_seqlens, "s_begin": responses.start, "n_responses": len(responses)}


def pick(wanted: Tensor, cu_seqlens: Tensor) -> TokenList:
    """The tokens where `wanted` [n] is true. Their number stays on the device."""
    n = wanted.shape[0]
    count = wanted.cumsum(0)
    place = torch.where(wanted, count - 1, n)  # the others share a last place, which is not used
    index = torch.empty(n + 1, dtype=torch.int64, device=wanted.device)
    index.scatter_(0, place, torch.arange(n, device=wanted.device))
    return TokenList(index, torch.nn.functional.pad(count, (1, 0))[cu_seqlens])
