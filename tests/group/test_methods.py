"""Methods beside g2rl: values worked out by hand from the formulas, and what every one of them must keep."""

from __future__ import annotations

import math
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels.group.methods import METHODS, dirl, dqo, dra, gar, passk, repexp, setpo, text_similarity
from g2rl_kernels.group.options import LEAST_RIDGE, MethodOptions, ShapingOptions
from g2rl_kernels.group.shaping import check_group_size, check_options, shape_rewards, shape_scores

NAN = torch.nan
APART, ALIKE = torch.eye(2).double()[None], torch.ones(1, 2, 2).double()
# The first two of three responses are the same, and the third has nothing in common with them.
PAIR_AND_ONE = torch.tensor([[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]).double()


def rewards(*values: float) -> Tensor:
    return torch.tensor([values]).double()


def full(count: int) -> Tensor:
    return torch.ones(1, count, dtype=torch.bool)


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, rewards(*expected), rtol=0, atol=5e-7)


# --- hand-computed values -----------------------------------------------------------------------------------


def test_repexp() -> None:
    """x = +-(1/2, -1/2): K = 1/2 [[1, -1], [-1, 1]], of eigenvalue 1: b = 1/2 * 1 / 1.01 = 0.4950495."""
    r = rewards(1, -1)
    close(repexp(r, full(2), APART, strength=1.0, ridge=0.01), [1.9900990, -0.0099010])
    close(repexp(r, full(2), APART, strength=0.01, ridge=0.01), [1.0099010, -0.9900990])
    close(repexp(r, full(2), ALIKE, strength=1.0, ridge=0.01), [1, -1])
    close(repexp(rewards(-1, -1), full(2), APART, strength=1.0, ridge=0.01), [-1, -1])  # no answer is right
    # x = (1/3, -1/3), (1/3, -1/3), (-2/3, 2/3): K has the eigenvalue 12/9 along (1, 1, -2)/sqrt 6.
    gain = (12 / 9) / (12 / 9 + 1)
    expected = [1 + 2 * gain / 6, -1 + 2 * gain / 6, -1 + 2 * gain * 4 / 6]
    close(repexp(rewards(1, -1, -1), full(3), PAIR_AND_ONE, strength=1.0, ridge=1.0), expected)


def test_dqo() -> None:
    """Apart: det(L + I) = 4, without one 2: log 2 = 0.6931472. Alike: 3 and 2: log 1.5 = 0.4054651."""
    r = rewards(1, -1)
    close(dqo(r, full(2), APART, strength=1.0), [2.3862944, 0.3862944])
    close(dqo(r, full(2), ALIKE, strength=1.0), [1.8109302, -0.1890698])
    close(dqo(r, full(2), ALIKE, strength=0.5), [1.4054651, -0.5945349])
    close(dqo(r, full(2), ALIKE, strength=0.0), [1, -1])
    close(dqo(rewards(1, 1, 1), full(3), PAIR_AND_ONE, strength=0.5), [1.4054651, 1.4054651, 1.6931472])


def test_setpo() -> None:
    """Apart: D = -log 1.5 for both and -log 2 for one, 0.2876821 more. A pair and one: D = -(2 log(5/3) + log
    (4/3)) / 3 = -0.4364445; -log 1.5 without one of the pair, -log 2 without the third."""
    a = rewards(1, -1)
    close(setpo(a, full(2), APART, a, strength=1.0), [1.2876821, -0.7123179])
    close(setpo(a, full(2), APART, a, strength=2.0), [1.5753641, -0.4246359])
    close(setpo(a, full(2), ALIKE, a, strength=1.0), [1, -1])
    none = rewards(0, 0, 0)
    close(setpo(none, full(3), PAIR_AND_ONE, none, strength=1.0), [-0.0309794, -0.0309794, 0.2567027])
    close(setpo(a, full(2), 2 * APART - ALIKE, a, strength=1.0), [1.2876821, -0.7123179])  # cosine -1: as 0


def test_dra() -> None:
    """Scores of 1 become 1/2 where one other response is the same, and 0 stays 0."""
    close(dra(rewards(1, 1, 1), full(3), PAIR_AND_ONE, strength=1.0), [0, 0, 1])
    close(dra(rewards(-1, 1, 1), full(3), PAIR_AND_ONE, strength=1.0), [-1, 0, 1])
    close(dra(rewards(1, 1, 1), full(3), PAIR_AND_ONE, strength=3.0), [-0.5, -0.5, 1])
    close(dra(rewards(0.5, 1), full(2), 0.6 * ALIKE, strength=1.0), [1.5 / 1.6 - 1, 2 / 1.6 - 1])
    close(dra(rewards(1, 1), full(2), 2 * APART - ALIKE, strength=1.0), [1, 1])  # cosine -1: as 0


