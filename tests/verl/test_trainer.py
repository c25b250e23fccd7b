"""The trainer g2rl_sync, with verl's own methods and engine around it."""

from __future__ import annotations

import pytest
import torch
from engines import Rows
from steps import PROMPTS, SCORES, Step, compose_config
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from g2rl_kernels.group import reference, shaping
from g2rl_kernels.group.options import ShapingOptions
from g2rl_kernels.integrations.verl.engine import FEATURES, REQUEST, SAMPLING, is_patched
from g2rl_kernels.integrations.verl.trainer import G2RLSettings, G2RLTrainerSync, _with_bonus, group_ids


@pytest.fixture
def make_step(monkeypatch, model):
    return lambda mode, *overrides, **options: Step(monkeypatch, model, mode, *overrides, **options)


KEYS = [f"{uid}_{r}_0" for uid in PROMPTS for r in range(6)]


def test_advantages_are_those_of_grpo_on_shaped_rewards(make_step, model):
    step = make_step("g2rl_sync", "+algorithm.g2rl.lam=0.8")
    found = step.run()
    for p, (uid, scores) in enumerate(zip(PROMPTS, SCORES)):
        rows = Rows(seed=p)
        rows.masks = [torch.ones_like(mask) for mask in rows.masks]
        rewards = 2 * torch.tensor(scores, dtype=torch.float64) - 1
        shaped = reference.group_geometry(
            rows.features(model),
            rewards,
            torch.arange(6)[None],
            ShapingOptions(lam=0.8, uniform_groups="skip"),
        )[2]
        assert (shaped - rewards).abs().max() > 0.1
        shaped = (shaped + 1) / 2  # in the units of the scores
        expected = (shaped - shaped.mean()) / (shaped.std() + 1e-6)  # verl's GRPO
        for r, advantage in enumerate(expected):
            (value,) = found[f"{uid}_{r}_0"].unique()
            assert value.item() == pytest.approx(advantage.item(), abs=1e-4)


def test_reordered_and_padded_batches_give_what_the_plain_one_gives(make_step):
    plain = make_step("g2rl_sync")
    expected = plain.run()
    balanced = make_step("g2rl_sync", ranks=5)
    found = balanced.run()
    assert list(expected) == KEYS
    padding = [key for key in found if key.startswith("pad")]
    assert len(found) == 60  # the least that 5 ranks and mini-batches of 12 divide
    assert len(padding) == 48
    assert [key for key in found if key in expected] != KEYS
    for key in KEYS:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)
    for key in padding:
        assert not found[key].any()
    names = (
        "exploration_score_mean",
        "cos_mean",
        "negative_pairs",
        "accuracy",
        "shaped_reward_mean",
        "sign_flips",
    )
    for name in names:
        name = f"g2rl/{name}"
        assert balanced.metrics[name] == pytest.approx(plain.metrics[name], abs=1e-5)
    assert plain.metrics["g2rl/accuracy"] == pytest.approx(5 / 12)
    assert plain.metrics["g2rl/feature_seconds"] > 0


def test_features_may_be_over_the_ids_that_sampling_kept(make_step, model):
    options = "+algorithm.g2rl.keep_sampling_mask=True", "actor_rollout_ref.rollout.top_k=4"
    step = make_step("g2rl_sync", *options, "actor_rollout_ref.rollout.dtype=float32")
    step.run()
    for p, uid in enumerate(PROMPTS):
        rows = Rows(seed=p)
        rows.masks = [torch.ones_like(mask) for mask in rows.masks]
        for r, expected in enumerate(rows.features(model, top_k=4)):
            found = step.store.rows[f"{uid}_{r}_0"][FEATURES]
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    added = step.metrics["g2rl/added_tokens"]
    assert 0 < added < 1
    assert step.metrics["g2rl/kept_ids"] == pytest.approx(4 + added)
    assert step.metrics["g2rl/whole_tokens"] == 0
    (request,) = step.workers.requests
    assert request[SAMPLING] == {"top_k": 4, "top_p": 1.0, "rules": "vllm", "logits_dtype": None}
    assert SAMPLING not in step.batch.extra_info


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "top_k=-1 and top_p=1 leave nothing out"),
        (
            ["actor_rollout_ref.rollout.name=sglang", "actor_rollout_ref.rollout.top_k=4"],
            "rollout.name=sglang",
        ),
    ],
)
def test_a_rollout_whose_mask_is_not_known_is_refused(options, message):
    base = (
        "algorithm.adv_estimator=grpo",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=6",
    )
    config = compose_config(*base, "+algorithm.g2rl.keep_sampling_mask=True", *options)
    with pytest.raises(ValueError, match=f"algorithm.g2rl.keep_sampling_mask: got True.*{message}"):
        G2RLSettings.read(config)


