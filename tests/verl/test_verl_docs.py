"""The recipe and docs/verl.md: every option is known, and defaults match the code."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from engines import save_model
from steps import compose_config
from tiny import make_tokenizer
from verl.trainer.ppo.core_algos import kl_penalty
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from g2rl_kernels.integrations.verl.trainer import G2RLSettings

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "verl-qwen3-1.7b.sh"
TEXT = (ROOT / "docs" / "verl.md").read_text(encoding="utf-8")
COMMANDS = [
    block
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    if "verl.trainer" in block
]


def recipe_options(*more: str, **environment: str) -> list[str]:
    """The options that the recipe passes to verl; `echo` stands in for Python."""
    env = os.environ | {"PYTHON": "echo"} | environment
    done = subprocess.run([RECIPE, *more], capture_output=True, text=True, env=env, check=True)
    module, name, *options = shlex.split(done.stdout)
    assert (module, name) == ("-m", "verl.trainer.main_ppo")
    return options


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = save_model(tmp_path_factory.mktemp("model"))
    make_tokenizer().save_pretrained(path)
    return path


def test_the_recipe_is_a_configuration_that_verl_accepts(model):
    options = recipe_options(f"actor_rollout_ref.model.path={model}", GPUS="8")
    config = compose_config(*options)
    validate_config(config, need_reference_policy(config), need_critic(config))
    for part in ("model", "rollout", "actor"):
        omega_conf_to_dataclass(config.actor_rollout_ref[part])
    assert G2RLSettings.read(config) == G2RLSettings()


def test_the_recipe_is_the_papers(model):
    config = compose_config(*recipe_options())
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.trainer.v1.trainer_mode == "g2rl_sync"
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen3-1.7B-Base"
    assert (rollout.n, rollout.temperature, rollout.val_kwargs.temperature) == (16, 1.0, 0.8)
    assert (actor.optim.lr, actor.kl_loss_coef, actor.use_kl_loss) == (5e-7, 0.001, True)
    assert actor.kl_loss_type == "k2"  # low_var_kl has no gradient beyond 2.6 nats
    assert (config.data.train_batch_size, config.data.max_response_length) == (16, 8192)
    assert actor.ppo_mini_batch_size * rollout.n == 32
    assert actor.ppo_micro_batch_size_per_gpu == 2


def test_the_recipes_kl_has_a_gradient_where_verls_default_has_not():
    gradients = {}
    for kind in ("low_var_kl", "k2"):
        logprob = torch.tensor([-2.7, -2.5], requires_grad=True)
        kl_penalty(logprob, torch.zeros(2), kind).sum().backward()
        gradients[kind] = logprob.grad.tolist()
    assert gradients["low_var_kl"][0] == 0
    assert gradients["low_var_kl"][1] < -1
    assert gradients["k2"] == pytest.approx([-2.7, -2.5])


def test_the_recipe_takes_more_options_and_its_variables():
    options = recipe_options("+algorithm.g2rl.exploration_score=sqrt", DATA="/d", GPUS="2")
    config = compose_config(*options)
    assert G2RLSettings.read(config).exploration_score == "sqrt"
    assert config.data.train_files == "/d/train.parquet"
    assert config.trainer.n_gpus_per_node == 2


def test_there_are_two_commands():
    assert len(COMMANDS) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_options_are_known(command):
    python, module, name, *options = shlex.split(command.replace("\\\n", " "))
    assert (python, module, name) == ("python3", "-m", "verl.trainer.main_ppo")
    config = compose_config(*options, "actor_rollout_ref.rollout.name=vllm")
    assert config.trainer.v1.trainer_mode == "g2rl_sync"
    G2RLSettings.read(config)


def test_the_command_that_keeps_the_mask():
    text = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    _, _, _, *options = shlex.split(command.replace("\\\n", " "))
    config = compose_config(*options, "actor_rollout_ref.rollout.n=8")
    found = G2RLSettings.read(config).sampling(config.actor_rollout_ref.rollout)
    assert found == {"top_k": 0, "top_p": 0.9, "rules": "vllm", "logits_dtype": "bfloat16"}


def test_the_table_of_options_is_complete_and_right():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| ", TEXT, re.MULTILINE)
    assert rows == [(field.name, str(field.default)) for field in dataclasses.fields(G2RLSettings)]


def test_the_metrics_named_are_those_of_the_metrics_page():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`g2rl/(\w+)`", TEXT)) == set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
