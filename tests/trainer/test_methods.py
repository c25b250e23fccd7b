"""Methods of other papers in our trainer: what they are given, and that they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_systems import measured
from tiny import Letters, LetterTask, make_trainer

import g2rl_kernels as g2
from g2rl_kernels.errors import ConfigError
from g2rl_kernels.group.methods import METHODS
from g2rl_kernels.group.options import MethodOptions, ShapingOptions
from g2rl_kernels.group.shaping import shape_rewards
from g2rl_kernels.trainer import TrainerConfig
from g2rl_kernels.trainer import trainer as trainer_module


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "SentenceEncoder", Letters)


@pytest.mark.parametrize("name", METHODS)
def test_each_trains_and_changes_advantages(tmp_path: Path, name: str) -> None:
    keys: dict[str, Any] = {"batch_size": 32, "group_size": 8, "temperature": 1.5, "steps": 2}
    trainer = make_trainer(tmp_path / name, algorithm=name, **keys)
    _, at = measured(trainer)
    _, plain = measured(make_trainer(tmp_path / "grpo", algorithm="grpo", **keys))
    assert torch.equal(at.rewards, plain.rewards)
    assert torch.equal(at.geometry.similarity, plain.geometry.similarity)
    assert (at.geometry.advantages - plain.geometry.advantages).abs().max() > 1e-4
    moved = not torch.equal(at.geometry.shaped_rewards, at.rewards)
    assert moved == (METHODS[name].gives == "rewards")
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    steps = trainer.train()
    assert len(steps) == 2
    assert all(metrics["grad_norm"] > 0 for metrics in steps)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


@pytest.mark.parametrize("similarity", ["gradient", "text"])
@pytest.mark.parametrize("truncated", ["keep", "drop"])
def test_settings_reach_the_method(tmp_path: Path, similarity: str, truncated: str) -> None:
    trainer = make_trainer(
        tmp_path,
        algorithm="dqo",
        similarity=similarity,
        strength=0.3,
        uniform_groups="skip",
        truncated=truncated,
        encoder="org/letters",
        batch_size=32,
        group_size=8,
        temperature=1.5,
    )
    seen: dict[str, torch.Tensor] = {}
    shape = trainer._shape

    def watched(features: torch.Tensor, keys: torch.Tensor, *others: Any) -> Any:
        seen.update(features=features, keys=keys)
        return shape(features, keys, *others)

    trainer._shape = watched
    rollout, at = measured(trainer)
    ids = torch.arange(32) // 8
    if truncated == "drop":
        ids = ids.masked_fill(rollout.truncated, -1)
    texts = {"embeddings": Letters("", "cpu")(rollout.completions)} if similarity == "text" else {}
    expected = shape_rewards(
        seen["features"],
        at.rewards,
        ShapingOptions(uniform_groups="skip"),
        group_ids=ids,
        keys=seen["keys"],
        algorithm="dqo",
        method_options=MethodOptions(strength=0.3, similarity=similarity),
        **texts,
    )
    for found, one in zip(at.geometry, expected):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-6)
    assert (similarity == "text") == (getattr(trainer, "encoder", None) is not None)


def test_an_encoder_is_loaded_where_texts_are_compared_alone(tmp_path: Path) -> None:
    assert not hasattr(make_trainer(tmp_path / "one", algorithm="dra"), "encoder")
    assert hasattr(make_trainer(tmp_path / "two", algorithm="dra", similarity="text"), "encoder")


def test_majority_labels_work_with_methods(tmp_path: Path) -> None:
    class Last(LetterTask):
        def answer(self, completion: str, item: dict[str, Any]) -> str | None:
            return completion[-1:]

    trainer = make_trainer(tmp_path, task=Last(), algorithm="passk", pass_k=2, labels="majority")
    _, at = measured(trainer)
    expected = []
    for r in at.rewards.view(-1, 4):
        pairs = [(i, j) for i in range(4) for j in range(i)]
        won = torch.tensor([float((r[[*pair]] > 0).any()) for pair in pairs])
        spread = (won.mean() * (1 - won.mean())).sqrt() + 1e-6
        for i in range(4):
            mine = torch.tensor([i in pair for pair in pairs])
            expected.append(((won[mine].mean() - won.mean()) / spread).item())
    torch.testing.assert_close(at.geometry.advantages, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_setpo_adds_to_scaled_advantages(tmp_path: Path) -> None:
    for scale in ("group", "none"):
        trainer = make_trainer(tmp_path / scale, algorithm="setpo", scale=scale, strength=0.0)
        _, at = measured(trainer)
        plain = g2.group_geometry(
            torch.ones(8, 1), at.rewards, group_size=4, shaping="none", scale=scale
        ).advantages
        torch.testing.assert_close(at.geometry.advantages, plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strength": -1}, r"^strength: got -1\.0, needs a positive finite number, 0, or None"),
        ({"similarity": "words"}, r"^similarity='words': choose one of gradient, text"),
        (
            {"similarity": "text"},
            r"^similarity: got 'text' with algorithm=g2rl, .* use repexp, dqo, setpo, dra",
        ),
        ({"algorithm": "passk", "group_size": 4}, r"^pass_k: got 4, needs fewer than group_size=4"),
        ({"ridge": 0}, r"^ridge: got 0\.0, needs a positive finite number"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainerConfig.from_dict(values)
