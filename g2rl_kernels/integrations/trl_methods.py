"""What dirl and gar are given in TRL."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor

from ..models.lm_head import LMHead
from ..models.method_inputs import MethodInputs, reasoning_direction, solution_of, solution_vector
from .trl_head import current_head, innermost


class BatchInputs(MethodInputs):
    """`MethodInputs` of one generation batch on this rank.

    Raises ValueError where the weights are sharded or prompts have images: the model is run on prompts and
    solutions here, outside TRL's forwards. Raises ConfigError where gar's data set has no solutions, and for
    one of dirl's prompts that exceeds the model's positions.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer.args.g2rl_algorithm)
        self.trainer = trainer
        if self.algorithm not in ("dirl", "gar"):
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer._is_vlm:
            raise ValueError(
                f"g2rl_algorithm: got {self.algorithm!r}, which runs the model on texts of its own and needs "
                "whole weights and prompts without images: use one process or DDP, or another algorithm"
            )
        if self.algorithm == "dirl":
            with torch.no_grad(), trainer.accelerator.autocast():
                prompts = trainer.args.g2rl_direction_prompts
                self.direction = reasoning_direction(
                    self._head(), self._encode, prompts, "g2rl_direction_prompts"
                )
        rows = trainer.train_dataset
        columns, made = getattr(rows, "column_names", None), getattr(rows, "format", {})
        # A transform may make the column when a row is read.
        if self.algorithm == "gar" and columns and hasattr(rows, "__len__") and made.get("type") != "custom":
            known = rows["solution"] if "solution" in columns else [None]
            for number, solution in enumerate(known):
                solution_of({"solution": solution}, f"train_dataset: row {number}")

    def _head(self) -> LMHead:
        return current_head(self.trainer._scoring.head, innermost(self.trainer.model))

    def _encode(self, text: str) -> list[int]:
        tokenizer = self.trainer._tokenizer
        if tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(tokenizer(text)["input_ids"])

    def alignment(self, inputs: list[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Arguments of `shape_scores` from all ranks' responses since the last call.

        inputs: this rank's rows of the data set; batch: TRL's, with prompt_ids and prompt_mask [S / R, P].
        """
        found = self.aligned(lambda: self._anchors(inputs, batch))
        self.found = []
        return {} if found is None else {"alignment": gather(found)}

    def _anchors(self, inputs: list[dict[str, Any]], batch: dict[str, Any]) -> Tensor:
        """The vector of each row's solution, [S / R, d]; equal rows are computed once."""
        trainer, head = self.trainer, self._head()
        dtype = torch.float32 if trainer._scoring.float32 else head.output.weight.dtype
        known: dict[tuple[Any, ...], Tensor] = {}
        rows = []
        for item, ids, mask in zip(inputs, batch["prompt_ids"], batch["prompt_mask"]):
            solution = solution_of(item, "train_dataset: a row")
            key = (*ids[mask.bool()].tolist(), solution)
            if key not in known:
                tokens = trainer._tokenizer(solution, add_special_tokens=False)["input_ids"]
                with trainer.accelerator.autocast():
                    known[key] = solution_vector(head, key[:-1], tokens, dtype, trainer.temperature)
            rows.append(known[key])
        return torch.stack(rows)
