"""algorithm=grpo | entropy_bonus | evol_rl | g2rl and labels=majority, with verl's own methods and engine."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from engines import Rows
from scripted import answer
from steps import PROMPTS, SCORES, compose_config
from tiny import make_tokenizer

from g2rl_kernels.group import reference
from g2rl_kernels.group.evol import evol_rewards
from g2rl_kernels.group.options import ShapingOptions
from g2rl_kernels.integrations.verl.trainer import G2RLSettings, G2RLTrainerSync

READ = ("+algorithm.g2rl.answer_func=scripted.answer", "+algorithm.g2rl.encoder=letters")


def responses(p: int) -> list[str]:
    """The texts of prompt p's responses, as the tokenizer writes their tokens."""
    rows = Rows(seed=p)
    own = [ids[len(ids) - len(mask) :] for ids, mask in zip(rows.ids, rows.masks)]
    return make_tokenizer().batch_decode(own, skip_special_tokens=True)


def check(found: dict, expected: list[torch.Tensor]) -> None:
    """Compares each response's advantage with verl's GRPO of the expected scores of the two prompts."""
    for uid, scores in zip(PROMPTS, expected):
        advantages = (scores - scores.mean()) / (scores.std() + 1e-6)
        for r, advantage in enumerate(advantages):
            (value,) = found[f"{uid}_{r}_0"].unique()
            assert value.item() == pytest.approx(advantage.item(), abs=1e-4)


@pytest.mark.parametrize("algorithm", ["grpo", "entropy_bonus"])
def test_without_novelty_the_advantages_are_verls_to_the_bit(make_step, algorithm):
    expected = make_step("sync").run()
    step = make_step("g2rl_sync", f"+algorithm.g2rl.algorithm={algorithm}")
    found = step.run()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert step.metrics["g2rl/sign_flips"] == 0
    assert 0 < step.metrics["g2rl/exploration_score_mean"] < 1


@pytest.mark.parametrize("ranks", [1, 5], ids=["plain", "reordered and padded"])
def test_evol_rl_has_the_advantages_of_its_rewards(make_step, ranks):
    step = make_step("g2rl_sync", "+algorithm.g2rl.algorithm=evol_rl", *READ, ranks=ranks)
    found = step.run()
    expected = []
    for p, scores in enumerate(SCORES):
        texts, right = responses(p), torch.tensor(scores) > 0
        answered = torch.tensor([answer(text) is not None for text in texts])
        assert 0 < answered.sum() < 6
        embeddings = step.trainer.g2rl_reader.encoder(texts)
        expected.append((evol_rewards(embeddings, right, torch.zeros(6).long(), answered) + 1) / 2)
    check(found, expected)
    mean = 2 * torch.cat(expected).mean() - 1
    assert step.metrics["g2rl/shaped_reward_mean"] == pytest.approx(mean.item(), abs=1e-5)
    assert step.metrics["g2rl/accuracy"] == pytest.approx(5 / 12)


def test_majority_labels_replace_the_scores_before_shaping(make_step, model):
    labels = ("+algorithm.g2rl.labels=majority", "+algorithm.g2rl.answer_func=scripted.answer")
    step = make_step("g2rl_sync", *labels)
    found = step.run()
    expected = []
    for p, scores in enumerate(SCORES):
        answers = [answer(text) for text in responses(p)]
        winner = Counter(one for one in answers if one is not None).most_common(1)[0][0]
        rewards = torch.tensor([1.0 if one == winner else -1.0 for one in answers], dtype=torch.float64)
        assert (rewards > 0).tolist() != [score > 0 for score in scores]
        rows = Rows(seed=p)
        rows.masks = [torch.ones_like(mask) for mask in rows.masks]
        inputs = (rows.features(model), rewards, torch.arange(6)[None], ShapingOptions())
        expected.append((reference.group_geometry(*inputs)[2] + 1) / 2)
    check(found, expected)
    assert step.metrics["g2rl/accuracy"] == pytest.approx(5 / 12)  # by the scores


