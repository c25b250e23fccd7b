"""A tokenizer whose template calls tools, a model that calls them, an environment, a rollout function."""

from __future__ import annotations

import string
from typing import Any

import torch
from datasets import Dataset
from tiny_trl import make_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template

CALL = '<tool_call>\n{"name": "%s", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
SPECIAL = ["<pad>", "<|im_end|>", "<unk>", "<|im_start|>"]


def tool_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a printable character."""
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=qwen3_chat_template,
    )


def caller(name: str, times: int = 1) -> Any:
    """A model that calls a tool in every second response, `times` times, and samples 6 tokens otherwise."""
    model, tokenizer = make_model(vocab_size=100, max_position_embeddings=2048), tool_tokenizer()
    sample, call = model.generate, tokenizer(CALL % name)["input_ids"]

    def generate(**inputs: Any) -> torch.Tensor:
        said = tokenizer.batch_decode(inputs["input_ids"])
        if not any("<tools>" in text for text in said):  # no prompt of the tests
            return sample(**inputs)
        ids = sample(**inputs, max_new_tokens=6)
        start = inputs["input_ids"].shape[1]
        ids = torch.nn.functional.pad(ids, (0, max(0, start + len(call) - ids.shape[1])))
        for row, text in enumerate(said):
            turns = text.count("<tool_response>")
            if turns < times and (row % 2 == 0 or turns):
                ids[row, start : start + len(call)] = torch.tensor(call)
                ids[row, start + len(call) :] = 0
        return ids

    model.generate = generate
    return model


def double(a: int) -> int:
    """
    Doubles a number.

    Args:
        a: The number.

    Returns:
        Twice the number.
    """
    return 2 * a


async def slowly_double(a: int) -> int:
    """
    Doubles a number, in its own time.

    Args:
        a: The number.

    Returns:
        Twice the number.
    """
    return 2 * a


class Counter:
    """An environment with one tool. It owns the reward: whether it was called."""

    def reset(self, **row: Any) -> str:
        self.count = 0
        return " Go."

    def add(self, a: int) -> int:
        """
        Adds to the counter.

        Args:
            a: How much.

        Returns:
            The counter.
        """
        self.count += a
        return self.count

    def get_reward(self) -> float:
        return float(self.count > 0)


def conversations(count: int = 16, **columns: Any) -> Dataset:
    rows = [[{"role": "user", "content": "abc" + "+1" * (i % 5) + "="}] for i in range(count)]
    return Dataset.from_dict({"prompt": rows, **columns})


def rollout(batch: list[str], trainer: Any) -> dict[str, Any]:
    """Responses of 3 to 5 random tokens, the second one a tool's, with log-probs and a column of its own."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    lengths = [3 + row % 3 for row in range(len(batch))]
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in batch],
        "completion_ids": [torch.randint(3, 20, (n,), generator=generator).tolist() for n in lengths],
        "logprobs": [[-2.0] * n for n in lengths],
        "env_mask": [[1, 0, *[1] * (n - 2)] for n in lengths],
        "note": [f"row {row}" for row in range(len(batch))],
    }


class Engine:
    """Stands in for vLLM: samples from the trainer's model and reports log-probs that are a little off."""

    def __init__(self, **settings: Any):
        self.model, self.length = settings["model"], settings["max_completion_length"]
        self.settings = {k: v for k, v in settings.items() if isinstance(v, int | float | str | None)}
        self.temperature, self.syncs, self.vllm_client = settings["temperature"], 0, self

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def sync_weights(self) -> None:
        self.syncs += 1

    @torch.no_grad()
    def generate(self, prompts: list, images: Any, num_generations: int, profiler: Any) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(self.syncs)
        responses, logprobs = [], []
        for prompt in prompts:
            ids, found = list(prompt), []
            while len(found) < self.length and ids[-1] != 1:
                logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
                log_p = (logits / self.temperature).log_softmax(-1)
                ids.append(int(torch.multinomial(log_p.exp(), 1, generator=generator)))
                found.append([float(log_p[ids[-1]] + 0.2 * torch.randn((), generator=generator))])
            found[-1] = [None]  # NaN in vLLM
            responses.append(ids[len(prompt) :])
            logprobs.append(found)
        return prompts, responses, logprobs, None
