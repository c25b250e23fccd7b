"""G2RLTrainer in TRL: evaluation, resuming, conversations; settings and versions that are refused."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from tiny_trl import CHAT, Watched, config, length, logged, make_tokenizer, parity, prompts, weights
from trl import GRPOConfig, GRPOTrainer, TrlParser

from g2rl_kernels import versions
from g2rl_kernels.group import shaping
from g2rl_kernels.integrations import trl_seams
from g2rl_kernels.integrations.seams import check_seams
from g2rl_kernels.integrations.trl import G2RLConfig, G2RLTrainer
from g2rl_kernels.integrations.trl_config import correctness_column

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


@pytest.mark.parametrize("asked", [None, 2, "2", -1, "-1", "lambda", True, 0.5])
def test_reward_functions_of_one_name_need_an_index(make: Callable[..., Any], asked: Any) -> None:
    rewards = [lambda completions, **_: [0.0] * len(completions), lambda **given: parity(**given)]
    said = "g2rl_correctness_reward: got .*index from 0 to 1, of the one.*: <lambda>, <lambda>"
    with pytest.raises(ValueError, match=said):
        make(model="/nowhere", reward_funcs=rewards, g2rl_correctness_reward=asked)  # before it is loaded
    for index in (1, "1"):
        trainer = make(Watched, reward_funcs=list(rewards), g2rl_correctness_reward=index, max_steps=1)
        trainer.train()
        rewarded = trainer.seen[0]["rewards"]
        assert logged(trainer, "g2rl/accuracy")[0] == pytest.approx(rewarded[:, 1].mean().item())
        assert 0 < logged(trainer, "g2rl/accuracy")[0] < 1


def test_a_command_line_gives_an_index_and_prompts(tmp_path: Path) -> None:
    parser = TrlParser(G2RLConfig)
    for given, asked in {"1": "1", "parity": "parity"}.items():
        line = ["--output_dir", str(tmp_path), "--g2rl_correctness_reward", given, "--bf16", "false"]
        (args,) = parser.parse_args_and_config([*line, "--use_cpu", "true"])
        assert args.g2rl_correctness_reward == asked
        assert correctness_column(["length", "parity"], args.g2rl_correctness_reward) == 1
    prompts = {"reasoning": ["1+2="], "memory": ["b"]}
    (args,) = parser.parse_args_and_config([*line, "--g2rl_direction_prompts", json.dumps(prompts)])
    assert args.g2rl_direction_prompts == prompts
    assert correctness_column(["1", "parity"], "1") == 0  # a name comes first


def test_the_model_card_cites_g2rl(make: Callable[..., Any], tmp_path: Path) -> None:
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make(**keys).train()
    card = (tmp_path / "out/README.md").read_text()
    assert "Cite G2RL as:" in card
    assert "eprint       = {arXiv:2512.15687}" in card
    make(g2rl_lam=0, **keys).train()
    card = (tmp_path / "out/README.md").read_text()
    assert "2512.15687" not in card
    assert "Cite GRPO as:" in card


# --- small data, evaluation alone -----------------------------------------------------------------------


def test_a_data_set_too_small_to_train_on_evaluates(make: Callable[..., Any]) -> None:
    few = {"train_dataset": prompts(1), "eval_dataset": prompts(3), "per_device_eval_batch_size": 4}
    ours, theirs = make(**few), make(GRPOTrainer, **few)
    torch.manual_seed(0)
    found = ours.evaluate()
    torch.manual_seed(0)
    assert found["eval_reward"] == theirs.evaluate()["eval_reward"]
    with pytest.raises(ValueError, match=r"train_dataset: 1 prompts, but a generation batch takes 2 .*8 / n"):
        ours.train()
    unshaped = make(g2rl_lam=0, **few)
    assert unshaped.train().global_step == theirs.train().global_step == 0


def test_small_groups_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaping, "_told", set())
    with pytest.warns(UserWarning, match=r"^num_generations=2: .* equally novel, .* or g2rl_lam to 0$"):
        config(tmp_path, num_generations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(tmp_path, num_generations=4)
        config(tmp_path, num_generations=2, g2rl_algorithm="entropy_bonus")


# --- TRL's versions -------------------------------------------------------------------------------------


def test_a_trl_without_a_seam_is_refused_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    check_seams("trl", trl_seams.SEAMS)
    monkeypatch.delattr("trl.trainer.utils.FusedCausalLMOutput")
    monkeypatch.delattr(GRPOTrainer, "_generate")
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", lambda self, inputs, completions: None)
    others = {
        "trl.nowhere": {"f": ""},
        "trl:NoTrainer": {"train": ""},
        "trl:GRPOTrainer": {**trl_seams.SEAMS["trl:GRPOTrainer"], "num_iteration": ""},
        "trl:GRPOConfig": {**trl_seams.SEAMS["trl:GRPOConfig"], "epsilon_low": ""},
    }
    lacking = (
        r"^trl .* lacks what g2rl-kernels builds on: trl.trainer.utils.FusedCausalLMOutput, "
        r"GRPOTrainer._generate, "
        r"GRPOTrainer._calculate_rewards \(its parameters prompts, completions\), GRPOTrainer.num_iteration, "
        r"GRPOConfig.epsilon_low, trl.nowhere, trl.NoTrainer; .*pip install 'trl==1.16.\*'"
    )
    with pytest.raises(ImportError, match=lacking):
        check_seams("trl", {**trl_seams.SEAMS, **others})


def test_a_trl_that_was_not_tested_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda package: "1.99.0")
    with pytest.warns(versions.UntestedVersionWarning, match=r"trl 1.99.0 is newer"):
        importlib.reload(trl_seams)
