"""What dirl and gar are given in TRL; for other algorithms everything here is empty."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather
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
from .trl_head import current_head, innermost


class MethodInputs:
    """Token weights and alignments of one generation batch on this rank.

    dirl's direction is that of the model as it is on construction, before a checkpoint is loaded.

    Raises ValueError where the weights are sharded or prompts have images: the model is run on prompts and
    solutions here, outside TRL's forwards.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.algorithm = trainer, trainer.args.g2rl_algorithm
        self.found: list[Tensor] = []
        if self.algorithm not in ("dirl", "gar"):
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer._is_vlm:
            raise ValueError(
                f"g2rl_algorithm: got {self.algorithm!r}, which runs the model on texts of its own and needs "
                "whole weights and prompts without images: use one process or DDP, or another algorithm"
            )
        if self.algorithm == "dirl":
            with torch.no_grad(), trainer.accelerator.autocast():
                self.direction = reasoning_direction(self._head(), self._encode)

    def _head(self) -> LMHead:
        return current_head(self.trainer._scoring.head, innermost(self.trainer.model))

    def _encode(self, text: str) -> list[int]:
        tokenizer = self.trainer._tokenizer
        if tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(tokenizer(text)["input_ids"])

    def token_weights(self, hidden: Tensor, counts: Tensor | None) -> Tensor | None:
        """[N] for `head_features`; hidden: [N, d]; counts: as in `add`."""
        if self.algorithm != "dirl":
            return counts
        weights = direction_weights(hidden, self.direction)
        return weights if counts is None else weights * counts

    def add(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        cu_seqlens: Tensor,
        counts: Tensor | None,
        **options: Any,
    ) -> None:
        """Measures the next responses, packed; counts: [N], 0 for a tool's token; options: of the head."""
        if self.algorithm == "dirl":
            self.found.append(direction_alignment(hidden, cu_seqlens, self.direction, counts))
        elif self.algorithm == "gar":
            self.found.append(activation_gradients(hidden, weight, tokens, cu_seqlens, counts, **options))

    def alignment(self, inputs: list[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Arguments of `shape_scores` from all ranks' responses since the last call.

        inputs: this rank's rows of the data set; batch: TRL's, with prompt_ids and prompt_mask [S / R, P].
        """
        if self.algorithm not in ("dirl", "gar"):
            return {}
        found, self.found = torch.cat(self.found), []
        if self.algorithm == "gar":
            found = cosine_to(found, self._anchors(inputs, batch))
        return {"alignment": gather(found)}

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
