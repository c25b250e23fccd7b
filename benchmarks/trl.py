"""What G2RLTrainer adds to GRPOTrainer: making a trainer and training a few steps, in turns.

    python -m benchmarks.trl                        model, batch and number of steps of TRL's own tests
    python -m benchmarks.trl --model qwen3-0.6b     a shape of benchmarks.train

The clock is the processor's, of all threads, so that other programs on the machine matter little. Generation
is a part of a step, as in training.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from g2rl_kernels.integrations.trl import G2RLConfig, G2RLTrainer

from .train import MODELS, make_model

CHARACTERS = "abcdefghijkl0123456789+="


def tiny_model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3}
    ends: dict[str, Any] = {"vocab_size": len(CHARACTERS) + 2, "pad_token_id": 0, "eos_token_id": 1}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **ends))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: place for place, word in enumerate(["<pad>", "</s>", *CHARACTERS])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def measure(kind: type, folder: Path, model: Path, steps: int, **settings: Any) -> tuple[float, float]:
    """Seconds to make a trainer, and seconds a step."""
    config = G2RLConfig if kind is G2RLTrainer else GRPOConfig
    args = config(
        str(folder),
        per_device_train_batch_size=3,
        num_generations=3,
        max_steps=steps,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    rows = Dataset.from_dict({"prompt": ["abc" + "+1" * (i % 5) + "=" for i in range(16)]})
    gc.collect()  # what the last trainer left: this one's train() would collect it
    start = time.process_time()
    trainer = kind(str(model), reward, args, rows, processing_class=tokenizer())
    made = time.process_time()
    trainer.train()
    return made - start, (time.process_time() - made) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tests", choices=["tests", *MODELS])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=17)
    parser.add_argument("--length", type=int, default=8, help="tokens of a response")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    kinds: dict[str, tuple[type, dict[str, Any]]] = {
        "GRPOTrainer": (GRPOTrainer, {}),
        "G2RLTrainer": (G2RLTrainer, {}),
        "G2RLTrainer, lam=0": (G2RLTrainer, {"g2rl_lam": 0}),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_model() if chosen.model == "tests" else make_model(chosen.model, "cpu")
        model.save_pretrained(Path(scratch, "model"))
        for round_ in range(chosen.rounds + 1):  # the first one warms up
            for name in list(kinds)[:: 1 if round_ % 2 else -1]:
                kind, settings = kinds[name]
                settings = {**settings, "max_completion_length": chosen.length}
                seconds = measure(
                    kind, Path(scratch, "out"), Path(scratch, "model"), chosen.steps, **settings
                )
                if round_:
                    found[name].append(seconds)
    base = [made + chosen.steps * step for made, step in found["GRPOTrainer"]]
    print(f"{chosen.model}, {chosen.steps} steps of 3 responses of {chosen.length} tokens, ", end="")
    print(f"medians of {chosen.rounds} rounds, processor's seconds")
    for name, times in found.items():
        made, step = (statistics.median(column) for column in zip(*times))
        total = [one + chosen.steps * each for one, each in times]
        more = statistics.median(b / a - 1 for a, b in zip(base, total))
        print(f"{name:20} made {made:.4f}  a step {step:.4f}  together {100 * more:+.1f} %")


if __name__ == "__main__":
    main()
