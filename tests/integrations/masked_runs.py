"""Runs of G2RLTrainer with g2rl_keep_sampling_mask that are kept, and dense oracles for them. Needs TRL."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from tiny_trl import G2RLConfig, G2RLTrainer, trained
from torch import Tensor
from transformers import GenerationConfig

from g2rl_kernels.integrations.trl_support import KEPT


class Recorded(G2RLTrainer):
    """Keeps each generation batch with the policy that sampled it, and each loss with its policy."""

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self.batches: list[dict[str, Any]] = []
        self.policies: list[Any] = []
        self.learners: list[Any] = []
        self.forwards: list[tuple[dict[str, Any], Tensor]] = []

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.policies.append(copy.deepcopy(self.model))
        self.batches.append(super()._generate_and_score_completions(inputs))
        return self.batches[-1]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.inputs = inputs
        self.learners.append(copy.deepcopy(self.model))
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **keywords: Any) -> tuple[Any, ...]:
        found = super()._get_per_token_logps_and_entropies(*args, **keywords)
        if keywords.get("compute_entropy"):
            self.forwards.append((self.inputs, found[0].detach()))
        return found


class Measured(Recorded):
    """The sets come from the forward of the old log-probs, as with another sampler than generate()."""

    def _samples_itself(self) -> bool:
        return False


def run(make: Callable[..., Any], kind: type = Recorded, **settings: Any) -> Any:
    return trained(make, kind, **{"g2rl_keep_sampling_mask": True, "max_steps": 1, **settings})


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    """[B, L, V] of the completions' tokens, by the own forward of a copy of the model."""
    bare = copy.deepcopy(model)
    inner = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
    vars(inner).pop("forward", None)
    return logits_of(bare, batch).float()


def logits_of(model: Any, batch: dict[str, Any]) -> Tensor:
    """The same, with gradients for the model's own weights."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    z: Tensor = model(input_ids=ids, attention_mask=attention).logits
    return z[:, -batch["completion_ids"].shape[1] - 1 : -1]


def kept_by_transformers(model: Any, batch: dict[str, Any], args: G2RLConfig) -> Tensor:
    """[B, L, V] bool: what transformers' own processors leave of the model's logits."""
    settings = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    config = GenerationConfig(do_sample=True, **settings)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    z = logits(model, batch)
    truncate = inner._get_logits_processor(config, 1, None, None, [])
    return truncate(batch["completion_ids"], z.flatten(0, 1)).view(z.shape) != -torch.inf


def kept_sets(batch: dict[str, Any], V: int) -> Tensor:
    """[B, L, V] bool: the lists that travel with the batch."""
    found = torch.zeros(*batch["completion_ids"].shape, V, dtype=torch.bool)
    for row, kept in enumerate(batch[KEPT]):
        for t, (first, last) in enumerate(pairwise(kept.offsets)):
            found[row, t, kept.ids[first:last].long()] = True
    return found


def logprobs(model: Any, batch: dict[str, Any], kept: Tensor | None, temperature: float) -> Tensor:
    """[B, L], dense, of the softmax over kept [B, L, V]."""
    z = logits(model, batch) / temperature
    log_p = (z if kept is None else z.masked_fill(~kept, -torch.inf)).log_softmax(-1)
    return log_p.gather(2, batch["completion_ids"][..., None])[..., 0]


def same_where(mask: Tensor, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-5)
