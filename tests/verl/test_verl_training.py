"""verl's own command line, workers, queue and loop: two steps on two ranks. Only generation is scripted."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from engines import save_model
from tiny import make_tokenizer

TOKENIZER_TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name, overrides of verl's configuration) -> the finished process, the metrics of each step."""
    folder = tmp_path_factory.mktemp("verl")
    model = save_model(folder / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOKENIZER_TEMPLATE
    tokenizer.save_pretrained(model)
    prompt = {"data_source": "tiny", "prompt": [{"role": "user", "content": "1+1="}]}
    prompt |= {"reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": 0}}
    pandas.DataFrame(8 * [prompt]).to_parquet(folder / "prompts.parquet")

    def run_verl(name: str, *overrides: str, **environment: str):
        metrics = folder / f"{name}.jsonl"
        command = [
            *(sys.executable, "-m", "verl.trainer.main_ppo", "trainer.v1.trainer_mode=g2rl_sync"),
            *("algorithm.adv_estimator=grpo", f"data.train_files={folder}/prompts.parquet"),
            *(f"data.val_files={folder}/prompts.parquet", "data.train_batch_size=3"),
            *("data.dataloader_num_workers=0", "data.max_prompt_length=16", "data.max_response_length=16"),
            *(f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.model.external_lib=scripted"),
            "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
            *("actor_rollout_ref.rollout.name=scripted", "actor_rollout_ref.rollout.n=4"),
            "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=scripted.ScriptedAgentLoopManager",
            "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
            *("actor_rollout_ref.actor.strategy=fsdp2", "actor_rollout_ref.actor.use_torch_compile=False"),
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
            *("reward.num_workers=1", "trainer.device=cpu", "trainer.n_gpus_per_node=2"),
            *("trainer.logger=[file]", "trainer.val_before_train=False", "trainer.resume_mode=disable"),
            "trainer.total_training_steps=2",
            *("+ray_kwargs.ray_init.num_cpus=16", "+ray_kwargs.ray_init.num_gpus=2"),
            "+ray_kwargs.ray_init.include_dashboard=False",
            "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
            *overrides,
        ]
        environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(metrics), **environment}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=folder, timeout=900
        )
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return done, [json.loads(line)["data"] for line in lines]

    return run_verl


def test_two_steps(run):
    done, steps = run("steps", "+algorithm.g2rl.lam=1", "+algorithm.g2rl.shaping=intent")
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    version = importlib.metadata.version("verl")
    assert f"plugin loaded into verl {version}; trainer.v1.trainer_mode=g2rl_sync selects it" in done.stderr
    assert len(steps) == 2
    for step in steps:
        assert step["critic/score/mean"] == pytest.approx(step["g2rl/accuracy"])  # 0 and 1, no padding
        assert step["critic/score/max"] == 1
        assert 0 < step["g2rl/exploration_score_mean"] < 1
        assert -1 < step["g2rl/cos_mean"] < 1
        assert 0 <= step["g2rl/negative_pairs"] <= 1
        assert step["g2rl/shaped_reward_mean"] != pytest.approx(2 * step["g2rl/accuracy"] - 1, abs=1e-4)
        assert step["g2rl/sign_flips"] == 0
        assert 0 < step["g2rl/feature_seconds"] < step["timing_s/step"]
        assert step["actor/grad_norm"] > 0
        assert "actor/entropy_loss" not in step


def test_a_step_of_evol_rl_by_majority(run):
    options = ("algorithm=evol_rl", "labels=majority", "answer_func=scripted.answer", "encoder=characters")
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).with_name("stand_in"))])
    overrides = [f"+algorithm.g2rl.{option}" for option in options]
    done, steps = run("evol", *overrides, "trainer.total_training_steps=1", PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    (step,) = steps
    assert step["critic/score/mean"] == pytest.approx(step["g2rl/accuracy"])
    assert -1 < step["g2rl/shaped_reward_mean"] < 1
    assert step["critic/advantages/max"] > 0
    assert step["actor/grad_norm"] > 0
    assert step["actor/entropy_loss"] > 0  # verl computes it where its coefficient is not 0


@pytest.mark.parametrize("name", ["setpo", "dqo"])
def test_two_steps_of_other_methods(run, name):
    """setpo's advantages replace verl's in the TransferQueue; dqo's rewards are normalised by verl."""
    done, steps = run(name, f"+algorithm.g2rl.algorithm={name}", "+algorithm.g2rl.strength=2")
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    assert len(steps) == 2
    for step in steps:
        assert step["critic/score/mean"] == pytest.approx(step["g2rl/accuracy"])
        moved = step["g2rl/shaped_reward_mean"] != pytest.approx(2 * step["g2rl/accuracy"] - 1, abs=1e-4)
        assert moved == (name == "dqo")
        assert step["critic/advantages/max"] > 0
        assert step["actor/grad_norm"] > 0


def test_a_worker_without_the_package_stops_the_run_before_the_first_rollout(run):
    done, steps = run("without", WITHOUT_G2RL="workers")
    assert done.returncode != 0
    assert not steps
    assert "trainer_mode=g2rl_sync, but not every worker could load the plugin" in done.stderr
    assert "install g2rl-kernels on every node" in done.stderr