def test_scores_in_other_units_are_shaped_alike_once_the_options_say_so(make_step):
    def double(step):  # -1 and +1
        for row in step.store.rows.values():
            row["rm_scores"][-1] = 2 * row["rm_scores"][-1] - 1
        return step

    expected = make_step("g2rl_sync").run()
    with pytest.warns(UserWarning, match="scores lie further apart than algorithm.g2rl.correctness_gap=1"):
        double(make_step("g2rl_sync")).run()
    units = ("+algorithm.g2rl.correctness_threshold=0", "+algorithm.g2rl.correctness_gap=2")
    found = double(make_step("g2rl_sync", *units)).run()
    for key in KEYS:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)


def test_lam_0_is_verls_grpo_to_the_bit(make_step):
    theirs = make_step("sync", ranks=5)
    expected = theirs.run()
    ours = make_step("g2rl_sync", "+algorithm.g2rl.lam=0", ranks=5)
    found = ours.run()
    for key in KEYS:
        assert torch.equal(found[key], expected[key])
        assert torch.equal(ours.store.rows[key]["returns"], theirs.store.rows[key]["returns"])
    assert any(expected[key].any() for key in KEYS)
    assert {name for name in ours.metrics if not name.startswith("g2rl/")} == theirs.metrics.keys()


@pytest.mark.parametrize("fails", [False, True])
def test_raw_scores_are_back_afterwards(make_step, monkeypatch, fails):
    step = make_step("g2rl_sync", "+algorithm.g2rl.lam=1")
    raw = {key: step.store.rows[key]["rm_scores"].clone() for key in KEYS}
    seen = {}
    compute = PPOTrainerSync._compute_advantage

    def watched(self, batch, metrics):
        seen.update({key: step.store.rows[key]["rm_scores"].clone() for key in KEYS})
        if fails:
            raise RuntimeError("halfway")
        return compute(self, batch, metrics)

    monkeypatch.setattr(PPOTrainerSync, "_compute_advantage", watched)
    if fails:
        with pytest.raises(RuntimeError, match="halfway"):
            step.run()
    else:
        step.run()
    assert any(not torch.equal(seen[key], raw[key]) for key in KEYS)
    for key in KEYS:
        assert torch.equal(step.store.rows[key]["rm_scores"], raw[key])


def test_kl_in_the_reward_is_taken_off_the_shaped_one(make_step):
    step = make_step("g2rl_sync", "algorithm.use_kl_in_reward=True")
    shaped = {}
    put = step.trainer._put_scores
    step.trainer._put_scores = lambda batch, scores: shaped.setdefault("first", scores) is put(batch, scores)
    for row in step.store.rows.values():
        row["ref_log_prob"] = torch.zeros(len(row["response_mask"]))
    step.run()
    coefficient = step.trainer.kl_ctrl_in_reward.value
    for key, score in zip(step.batch.keys, shaped["first"].unbind()):
        row = step.store.rows[key]
        torch.testing.assert_close(row["token_level_rewards"], score - coefficient * row["old_log_probs"])


def test_only_the_old_log_probs_are_asked_for_features(make_step):
    step = make_step("g2rl_sync")
    step.run()
    step.trainer.ref_in_actor = True
    step.trainer._compute_ref_log_prob(step.batch, step.metrics)
    assert [request.get(REQUEST, False) for request in step.workers.requests] == [True, False]


def test_workers_without_the_plugin_are_named(make_step):
    step = make_step("g2rl_sync")
    wg = step.trainer.actor_rollout_wg
    wg.execute_all_sync = lambda method, function: [function(), function()]
    step.trainer._check_workers()
    wg.execute_all_sync = lambda method, function: [function(), False]
    with pytest.raises(
        RuntimeError, match=r"not every worker .* \(ranks \[1\] run verl's own engine\): inst"
    ):
        step.trainer._check_workers()

    def missing(method, function):
        raise ModuleNotFoundError("No module named 'g2rl_kernels'")

    wg.execute_all_sync = missing
    with pytest.raises(RuntimeError, match=r"\(No module named 'g2rl_kernels'\): install g2rl-kernels on"):
        step.trainer._check_workers()
    assert is_patched()


