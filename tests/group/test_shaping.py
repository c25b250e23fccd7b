"""From a trainer's scores to shaped ones: units, NaN, padding and responses without tokens."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels.group import shaping
from g2rl_kernels.group.metrics import describe
from g2rl_kernels.group.options import EXPLORATION_SCORES, SCORE_GATE, SHAPINGS, ShapingOptions
from g2rl_kernels.group.shaping import (
    check_group_size,
    check_options,
    check_threshold,
    graded_rewards,
    response_keys,
    shape_scores,
    signed_rewards,
)

NAN = torch.nan
FEATURES = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [1.0, -0.2]])
SIGNS = torch.tensor([1.0, 1.0, -1.0, -1.0])


def test_signed_rewards_follow_the_threshold() -> None:
    scores = torch.tensor([0.0, 0.49, 0.5, 1.0, NAN, -1.0])
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0, NAN, -1.0])
    assert torch.equal(signed_rewards(scores, 0.5).nan_to_num(9.0), expected.nan_to_num(9.0))


def test_partial_credit_is_not_right_by_default() -> None:
    """reasoning-gym's base scorer gives 0.5 to 13 for 3; one wrong cell of 100 scores 0.99."""
    scores = torch.tensor([0.5, 0.99, 0.7 + 0.2 + 0.1, 1.0])
    assert signed_rewards(scores, SCORE_GATE).tolist() == [-1, -1, 1, 1]
    assert shape_scores(FEATURES, scores, ShapingOptions(), group_size=4).metrics["accuracy"] == 1 / 2


def test_rewards_of_plus_and_minus_one_need_the_gap_alone() -> None:
    zero_one = shape_scores(FEATURES, (SIGNS + 1) / 2, ShapingOptions(lam=0.5), group_size=4)
    signed = shape_scores(FEATURES, SIGNS, ShapingOptions(lam=0.5), group_size=4, gap=2.0)
    torch.testing.assert_close(2 * zero_one.scores - 1, signed.scores)
    assert zero_one.metrics == signed.metrics


def test_shaping_means_the_same_in_every_unit() -> None:
    paper = g2.group_geometry(FEATURES, SIGNS, group_size=4, lam=0.5).shaped_rewards
    same = shape_scores(FEATURES, SIGNS, ShapingOptions(lam=0.5), group_size=4, threshold=0.0, gap=2.0)
    assert torch.equal(same.scores, paper)
    zero_one = shape_scores(FEATURES, (SIGNS + 1) / 2, ShapingOptions(lam=0.5), group_size=4)
    torch.testing.assert_close(2 * zero_one.scores - 1, paper)
    assert not torch.equal(paper, SIGNS)
    assert zero_one.metrics == same.metrics


def test_wrong_answers_keep_their_scores_by_right() -> None:
    """The first of the two right ones is slightly more novel; nubar stretches that to 1."""
    shaped = shape_scores(FEATURES, (SIGNS + 1) / 2, ShapingOptions(shaping="right", lam=0.5), group_size=4)
    assert shaped.bonus.tolist() == [0.25, -0.25, 0.0, 0.0]
    assert shaped.scores.tolist() == [1.25, 0.75, 0.0, 0.0]
    assert shaped.metrics["sign_flips"] == 0


def test_keys_tell_the_tokens_apart_and_nothing_else() -> None:
    responses = [[5, 7], [7, 5], [5, 7, 0], [], [5], [5, 7], [0], [0, 0], [151935] * 3000, [151935] * 2999]
    responses += [[*range(1000)], [*range(512), 513, 512, *range(514, 1000)], []]
    flat = torch.tensor([token for response in responses for token in response])
    lengths = torch.tensor([len(response) for response in responses])
    keys = response_keys(flat, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))).tolist()
    same = [(i, j) for i in range(len(keys)) for j in range(i) if keys[i] == keys[j]]
    assert same == [(5, 0), (12, 3)]
    alone = response_keys(torch.tensor([7, 5], dtype=torch.int32), torch.tensor([0, 2]))  # wherever it lies
    assert alone.tolist() == [keys[1]]
    assert response_keys(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).shape == (0,)