@pytest.mark.parametrize(
    ("r", "k", "expected"),
    [
        # One of four is right. Pairs: 3 of 6 have it, so R = 1/2 and sigma = 1/2. A wrong one is in 3 pairs,
        # 1 of them with the right one: 1/3 - 1/2 in place of 1 - 1/2.
        ((1, -1, -1, -1), 2, [1, -1 / 3, -1 / 3, -1 / 3]),
        # Triples: 3 of 4 have it: sigma = sqrt(3)/4; a wrong one is in 3, of which 2 have it.
        ((1, -1, -1, -1), 3, [1 / math.sqrt(3), *[(2 / 3 - 3 / 4) / (math.sqrt(3) / 4)] * 3]),
        ((1, -1, -1, -1), 1, [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]),  # GRPO
        ((1, 1, -1, -1), 2, [*[1 / math.sqrt(5)] * 2, *[(2 / 3 - 5 / 6) / (math.sqrt(5) / 6)] * 2]),
        ((1, 1, 1, -1), 2, [0, 0, 0, 0]),  # every pair has a right one
        ((1, 1, 1, 1), 2, [0, 0, 0, 0]),
        ((-1, -1, -1, -1), 2, [0, 0, 0, 0]),
    ],
)
def test_passk(r: tuple[float, ...], k: int, expected: list[float]) -> None:
    found = passk(rewards(*r), full(4), pass_k=k, eps=1e-6)
    torch.testing.assert_close(found, rewards(*expected), rtol=0, atol=1e-5)
    assert abs(found.sum().item()) < 1e-5


def test_passk_is_the_mean_over_sets() -> None:
    """Against the definition: every set of k gets (R_set - R) / sigma, a response the mean over its sets."""
    right, k = [True, False, False, True, False, False, False], 3
    sets = [*combinations(range(7), k)]
    won = [float(any(right[i] for i in one)) for one in sets]
    R = sum(won) / len(won)
    sigma = math.sqrt(R * (1 - R))
    expected = []
    for i in range(7):
        mine = [(value - R) / sigma for one, value in zip(sets, won) if i in one]
        expected.append(sum(mine) / len(mine))
    r = rewards(*[1.0 if one else -1.0 for one in right])
    torch.testing.assert_close(passk(r, full(7), pass_k=k, eps=1e-12), rewards(*expected), rtol=0, atol=1e-7)


def test_gar() -> None:
    """Right ones: mean cosine 0.4; the first is 0.5 above, the second below. The wrong one does not count."""
    b = rewards(0.9, -0.1, 0.99)
    close(gar(rewards(1, 1, -1), full(3), b, strength=0.5), [1.5, 1, -1])
    close(gar(rewards(1, 1, -1), full(3), b, strength=1.0), [2, 1, -1])
    close(gar(rewards(1, -1, -1), full(3), b, strength=0.5), [1, -1, -1])  # one right answer: its own mean
    close(gar(rewards(-1, -1, -1), full(3), b, strength=0.5), [-1, -1, -1])


OPTIONS: dict[str, Any] = {"clip": 3.0, "exploration_score": "linear", "eps": 1e-9}


def test_dirl() -> None:
    """Responses 1 to 3 are aligned, and 1 and 2 are the same. All are right: nu = 1/2, 1/2, 1. Response 4 is
    like 1, and 5 like none: nu = 1/3 and 1."""
    S = torch.zeros(1, 5, 5).double()
    S[0, :3, :3] = PAIR_AND_ONE[0]
    S[0, 3, [0, 1, 3]] = S[0, [0, 1, 3], 3] = 1
    S[0, 4, 4] = 1
    a = rewards(0.2, 3, 1, -0.1, -2)
    close(dirl(rewards(1, 1, 1, 1, 1), full(5), S, a, strength=0.5, **OPTIONS), [1, 1, 1.5, 1, 0.5])
    # A wrong one: weights e and 1/e. The novel aligned one is punished less, the far unaligned one more.
    found = dirl(rewards(1, 1, -1, -1, -1), full(5), S, a, strength=0.5, **OPTIONS)
    close(found, [1, 1, -0.5, -1, -1.5])
    found = dirl(rewards(1, 1, -1, -1, -1), full(5), S, a, strength=5.0, **OPTIONS)
    close(found, [1, 1, 3, -1, -3])  # clipped
    close(dirl(rewards(1, -1, 1, -1, 1), full(5), S, -a.abs(), strength=0.5, **OPTIONS), [1, -1, 1, -1, 1])


