"""Truncated sampling (top_k, top_p, min_p), and which ids each token was drawn from.

A response's tokens come from the softmax over the ids that sampling kept, so log-probs, KL and entropy are
those of the same softmax: `support` of the ops. The sets are recorded where the sampler makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..head.support.spec import Support
from .config import TrainerConfig

LIMIT = 1024  # kept ids of a token; beyond it the whole vocabulary counts, as it nearly does


class Truncation:
    """What sampling leaves of the logits, by transformers' rules: temperature, top_k, top_p, min_p."""

    def __init__(self, config: TrainerConfig):
        from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.temperature = config.temperature
        self.warpers: list[Any] = []
        if config.top_k > 0:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self.warpers.append(TopPLogitsWarper(config.top_p))
        if config.min_p > 0:
            self.warpers.append(MinPLogitsWarper(config.min_p))

    def __bool__(self) -> bool:
        """Whether it leaves anything out."""
        return bool(self.warpers)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, V] over temperature, -inf where sampling leaves an id out."""
        logits = logits / self.temperature
        for warp in self.warpers:
            logits = warp(None, logits)
        return logits


class KeptIds:
    """The ids that each of B responses' tokens was drawn from, step by step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []  # ids [k], row by row; counts [B]; whole [B]

    def add(self, logits: Tensor) -> None:
        """The next step: truncated logits [B, V]."""
        kept = logits != -torch.inf
        counts = kept.sum(1)
        whole = counts > LIMIT
        ids = (kept & ~whole[:, None]).nonzero()[:, 1].int()
        self.steps.append((ids, counts.masked_fill(whole, 0), whole))

    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids [K] row by row, the lengths of their lists [B, L], and which tokens are `whole` [B, L]."""
        ids, counts, whole = zip(*self.steps)
        rows = [torch.arange(len(c), device=c.device).repeat_interleave(c) for c in counts]
        order = torch.argsort(torch.cat(rows), stable=True)  # steps of a row stay in order
        return torch.cat(ids)[order], torch.stack(counts, 1), torch.stack(whole, 1)


def recorder(truncation: Truncation, kept: KeptIds | None) -> Any:
    """A logits processor for generate(), which then needs no setting of its own."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Recorder(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores = truncation(scores)
            if kept is not None:
                kept.add(scores)
            return scores

    return LogitsProcessorList([Recorder()])


def joined(batches: Sequence[KeptIds], length: int) -> Support:
    """The lists of all batches' S responses at S x length positions, row by row; empty beyond their ends."""
    found = [batch.lists() for batch in batches]
    lengths, whole = (
        torch.cat([torch.nn.functional.pad(part[at], (0, length - part[at].shape[1])) for part in found])
        for at in (1, 2)
    )
    offsets = torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0))
    return Support(torch.cat([part[0] for part in found]), offsets, whole.flatten())
