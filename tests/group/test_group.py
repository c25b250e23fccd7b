"""group_geometry: tables worked out by hand, the reference in float64, and hostile groups."""

import math

import pytest
import torch
from examples import given
from strategies import groupings

import g2rl_kernels as g2
from g2rl_kernels.group import reference
from g2rl_kernels.group.geometry import IMPLEMENTATIONS
from g2rl_kernels.group.options import ShapingOptions

OUTPUTS = ("similarity", "exploration_score", "shaped_rewards", "advantages")

# Angles (degrees) of unit features in the plane, so that S_ij = cos(a_i - a_j).
#
# Table 1: angles 0, 0, 90; rewards 1, 1, -1.  S12 = 1, S13 = S23 = 0.
#   w12 = e / (e + 1/e) = 0.880797;  nu = 1 - w12, 1 - w12, 1 = 0.119203, 0.119203, 1;  nubar = 0, 0, 1
#   intent:   r (1 + (2 nubar - 1) / 2) = 1/2, 1/2, -3/2;  mean -1/6; deviations 2/3, 2/3, -4/3; variance 8/9
#             advantages 1/sqrt 2, 1/sqrt 2, -sqrt 2
#   equation: r (1 + r nubar / 2) = 1, 1, -1/2;  mean 1/2; deviations 1/2, 1/2, -1; variance 1/2
#             advantages 1/sqrt 2, 1/sqrt 2, -sqrt 2
# Table 2: angles 0, 60, 90, 180; rewards 1, 1, -1, -1.  Squares: 12 .25, 13 0, 14 1, 23 .75, 24 .25, 34 0.
#   e = 2.718282, 1/e = 0.367879.  To 1 and 2: e / (e + 2/e) = 0.786986, (1/e) / (e + 2/e) = 0.106507;
#   to 3 and 4: e / (2e + 1/e) = 0.468311, (1/e) / (2e + 1/e) = 0.063379
#   nu1 = 1 - .786986 x .25 - .106507 x 1                  = 0.696747
#   nu2 = 1 - .786986 x .25 - .106507 x (.75 + .25)        = 0.696747
#   nu3 = 1 - .468311 x .75                                = 0.648767
#   nu4 = 1 - .468311 x (1 + .25)                          = 0.414612
#   nubar = 1, 1, (.648767 - .414612) / (.696747 - .414612) = .829940, 0
#   intent:   3/2, 3/2, -(1 + .659880 / 2) = -1.329940, -1/2;   mean .292515; variance 1.544120 (s 1.242626)
#   equation: 3/2, 3/2, -(1 - .829940 / 2) = -.585030, -1;      mean .353743; variance 1.335431 (s 1.155609)
# Table 3: angles 0, 30, 90, 30; rewards 1, 1, 1, -1: the wrong answer is the least novel, so that nubar of
#   the right ones depends on whom it compares.  Squares: 12 14 .75, 13 0, 23 34 .25, 24 1.
#   From the right: 1 / (2 + e^-2) = .468311, e^-2 / (2 + e^-2) = .063379, together u = .531689; else 1/3.
#   nu = 1 - .75 u, 1 - u, 1 - .25 u, 1 - (.75 + 1 + .25) / 3 = .601233, .468311, .867078, .333333
#   nubar over all .501925, .252887, 1, 0; over the right ones 1/3, 0, 1
#   intent:   1.001925, .752887, 3/2, -1/2;                     mean .688703; variance .543361 (s .737130)
#   equation: 1.250962, 1.126444, 3/2, -1;                      mean .719352; variance 1.003479 (s 1.001738)
#   right:    5/6, 1/2, 3/2, -1;                                mean 11/24; variance 161/192 (s .915719)
# In tables 1 and 2 the right answers are equally novel: "right" leaves all as they are.
TABLES = {
    "three": {
        "angles": (0, 0, 90),
        "rewards": (1, 1, -1),
        "exploration_score": (0.119203, 0.119203, 1.0),
        "intent": (0.5, 0.5, -1.5),
        "intent_advantages": (0.707107, 0.707107, -1.414214),
        "equation": (1.0, 1.0, -0.5),
        "equation_advantages": (0.707107, 0.707107, -1.414214),
        "right": (1.0, 1.0, -1.0),
        "right_advantages": (0.707107, 0.707107, -1.414214),
    },
    "four": {
        "angles": (0, 60, 90, 180),
        "rewards": (1, 1, -1, -1),
        "exploration_score": (0.696747, 0.696747, 0.648767, 0.414612),
        "intent": (1.5, 1.5, -1.329940, -0.5),
        "intent_advantages": (0.971720, 0.971720, -1.305666, -0.637774),
        "equation": (1.5, 1.5, -0.585030, -1.0),
        "equation_advantages": (0.991908, 0.991908, -0.812362, -1.171454),
        "right": (1.0, 1.0, -1.0, -1.0),
        "right_advantages": (1.0, 1.0, -1.0, -1.0),
    },
    "a wrong answer like others": {
        "angles": (0, 30, 90, 30),
        "rewards": (1, 1, 1, -1),
        "exploration_score": (0.601233, 0.468311, 0.867078, 0.333333),
        "intent": (1.001925, 0.752887, 1.5, -0.5),
        "intent_advantages": (0.424921, 0.087073, 1.100615, -1.612609),
        "equation": (1.250962, 1.126444, 1.5, -1.0),
        "equation_advantages": (0.530689, 0.406386, 0.779294, -1.716369),
        "right": (0.833333, 0.5, 1.5, -1.0),
        "right_advantages": (0.409514, 0.045502, 1.137539, -1.592555),
    },
}