# --- what every method keeps --------------------------------------------------------------------------------

ALL = pytest.mark.parametrize("name", METHODS)
RIGHT = torch.tensor([1.0, -1, 1, -1, 1, 1, -1, 1, -1])  # groups of 5 and 4


def shaped(
    name: str, features: Tensor, r: Tensor, ids: Tensor, similarity: str = "gradient", **options: Any
) -> Tensor:
    """[2, S]: shaped rewards and advantages."""
    generator = torch.Generator().manual_seed(1)
    alignment = torch.randn(len(features), generator=generator)
    unit = torch.nn.functional.normalize(features, dim=1)
    found = shape_rewards(
        features,
        r,
        ShapingOptions(**options),
        group_ids=ids,
        algorithm=name,
        embeddings=unit if similarity == "text" else None,
        alignment=alignment + features.sum(1) * 0,
        method_options=MethodOptions(pass_k=2, similarity=similarity),
    )
    return torch.stack([found.shaped_rewards, found.advantages])


@pytest.fixture
def features() -> Tensor:
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


IDS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1])


@ALL
def test_a_group_does_not_see_others_or_padding(name: str, features: Tensor) -> None:
    both = shaped(name, features, RIGHT, IDS)
    for group in (0, 1):
        alone = shaped(name, features, RIGHT, torch.where(group == IDS, 0, -1))
        torch.testing.assert_close(both[:, group == IDS], alone[:, group == IDS], rtol=0, atol=1e-6)
        assert (alone[:, group != IDS] == 0).all()
    padded = shaped(name, features, RIGHT.where(IDS == 0, NAN), torch.where(IDS == 0, 0, -1))
    torch.testing.assert_close(both[:, IDS == 0], padded[:, IDS == 0], rtol=0, atol=1e-6)


@ALL
def test_nan_stays_in_its_group(name: str, features: Tensor) -> None:
    both = shaped(name, features, RIGHT, IDS)
    for row in (1, 7):
        r = RIGHT.clone()
        r[row] = NAN
        found, inside = shaped(name, features, r, IDS), IDS[row] == IDS
        assert found[1, inside].isnan().all()
        assert torch.equal(found[:, ~inside], both[:, ~inside])
    if "similarity" in METHODS[name].needs:
        bad = features.clone()
        bad[3, 2] = NAN
        found = shaped(name, bad, RIGHT, IDS)
        assert found[1, IDS == 0].isnan().all()
        assert torch.equal(found[:, IDS == 1], both[:, IDS == 1])


@ALL
def test_order_does_not_matter(name: str, features: Tensor) -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    alignment = torch.randn(9, generator=torch.Generator().manual_seed(1))

    def run(rows: Tensor) -> Tensor:
        found = shape_rewards(
            features[rows],
            RIGHT[rows],
            ShapingOptions(),
            group_ids=IDS[rows],
            algorithm=name,
            alignment=alignment[rows],
            method_options=MethodOptions(pass_k=2),
        )
        return torch.stack([found.shaped_rewards, found.advantages])

    torch.testing.assert_close(run(order), run(torch.arange(9))[:, order], rtol=0, atol=1e-5)


@ALL
def test_a_group_of_one_has_no_advantage_but_its_own(name: str, features: Tensor) -> None:
    for r in (1.0, -1.0):
        found = shaped(name, features[:1], torch.tensor([r]), torch.tensor([0]))
        assert found.isfinite().all()
        assert found[1].item() == pytest.approx(0, abs=1e-6)
    assert shaped(name, features[:0], RIGHT[:0], IDS[:0]).shape == (2, 0)
    assert (shaped(name, features, RIGHT, IDS - 2) == 0).all()


