"""Verification within the trainer and the evaluation: failures are counted, votes agree, tags are seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from judges import Fussy, JudgedTask
from tiny import make_model, make_tokenizer, make_trainer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from g2rl_kernels.evaluation.engines import Decoding, TransformersEngine
from g2rl_kernels.evaluation.results import summarise, table
from g2rl_kernels.evaluation.samples import DataSet, Settings, sample, verify
from g2rl_kernels.group.evol import majority_labels
from g2rl_kernels.tasks.answers import AnswerTask
from g2rl_kernels.trainer import TrainerConfig
from g2rl_kernels.trainer.sampling import response_text


class FussyTask(JudgedTask):
    def __init__(self) -> None:
        super().__init__(Fussy())


@pytest.mark.filterwarnings("ignore:FussyTask. the verifier failed")
def test_failures_in_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, task=FussyTask(), batch_size=32, steps=2, temperature=2.0)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    completions = trainer.last[0].completions
    failed = ["1" in text for text in completions]
    assert 0 < sum(failed) < 32
    assert rows[-1]["verify_failures"] == sum(failed)
    scores = trainer.last[1].scores.tolist()
    assert scores == [float("a" in text and not bad) for text, bad in zip(completions, failed)]


@pytest.mark.filterwarnings("ignore:FussyTask. the verifier failed")
def test_votes_in_training_follow_the_judge(tmp_path: Path) -> None:
    settings = {"batch_size": 8, "group_size": 8, "labels": "majority"}
    trainer = make_trainer(tmp_path, task=FussyTask(), **settings)
    rollout = trainer.sampler.sample()
    rollout.completions[:] = ["a", "ba", "ca", "b", "b", "1", "", "ad"]
    verified = trainer.verify(rollout)
    assert verified.failures == 1
    assert verified.answers == ["a", "a", "a", "b", "b", None, None, "a"]
    rewards = trainer.measure(rollout, verified).rewards.tolist()
    assert rewards == [1, 1, 1, -1, -1, -1, -1, 1]


@pytest.mark.filterwarnings("ignore:FussyTask. the verifier failed")
def test_failures_in_evaluation(tmp_path: Path) -> None:
    config = TrainerConfig.from_dict({"max_new_tokens": 6, "max_prompt_tokens": 32})
    settings = Settings(config, Decoding(n=8, temperature=2.0), batch_size=16)
    engine = TransformersEngine(make_model(), make_tokenizer(), config, settings.decoding)
    data = DataSet("fussy", "judges.py", FussyTask())
    rows = sample([data], settings, tmp_path, engine)
    bad = ["1" in row["completion"] for row in rows]
    assert 0 < sum(bad) < len(rows)
    assert [row.get("failure") for row in rows] == ["ValueError: a digit" if one else None for one in bad]
    assert all(row["score"] == 0 and row["answer"] is None for row, one in zip(rows, bad) if one)
    assert verify(rows, [data]) == rows
    summary = summarise(rows)
    assert summary["fussy"]["verify_failures"] == sum(bad)
    assert f"| verify failures        | {sum(bad)}" in table(summary)
    for problem in {row["problem"] for row in rows}:  # two classes: with an "a", and without
        assert len({row["answer"] for row in rows if row["problem"] == problem} - {None}) <= 2


def test_one_answer_in_three_forms(tmp_path: Path) -> None:
    """The vote and the number of distinct answers, through the samples of an evaluation."""
    task = AnswerTask([{"question": "How much?", "answer": "0.001"}], "here")
    texts = [r"\boxed{10^{-3}}", r"\boxed{x = 0.001}", r"\boxed{0.1\%}", r"\boxed{0.01}", r"\boxed{0.01}"]
    rows: Any = [
        {"problem": "d/0", "sample": i, "question": "How much?", "completion": text, "data": "d"}
        for i, text in enumerate(texts)
    ]
    rows = verify(rows, [DataSet("d", "here", task)])
    assert [row["score"] for row in rows] == [1, 1, 1, 0, 0]
    metrics = summarise(rows, [5])["d"]["metrics"]
    assert metrics["maj@5"]["mean"] == 1
    assert metrics["distinct_right"]["mean"] == 1
    assert majority_labels([row["answer"] for row in rows], torch.zeros(5, dtype=torch.int64)).tolist() == [
        True,
        True,
        True,
        False,
        False,
    ]


def tagged() -> PreTrainedTokenizerFast:
    """A tokenizer with <answer> and </answer> among its special tokens."""
    words = ["<pad>", "</s>", "<unk>", "<answer>", "</answer>", "<|im_end|>", "3", "x", "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<answer>", "</answer>", "<|im_end|>"],
    )


def test_tags_that_are_special_tokens_are_seen() -> None:
    tokenizer = tagged()
    assert tokenizer.decode([7, 3, 6, 4, 1], skip_special_tokens=True) == "x3"  # what was verified before
    text = response_text([7, 3, 6, 4, 1, 0, 0], tokenizer, [1])
    assert text == "x<answer>3</answer>"
    task = AnswerTask([{"question": "?", "answer": 3}], "here", extract="answer_tag")
    assert task.score(text, task[0]) == 1
    assert response_text([7, 6, 5], tokenizer, [1, 5]) == "x3"  # <|im_end|>, an end token of the model
    assert response_text([7, 6, 8], tokenizer, [1, 8]) == "x3\n"  # a line end that stops, a plain token