def test_tokens_that_the_mask_leaves_out_are_not_read(make_step):
    step = make_step("g2rl_sync", "+algorithm.g2rl.labels=majority", *READ)
    texts = []
    step.trainer.g2rl_reader = lambda read, _groups: texts.extend(read) or {}
    row = step.store.rows["one_1_0"]
    row["response_mask"] = row["loss_mask"] = Rows().masks[1]
    step.run()
    whole = responses(0)
    assert texts[0] == whole[0]
    assert texts[1] == whole[1][:2] + whole[1][5:]


GRPO = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.name=vllm")
ACTOR = "actor_rollout_ref.actor."


@pytest.mark.parametrize(
    ("overrides", "entropy", "clip"),
    [
        (["grpo"], 0, 0.2),
        (["g2rl"], 0, 0.2),
        (["entropy_bonus"], 0.003, 0.2),
        (["evol_rl"], 0.003, 0.28),
        (["evol_rl", f"{ACTOR}entropy_coeff=0.01", f"{ACTOR}clip_ratio_high=0.3"], 0.01, 0.3),
        (["evol_rl", f"{ACTOR}clip_ratio_high=null"], 0.003, 0.28),
        (["evol_rl", "+algorithm.g2rl.entropy_coef=0", "+algorithm.g2rl.ratio_clip_high=0.2"], 0, 0.2),
        (["g2rl", "+algorithm.g2rl.entropy_coef=0.003", "+algorithm.g2rl.ratio_clip_high=0.28"], 0.003, 0.28),
    ],
)
def test_the_algorithm_decides_entropy_and_clip_where_they_are_unset(overrides, entropy, clip):
    algorithm, *others = overrides
    config = compose_config(*GRPO, f"+algorithm.g2rl.algorithm={algorithm}", *others)
    settings = G2RLSettings.read(config)
    settings.apply(config)
    assert config.actor_rollout_ref.actor.entropy_coeff == entropy
    assert config.actor_rollout_ref.actor.clip_ratio_high == clip
    assert G2RLSettings.read(config) == settings


def test_the_actors_get_them(make_step):
    step = make_step("g2rl_sync", "+algorithm.g2rl.algorithm=evol_rl", *READ)
    actor = step.trainer.config.actor_rollout_ref.actor
    assert (actor.entropy_coeff, actor.clip_ratio_high) == (0.003, 0.28)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=ppo"], "algorithm.g2rl.algorithm: got 'ppo', needs one of 'grpo', 'entropy_bonus'"),
        (["labels=votes"], "algorithm.g2rl.labels: got 'votes', needs one of 'truth', 'majority'"),
        (["entropy_coef=-1"], "algorithm.g2rl.entropy_coef: got -1.0, needs a finite number, 0 or more"),
        (["ratio_clip_high=nan"], "algorithm.g2rl.ratio_clip_high: got nan, needs a finite number"),
        (
            ["algorithm=grpo", "entropy_coef=0.01"],
            "got 0.01 with algorithm.g2rl.algorithm=grpo: grpo has",
        ),
        (["algorithm=entropy_bonus", "entropy_coef=0"], "entropy_bonus has one; leave it"),
        (["labels=majority", "answer_func=nowhere.f"], "answer_func: cannot import 'nowhere.f' (No module"),
        (["labels=majority"], "algorithm.g2rl.answer_func: name a function, or pip install math-verify"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_built(monkeypatch, overrides, message):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    options = [f"+algorithm.g2rl.{one}" for one in overrides]
    with pytest.raises(ValueError, match=r".*") as error:
        G2RLTrainerSync(compose_config(*GRPO, *options))
    assert message in str(error.value)


@pytest.mark.parametrize("value", ["false", "0", "[]"])
def test_what_is_no_mapping_does_not_mean_the_defaults(value):
    with pytest.raises(ValueError, match=r"algorithm.g2rl: got .*, needs options; leave it out"):
        G2RLTrainerSync(compose_config(*GRPO, f"+algorithm.g2rl={value}"))
