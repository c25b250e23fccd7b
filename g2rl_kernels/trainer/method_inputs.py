"""What dirl and gar are given in our trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.lm_head import LMHead
from ..models.method_inputs import MethodInputs, reasoning_direction, solution_of, solution_vector
from ..tasks.base import Item, Task, item_of
from .config import TrainerConfig
from .sampling import Rollout, Sampler, autocast


class RolloutInputs(MethodInputs):
    """`MethodInputs` of a rollout: `begin`, what the base does for each forward, and `alignment`.

    Raises ConfigError where gar's tasks have no solutions.
    """

    def __init__(
        self, config: TrainerConfig, head: LMHead, sampler: Sampler, tokenizer: Any, dtype: torch.dtype
    ):
        super().__init__(config.algorithm)
        self.config, self.head, self.sampler = config, head, sampler
        self.tokenizer, self.dtype = tokenizer, dtype
        self.device = head.output.weight.device
        if config.algorithm == "dirl":
            with autocast(config, self.device):
                self.direction = reasoning_direction(
                    head, lambda text: sampler.encode({"question": text}), config.direction_prompts
                )
        if config.algorithm == "gar":
            for task in sampler.tasks:
                solution_of(item_of(task, 0), f"task: {type(task).__name__}[0]")

    def begin(self, rollout: Rollout) -> None:
        """Forgets the last rollout; gar: finds the vector of each response's solution."""
        self.found = []
        if self.algorithm == "gar":
            groups = rollout.items[:: self.config.group_size]
            vectors = torch.stack([self._solution(task, item) for task, item in groups])
            self.anchors = vectors.repeat_interleave(self.config.group_size, 0)

    def _solution(self, task: Task, item: Item) -> Tensor:
        solution = solution_of(item, f"task: an item of {type(task).__name__}")
        tokens = self.tokenizer(solution, add_special_tokens=False)["input_ids"]
        prompt, temperature = self.sampler.encode(item), self.config.temperature
        with autocast(self.config, self.device):
            return solution_vector(self.head, prompt, tokens, self.dtype, temperature)

    def alignment(self) -> Tensor | None:
        """[S] of all responses since `begin`; None for other algorithms."""
        return self.aligned(lambda: self.anchors)