# By shaping="right" with lam = 0.5, clip = 3 and uniform_groups="shape": angles, rewards, shaped rewards,
# advantages. nubar is 0 for the less and 1 for the more novel right answer, 0.5 for the only one.
RIGHT = {
    "one right": ((0, 0, 90), (1, -1, -1), (1, -1, -1), (2**0.5, -(0.5**0.5), -(0.5**0.5))),
    "none right": ((0, 0, 90), (-1, -7, 0), (-1, -3, 0), (1 / 14**0.5, -5 / 14**0.5, 4 / 14**0.5)),
    "all wrong": ((0, 0, 90), (-1, -1, -1), (-1, -1, -1), (0, 0, 0)),
    "all right": ((0, 0, 90), (1, 1, 1), (0.5, 0.5, 1.5), (-(0.5**0.5), -(0.5**0.5), 2**0.5)),
    # The third, of reward 0, is no right answer but takes novelty from the first. 2.5 x 1.5 is clipped.
    "other rewards": (
        (0, 90, 0, 45),
        (0.5, 2.5, 0, -7),
        (0.25, 3, 0, -3),
        (
            0.1875 / 4.51171875**0.5,
            2.9375 / 4.51171875**0.5,
            -0.0625 / 4.51171875**0.5,
            -3.0625 / 4.51171875**0.5,
        ),
    ),
    # Infinity makes the wrong answer's score NaN (eq. 10), which the right one is not compared with.
    "a NaN score of a wrong answer": ((0, 60), (math.inf, -1), (3, -1), (1, -1)),
    # A NaN reward is not above 0. By eqs. 10-11 it makes the scores of all others NaN.
    "a NaN reward": ((0, 60, 90), (1, -1, math.nan), (math.nan, -1, math.nan), (math.nan,) * 3),
}


def plane(angles) -> torch.Tensor:
    radians = [math.radians(a) for a in angles]
    return torch.tensor([[math.cos(a), math.sin(a)] for a in radians])


