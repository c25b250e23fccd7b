"""G2RLTrainer and its policy worker: SkyRL's own loop, batches, FSDP2 worker and advantages around them."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections import Counter

import pytest
import torch
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl_steps import Prompts, expected_features, make_trainer
from tiny import make_model, make_tokenizer
from transformers import Qwen3ForCausalLM

from g2rl_kernels import versions
from g2rl_kernels.errors import TrainerError
from g2rl_kernels.group import reference, shaping
from g2rl_kernels.group.methods import METHODS
from g2rl_kernels.group.options import MethodOptions, ShapingOptions
from g2rl_kernels.group.shaping import shape_rewards
from g2rl_kernels.integrations import skyrl
from g2rl_kernels.integrations.skyrl import REQUEST, G2RLConfig, G2RLSettings, G2RLTrainer, group_ids


@pytest.fixture(scope="module", params=[False])
def model(request, tmp_path_factory):
    """A tiny model; its head is a unit of FSDP2 of its own, unless it is tied to the embeddings."""
    path = tmp_path_factory.mktemp("model")
    make_model(max_position_embeddings=512, tie_word_embeddings=request.param).save_pretrained(path)
    return path


@pytest.fixture
def make(monkeypatch, model):
    return lambda *overrides, **options: make_trainer(monkeypatch, model, *overrides, **options)


BOTH = pytest.mark.parametrize("model", [False, True], ids=["untied", "tied"], indirect=True)


def batch_of(trainer):
    """The trainer's first batch, as its loop makes it, ready for the forward."""
    generated = {"trajectory_ids": [Row(prompt["uid"]) for prompt in Prompts(2) for _ in range(4)]}
    output = asyncio.run(trainer.generator.generate({"prompts": 8 * [[]], **generated}))
    uids = [one.instance_id for one in output["trajectory_ids"]]
    output, uids = trainer.postprocess_generator_output(output, uids)
    return trainer.convert_to_training_input(output, uids), trainer.generator.outputs[-1]


class Row:
    def __init__(self, uid: str) -> None:
        self.instance_id = uid


def step(trainer):
    """Old log-probs and advantages of one batch."""
    batch, output = batch_of(trainer)
    if trainer.cfg.trainer.algorithm.use_kl_in_reward:
        trainer.reward_kl_controller = ppo_utils.get_kl_controller(trainer.cfg.trainer.algorithm)
    batch = trainer.fwd_logprobs_values_reward(batch)
    if trainer.cfg.trainer.algorithm.use_kl_in_reward:
        batch["base_action_log_probs"] = batch["action_log_probs"] - 0.3
        batch = trainer.apply_reward_kl_penalty(batch)
    return trainer.compute_advantages_and_returns(batch), output


def shaped_scores(features, output, options, labels=None):
    """[8] scores by the reference: rows without tokens keep theirs, and change nothing for others."""
    scores = torch.tensor(output["rewards"] if labels is None else labels, dtype=torch.float64)
    shaped = scores.clone()
    for rows in (range(4), range(4, 8)):
        kept = [row for row in rows if any(output["loss_masks"][row])]
        rewards = 2 * scores[kept] - 1
        found = reference.group_geometry(features[kept], rewards, torch.arange(len(kept))[None], options)
        shaped[kept] = (found[2] + 1) / 2
    return shaped


def check(batch, scores):
    """Compares advantages with SkyRL's GRPO of the expected scores."""
    grouped = scores.view(2, 4)
    expected = (grouped - grouped.mean(1, True)) / (grouped.std(1, keepdim=True) + 1e-6)
    found = batch["advantages"][:8]
    expected = expected.flatten()[:, None] * batch["response_mask"][:8]
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2e-4)


@BOTH
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_features_are_those_of_the_reference(make, model, packed, temperature):
    trainer = make(f"trainer.algorithm.temperature={temperature}")
    trainer.dispatch.worker.model.remove_microbatch_padding = packed  # its kernels need a GPU
    batch, output = batch_of(trainer)
    trainer.fwd_logprobs_values_reward(batch)
    expected = expected_features(model, output, temperature)
    found = trainer._g2rl_features
    assert found.dtype == torch.float32
    assert expected[2].abs().max() == found[2].abs().max() == 0
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-3)
    assert error.max() < 1e-5


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_old_log_probs_are_skyrls_to_the_bit(make, packed):
    found = []
    for plain in (True, False):
        trainer = make(plain=plain)
        trainer.dispatch.worker.model.remove_microbatch_padding = packed
        batch, _ = batch_of(trainer)
        found.append(trainer.fwd_logprobs_values_reward(batch)["action_log_probs"])
    assert torch.equal(*found)
    assert found[0].any()