def test_rounding_makes_no_difference_between_the_same_tokens() -> None:
    """Two groups have the same features up to noise; the first holds copies of one response."""
    noise = 0.1 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    features, scores = torch.cat([torch.ones(4, 2) + noise] * 2), torch.ones(8)
    keys = torch.tensor([3, 3, 3, 3, 0, 1, 2, 3])
    options = ShapingOptions(shaping="intent")  # adds nothing where all are alike
    shaped = shape_scores(features, scores, options, group_size=4, keys=keys)
    assert (shaped.bonus[:4] == 0).all()
    without = shape_scores(features, scores, options, group_size=4)
    assert without.bonus[:4].abs().max() == 0.25
    assert torch.equal(shaped.bonus[4:], without.bonus[4:])
    # ids in any order; the feature is the first's in the group, not another group's
    order = torch.tensor([7, 2, 5, 0, 6, 1, 3, 4])
    ids = (torch.arange(8) // 4)[order]
    mixed = shape_scores(features[order], scores, options, group_ids=ids, keys=keys[order])
    assert torch.equal(mixed.bonus, shaped.bonus[order])


@pytest.mark.parametrize("why", ["not scored", "without tokens", "padding"])
def test_rows_that_take_no_part_touch_nobody(why: str) -> None:
    at = torch.tensor([0, 1, 3, 4])
    features, scores = torch.randn(5, 2), torch.full((5,), 0.25)
    features[at], scores[at] = FEATURES, (SIGNS + 1) / 2
    has_tokens, groups = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.int64)
    if why == "not scored":
        scores[2] = NAN
    elif why == "without tokens":
        has_tokens[2] = False
    else:
        groups[2] = -1
    alone = shape_scores(FEATURES, scores[at], ShapingOptions(), group_size=4)
    beside = shape_scores(features, scores, ShapingOptions(), group_ids=groups, has_tokens=has_tokens)
    assert torch.equal(beside.scores[at], alone.scores)
    assert torch.equal(beside.scores[2:3].nan_to_num(9.0), scores[2:3].nan_to_num(9.0))
    assert beside.bonus[2] == 0
    if why == "not scored":
        assert beside.metrics == alone.metrics
    else:  # scored, if wrong
        assert beside.metrics == {**alone.metrics, "accuracy": 2 / 5}


def test_metrics_of_a_group_worked_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [3.0, 0.0]])
    rewards = torch.tensor([1.0, -1.0, NAN, 1.0])
    ids = torch.tensor([0, 0, -1, 0])
    geometry = g2.group_geometry(features, rewards, group_ids=ids, lam=3.0, clip=5.0, shaping="intent")
    found = describe(geometry, rewards)
    # cosines 0, 1, 0. w = e^r: nu = 1 - e / (e + 1/e) for both right ones, 1 for the wrong one
    nu = 1 - 1 / (1 + torch.tensor(-2.0).exp().item())
    assert found["cos_mean"] == pytest.approx(1 / 3, abs=1e-5)
    assert found["negative_pairs"] == 0
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["exploration_score_mean"] == pytest.approx((2 * nu + 1) / 3, abs=1e-5)
    # nubar 0, 1, 0: r (1 - lam), r (1 + lam), r (1 - lam)
    assert found["shaped_reward_mean"] == pytest.approx((-2 - 4 - 2) / 3, abs=1e-5)
    assert found["sign_flips"] == pytest.approx(2 / 3)


def test_a_batch_in_which_nobody_takes_part_is_described_by_zeros() -> None:
    shaped = shape_scores(FEATURES, torch.full((4,), NAN), ShapingOptions(), group_size=4)
    assert shaped.scores.isnan().all()
    assert (shaped.bonus == 0).all()
    assert math.isnan(shaped.metrics.pop("accuracy"))
    assert set(shaped.metrics.values()) == {0.0}