@ALL
@pytest.mark.parametrize("r", [1.0, -1.0])
def test_equal_responses_get_equal_rewards(name: str, r: float, features: Tensor) -> None:
    """Also by an estimator that divides by a deviation plus 1e-6, as verl's does."""
    keys = torch.zeros(5, dtype=torch.int64)
    noisy = features[:1] + 1e-4 * torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    found = shape_scores(
        noisy,
        torch.full((5,), r),
        ShapingOptions(),
        group_size=5,
        gap=2.0,
        keys=keys,
        algorithm=name,
        alignment=noisy.sum(1),
        method_options=MethodOptions(pass_k=2),
    )
    assert found.scores.isfinite().all()
    advantages = (found.scores - found.scores.mean()) / (found.scores.std() + 1e-6)
    assert advantages.abs().max() < 1e-3
    assert found.geometry.advantages.abs().max() < 1e-3


@ALL
@pytest.mark.parametrize("r", [1.0, -1.0])
def test_uniform_groups_may_be_left_alone(name: str, r: float, features: Tensor) -> None:
    same = torch.full((9,), r)
    found = shaped(name, features, same, IDS, uniform_groups="skip")
    assert torch.equal(found[0], same)
    assert found[1].abs().max() == 0
    mixed = shaped(name, features, RIGHT, IDS, uniform_groups="skip")
    assert torch.equal(mixed, shaped(name, features, RIGHT, IDS))


@ALL
def test_what_a_method_gives(name: str, features: Tensor) -> None:
    """Rewards move and advantages follow by eq. 2; or advantages alone are the method's."""
    plain = g2.group_geometry(features, RIGHT, group_ids=IDS, shaping="none")
    found = shaped(name, features, RIGHT, IDS)
    if METHODS[name].gives == "advantages":
        assert torch.equal(found[0], RIGHT)
        assert (found[1] - plain.advantages).abs().max() > 1e-3
    else:
        assert (found[0] - RIGHT).abs().max() > 1e-3
        for group in (0, 1):
            r = found[0, group == IDS]
            expected = (r - r.mean()) / (r.var(unbiased=False) + 1e-6).sqrt()
            torch.testing.assert_close(found[1, group == IDS], expected, rtol=1e-4, atol=1e-4)


@ALL
def test_strength_zero_is_grpo(name: str, features: Tensor) -> None:
    if METHODS[name].strength is None:
        pytest.skip("it has none")
    plain = g2.group_geometry(features, RIGHT, group_ids=IDS, shaping="none")
    found = shape_rewards(
        features,
        RIGHT,
        ShapingOptions(),
        group_ids=IDS,
        algorithm=name,
        alignment=features[:, 0],
        method_options=MethodOptions(strength=0),
    )
    torch.testing.assert_close(found.shaped_rewards, RIGHT, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.advantages, plain.advantages, rtol=0, atol=1e-5)


def test_scores_in_a_trainers_units(features: Tensor) -> None:
    """dra halves a repeated right answer's score: 1/2 where scores are 0 and 1, and 0 where -1 and 1."""
    same = features[:1].expand(2, -1)
    one = shape_scores(same, torch.tensor([1.0, 1.0]), ShapingOptions(), group_size=2, algorithm="dra")
    torch.testing.assert_close(one.scores, torch.tensor([0.5, 0.5]))
    assert one.advantages is None
    two = shape_scores(
        same, torch.tensor([1.0, 1.0]), ShapingOptions(), group_size=2, gap=2.0, algorithm="dra"
    )
    torch.testing.assert_close(two.scores, torch.tensor([0.0, 0.0]), atol=1e-6, rtol=0)
    given = shape_scores(features, (RIGHT + 1) / 2, ShapingOptions(), group_ids=IDS, algorithm="setpo")
    assert torch.equal(given.scores, (RIGHT + 1) / 2)
    assert given.advantages is given.geometry.advantages


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("graded", [True, False])
def test_setpo_adds_to_the_advantages_of_the_scores(graded: bool, scale: str, features: Tensor) -> None:
    """Not to those of right and wrong: with strength 0 they are GRPO's of graded scores, in their units."""
    scores = torch.tensor([0.0, 0.1, 0.2, 1.0, 0.0, 0.3, 0.6, 0.7]).double()
    found = shape_scores(
        features[:8],
        scores,
        ShapingOptions(scale=scale),
        group_size=4,
        algorithm="setpo",
        method_options=MethodOptions(strength=0),
        graded=graded,
    ).advantages
    grouped = scores.view(2, 4)
    expected = grouped - grouped.mean(1, keepdim=True)
    if scale == "group":
        expected /= (grouped.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert found is not None
    torch.testing.assert_close(found.double(), expected.flatten(), rtol=1e-6, atol=1e-6)


def test_repexp_at_the_least_ridge_of_few_dimensions() -> None:
    """16 responses in 3 dimensions: the similarities' rounding must not show."""
    unit = torch.nn.functional.normalize(
        torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), dim=1
    )
    x = unit.double() - unit.double().mean(0)
    inverse = torch.linalg.inv(LEAST_RIDGE * torch.eye(3).double() + x.T @ x)
    expected = 1 + 2 * torch.einsum("id,de,ie->i", x, inverse, x)
    found = repexp(
        rewards(*[1] * 16), full(16), (unit @ unit.T).double()[None], strength=1.0, ridge=LEAST_RIDGE
    )
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0.01)