# Shapes wrong answers too, which most are here.
INTENT = ("trainer.algorithm.g2rl.lam=0.8", "trainer.algorithm.g2rl.shaping=intent")
OPTIONS = {
    "whole batch": ["trainer.recompute_old_logprobs_per_minibatch=false"],
    "by mini-batch": [],
    "micro-batches by tokens": ["trainer.max_tokens_per_microbatch=40"],
}


@pytest.mark.parametrize("ranks", [2, 3], ids=["2 ranks", "3 ranks, padded"])
@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_advantages_are_those_of_grpo_on_shaped_rewards(make, model, overrides, ranks):
    trainer = make(*INTENT, *overrides, ranks=ranks)
    batch, output = step(trainer)
    assert len(batch["advantages"]) == (9 if ranks == 3 else 8)
    features = expected_features(model, output)
    scores = shaped_scores(features, output, ShapingOptions(lam=0.8, shaping="intent"))
    assert (scores - torch.tensor(output["rewards"])).abs().max() > 0.1
    check(batch, scores)
    metrics = trainer.all_metrics
    assert metrics["loss/avg_final_rewards"] == pytest.approx(sum(output["rewards"]) / 8)
    assert batch.metadata["metrics"]["avg_final_rewards"] == metrics["loss/avg_final_rewards"]
    assert metrics["g2rl/accuracy"] == pytest.approx(sum(output["rewards"]) / 8)
    assert 0 < metrics["g2rl/exploration_score_mean"] < 1
    assert metrics["g2rl/feature_seconds"] > 0
    assert batch["rewards"].sum() == pytest.approx(sum(output["rewards"]) + batch["rewards"][8:].sum().item())


def test_lam_0_is_skyrls_grpo_to_the_bit(make):
    expected, _ = step(make(plain=True))
    found, _ = step(make("trainer.algorithm.g2rl.lam=0"))
    assert torch.equal(found["advantages"], expected["advantages"])
    assert expected["advantages"].any()


def test_kl_in_the_reward_is_taken_off_the_shaped_one(make, model):
    kl = ("trainer.algorithm.use_kl_in_reward=true", "trainer.algorithm.kl_loss_coef=0.1")
    trainer = make(*INTENT, *kl)
    batch, output = step(trainer)
    options = ShapingOptions(lam=0.8, shaping="intent")
    scores = shaped_scores(expected_features(model, output), output, options)
    penalty = batch["rewards"].sum(1).double() - torch.tensor(output["rewards"])
    assert penalty.abs().max() > 0.01
    check(batch, scores + penalty)


def test_a_trajectorys_last_step_counts_and_padding_does_not():
    metadata = {"uids": ["a", "a", "b", "b", "pad0"], "pad_size": 1}
    assert group_ids(metadata).tolist() == [0, 0, 1, 1, -1]
    metadata["is_last_step"] = [False, True, True, True, True]
    assert group_ids(metadata).tolist() == [-1, 0, 1, 1, -1]