@pytest.mark.parametrize("shaping", ["intent", "equation", "right"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_worked_out_by_hand(name, shaping):
    table = TABLES[name]
    m = len(table["rewards"])
    features, rewards = 3.5 * plane(table["angles"]), torch.tensor(table["rewards"], dtype=torch.float32)
    out = g2.group_geometry(features, rewards, group_size=m, lam=0.5, shaping=shaping, eps=1e-9)
    close = {"rtol": 0, "atol": 2e-6}  # the tables have six digits
    torch.testing.assert_close(out.exploration_score, torch.tensor(table["exploration_score"]), **close)
    torch.testing.assert_close(out.shaped_rewards, torch.tensor(table[shaping]), **close)
    torch.testing.assert_close(out.advantages, torch.tensor(table[shaping + "_advantages"]), **close)
    for i in range(m):
        for j in range(m):
            cosine = math.cos(math.radians(table["angles"][i] - table["angles"][j]))
            assert out.similarity[0, i, j].item() == pytest.approx(cosine, abs=1e-6)
    root = g2.group_geometry(features, rewards, group_size=m, exploration_score="sqrt", eps=1e-9)
    torch.testing.assert_close(
        root.exploration_score, torch.tensor(table["exploration_score"]).sqrt(), **close
    )


def test_a_novel_wrong_answer_loses_by_intent_and_gains_by_the_equation():
    """The two readings of eq. 12: the third answer of table "three" is wrong and novel."""
    features, rewards = plane((0, 0, 90)), torch.tensor([1.0, 1, -1])
    assert g2.group_geometry(features, rewards, group_size=3, shaping="intent").shaped_rewards[2] < -1
    assert g2.group_geometry(features, rewards, group_size=3, shaping="equation").shaped_rewards[2] > -1


@pytest.mark.parametrize("implementation", ["compiled", "reference"])
@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_alone_worked_out_by_hand(name, implementation):
    angles, rewards, shaped, advantages = RIGHT[name]
    rewards = torch.tensor(rewards, dtype=torch.float32)
    members = torch.arange(len(angles)).view(1, -1)
    # 3: "right"; divided by the group's deviation; uniform groups are not skipped
    out = IMPLEMENTATIONS[implementation](plane(angles), rewards, members, 0.5, 3.0, 3, 0, 1, False, 1e-9)
    close = {"rtol": 0, "atol": 2e-6, "equal_nan": True}
    torch.testing.assert_close(out[2], torch.tensor(shaped, dtype=torch.float32), **close)
    torch.testing.assert_close(out[3], torch.tensor(advantages, dtype=torch.float32), **close)
    if name == "a NaN score of a wrong answer":
        assert out[1].isnan().tolist() == [False, True]


@pytest.mark.parametrize("implementation", ["compiled", "reference"])
def test_nan_in_a_wrong_answer_leaves_wrong_rewards(implementation):
    """With shaping="right". By eq. 11 NaN reaches the scores of its group, so right rewards and the mean."""
    features, rewards = torch.randn(8, 4), torch.tensor([1.0, -1, 1, -1, -1, -1, -1, -1])
    features[[1, 5]] = torch.nan
    members = torch.arange(8).view(2, 4)
    out = IMPLEMENTATIONS[implementation](features, rewards, members, 0.5, 3.0, 3, 0, 1, False, 1e-6)
    _, score, shaped, advantages = out
    assert score.isnan().all()
    assert shaped[[0, 2]].isnan().all()
    assert shaped[[1, 3, 4, 5, 6, 7]].tolist() == [-1] * 6
    assert advantages[:4].isnan().all()
    assert not advantages[4:].any()  # nobody is right: nobody is shaped


@given(grouping=groupings())
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("shaping", ["intent", "equation", "right", "none"])
def test_any_groups(grouping, scale, shaping):
    """Against the reference in float64; ids, padding, degenerate features."""
    ids, features, rewards = grouping
    ids = torch.tensor(ids, dtype=torch.int64)
    for uniform_groups, score in (("skip", "linear"), ("shape", "sqrt")):
        options = {
            "scale": scale,
            "shaping": shaping,
            "uniform_groups": uniform_groups,
            "exploration_score": score,
        }
        out = g2.group_geometry(features, rewards, group_ids=ids, **options)
        assert torch.equal(out.members, reference.group_members(ids))
        exact = reference.group_geometry(
            features.double(), rewards.double(), out.members, ShapingOptions(**options)
        )
        for name, theirs in zip(OUTPUTS, exact):
            ours = getattr(out, name)
            assert ours.dtype == torch.float32
            # Computed in double, so one rounding to float32; except where a spread of nu near 1e-5 or a
            # variance near 0 enlarges what double leaves: cos^2 = 1 has the root of an error of 1e-16 in
            # "sqrt".
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=2e-7)
        for name in OUTPUTS[1:]:
            assert not getattr(out, name)[ids < 0].any()


def test_blocks_equal_ids():
    features, rewards = torch.randn(12, 5), torch.randn(12).sign()
    ids = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2, 9, 9, 9, 9])
    for a, b in zip(
        g2.group_geometry(features, rewards, group_size=4),
        g2.group_geometry(features, rewards, group_ids=ids),
    ):
        assert torch.equal(a, b)