# --- texts in place of gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if one.texts])
def test_texts_in_place_of_gradients(name: str, features: Tensor) -> None:
    """With unit features as embeddings both are the same; the measured geometry stays the gradient's."""
    texts, gradient = (shaped(name, features, RIGHT, IDS, one) for one in ("text", "gradient"))
    torch.testing.assert_close(texts, gradient, rtol=0, atol=1e-4)
    other = torch.nn.functional.normalize(features.flip(0), dim=1)
    found = shape_rewards(
        features,
        RIGHT,
        ShapingOptions(),
        group_ids=IDS,
        algorithm=name,
        embeddings=other,
        method_options=MethodOptions(similarity="text"),
    )
    assert (found.advantages - gradient[1]).abs().max() > 1e-4
    plain = g2.group_geometry(features, RIGHT, group_ids=IDS)
    assert torch.equal(found.similarity, plain.similarity)


def test_text_similarity_of_padded_groups() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    found = text_similarity(embeddings, torch.tensor([[2, 1], [0, -1]]))
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.8], [0.8, 1.0]], [[1.0, 0.0], [0.0, 0.0]]]))


# --- documentation ------------------------------------------------------------------------------------------


@ALL
def test_the_page_has_each_method_with_its_source_and_default(name: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    rows = re.findall(rf"^\| `{name}` \|(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 2
    formula, source = rows
    assert f" {METHODS[name].gives} |" in formula
    assert METHODS[name].source in source
    assert METHODS[name].source.removeprefix("arXiv ") in (METHODS[name].function.__doc__ or "")
    if METHODS[name].strength is not None:
        assert re.search(rf"c = {METHODS[name].strength:g}\b", formula)


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strength": -1.0}, r"p\.strength: got -1\.0, needs a positive finite number, 0, or None"),
        ({"ridge": 0.0}, r"p\.ridge: got 0\.0, needs a positive finite number"),
        ({"ridge": 1e-5}, r"p\.ridge: got 1e-05, needs at least 0\.0001: below it the bonus is rounding"),
        ({"pass_k": 0}, r"p\.pass_k: got 0, needs a whole number, at least 1"),
        ({"pass_k": 1.5}, r"p\.pass_k: got 1\.5, needs a whole number"),
        ({"similarity": "words"}, r"p\.similarity: got 'words', needs one of 'gradient', 'text'"),
        (
            {"similarity": "text", "algorithm": "passk"},
            r"p\.similarity: got 'text' with p\.algorithm=passk, .* or use repexp, dqo, setpo, dra",
        ),
        ({"similarity": "text"}, r"p\.similarity: got 'text' with p\.algorithm=g2rl"),
        ({"rewards": "graded", "algorithm": "passk"}, r"p\.rewards: got 'graded' with p\.algorithm=passk"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(values, "p.")


def test_passk_needs_groups_larger_than_k() -> None:
    check_group_size(5, "n", {"algorithm": "passk", "pass_k": 4}, "")
    with pytest.raises(ValueError, match=r"^pass_k: got 4, needs fewer than n=4, the responses of a prompt"):
        check_group_size(4, "n", {"algorithm": "passk"}, "")


def test_missing_inputs_are_named(features: Tensor) -> None:
    with pytest.raises(ValueError, match=r"embeddings: got None, similarity='text' needs \[S, e\]"):
        shape_rewards(
            features,
            RIGHT,
            ShapingOptions(),
            group_ids=IDS,
            algorithm="dra",
            method_options=MethodOptions(similarity="text"),
        )
    with pytest.raises(ValueError, match=r"alignment: got None, gar needs \[S\], one for each response"):
        shape_rewards(features, RIGHT, ShapingOptions(), group_ids=IDS, algorithm="gar")
