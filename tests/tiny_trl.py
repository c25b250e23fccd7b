"""The tiny model of the trainer's tests as TRL wants it, prompts, rewards, and a trainer that is watched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # and no telemetry

import torch
from datasets import Dataset
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
    """They differ in length, so that they are padded."""
    return Dataset.from_dict({"prompt": ["abc" + "+1" * (i % 5) + "=" for i in range(count)]})


def parity(completions: list[Any], **_: Any) -> list[float]:
    """A reward that is right half of the time."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 2) for text in texts]


def length(completions: list[Any], **_: Any) -> list[float | None]:
    """A second reward, which does not apply to every response."""
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


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Watched(G2RLTrainer):
    """Keeps what each generation batch was, and what its features should be."""

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
                    HeadSpec(head.weight.double(), temperature=self.temperature),
                    Responses(torch.tensor([0, len(completion)]), counts.double()),
                )[0]
            )
        return torch.cat(features).float()