def test_missing_features_are_an_error_that_says_what_to_do(make_step):
    step = make_step("g2rl_sync")
    infer = step.workers.compute_log_prob

    def without(batch):
        batch.extra_info[REQUEST] = False  # as an engine that does not know it
        return infer(batch)

    step.workers.compute_log_prob = without
    with pytest.raises(RuntimeError, match=r"no features came back\): install g2rl-kernels on every node"):
        step.run()
    assert FEATURES not in step.store.rows[KEYS[0]]


def test_it_is_a_synchronous_trainer_to_verl(make_step):
    trainer = make_step("g2rl_sync").trainer
    assert isinstance(trainer, G2RLTrainerSync)
    assert trainer.trainer_mode == "sync"
    assert type(trainer.replay_buffer) is ReplayBuffer
    assert trainer.replay_buffer.trainer_mode == "sync"


def test_group_ids_number_prompts_and_leave_out_padding_and_all_but_a_sessions_last_output():
    rows = [
        ("b_1_0", {}, 0),
        ("a_0_1", {}, 1),
        ("a_0_0", {}, -1),  # session 0 went on
        ("pad_0_0", {"is_padding": True}, -1),
        ("a_1_0", {"is_padding": False}, 1),
        ("b_0_10", {}, 0),
        ("b_0_9", {}, -1),  # by number, not by letter
    ]
    keys, tags, expected = map(list, zip(*rows))
    assert group_ids(keys, tags).tolist() == expected


def test_a_bonus_goes_to_the_last_token_and_nothing_changes_no_bit():
    raw = torch.nested.as_nested_tensor(
        [torch.tensor([0.1, 0.2]), torch.zeros(0), torch.tensor([0.7])], layout=torch.jagged
    )
    moved = _with_bonus(raw, torch.tensor([0.5, 0.0, -0.25]))
    assert [row.tolist() for row in moved.unbind()] == [
        raw[0].add(torch.tensor([0, 0.5])).tolist(),
        [],
        raw[2].sub(0.25).tolist(),
    ]
    assert torch.equal(_with_bonus(raw, torch.zeros(3)).values(), raw.values())


# Settings

GRPO = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.name=vllm")


def test_settings_default_and_are_read_from_the_command_line(monkeypatch):
    monkeypatch.setattr(shaping, "_told", set())
    with pytest.warns(UserWarning, match=r"^actor_rollout_ref\.rollout\.n=1: .* equally novel"):
        assert G2RLSettings.read(compose_config(*GRPO)) == G2RLSettings()  # verl's default is one response
    options = ["lam=1", "shaping=equation", "correctness_gap=2", "correctness_threshold=0"]
    config = compose_config(*GRPO, *(f"+algorithm.g2rl.{option}" for option in options))
    expected = G2RLSettings(lam=1.0, shaping="equation", correctness_gap=2.0, correctness_threshold=0.0)
    assert G2RLSettings.read(config) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+algorithm.g2rl.lamda=1",
            "algorithm.g2rl: Key 'lamda' not in 'G2RLSettings'; options: lam",
        ),
        ("+algorithm.g2rl.lam=much", "algorithm.g2rl: Value 'much' of type 'str' could not be convert"),
        ("+algorithm.g2rl.lam=-1", "algorithm.g2rl.lam: got -1.0, needs a positive finite number, or 0"),
        ("+algorithm.g2rl.lam=nan", "algorithm.g2rl.lam: got nan, needs a positive finite number"),
        ("+algorithm.g2rl.clip=0", "algorithm.g2rl.clip: got 0.0, needs a positive finite number"),
        ("+algorithm.g2rl.correctness_gap=0", "algorithm.g2rl.correctness_gap: got 0.0, needs a positive"),
        (
            "+algorithm.g2rl.shaping=prose",
            "algorithm.g2rl.shaping: got 'prose', needs one of 'none', 'intent',",
        ),
        (
            "+algorithm.g2rl.exploration_score=log",
            "algorithm.g2rl.exploration_score: got 'log', needs one of 'linear', 'sqrt'",
        ),
        ("+algorithm.g2rl.uniform_groups=drop", "algorithm.g2rl.uniform_groups: got 'drop', needs one of"),
        ("algorithm.adv_estimator=gae", "algorithm.adv_estimator: got gae, g2rl_sync needs grpo"),
        ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode: g2rl_sync needs False, because feat"),
        ("actor_rollout_ref.actor.strategy=megatron", "strategy: got megatron, g2rl_sync needs fsdp"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_built(override, message):
    with pytest.raises(ValueError, match=r".*") as error:
        G2RLTrainerSync(compose_config(*GRPO, override))
    assert message in str(error.value)
