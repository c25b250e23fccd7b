"""slime's two functions on two gloo ranks, on stand-ins for slime and Megatron, against float64 on one."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import slime_stand_in
import torch
from slime_ranks import ALONE, STRADDLING, WAYS, Way, samples
from test_megatron import close, run_ranks
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels.group.shaping import graded_rewards

names = pytest.mark.parametrize("name", WAYS)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("slime_ranks.py", tmp_path_factory)


def features(way: Way, results: list[dict[str, Any]]) -> Tensor:
    """[12, d]: of every sample alone, whole, by autograd in float64."""
    embedding, weight = (
        torch.cat([result[name] for result in results[: way.tensor_parallel]]).double()
        for name in ("embedding", "weight")
    )
    decoder, bias = (results[0][f"decoder {name}"].double() for name in ("weight", "bias"))
    temperature = way.args.get("rollout_temperature", 1.0)
    rows = []
    for sample in samples():
        tokens, length, counts = sample["tokens"], sample["response_length"], sample["loss_mask"].double()
        first = len(tokens) - length
        embedded = embedding[tokens]
        hidden = (embedded + torch.tanh(embedded @ decoder.T + bias))[first - 1 : -1][
            :length
        ].requires_grad_()
        scores = (hidden @ weight[:300].T / temperature).log_softmax(-1)
        mean = (scores[range(length), tokens[first:]] * counts).sum() / counts.sum().clamp(min=1)
        rows.append(torch.autograd.grad(mean, hidden)[0].sum(0) * temperature)
    return torch.stack(rows)


def parts(way: Way, results: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[int]]]:
    """Each rank's results, and the samples that it has."""
    schedules = way.schedule if len(way.schedule) == len(results) else way.schedule * len(results)
    samples_of = [[i for batch in batches for i in batch] for batches in schedules]
    return [(result, sorted(i) if way.ascending else i) for result, i in zip(results, samples_of)]


@names
def test_features_are_those_of_each_sample_alone(found, name):
    way, results = WAYS[name], [rank[name] for rank in found]
    exact = features(way, results)
    for result, samples_here in parts(way, results):
        assert result["partition"] == samples_here
        close(result["features"], exact[samples_here], 2e-5)


def settings(way: Way) -> dict[str, Any]:
    given = {"lam": 0.5, "clip": 3.0, "shaping": "right", **way.args.get("g2rl", {})}
    return {name: value for name, value in given.items() if name != "rewards"}


@names
def test_advantages_are_slimes_of_shaped_rewards(found, name):
    way, results = WAYS[name], [rank[name] for rank in found]
    args = slime_stand_in.arguments(**way.args)
    rollout, run = samples(), {i for batches in way.schedule for batch in batches for i in batch}
    raw = torch.tensor([sample["reward"] for sample in rollout])
    signs = torch.where(raw == 1, 1.0, -1.0)
    left_out = [i for i, sample in enumerate(rollout) if i not in run or not sample["loss_mask"].any()]
    assert left_out[:1] == [7]  # the aborted one
    groups = torch.arange(12) // 4
    groups[left_out] = -1
    half: float | Tensor = 0.5
    if "rewards" in way.args.get("g2rl", {}):
        signs, half = graded_rewards(raw, groups)
        assert signs[8:].tolist() == [0.0] * 4  # all the same
    geometry = g2.group_geometry(features(way, results).float(), signs, group_ids=groups, **settings(way))
    bonus = ((geometry.shaped_rewards - signs) * half).masked_fill(groups < 0, 0)
    assert bonus[groups >= 0].abs().max() > 0.05
    expected = torch.tensor(slime_stand_in.own_rewards(args, (raw + bonus).tolist()))
    for result, samples_here in parts(way, results):
        ours = result["g2rl"]
        for i, advantages, returns in zip(samples_here, ours["advantages"], ours["returns"]):
            assert torch.equal(advantages, returns)
            assert advantages.shape == (rollout[i]["response_length"],)
            torch.testing.assert_close(advantages, expected[i].expand_as(advantages), rtol=1e-4, atol=1e-4)
        cosines = [
            geometry.similarity[b, i, j]
            for b, rows in enumerate(geometry.members.tolist())
            for j in range(4)
            for i in range(j)
            if rows[i] >= 0 and rows[j] >= 0
        ]
        assert ours["g2rl/accuracy"] == pytest.approx(8 / 12)
        assert ours["g2rl/cos_mean"] == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-4)
        assert ours["g2rl/feature_seconds"] > 0


