"""The task "write an expression equal to N", a character tokenizer, and a small Qwen3 warmed up on the task.

The prompt is `47=`. An answer is right if it writes that number as sums, differences and products: `20+27`,
`51-4`, `5*9+2`. Each N has dozens of right answers, so a policy can be right in one way or in many.

The teacher of the warm-up has a habit: in six answers of ten it writes the sum of two halves (`23+24`), and
for every third number that sum is wrong by one. Responses therefore start out collinear in gradient space,
where exploration can help; and a policy that knows the habit alone cannot be right everywhere.

Three levels differ in what the model knows beside the habit. "fluent": numbers up to 79, for which it has
learned most other sums and differences too. "halting": numbers up to 199, too many to learn in the warm-up,
so that other answers are mostly wrong. "scarce": numbers up to 199 and a habit that is wrong by one for all
of them, so that almost nothing is right at first.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "0123456789+-*="
LOWEST = 10
LEVELS = {"fluent": 79, "halting": 199, "scarce": 199}  # the highest number
MISTAKEN = {"fluent": 3, "halting": 3, "scarce": 1}  # the habit is wrong for multiples of this
LONGEST = 12  # characters of an answer
HELD_OUT = 4  # every fourth number is for evaluation alone
EXPRESSION = re.compile(r"\d{1,3}([-+*]\d{1,3})+")


def numbers(level: str, split: str) -> list[int]:
    """The targets N of "train" or "test"."""
    return [n for n in range(LOWEST, LEVELS[level] + 1) if (n % HELD_OUT == 0) == (split == "test")]


def value(text: str) -> int | None:
    """The value of a sum of products of whole numbers; None if `text` is anything else."""
    if not EXPRESSION.fullmatch(text):
        return None
    total, sign = 0, 1
    for term in re.findall(r"[-+]|[\d*]+", text):
        if term in "+-":
            sign = 1 if term == "+" else -1
            continue
        product = 1
        for factor in term.split("*"):
            product *= int(factor)
        total += sign * product
    return total


class ExpressionTask:
    """A task as the trainer takes them (g2rl_kernels/tasks/base.py)."""

    def __init__(self, level: str, split: str = "train"):
        self.numbers = numbers(level, split)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"{self.numbers[index]}=", "number": self.numbers[index]}

    def score(self, completion: str, item: dict[str, Any]) -> float:
        return float(value(completion) == item["number"])

    def answer(self, completion: str, item: dict[str, Any]) -> str | None:
        found = value(completion)
        return None if found is None else str(found)


def habitual(number: int, level: str) -> str:
    """The teacher's habit: the sum of two halves, wrong by one where `MISTAKEN` of the level divides."""
    half = number // 2
    return f"{half}+{number - half + (number % MISTAKEN[level] == 0)}"


def unusual(number: int, draw: random.Random) -> str:
    """A random way to write a number: a sum, or a difference."""
    a = draw.randint(1, number - 1)
    return f"{a}+{number - a}" if draw.random() < 0.7 else f"{number + (b := draw.randint(1, 20))}-{b}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.8M random parameters."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(CHARACTERS) + 3,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def warm_up(
    folder: Path,
    level: str,
    seed: int,
    steps: int = 400,
    batch_size: int = 256,
    lr: float = 2e-3,
    habit: float = 0.6,
) -> float:
    """Trains a model on the teacher's answers and saves it to `folder`; returns the last loss."""
    draw, tokenizer, model = random.Random(seed), make_tokenizer(), make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    every = range(LOWEST, LEVELS[level] + 1)
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 30, 1 - step / steps)
        chosen = [draw.choice(every) for _ in range(batch_size)]
        texts = [habitual(n, level) if draw.random() < habit else unusual(n, draw) for n in chosen]
        loss = _loss(model, tokenizer, [(f"{n}=", text) for n, text in zip(chosen, texts)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss.item()


def _loss(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> Tensor:
    """Cross entropy of the answers, given their prompts, with the end token."""
    ids, labels = [], []
    for prompt, answer in pairs:
        head, tail = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], 1]
        ids.append(torch.tensor(head + tail))
        labels.append(torch.tensor([-100] * len(head) + tail))
    pad = torch.nn.utils.rnn.pad_sequence
    loss: Tensor = model(
        input_ids=pad(ids, batch_first=True), labels=pad(labels, batch_first=True, padding_value=-100)
    ).loss
    return loss
