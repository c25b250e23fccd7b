"""G2RLTrainer: plain GRPO to the bit, rewards in any unit, metrics and tables of the raw rewards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from tiny_trl import Watched, assert_same_run, length, logged, parity, trained
from trl import GRPOTrainer

import g2rl_kernels as g2
from g2rl_kernels.group.options import SCORE_GATE
from g2rl_kernels.group.shaping import graded_rewards

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers


# --- plain GRPO ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"num_iterations": 2, "beta": 0.1, "max_steps": 4}], ids=["plain", "iterations and KL"]
)
def test_lam_0_is_grpo_to_the_bit(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    ours, theirs = trained(make, g2rl_lam=0, **settings), trained(make, GRPOTrainer, **settings)
    assert_same_run(ours, theirs)
    assert not any(key.startswith("g2rl") for entry in ours.state.log_history for key in entry)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_unshaped_advantages_are_trls_to_the_bit(
    make: Callable[..., Any], scale: str, aggregation: str
) -> None:
    """shaping="none" runs everything but shaping, so this compares the advantages' formula with TRL's."""
    settings = {
        "reward_funcs": [length, parity],
        "reward_weights": [0.5, 2.0],
        "scale_rewards": scale,
        "multi_objective_aggregation": aggregation,
    }
    own = {"g2rl_shaping": "none", "g2rl_fused_logprobs": False, "g2rl_correctness_reward": "parity"}
    ours, theirs = trained(make, **own, **settings), trained(make, GRPOTrainer, **settings)
    assert_same_run(ours, theirs)
    assert len(logged(ours, "g2rl/cos_mean")) == 2


# --- rewards and metrics ------------------------------------------------------------------------------------


def some_without(completions: list[str], **_: Any) -> list[float | None]:
    return [None if i % 4 == 1 else float(i % 2 == 0) for i in range(len(completions))]


def test_a_response_that_is_not_scored_takes_no_part(make: Callable[..., Any]) -> None:
    trainer = make(Watched, reward_funcs=some_without)
    trainer.train()
    seen = trainer.seen[0]
    assert (seen["advantages"][1::4] == 0).all()
    assert seen["advantages"].isfinite().all()
    assert logged(trainer, "g2rl/accuracy")[0] == pytest.approx(4 / 6)
    assert logged(trainer, "reward")[0] == pytest.approx(4 / 6)
    scored = torch.tensor([0, 2, 3, 4, 6, 7])
    alone = g2.group_geometry(
        seen["features"][scored], 2 * seen["rewards"][scored, 0] - 1, group_size=3, lam=0.5
    )
    assert logged(trainer, "g2rl/shaped_reward_mean")[0] == pytest.approx(alone.shaped_rewards.mean().item())


def test_a_batch_that_is_not_scored_has_no_accuracy(make: Callable[..., Any]) -> None:
    trainer = trained(make, reward_funcs=lambda completions, **_: [None] * len(completions), max_steps=1)
    assert logged(trainer, "g2rl/accuracy") == logged(trainer, "reward") == [None]


def signs(completions: list[str], **_: Any) -> list[float]:
    return [2 * reward - 1 for reward in parity(completions)]


def test_rewards_of_another_unit_shape_as_much(make: Callable[..., Any]) -> None:
    zero_one = trained(make, Watched)
    units = {"g2rl_correctness_threshold": 0.0, "g2rl_correctness_gap": 2.0, "log_completions": True}
    plus_minus = trained(make, Watched, reward_funcs=signs, **units)
    for one, other in zip(zero_one.seen, plus_minus.seen):
        torch.testing.assert_close(one["advantages"], other["advantages"], rtol=1e-3, atol=1e-3)
    with pytest.warns(UserWarning, match="rewards of signs lie further apart than g2rl_correctness_gap=1"):
        trained(make, reward_funcs=signs)


def test_metrics_and_tables_keep_the_raw_rewards(make: Callable[..., Any], tmp_path: Path) -> None:
    import pandas

    trainer = make(
        Watched, reward_funcs=[length, parity], g2rl_correctness_reward="parity", log_completions=True
    )
    trainer.train()
    for step, seen in enumerate(trainer.seen):
        table = pandas.read_parquet(tmp_path / f"out/completions/completions_{step + 1:05d}.parquet")
        raw, bonus = seen["rewards"], torch.tensor(table["g2rl_bonus"], dtype=torch.float32)
        assert torch.equal(torch.tensor(table["parity"], dtype=torch.float32), raw[:, 1])
        torch.testing.assert_close(torch.tensor(table["advantage"], dtype=torch.float32), seen["advantages"])
        assert logged(trainer, "rewards/parity/mean")[step] == pytest.approx(raw[:, 1].mean().item())
        assert logged(trainer, "reward")[step] == pytest.approx(raw.nansum(1).mean().item())
        signs = 2 * raw[:, 1] - 1
        shaped = g2.group_geometry(seen["features"], signs, group_size=4, lam=0.5)
        torch.testing.assert_close(bonus, (shaped.shaped_rewards - signs) / 2)
        groups = (raw.nansum(1) + bonus).view(-1, 4)
        expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(seen["advantages"], expected.flatten(), rtol=1e-3, atol=1e-4)
        assert logged(trainer, "g2rl/exploration_score_mean")[step] == pytest.approx(
            shaped.exploration_score.mean().item()
        )
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    names = (
        "exploration_score_mean "
        "cos_mean negative_pairs accuracy shaped_reward_mean sign_flips feature_seconds"
    )
    assert {key for key in entry if key.startswith("g2rl")} == {f"g2rl/{name}" for name in names.split()}
    assert entry["g2rl/feature_seconds"] > 0


def half_right(completions: list[str], **_: Any) -> list[float]:
    return [(1.0, 0.5, 0.0)[i % 3] for i in range(len(completions))]


def test_partial_credit_is_not_right(make: Callable[..., Any]) -> None:
    trainer = trained(make, Watched, reward_funcs=half_right)
    assert trainer.args.g2rl_correctness_threshold == SCORE_GATE
    assert set(logged(trainer, "g2rl/accuracy")) == {3 / 8}


def grades(completions: list[str], **_: Any) -> list[float]:
    return [(sum(map(ord, text)) % 7) / 10 for text in completions]


def test_graded_rewards_are_told_and_have_a_rule(make: Callable[..., Any]) -> None:
    said = "rewards of grades differ in a batch, but all lie below .*set g2rl_rewards='graded'"
    with pytest.warns(UserWarning, match=said):
        trained(make, reward_funcs=grades)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = trained(make, Watched, reward_funcs=grades, g2rl_rewards="graded", log_completions=True)
    for seen in trainer.seen:
        raw, ids = seen["rewards"][:, 0], torch.arange(8) // 4
        rewards, half = graded_rewards(raw, ids)
        shaped = g2.group_geometry(seen["features"], rewards, group_ids=ids).shaped_rewards
        groups = (raw + (shaped - rewards) * half).view(-1, 4)
        expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(seen["advantages"], expected.flatten(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="g2rl_rewards: got 'graded' with g2rl_labels=majority"):
        make(g2rl_rewards="graded", g2rl_labels="majority")


def test_the_alarm_sees_what_is_logged(make: Callable[..., Any]) -> None:
    trainer, seen = make(logging_steps=1, max_steps=3, g2rl_shaping="intent"), []

    def feed(step: int, *numbers: float | None) -> bool:
        seen.append((step, *numbers))
        trainer._alarm.message = "step 1: made up" if step == 1 else trainer._alarm.message
        return step == 1

    trainer._alarm.feed = feed
    with pytest.warns(UserWarning, match="g2rl: step 1: made up"):
        trainer.train()
    assert [step for step, *_ in seen] == [0, 1, 2]
    for place, key in enumerate(("g2rl/accuracy", "g2rl/cos_mean", "entropy"), 1):
        assert [one[place] for one in seen] == pytest.approx(logged(trainer, key), rel=1e-4, abs=1e-6)
    assert logged(trainer, "g2rl/alarm") == [1.0, 1.0]
    assert trainer._alarm.remedy == "try g2rl_shaping=right"
