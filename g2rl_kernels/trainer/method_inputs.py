"""What dirl and gar are given in our trainer; for other algorithms everything here is empty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.lm_head import LMHead
from ..models.method_inputs import (
    activation_gradients,
    cosine_to,
    direction_alignment,
    direction_weights,
    reasoning_direction,
    solution_of,
    solution_vector,
)
from ..tasks.base import Item, Task, item_of
from .config import TrainerConfig
from .sampling import Rollout, Sampler, autocast


class MethodInputs:
    """Token weights and alignments of a rollout's responses: `begin`, then for each forward `add`.

    dirl's direction is that of the model as it is on construction: before training, and before a checkpoint
    is loaded.

    Raises ConfigError where gar's tasks have no solutions.
    """

    def __init__(
        self, config: TrainerConfig, head: LMHead, sampler: Sampler, tokenizer: Any, dtype: torch.dtype
    ):
        self.config, self.head, self.sampler = config, head, sampler
        self.tokenizer, self.dtype = tokenizer, dtype
        self.device = head.output.weight.device
        self.found: list[Tensor] = []
        if config.algorithm == "dirl":
            with autocast(config, self.device):
                self.direction = reasoning_direction(head, lambda text: sampler.encode({"question": text}))
        if config.algorithm == "gar":
            for task in sampler.tasks:
                solution_of(item_of(task, 0), f"task: {type(task).__name__}[0]")

    def begin(self, rollout: Rollout) -> None:
        """Forgets the last rollout; gar: finds the vector of each response's solution."""
        self.found = []
        if self.config.algorithm == "gar":
            groups = rollout.items[:: self.config.group_size]
            vectors = torch.stack([self._solution(task, item) for task, item in groups])
            self.anchors = vectors.repeat_interleave(self.config.group_size, 0)

    def _solution(self, task: Task, item: Item) -> Tensor:
        solution = solution_of(item, f"task: an item of {type(task).__name__}")
        tokens = self.tokenizer(solution, add_special_tokens=False)["input_ids"]
        prompt, temperature = self.sampler.encode(item), self.config.temperature
        with autocast(self.config, self.device):
            return solution_vector(self.head, prompt, tokens, self.dtype, temperature)

    def token_weights(self, hidden: Tensor) -> dict[str, Any]:
        """For `head_features`; hidden: [N, d]."""
        if self.config.algorithm != "dirl":
            return {}
        return {"token_weights": direction_weights(hidden, self.direction)}

    def add(self, hidden: Tensor, weight: Tensor, tokens: Tensor, cu_seqlens: Tensor, **options: Any) -> None:
        """Measures the next responses, packed; options: of `linear_logprobs`."""
        if self.config.algorithm == "dirl":
            self.found.append(direction_alignment(hidden, cu_seqlens, self.direction))
        elif self.config.algorithm == "gar":
            self.found.append(activation_gradients(hidden, weight, tokens, cu_seqlens, **options))

    def alignment(self) -> Tensor | None:
        """[S] of all responses since `begin`; None for other algorithms."""
        if not self.found:
            return None
        found = torch.cat(self.found)
        return cosine_to(found, self.anchors) if self.config.algorithm == "gar" else found