def test_ragged_members():
    out = g2.group_geometry(torch.randn(7, 3), torch.ones(7), group_ids=torch.tensor([5, 3, -1, 5, 9, 3, 5]))
    assert out.members.tolist() == [[0, 3, 6], [1, 5, -1], [4, -1, -1]]
    assert out.similarity.shape == (3, 3, 3)
    assert not out.similarity[1, 2].any()
    assert not out.similarity[1, :, 2].any()


def test_padding_rows_touch_nobody():
    features, rewards = torch.randn(6, 5), torch.tensor([1.0, -1, 1, -1, 1, 1])
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    out = g2.group_geometry(features, rewards, group_ids=ids, scale="batch")
    where = torch.tensor([0, 2, 3, 5, 6, 8])
    padded_features, padded_rewards = torch.full((9, 5), torch.nan), torch.full((9,), torch.inf)
    padded_features[where], padded_rewards[where] = features, rewards
    padded_ids = torch.full((9,), -1)
    padded_ids[where] = ids
    padded = g2.group_geometry(padded_features, padded_rewards, group_ids=padded_ids, scale="batch")
    assert torch.equal(out.similarity, padded.similarity)
    for name in OUTPUTS[1:]:
        assert torch.equal(getattr(out, name), getattr(padded, name)[where])
        assert not getattr(padded, name)[[1, 4, 7]].any()


