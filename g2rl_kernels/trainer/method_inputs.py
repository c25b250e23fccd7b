"""What dirl and gar are given in our trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.lm_head import LMHead
from ..models.method_inputs import (
    MethodInputs,
    check_solution_length,
    positions,
    reasoning_direction,
    solution_of,
    solution_vector,
)
from ..tasks.base import Item, Task, brief, item_of
from .config import TrainerConfig
from .sampling import Rollout, Sampler, autocast


class RolloutInputs(MethodInputs):
    """`MethodInputs` of a rollout: `begin`, what the base does for each forward, and `alignment`.

    Raises ConfigError where gar's tasks have no solutions, or longer ones than the model's positions: of
    each item where a task keeps them in a list `rows`, else of the first.
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
                kept = isinstance(getattr(task, "rows", None), list)
                for index in range(len(task) if kept else 1):
                    self._check_solution(item_of(task, index), f"task: {type(task).__name__}[{index}]")

    def begin(self, rollout: Rollout) -> None:
        """Forgets the last rollout; gar: finds the vector of each response's solution."""
        self.found = []
        if self.algorithm == "gar":
            groups = rollout.items[:: self.config.group_size]
            vectors = torch.stack([self._solution(task, item) for task, item in groups])
            self.anchors = vectors.repeat_interleave(self.config.group_size, 0)

    def _check_solution(self, item: Item, where: str) -> None:
        limit, longest = positions(self.head), self.config.max_prompt_tokens
        size = len(solution_of(item, where).encode()) + 1  # no tokenizer makes more tokens
        if not limit or longest + size <= limit:
            return
        try:
            prompt = self.sampler.encode(item)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if len(prompt) <= longest:  # others are skipped
            tokens = self._solution_tokens(item, where)
            check_solution_length(self.head, len(prompt), len(tokens), where)

    def _solution_tokens(self, item: Item, where: str) -> list[int]:
        return self.tokenizer(solution_of(item, where), add_special_tokens=False)["input_ids"]

    def _solution(self, task: Task, item: Item) -> Tensor:
        tokens = self._solution_tokens(item, f"task: {type(task).__name__}: {brief(item['question'])}")
        prompt, temperature = self.sampler.encode(item), self.config.temperature
        with autocast(self.config, self.device):
            return solution_vector(self.head, prompt, tokens, self.dtype, temperature)

    def alignment(self) -> Tensor | None:
        """[S] of all responses since `begin`; None for other algorithms."""
        return self.aligned(lambda: self.anchors)
