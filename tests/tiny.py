"""A tiny random language model, a character tokenizer and a trainer for them, made without hub or files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from g2rl_kernels.trainer import Trainer, TrainerConfig
from g2rl_kernels.trainer.sampling import Rollout

CHARACTERS = "0123456789+-= abcdefgh"


def make_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "</s>", "unk_token": "<unk>", **({"pad_token": "<pad>"} if pad else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(seed: int = 0, **settings: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        **{
            "vocab_size": len(CHARACTERS) + 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "initializer_range": 0.3,  # far from uniform, so that errors show
            "eos_token_id": 1,
            "pad_token_id": 0,
            **settings,
        }
    )
    return Qwen3ForCausalLM(config)


class LetterTask:
    """A completion with an "a" is right. Questions differ in length, so prompts are padded."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": "abc" + "+1" * (index % 5) + "=", "solution": f"{index % 5}+1=a"}

    def score(self, completion: str, item: dict[str, Any]) -> float:
        return float("a" in completion)


class Letters:
    """A sentence encoder that counts characters."""

    def __init__(self, name: str, device: Any):
        self.name = name

    def __call__(self, texts: list[str]) -> torch.Tensor:
        counts = torch.tensor([[float(text.count(c)) for c in CHARACTERS] for text in texts])
        return torch.nn.functional.normalize(counts + 0.01, dim=1)


def make_trainer(
    path: Path, task: Any = None, model: Any = None, tokenizer: Any = None, **keys: Any
) -> Trainer:
    config = TrainerConfig.from_dict(
        {
            "output_dir": str(path),
            "batch_size": 8,
            "group_size": 4,
            "max_new_tokens": 6,
            "max_prompt_tokens": 32,
            "lr": 1e-3,
            "steps": 3,
            **keys,
        }
    )
    task = LetterTask() if task is None else task
    return Trainer(model or make_model(), tokenizer or make_tokenizer(), task, config)


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics but for those that measure time."""
    times = ("seconds", "tokens_per_second")
    return {key: value for key, value in metrics.items() if not key.endswith(times)}


def gradients_of_a_step(trainer: Any, rollout: Rollout | None = None) -> dict[str, torch.Tensor]:
    """Gradients that the optimiser would get for one rollout; a high max_grad_norm leaves them unclipped."""
    torch.manual_seed(1)
    rollout = rollout or trainer.sampler.sample()
    found: dict[str, torch.Tensor] = {}
    trainer.optimizer.step = lambda: found.update(
        {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    )
    trainer.update(rollout, trainer.measure(rollout, trainer.verify(rollout)))
    return found
