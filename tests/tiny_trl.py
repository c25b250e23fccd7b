"""For tests with TRL: the tiny model on disk, prompts, rewards, and a G2RLTrainer that records batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # and no telemetry

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import Letters, make_model, make_tokenizer  # noqa: F401
from torch import Tensor

from g2rl_kernels.head import reference
from g2rl_kernels.head.spec import HeadSpec, Responses
from g2rl_kernels.integrations.trl import G2RLConfig, G2RLTrainer

CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}={% endfor %}"


def save_model(path: Path, **settings: Any) -> str:
    make_model(**settings).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def prompts(count: int = 16) -> Dataset:
    """Prompts of different lengths, so that they are padded."""
    return Dataset.from_dict({"prompt": ["abc" + "+1" * (i % 5) + "=" for i in range(count)]})


def parity(completions: list[Any], **_: Any) -> list[float]:
    """A correctness reward that is 1 for about half of the completions."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 2) for text in texts]


def length(completions: list[Any], **_: Any) -> list[float | None]:
    """A second reward, None for short completions."""
    return [0.1 * len(c) if len(c) > 2 else None for c in completions]


def config(path: Path, kind: type = G2RLConfig, **settings: Any) -> Any:
    return kind(
        str(path),
        **{
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            **settings,
        },
    )


def trained(make: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Made and trained at once: making a trainer seeds the random numbers."""
    trainer = make(*args, **settings)
    trainer.train()
    return trainer


def lora(**settings: Any) -> LoraConfig:
    targets = {"target_modules": ["q_proj", "v_proj"], **settings}
    return LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **targets)


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same_run(one: Any, other: Any) -> None:
    for key in ("loss", "grad_norm", "reward", "entropy"):
        assert logged(one, key) == logged(other, key), key
    assert len(logged(one, "loss")) > 0
    assert weights(one).keys() == weights(other).keys()
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(other)[name]), name


def effective_weight(head: Any) -> Tensor:
    """In float64, with PEFT's adapter on the head, if there is one."""
    weight = head.weight.double()
    if not hasattr(head, "lora_A"):
        return weight
    (name,) = head.active_adapters
    A, B = (part[name].weight.double() for part in (head.lora_A, head.lora_B))
    return weight + head.scaling[name] * B @ A


class Watched(G2RLTrainer):
    """Records each generation batch, and the features that it should have."""

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self.seen: list[dict[str, Any]] = []

    def _generate(self, prompts: list) -> tuple[Any, ...]:
        self.generated = super()._generate(prompts)
        return self.generated

    def _shape(self, measurement: Any, count: int) -> Tensor:
        advantages = super()._shape(measurement, count)
        self.seen.append(
            {
                "features": torch.cat(measurement.features),
                "expected": self._expected_features(),
                "has_tokens": torch.cat(measurement.has_tokens),
                "rewards": measurement.rewards,
                "advantages": advantages,
            }
        )
        return advantages

    @torch.no_grad()
    def _expected_features(self) -> Tensor:
        """Each response on its own, without padding, through the reference in float64."""
        prompt_ids, completion_ids, tool_mask = self.generated[:3]
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        head = causal.get_output_embeddings()
        features = []
        for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids)):
            ids = torch.tensor([prompt + completion])
            hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            counts = torch.tensor(tool_mask[row]) if tool_mask is not None else torch.ones(len(completion))
            ended = completion[-1] in (*self.eos_token_ids, self._tokenizer.pad_token_id)
            if self.mask_truncated_completions and not ended:
                counts = torch.zeros(len(completion))
            features.append(
                reference.head_features(
                    hidden[len(prompt) - 1 : -1].double(),
                    ids[0, len(prompt) :],
                    HeadSpec(effective_weight(head), temperature=self.temperature),
                    Responses(torch.tensor([0, len(completion)]), counts.double()),
                )[0]
            )
        return torch.cat(features).float()