def test_permuting_rows_permutes_results():
    features, rewards = torch.randn(10, 8), torch.randn(10).sign()
    ids = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 0])
    order = torch.randperm(10)
    a = g2.group_geometry(features, rewards, group_ids=ids)
    b = g2.group_geometry(features[order], rewards[order], group_ids=ids[order])
    for name in OUTPUTS[1:]:
        torch.testing.assert_close(getattr(a, name)[order], getattr(b, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [-1000.0, -80.0, 80.0, 1000.0, 3e38])
def test_exponentials_of_rewards_do_not_overflow(shift):
    """Eq. 10 depends on rewards by their differences only, as long as exp(r) >> eps."""
    features = torch.randn(4, 6)
    rewards = torch.tensor([0.0, 1, -1, 0.5])
    out = g2.group_geometry(features, rewards + shift, group_size=4, shaping="none")
    for tensor in out:
        assert torch.isfinite(tensor).all()
    exact = reference.group_geometry(
        features.double(), (rewards + shift).double(), out.members, ShapingOptions(shaping="none")
    )
    torch.testing.assert_close(out.exploration_score.double(), exact[1], rtol=1e-6, atol=1e-6)
    if shift == 80:
        plain = g2.group_geometry(features, rewards, group_size=4, shaping="none", eps=1e-9)
        torch.testing.assert_close(out.exploration_score, plain.exploration_score, rtol=1e-5, atol=1e-5)
    if shift < 0:  # exp(r) << eps: nobody has weight, everybody is novel
        torch.testing.assert_close(out.exploration_score, torch.ones(4))


def test_one_outstanding_reward_leaves_the_others_their_weights():
    """From the point of view of the best, the others still share the weight, though exp(0 - 1000) is 0."""
    features = plane((0, 0, 90))
    out = g2.group_geometry(features, torch.tensor([1000.0, 0, 0]), group_size=3, shaping="none", eps=1e-9)
    assert out.exploration_score.tolist() == pytest.approx([0.5, 0.0, 1.0], abs=1e-6)


def test_a_group_of_one():
    rewards = torch.tensor([1.0, -1])
    out = g2.group_geometry(torch.randn(2, 4), rewards, group_size=1, uniform_groups="shape")
    assert out.exploration_score.tolist() == [1, 1]
    assert torch.equal(out.shaped_rewards, rewards)  # nubar = 0.5
    assert not out.advantages.any()


def test_uniform_groups():
    features, rewards = plane((0, 0, 90)), torch.ones(3)
    skipped = g2.group_geometry(features, rewards, group_size=3, uniform_groups="skip")
    assert torch.equal(skipped.shaped_rewards, rewards)
    assert not skipped.advantages.any()
    shaped = g2.group_geometry(features, rewards, group_size=3, uniform_groups="shape")
    torch.testing.assert_close(shaped.shaped_rewards, torch.tensor([0.5, 0.5, 1.5]), rtol=0, atol=1e-5)
    assert torch.equal(skipped.exploration_score, shaped.exploration_score)
    # Skipped rewards are raw: not even clipped.
    large = g2.group_geometry(features, 5 * rewards, group_size=3, uniform_groups="skip")
    assert torch.equal(large.shaped_rewards, 5 * rewards)


def test_equal_features_shape_by_a_half():
    """All alike: nu is flat, nubar 0.5, so that "intent" and "right" leave rewards as they are."""
    for shaping in ("intent", "right"):
        out = g2.group_geometry(
            torch.ones(4, 3), torch.tensor([1.0, -1, 1, -1]), group_size=4, shaping=shaping
        )
        assert out.shaped_rewards.tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize(
    ("scale", "advantages"),
    [
        # Rewards 1, -1 | 1, 1. Group means 0, 1; group variances 1, 0. Batch mean 1/2, variance 3/4.
        ("group", (1.0, -1.0, 0.0, 0.0)),
        ("batch", (1.154701, -1.154701, 0.0, 0.0)),
        ("none", (1.0, -1.0, 0.0, 0.0)),
    ],
)
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_scales_worked_out_by_hand(scale, advantages, factor):
    rewards = factor * torch.tensor([1.0, -1, 1, 1])
    out = g2.group_geometry(torch.randn(4, 3), rewards, group_size=2, shaping="none", scale=scale, eps=1e-9)
    expected = torch.tensor(advantages) * (factor if scale == "none" else 1)
    torch.testing.assert_close(out.advantages, expected, rtol=0, atol=2e-6)


def test_eps_of_the_advantages():
    """s = sqrt(variance + eps): rewards +-1e-3 have variance 1e-6."""
    out = g2.group_geometry(
        torch.randn(2, 3), torch.tensor([1e-3, -1e-3]), group_size=2, shaping="none", eps=3e-6
    )
    torch.testing.assert_close(out.advantages, torch.tensor([0.5, -0.5]), rtol=1e-5, atol=0.0)


def test_clip():
    rewards = torch.tensor([1.0, 2, -2.9])
    out = g2.group_geometry(plane((0, 0, 90)), rewards, group_size=3, lam=0.5, clip=3.0, shaping="intent")
    assert out.shaped_rewards[2].item() == -3
    assert out.shaped_rewards.abs().max().item() <= 3


def test_lam_zero_is_grpo_to_the_bit():
    """Whatever features say, NaN too, and beyond the clip."""
    features, rewards = torch.randn(8, 4), 10 * torch.randn(8)
    features[3] = torch.nan
    out = g2.group_geometry(features, rewards, group_size=4, lam=0)
    assert torch.equal(out.shaped_rewards, rewards)
    r = rewards.view(2, 4).double()
    centred = r - r.mean(1, keepdim=True)
    expected = (centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-6)).flatten()
    assert torch.equal(out.advantages, expected.float())


