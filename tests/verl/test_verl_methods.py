"""Methods of other papers with verl's own trainer and engine: rewards that verl normalises, or advantages."""

from __future__ import annotations

import pytest
import torch
from engines import Rows
from steps import PROMPTS, SCORES, compose_config
from test_systems import GRPO, check, responses

from g2rl_kernels.group.options import MethodOptions, ShapingOptions
from g2rl_kernels.group.shaping import shape_rewards
from g2rl_kernels.integrations.verl.trainer import G2RLSettings

PREFIX = "+algorithm.g2rl."


@pytest.fixture
def make_step(make_step):
    def make(*overrides, **options):
        return make_step("g2rl_sync", *(PREFIX + one for one in overrides), **options)

    return make


def whole(p):
    rows = Rows(seed=p)
    rows.masks = [torch.ones_like(mask) for mask in rows.masks]
    return rows


def expected(model, name, scale="group", embeddings=None, **options):
    """For both prompts: the geometry with the method's rewards and advantages."""
    found = []
    for p, scores in enumerate(SCORES):
        signs = 2 * torch.tensor(scores) - 1
        given = {"embeddings": embeddings(responses(p))} if embeddings else {}
        one = shape_rewards(
            whole(p).features(model).float(),
            signs,
            ShapingOptions(scale=scale),
            group_size=6,
            algorithm=name,
            method_options=MethodOptions(**options),
            scores=torch.tensor(scores),
            **given,
        )
        found.append(one)
    return found


@pytest.mark.parametrize("ranks", [1, 5], ids=["plain", "reordered and padded"])
@pytest.mark.parametrize("name", ["repexp", "dqo", "dra"])
def test_verl_normalises_a_methods_rewards(make_step, model, name, ranks):
    step = make_step(f"algorithm={name}", "strength=0.7", ranks=ranks)
    shaped = [one.shaped_rewards for one in expected(model, name, strength=0.7)]
    assert max((one - (2 * torch.tensor(s) - 1)).abs().max() for one, s in zip(shaped, SCORES)) > 1e-2
    check(step.run(), [(one + 1) / 2 for one in shaped])
    mean = torch.cat(shaped).mean().item()
    assert step.metrics["g2rl/shaped_reward_mean"] == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("ranks", [1, 5], ids=["plain", "reordered and padded"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("name", "options"), [("setpo", {"strength": 0.7}), ("passk", {"pass_k": 2})])
def test_a_methods_advantages_replace_verls(make_step, monkeypatch, model, name, options, scaled, ranks):
    step = make_step(f"algorithm={name}", *(f"{k}={v}" for k, v in options.items()), ranks=ranks)
    step.trainer.config.algorithm.norm_adv_by_std_in_grpo = scaled
    found = step.run()
    for uid, one in zip(PROMPTS, expected(model, name, "group" if scaled else "none", **options)):
        for r, advantage in enumerate(one.advantages.tolist()):
            (value,) = found[f"{uid}_{r}_0"].unique()
            assert value.item() == pytest.approx(advantage, abs=1e-4)
            row = step.store.rows[f"{uid}_{r}_0"]
            assert torch.equal(row["returns"], row["advantages"])
            assert row["rm_scores"].sum() == SCORES[PROMPTS.index(uid)][r]
    padding = [key for key in step.store.rows if key.rsplit("_", 2)[0] not in PROMPTS]
    assert bool(padding) == (ranks == 5)
    assert all((step.store.rows[key]["advantages"] == 0).all() for key in padding)


def test_texts_in_place_of_gradients(make_step, model):
    step = make_step("algorithm=dqo", "similarity=text", "encoder=letters")
    assert step.trainer.g2rl_reader.answer is None
    shaped = expected(model, "dqo", similarity="text", embeddings=step.trainer.g2rl_reader.encoder)
    check(step.run(), [(one.shaped_rewards + 1) / 2 for one in shaped])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{PREFIX}algorithm=dirl"], "algorithm.g2rl.algorithm: got 'dirl', whose inputs this trainer does"),
        ([f"{PREFIX}algorithm=passk", f"{PREFIX}pass_k=6"], "algorithm.g2rl.pass_k: got 6, needs fewer than"),
        (
            [f"{PREFIX}similarity=text"],
            "algorithm.g2rl.similarity: got 'text' with algorithm.g2rl.",
        ),
        (
            [f"{PREFIX}algorithm=setpo", "algorithm.use_kl_in_reward=true"],
            "algorithm.use_kl_in_reward: got True with algorithm.g2rl.algorithm=setpo",
        ),
    ],
)
def test_settings_that_cannot_work(overrides, message):
    config = compose_config(*GRPO, "actor_rollout_ref.rollout.n=6", *overrides)
    with pytest.raises(ValueError, match=r".*") as error:
        G2RLSettings.read(config)
    assert message in str(error.value)
