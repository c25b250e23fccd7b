"""G2RLTrainer in TRL: evaluation, resuming, conversations; settings that are refused."""

from __future__ import annotations

import importlib.metadata
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from tiny_trl import CHAT, Watched, config, length, logged, make_tokenizer, parity, prompts, weights
from trl import GRPOConfig

from g2rl_kernels.integrations import trl as integration
from g2rl_kernels.integrations.trl import G2RLTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers


# --- evaluation, resuming, conversations --------------------------------------------------------------------


def test_evaluation_is_of_the_rewards_as_they_are(make: Callable[..., Any], tmp_path: Path) -> None:
    import pandas

    trainer = make(
        Watched,
        eval_dataset=prompts(3),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        log_completions=True,
    )
    trainer.train()
    assert len(logged(trainer, "eval_reward")) == 2
    assert len(trainer.seen) == 2  # nothing is shaped in evaluation
    assert not any(key.startswith("eval_g2rl") for entry in trainer.state.log_history for key in entry)
    table = pandas.read_parquet(tmp_path / "out/completions/completions_00002.parquet")
    assert len(table) == 8


def test_a_resumed_run_goes_on_with_the_same_numbers(make: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2}
    whole = make(**settings)
    whole.train()
    again = make(**settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert logged(again, "g2rl/cos_mean") == logged(whole, "g2rl/cos_mean")
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(again)[name]), name


def test_conversations_go_through_the_chat_template(make: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    data = prompts().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = make(Watched, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert tokenizer.decode(trainer.generated[0][0]).startswith("<unk><unk>abc")  # u and : are no tokens
    for seen in trainer.seen:
        torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"g2rl_lam": -0.1}, "g2rl_lam: got -0.1"),
        ({"g2rl_lam": math.inf}, "g2rl_lam: got inf"),
        ({"g2rl_clip": 0.0}, "g2rl_clip: got 0.0"),
        ({"g2rl_shaping": "other"}, "g2rl_shaping: got 'other', needs one of 'none', 'intent', 'equation'"),
        ({"g2rl_correctness_gap": -1.0}, "g2rl_correctness_gap: got -1.0"),
        (
            {"g2rl_algorithm": "ppo"},
            "g2rl_algorithm: got 'ppo', needs one of 'grpo', 'entropy_bonus', 'evol_rl', 'g2rl'",
        ),
        ({"g2rl_labels": "gold"}, "g2rl_labels: got 'gold', needs one of 'truth', 'majority'"),
        ({"g2rl_algorithm": "grpo", "entropy_coef": 0.1}, "entropy_coef: got 0.1 with g2rl_algorithm=grpo"),
        (
            {"g2rl_algorithm": "entropy_bonus", "entropy_coef": 0.0},
            "entropy_coef: got 0.0 .*entropy_bonus has one",
        ),
        (
            {"g2rl_labels": "majority", "g2rl_answer_func": "os.nothing"},
            "g2rl_answer_func: cannot import 'os.no",
        ),
        ({"g2rl_labels": "majority", "g2rl_answer_func": "f"}, "g2rl_answer_func: cannot import 'f'"),
        (
            {"train_dataset": prompts(1)},
            r"train_dataset: 1 prompts, but a generation batch takes 2 .*8 / num_gen",
        ),
        ({"reward_funcs": [parity, length]}, "g2rl_correctness_reward: got None.*: parity, length"),
        ({"g2rl_correctness_reward": "accuracy"}, "g2rl_correctness_reward: got 'accuracy'.*: parity"),
    ],
)
def test_wrong_settings_are_named(make: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_grpo_config_is_refused(tmp_path: Path, model_dir: str) -> None:
    with pytest.raises(TypeError, match="args: got GRPOConfig, needs a G2RLConfig"):
        G2RLTrainer(model_dir, parity, config(tmp_path, GRPOConfig), prompts())


def test_trl_versions_that_were_not_tested_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.17.0")
    with pytest.raises(ImportError, match=r"tested with TRL 1.16, found 1.17.0.*pip install 'trl==1.16"):
        runpy.run_path(integration.__file__)