@pytest.mark.parametrize(
    ("units", "right", "wrong"),
    [({}, 1, 0), ({"gap": 2.0}, 1, -1), ({"threshold": 0.5}, 1, 0), ({"threshold": 9.0, "gap": 10.0}, 9, -1)],
)
def test_scores_that_votes_give(units: dict[str, float], right: float, wrong: float) -> None:
    scores, options = torch.zeros(4), ShapingOptions(shaping="none")
    voted = shape_scores(FEATURES, scores, options, group_size=4, votes=["4", "4", "4", "5"], **units)  # type: ignore[arg-type]
    assert voted.scores.tolist() == [right] * 3 + [wrong]


def test_votes_take_the_place_of_scores() -> None:
    """Whatever was scored, NaN too; a response without tokens neither votes nor moves."""
    votes = ["4", "5", "4", None, "5", "5"]
    features, scores = torch.randn(6, 2), torch.tensor([0.0, -0.7, NAN, 1.0, NAN, 0.3])
    has_tokens = torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    options = {"has_tokens": has_tokens, "threshold": 0.0, "gap": 2.0, "votes": votes}
    plain = shape_scores(features, scores, ShapingOptions(), group_size=6, algorithm="grpo", **options)
    assert plain.scores[:4].tolist() == [1, -1, 1, -1]
    assert torch.equal(plain.scores[4:].nan_to_num(9.0), scores[4:].nan_to_num(9.0))
    assert not plain.bonus.any()
    assert plain.metrics["accuracy"] == 3 / 4  # by the scores
    shaped = shape_scores(features, scores, ShapingOptions(lam=0.5), group_size=6, **options)
    expected = g2.group_geometry(
        features[:4], torch.tensor([1.0, -1, 1, -1]), group_size=4, lam=0.5
    ).shaped_rewards
    torch.testing.assert_close(shaped.scores[:4], expected)
    torch.testing.assert_close(shaped.bonus[:4], expected - plain.scores[:4])


def test_a_gap_must_be_positive() -> None:
    with pytest.raises(ValueError, match="gap: got 0"):
        shape_scores(FEATURES, SIGNS, ShapingOptions(), group_size=4, gap=0)


def test_an_unknown_system_and_one_without_embeddings_are_named() -> None:
    options = ShapingOptions()
    with pytest.raises(ValueError, match="algorithm: got 'g2r'"):
        shape_scores(FEATURES, SIGNS, options, group_size=4, algorithm="g2r")
    with pytest.raises(ValueError, match="embeddings: got None, evol_rl"):
        shape_scores(FEATURES, SIGNS, options, group_size=4, algorithm="evol_rl")
    with pytest.raises(TypeError, match="scores: got list"):
        shape_scores(FEATURES, SIGNS.tolist(), options, group_size=4)


# --- graded scores --------------------------------------------------------------------------------------


def graded_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features and scores of three groups of 6, and the groups' ids."""
    generator = torch.Generator().manual_seed(seed)
    features, scores = (torch.randn(18, 5, generator=generator), torch.rand(18, generator=generator))
    return features, scores, torch.arange(18) % 3


