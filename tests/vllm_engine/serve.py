"""The engine of these tests, and a program that samples with it, prints the tokens, and waits or raises.

python serve.py MODEL wait|raise
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import make_model, make_tokenizer

from g2rl_kernels.evaluation.engines import Decoding, VllmEngine
from g2rl_kernels.models.loading import load_model, load_tokenizer
from g2rl_kernels.trainer import TrainerConfig

PROMPTS = ["abc=", "abc+1=", "2+2=4 a", "hgfedcba 0123456789 abc=", "1"]
SEEDS = [11, 22, 33, 44, 55]
TEMPERATURE = 0.7
# A compiled model takes minutes to start on two cores. "processed": after temperature, top_k and top_p.
OPTIONS = {"enforce_eager": True, "logprobs_mode": "processed_logprobs"}


def save_tiny(path: Path) -> str:
    """The tiny model with heads as wide as vLLM's attention needs on a CPU."""
    tiny = make_model(head_dim=32)
    tiny.generation_config.update(do_sample=True, top_k=1, temperature=0.2, repetition_penalty=1.5)
    tiny.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def make_config(model: str, **keys: Any) -> TrainerConfig:
    return TrainerConfig.from_dict(
        {"model": model, "max_new_tokens": 8, "max_prompt_tokens": 32, "dtype": "float32", **keys}
    )


def make_engine(model: str, decoding: Decoding | None = None, **keys: Any) -> VllmEngine:
    config = make_config(model, **keys)
    decoding = decoding or Decoding(n=4, temperature=TEMPERATURE)
    return VllmEngine(load_tokenizer(config), config, decoding, **OPTIONS)


@torch.no_grad()
def hidden_states(
    path: str, prompts: Sequence[list[int]], responses: Sequence[list[int]], **keys: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of transformers that predict the responses' tokens [N, d], and the head's weight."""
    model, _ = load_model(make_config(path, **keys))
    found = []
    for prompt, tokens in zip(prompts, responses):
        states = model.model(torch.tensor([prompt + tokens])).last_hidden_state[0]
        found.append(states[len(prompt) - 1 : -1])  # a state predicts the token after it
    return torch.cat(found), model.lm_head.weight.detach()


def tokens_of(engine: VllmEngine) -> list[list[list[int]]]:
    """What the engine samples for PROMPTS with SEEDS: tokens of prompt, response."""
    prompts = [engine.tokenizer(text)["input_ids"] for text in PROMPTS]
    return [[one.tokens for one in responses] for responses in engine.sample(prompts, SEEDS)]


if __name__ == "__main__":
    served = make_engine(sys.argv[1])
    print("SAMPLED", json.dumps(tokens_of(served)), flush=True)
    if sys.argv[2] == "raise":
        raise RuntimeError("on purpose")
    time.sleep(600)
