"""Evaluation: prompts that the model cannot answer are named, and a sampler that differs is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_tokenizer
from transformers import RwkvConfig, RwkvForCausalLM

from g2rl_kernels.cli import main as cli
from g2rl_kernels.errors import TrainerError
from g2rl_kernels.evaluation.engines import Decoding, TransformersEngine
from g2rl_kernels.trainer import TrainerConfig


def evaluate(tmp_path: Path, questions: list[str], *words: str, tokens: tuple[str, ...] = ()) -> int:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens))
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [json.dumps({"question": question, "answer": "1"}) for question in questions]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    data = f"letters={{kind: jsonl, path: {tmp_path / 'data.jsonl'}}}"
    out = ["--out", str(tmp_path / "eval"), "--engine", "transformers", "-n", "2"]
    return cli.main(["eval", str(tmp_path / "model"), "--data", data, *out, *words])


def test_a_prompt_without_room_is_named_with_an_option(tmp_path: Path, capsys: Any) -> None:
    assert evaluate(tmp_path, ["1+1=", "a" * 60], "--max-new-tokens", "9") == 2
    said = "data: problem letters/1 (60 tokens) + max_new_tokens = 69: the model has 64 positions; "
    assert f"g2rl eval: error: {said}lower --max-new-tokens to 4 or less" in capsys.readouterr().err
    assert not (tmp_path / "eval/samples.jsonl").exists()
    assert evaluate(tmp_path, ["1+1=", "a" * 64], "--max-new-tokens", "9") == 2
    assert "shorten the prompt, or leave it out" in capsys.readouterr().err
    assert evaluate(tmp_path, ["1+1=", "a" * 60], "--max-new-tokens", "4", "--overwrite") == 0


def test_a_prompt_token_without_embedding_is_named(tmp_path: Path, capsys: Any) -> None:
    assert evaluate(tmp_path, ["1+1=", "a<new>"], "--max-new-tokens", "4", tokens=("<new>",)) == 2
    said = "data: problem letters/1 has the token '<new>', number 25, but the model embeds 25 tokens"
    assert said in capsys.readouterr().err


def test_a_sampler_that_differs_from_the_model_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64}
    model = RwkvForCausalLM(RwkvConfig(vocab_size=25, **sizes, bos_token_id=1, eos_token_id=1)).eval()
    torch.nn.init.normal_(model.head.weight)
    config = TrainerConfig(max_prompt_tokens=16, max_new_tokens=4)
    with pytest.raises(TrainerError, match="RwkvForCausalLM: it ignores attention_mask"):
        TransformersEngine(model, make_tokenizer(), config, Decoding(n=2))