def test_graded_rewards_by_hand() -> None:
    scores = torch.tensor([0.0, 0.1, 0.2, 0.9, 0.3, 0.3, 7.0])
    rewards, half = graded_rewards(scores, torch.tensor([0, 0, 0, 0, 1, 1, -1]))
    # mean 0.3; above it 0.9 alone, below it by 0.3, 0.2 and 0.1, by 0.2 in the mean
    torch.testing.assert_close(rewards, torch.tensor([-1.0, -1.0, -0.5, 1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(half, torch.tensor([0.4, 0.4, 0.4, 0.4, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("right", [1, 2, 3, 5])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.3, 0.7)])
def test_graded_is_intent_where_scores_are_right_and_wrong(right: int, low: float, high: float) -> None:
    features, _, ids = graded_batch()
    scores = torch.where(torch.arange(18) // 3 < right, high, low)
    units = {"threshold": (low + high) / 2, "gap": high - low}
    options = ShapingOptions(shaping="intent")
    binary = shape_scores(features, scores, options, group_ids=ids, **units)
    graded = shape_scores(features, scores, options, group_ids=ids, graded=True, **units)
    assert binary.bonus.abs().max() > 0.05
    torch.testing.assert_close(graded.bonus, binary.bonus, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(graded.geometry.advantages, binary.geometry.advantages, rtol=1e-4, atol=1e-5)
    assert graded.metrics == pytest.approx(binary.metrics, rel=1e-5)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 5.0), (10.0, 0.0), (0.01, -3.0)])
def test_graded_rewards_have_no_unit(scale: float, shift: float) -> None:
    features, scores, ids = graded_batch()
    one = shape_scores(features, scores, ShapingOptions(), group_ids=ids, graded=True)
    shifts = shift * (1 + ids)  # each group by another number
    other = shape_scores(features, scale * scores + shifts, ShapingOptions(), group_ids=ids, graded=True)
    torch.testing.assert_close(other.bonus, scale * one.bonus, rtol=1e-2, atol=1e-4 * scale)
    torch.testing.assert_close(
        other.geometry.shaped_rewards, one.geometry.shaped_rewards, rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("scores", [[0.1, 0.2, 0.3], [10.1, 10.2, 10.3], [-0.3, -0.2, -0.1]], ids=str)
def test_rounding_does_not_move_a_score_from_the_mean(scores: list[float]) -> None:
    """In float32 the middle one lies above or below the mean of all by the last bits."""
    rewards, half = graded_rewards(torch.tensor(scores), torch.zeros(3, dtype=torch.long))
    assert rewards.tolist() == [-1.0, 0.0, 1.0]
    torch.testing.assert_close(half, torch.full((3,), 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_an_infinite_score_reaches_its_own_group_only(bad: float) -> None:
    features, scores, ids = graded_batch()
    alone = shape_scores(features, scores, ShapingOptions(), group_ids=ids, graded=True)
    scores = torch.where(torch.arange(18) == 4, bad, scores)
    found = shape_scores(features, scores, ShapingOptions(), group_ids=ids, graded=True)
    assert torch.equal(found.bonus[ids != 1], alone.bonus[ids != 1])
    assert found.bonus[ids == 1].isnan().all()


def test_novelty_by_intent_helps_the_better_half_and_harms_the_worse() -> None:
    features, scores, ids = graded_batch()
    options = ShapingOptions(shaping="intent")
    shaped = shape_scores(features, scores, options, group_ids=ids, graded=True)
    for group in range(3):
        rows = ids == group
        nu = shaped.geometry.exploration_score[rows]
        novel = (nu - nu.min()) / (nu.max() - nu.min()) > 0.5
        better = scores[rows] > scores[rows].mean()
        assert ((shaped.bonus[rows] > 0) == (novel == better)).all()
        assert shaped.bonus[rows].abs().max() <= 0.25 * (scores[rows].max() - scores[rows].min())


def test_rows_that_take_no_part_change_no_grade() -> None:
    features, scores, ids = graded_batch()
    alone = shape_scores(features, scores, ShapingOptions(), group_ids=ids, graded=True)
    more = torch.cat([features, torch.randn(2, 5)])
    ids = torch.cat([ids, torch.tensor([0, 1])])
    scored = torch.cat([scores, torch.tensor([torch.nan, 9.0])])
    has_tokens = torch.arange(20) < 19
    found = shape_scores(more, scored, ShapingOptions(), group_ids=ids, has_tokens=has_tokens, graded=True)
    torch.testing.assert_close(found.bonus, torch.cat([alone.bonus, torch.zeros(2)]))
    empty = shape_scores(features[:0], scores[:0], ShapingOptions(), group_ids=ids[:0], graded=True)
    assert empty.bonus.shape == (0,)


def test_grades_need_the_truth() -> None:
    features, scores, ids = graded_batch()
    for given in ({"votes": ["a"] * 18}, {"algorithm": "evol_rl", "embeddings": features}):
        with pytest.raises(ValueError, match="graded: got True with votes or algorithm='evol_rl'"):
            shape_scores(features, scores, ShapingOptions(), group_ids=ids, graded=True, **given)
    with pytest.raises(ValueError, match="x_rewards: got 'graded' with x_labels=majority"):
        check_options({"rewards": "graded", "labels": "majority"}, "x_")
    with pytest.raises(ValueError, match="x_rewards: got 'gradual', needs one of 'binary', 'graded'"):
        check_options({"rewards": "gradual"}, "x_")


@pytest.mark.parametrize("threshold", ["0.5", None, True, torch.nan, torch.inf], ids=str)
def test_a_threshold_is_a_finite_number(threshold: Any) -> None:
    """NaN would take every answer for wrong; text would fail after the first rollout."""
    features, scores, ids = graded_batch()
    with pytest.raises((TypeError, ValueError), match=r"x\.correctness_threshold: got .* needs a .*number"):
        check_options({"correctness_threshold": threshold}, "x.")
    with pytest.raises((TypeError, ValueError), match=r"threshold: got .* needs a .*number"):
        shape_scores(features, scores, ShapingOptions(), group_ids=ids, threshold=threshold)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (
            [0.1, 0.9, torch.nan],
            "all lie below limit=1, .* answer for wrong: for graded rewards set x=y; else",
        ),
        ([1.0, 2.0], "all lie at or above limit=1, .* answer for right"),
        ([0.0, 1.0], None),
        ([0.2, 0.2], None),
        ([torch.nan], None),
    ],
    ids=str,
)
def test_scores_on_one_side_of_the_threshold_are_told(scores: list[float], said: str | None) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        check_threshold(torch.tensor(scores), 1.0, "scores", "limit", "x=y")
    assert len(told) == (said is not None)
    assert said is None or re.search(said, str(told[0].message))


# --- groups of two ------------------------------------------------------------------------------------------

RANDOM = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
# at some angle, almost alike, at right angles
PAIRS = torch.stack([RANDOM[:2], RANDOM[:1] + 1e-3 * RANDOM[:2], torch.eye(2, 8)])


@pytest.mark.parametrize("rewards", [[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]], ids=["one", "both", "none"])
@pytest.mark.parametrize("score", EXPLORATION_SCORES)
@pytest.mark.parametrize("form", SHAPINGS)
def test_a_pairs_advantages_are_grpos(form: str, score: str, rewards: list[float]) -> None:
    options = {"group_size": 2, "exploration_score": score}
    given = torch.tensor(rewards).repeat(len(PAIRS))
    plain = g2.group_geometry(PAIRS.flatten(0, 1), given, lam=0, **options)
    found = g2.group_geometry(PAIRS.flatten(0, 1), given, shaping=form, **options)
    torch.testing.assert_close(found.advantages, plain.advantages, rtol=1e-6, atol=0)
    bonus = found.shaped_rewards - given
    odd = (form, score) == ("equation", "sqrt") and rewards[0] != rewards[1]  # the pair that is almost alike
    assert (bonus[::2] - bonus[1::2]).tolist() == [0, 0.5 if odd else 0, 0]


def test_three_responses_are_told_apart() -> None:
    for form in SHAPINGS[1:3]:
        found = g2.group_geometry(RANDOM[:3], SIGNS[:3], group_size=3, shaping=form).advantages
        assert (found[0] - found[1]).abs() > 0.01  # both are right


@pytest.mark.parametrize(
    ("size", "settings", "told"),
    [
        (2, {}, True),
        (1, {"algorithm": "g2rl", "shaping": "equation"}, True),
        (3, {}, False),
        (2, {"lam": 0.0}, False),
        (2, {"shaping": "none"}, False),
        (2, {"algorithm": "evol_rl"}, False),
    ],
    ids=str,
)
def test_groups_too_small_for_g2rl_are_told_once(
    size: int, settings: dict[str, object], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shaping, "_told", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            check_group_size(size, "responses", settings, "x_")
    assert len(said) == told
    if told:
        expected = (
            rf"^responses={size}: .* equally novel, .* at least 3 \(the paper uses 16\), or x_lam to 0$"
        )
        assert re.search(expected, str(said[0].message))