@names
def test_lam_0_is_slimes_grpo_to_the_bit(found, name):
    for result in (rank[name] for rank in found):
        for key in ("advantages", "returns"):
            ours, theirs, shaped = (result[which][key] for which in ("lam 0", "slime", "g2rl"))
            assert len(ours) == len(theirs) == len(result["partition"])
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
            assert not all(torch.equal(a, b) for a, b in zip(shaped, theirs))


def test_the_groups_straddle_ranks():
    """What these tests are about."""
    for first in range(0, 12, 4):
        group = set(range(first, first + 4))
        assert all(group & {i for batch in batches for i in batch} for batches in STRADDLING)
    assert len(ALONE) == 1


ERRORS = {
    "no forward": "RuntimeError: g2rl: no features were measured for this rollout.",
    "only the reference's forward": "RuntimeError: g2rl: no features were measured for this rollout.",
    "unknown setting": "ValueError: g2rl: got {'lambda': 1}, needs a mapping of lam, clip",
    "not a mapping": "ValueError: g2rl: got 0.5, needs a mapping of lam, clip",
    "switched off": "ValueError: g2rl: got False, needs a mapping of lam, clip",
    "threshold as text": "TypeError: g2rl.correctness_threshold: got str, needs a number",
    "setting out of range": "ValueError: g2rl.lam: got -1",
    "ppo": "ValueError: --advantage-estimator: got ppo, g2rl needs grpo, gspo, cispo",
    "own post-processing": "ValueError: --custom-reward-post-process-path: got a.b",
    "no advantage function": "ValueError: --custom-advantage-function-path: got None",
    "other rewards": "RuntimeError: slime's rewards are not its raw rewards",
    "other raw rewards": "RuntimeError: slime's rewards are not its raw rewards",
    "several samples of a response": "ValueError: the rollout has 12 samples, g2rl needs",
    "no partition": "RuntimeError: rollout_data: got no partition",
    "a micro-batch less": "RuntimeError: 2 micro-batches were measured, this rank has 1",
    "nothing wrong": "no error",
    "groups of two": "--n-samples-per-prompt=2: with fewer than 3 responses in a group",
    "another pipeline stage": "None",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_change(found, name):
    for rank in found:
        assert rank["errors"].keys() == ERRORS.keys()
        assert rank["errors"][name].startswith(ERRORS[name]), rank["errors"][name]


# --- documents ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (ROOT / "recipes" / "slime-qwen3-1.7b.sh").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "slime.md").read_text(encoding="utf-8")


def test_the_page_lists_every_setting_with_its_default(found):
    table = PAGE[PAGE.index("## Settings") : PAGE.index("## What it does")]
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", table, re.MULTILINE))
    assert rows == {name: str(value) for name, value in found[0]["settings"]["default"].items()}


def test_the_recipe_names_both_functions_and_the_default_settings(found):
    for text in (RECIPE, PAGE):
        named = re.findall(r"g2rl_kernels\.integrations\.slime\.(\w+)", text)
        assert sorted(named) == found[0]["functions"] == ["measure_features", "shaped_advantages"]
    assert found[0]["settings"]["recipe"] == found[0]["settings"]["default"]


def test_the_recipe_makes_several_steps_of_a_rollout():
    """With one, slime leaves out the forward that gives features."""
    numbers = {name: int(value) for name, value in re.findall(r"^  --([\w-]+) (\d+)\b", RECIPE, re.MULTILINE)}
    assert numbers["rollout-batch-size"] * numbers["n-samples-per-prompt"] == 8 * numbers["global-batch-size"]


def test_the_recipe_passes_its_own_and_the_users_options_to_slime(tmp_path):
    """A Ray that prints its arguments takes them."""
    models = tmp_path / "scripts" / "models"
    models.mkdir(parents=True)
    (models / "qwen3-1.7B.sh").write_text("MODEL_ARGS=(--num-layers 28)\n")
    ray = tmp_path / "ray"
    ray.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    ray.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLIME": str(tmp_path)}
    command = [ROOT / "recipes" / "slime-qwen3-1.7b.sh", "--lr", "1e-6"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert said[:2] == ["job", "submit"]
    assert said[said.index("--custom-config-path") + 1] == str(ROOT / "recipes" / "slime-g2rl.yaml")
    assert said[said.index("--num-layers") + 1] == "28"
    assert said[-3:-1] == ["--lr", "1e-6"]
