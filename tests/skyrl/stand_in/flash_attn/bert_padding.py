"""In place of flash-attn, which needs a GPU: the two functions that SkyRL imports from it."""

from __future__ import annotations

import torch
from torch import Tensor


def unpad_input(hidden: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    """The rows of hidden [B, L, ...] that the mask [B, L] keeps, [n, ...], and their places in B x L."""
    indices = attention_mask.flatten().nonzero()[:, 0]
    return hidden.flatten(0, 1)[indices], indices, None, None, None


def pad_input(hidden: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse: [n, ...] to [B, L, ...], with zeros elsewhere."""
    whole = torch.zeros(batch * seqlen, *hidden.shape[1:], dtype=hidden.dtype, device=hidden.device)
    whole[indices] = hidden
    return whole.unflatten(0, (batch, seqlen))
