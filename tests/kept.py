"""What `linear_logprobs` keeps from forward to backward, for tests of the setting `logits_memory`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import g2rl_kernels as g2


@contextmanager
def kept_logits() -> Iterator[list[int]]:
    """Yields a list of the bytes of logits that each call keeps until its backward pass, 0 for none.

    autograd saves them, and they alone are uint8. Calls without gradients save nothing.
    """
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def asked_memory(monkeypatch: Any) -> list[int | None]:
    """The `logits_memory` of each later call of `g2.linear_logprobs`, None where it is left to the op."""
    asked: list[int | None] = []
    op = g2.linear_logprobs

    def spied(*args: Any, **options: Any) -> g2.LinearLogprobs:
        asked.append(options.get("logits_memory"))
        return op(*args, **options)

    monkeypatch.setattr(g2, "linear_logprobs", spied)
    return asked