def test_majority_labels_and_answers(make, model, monkeypatch):
    monkeypatch.setattr(skyrl, "first_letter", lambda text: text[:1] if text else None, raising=False)
    path = "trainer.algorithm.g2rl.answer_func=g2rl_kernels.integrations.skyrl.first_letter"
    trainer = make("trainer.algorithm.g2rl.labels=majority", path)
    batch, output = step(trainer)
    tokenizer, labels = make_tokenizer(), torch.tensor(output["rewards"])
    for rows in (range(4), range(4, 8)):
        own = {
            row: [
                token for token, mask in zip(output["response_ids"][row], output["loss_masks"][row]) if mask
            ]
            for row in rows
        }
        answers = {row: tokenizer.decode(ids)[:1] for row, ids in own.items() if ids}
        winner = Counter(answers.values()).most_common(1)[0][0]
        for row, one in answers.items():
            labels[row] = float(one == winner)
    assert labels.tolist() != output["rewards"]
    check(batch, shaped_scores(expected_features(model, output), output, ShapingOptions(), labels.tolist()))


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if "alignment" not in one.needs])
@pytest.mark.parametrize("ranks", [2, 3], ids=["2 ranks", "3 ranks, padded"])
def test_methods_of_other_papers(make, model, name, ranks):
    """The advantages are SkyRL's of a method's rewards, or the method's own."""
    prefix = "trainer.algorithm.g2rl."
    trainer = make(f"{prefix}algorithm={name}", f"{prefix}strength=0.7", f"{prefix}pass_k=2", ranks=ranks)
    batch, output = step(trainer)
    features = expected_features(model, output).float()
    scores = torch.tensor(output["rewards"])
    kept = torch.tensor([any(mask) for mask in output["loss_masks"]])
    found = shape_rewards(
        features,
        2 * scores - 1,
        ShapingOptions(),
        group_ids=torch.where(kept, torch.arange(8) // 4, -1),
        algorithm=name,
        method_options=MethodOptions(strength=0.7, pass_k=2),
    )
    if METHODS[name].gives == "rewards":
        shaped = torch.where(kept, (found.shaped_rewards + 1) / 2, scores)
        assert (shaped - scores).abs().max() > 1e-2
        check(batch, shaped.double())
    else:
        expected = found.advantages[:, None] * batch["response_mask"][:8]
        torch.testing.assert_close(batch["advantages"][:8], expected, rtol=0, atol=2e-4)
        assert torch.equal(batch["returns"], batch["advantages"])
        assert not batch["advantages"][8:].any()


def test_a_methods_advantages_reach_all_steps_of_a_trajectory():
    metadata = {"uids": ["a", "a", "b", "c"], "is_last_step": [False, True, True, True], "pad_size": 1}
    values, groups = torch.tensor([0.0, 0.5, -1.0, 9.0]), torch.tensor([-1, 0, 1, -1])
    assert skyrl.trajectory_values(values, groups, metadata).tolist() == [0.5, 0.5, -1.0, 0.0]
    del metadata["is_last_step"]
    assert skyrl.trajectory_values(values, groups, metadata).tolist() == [0.0, 0.5, -1.0, 0.0]


def test_only_the_policys_forward_is_measured(make):
    trainer = make()
    batch, _ = batch_of(trainer)
    before = batch.select(["sequences", "attention_mask"], metadata_keys=["response_length"])
    trainer.fwd_logprobs_values_reward(batch)
    assert all(one.metadata[REQUEST] for one in trainer.dispatch.seen)
    trainer.dispatch.seen.clear()
    other = trainer._execute_forward_pass("ref", before, "logprobs", None)
    assert REQUEST not in trainer.dispatch.seen[0].metadata
    assert other.shape == batch["loss_mask"].shape
    assert [*before] == ["sequences", "attention_mask"]


def test_a_head_that_does_something_unknown_is_refused(make):
    trainer = make()
    lm_head = trainer.dispatch.worker.model.model.lm_head
    inner = lm_head.forward
    lm_head.forward = lambda hidden: 2 * inner(hidden)
    batch, _ = batch_of(trainer)
    with pytest.raises(TrainerError, match="something unknown between hidden states and logits"):
        trainer.fwd_logprobs_values_reward(batch)


@BOTH
def test_two_steps_of_skyrls_own_loop(make, model):
    trainer = make("trainer.algorithm.g2rl.lam=1", "trainer.policy.optimizer_config.lr=0.01")
    before = Qwen3ForCausalLM.from_pretrained(model).lm_head.weight
    asyncio.run(trainer.train())
    first, second = trainer.tracker.logged
    for metrics, output in zip((first, second), trainer.generator.outputs):
        assert metrics["g2rl/accuracy"] == pytest.approx(sum(output["rewards"]) / 8)
        assert metrics["reward/avg_raw_reward"] == metrics["loss/avg_final_rewards"]
        assert metrics["g2rl/shaped_reward_mean"] != pytest.approx(2 * metrics["g2rl/accuracy"] - 1, abs=1e-4)
        assert metrics["policy/grad_norm"] > 0
        assert metrics["g2rl/feature_seconds"] < metrics["timing/step"]
    after = trainer.dispatch.worker.model.model.lm_head.weight.full_tensor()
    assert (after - before).abs().max() > 1e-3


def test_the_trainer_builds_its_own_policy_workers(make, monkeypatch):
    trainer, built = make(), []
    monkeypatch.setattr(skyrl.RayPPOTrainer, "build_models", lambda _self, *workers: built.extend(workers))
    trainer.build_models("policy", "critic", "ref")
    assert built == [skyrl.PolicyWorker, "critic", "ref"]
    assert isinstance(skyrl.G2RLExp.get_trainer(None, **{"cfg": trainer.cfg, **ARGUMENTS}), G2RLTrainer)


ARGUMENTS = dict.fromkeys(("tracker", "tokenizer", "train_dataset", "inference_engine_client", "generator"))

# Settings


def configure(*overrides):
    return G2RLConfig.from_cli_overrides([*overrides])


PREFIX = "trainer.algorithm."


def test_settings_default_and_are_read_from_the_command_line():
    assert configure().trainer.algorithm.g2rl == G2RLSettings()
    options = ["lam=1", "shaping=equation", "correctness_gap=2", "algorithm=evol_rl"]
    found = configure(*(f"{PREFIX}g2rl.{option}" for option in options)).trainer.algorithm.g2rl
    assert found == G2RLSettings(lam=1, shaping="equation", correctness_gap=2, algorithm="evol_rl")


@pytest.mark.parametrize(
    ("overrides", "entropy", "clip"),
    [
        ([], None, 0.2),
        (["g2rl.algorithm=entropy_bonus"], 0.003, 0.2),
        (["g2rl.algorithm=evol_rl"], 0.003, 0.28),
        (["g2rl.algorithm=evol_rl", "use_entropy_loss=true", "eps_clip_high=0.3"], 0.01, 0.3),
        (["g2rl.algorithm=evol_rl", "g2rl.entropy_coef=0"], None, 0.28),
    ],
)
def test_the_algorithm_decides_entropy_and_clip_where_they_are_unset(overrides, entropy, clip):
    cfg = configure(*(PREFIX + one for one in overrides))
    cfg.trainer.algorithm.g2rl.apply(cfg)
    algorithm = cfg.trainer.algorithm
    assert algorithm.use_entropy_loss == (entropy is not None)
    assert entropy is None or algorithm.entropy_loss_coef == entropy
    assert algorithm.eps_clip_high == clip


def test_small_groups_are_told(monkeypatch):
    monkeypatch.setattr(shaping, "_told", set())
    cfg = configure("generator.n_samples_per_prompt=2")
    said = rf"^generator\.n_samples_per_prompt=2: .* equally novel, .* {PREFIX}g2rl\.lam to 0$"
    with pytest.warns(UserWarning, match=said):
        cfg.trainer.algorithm.g2rl.apply(cfg)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{PREFIX}g2rl.lamda=1", "lamda"),
        (f"{PREFIX}g2rl.lam=-1", "trainer.algorithm.g2rl.lam: got -1, needs a positive finite number, or 0"),
        (f"{PREFIX}g2rl.algorithm=ppo", "trainer.algorithm.g2rl.algorithm: got 'ppo', needs one of 'grpo'"),
        (
            f"{PREFIX}advantage_estimator=gae",
            "trainer.algorithm.advantage_estimator: got gae, G2RLTrainer",
        ),
        ("trainer.strategy=megatron", "trainer.strategy: got megatron, G2RLTrainer needs fsdp"),
        (
            f"{PREFIX}g2rl.algorithm=gar",
            "g2rl.algorithm: got 'gar', whose inputs this trainer does not",
        ),
        (
            f"{PREFIX}g2rl.similarity=text",
            f"{PREFIX}g2rl.similarity: got 'text' with {PREFIX}g2rl.algorithm=",
        ),
        ("trainer.policy.sequence_parallel_size=2", "sequence_parallel_size: got 2, G2RLTrainer needs 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_built(override, message):
    with pytest.raises(ValueError, match=r".*") as error:
        G2RLTrainer(configure(override), **ARGUMENTS)
    assert message in str(error.value)


def test_the_command_reads_its_settings_and_starts_the_experiment(monkeypatch):
    ran = []
    monkeypatch.setattr(skyrl, "validate_cfg", lambda cfg: None)
    monkeypatch.setattr(skyrl, "initialize_ray", lambda cfg: None)
    monkeypatch.setattr(skyrl.ray, "get", lambda one: ran.append(one))
    monkeypatch.setattr(skyrl._entrypoint, "remote", lambda cfg: cfg)
    own = "trainer.override_entrypoint=g2rl_kernels.integrations.skyrl"
    monkeypatch.setattr("sys.argv", ["main_base", own, f"{PREFIX}g2rl.lam=0.7"])
    skyrl.main()
    assert ran[0].trainer.algorithm.g2rl.lam == 0.7


def test_this_version_is_the_tested_one():
    assert versions.untested("skyrl") is None, importlib.metadata.version("skyrl")