def test_nan_stays_in_its_group():
    features, rewards = torch.randn(9, 4), torch.tensor([1.0, -1, 1] * 3)
    clean = g2.group_geometry(features, rewards, group_size=3, shaping="equation")
    features[4, 1] = torch.nan
    out = g2.group_geometry(features, rewards, group_size=3, shaping="equation")
    nan = torch.isnan(out.similarity)
    assert nan[1, 1].all()
    assert nan[1, :, 1].all()
    assert nan.sum() == 5  # the other pairs of the group are as before
    others = [0, 1, 2, 6, 7, 8]
    for name in OUTPUTS[1:]:
        assert torch.isnan(getattr(out, name)[3:6]).all()
        assert torch.equal(getattr(out, name)[others], getattr(clean, name)[others])


def test_nan_reward_stays_in_its_group():
    features, rewards = torch.randn(6, 4), torch.tensor([1.0, -1, 1, 1, torch.nan, -1])
    out = g2.group_geometry(features, rewards, group_size=3)
    assert torch.isfinite(out.exploration_score[:3]).all()
    assert torch.isfinite(out.advantages[:3]).all()
    assert torch.isnan(out.advantages[3:]).all()


def test_responses_without_tokens():
    """Zero features are orthogonal to all."""
    out = g2.group_geometry(torch.zeros(3, 4), torch.tensor([1.0, 1, -1]), group_size=3)
    assert not out.similarity.any()
    assert out.exploration_score.tolist() == [1, 1, 1]


def test_extreme_magnitudes():
    """Squares of 1e30 overflow float32, those of 1e-30 vanish."""
    features = torch.tensor([[1e30, 1e30], [1e30, 0], [0, 1e30]])
    out = g2.group_geometry(features, torch.tensor([1.0, 1, -1]), group_size=3)
    expected = torch.tensor([[1, 0.5**0.5, 0.5**0.5], [0.5**0.5, 1, 0], [0.5**0.5, 0, 1]])
    torch.testing.assert_close(out.similarity[0], expected)
    small = g2.group_geometry(1e-30 * plane((0, 60, 90)), torch.tensor([1.0, 1, -1]), group_size=3)
    assert small.similarity.abs().max() < 1e-40  # eq. 9's eps rules


def test_threads_change_no_bit():
    features, rewards, ids = torch.randn(300, 77), torch.randn(300).sign(), torch.randint(-1, 20, (300,))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(g2.group_geometry(features, rewards, group_ids=ids, scale="batch"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_other_dtypes_and_strides():
    features, rewards = torch.randn(6, 5).bfloat16(), torch.tensor([1.0, -1, 1, -1, 1, 1])
    expected = g2.group_geometry(features.float(), rewards, group_size=3)
    for moved in (features, features.double(), features.T.contiguous().T, features.requires_grad_()):
        out = g2.group_geometry(moved, rewards.double().repeat_interleave(2)[::2], group_size=3)
        assert all(torch.equal(a, b) for a, b in zip(expected, out))


def test_empty_batches():
    for groups in ({"group_size": 3}, {"group_ids": torch.empty(0, dtype=torch.int64)}):
        out = g2.group_geometry(torch.empty(0, 4), torch.empty(0), **groups)
        assert out.similarity.shape[0] == 0
        assert out.advantages.shape == (0,)
    padding = g2.group_geometry(torch.randn(2, 4), torch.ones(2), group_ids=torch.tensor([-1, -1]))
    assert padding.members.shape == (0, 0)
    assert padding.exploration_score.tolist() == [0, 0]


def test_reference_keeps_to_the_same_rules():
    """The reference serves the devices that have no kernel: float32, padding, NaN."""
    features, rewards = torch.randn(9, 4), torch.tensor([1.0, -1, 1] * 3)
    features[8] = torch.nan
    members = torch.tensor([[0, 2, 4], [1, 3, -1]])
    ours = torch.ops.g2rl.group_geometry(features, rewards, members, *ShapingOptions().flat())
    theirs = reference.group_geometry(features, rewards, members)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
