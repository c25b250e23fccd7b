"""Metrics: held to enumeration of every subset of the samples."""

import time
from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2rl_kernels.evaluation.metrics import bootstrap_interval, distinct_right, maj_at_k, pass_at_k

samples = st.lists(
    st.tuples(st.sampled_from(["1", "2", "3", "4", None]), st.booleans()), min_size=1, max_size=9
)


def vote(answers, right, chosen):
    """The chance that a vote among the chosen samples is right, as the docstring says it."""
    counts = Counter(answers[i] for i in chosen if answers[i] is not None)
    if not counts:
        return Fraction(0)
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    shares = []
    for winner in winners:
        verdicts = [r for a, r in zip(answers, right) if a == winner]
        shares.append(Fraction(sum(verdicts), len(verdicts)))
    return sum(shares) / len(winners)


@settings(max_examples=150, deadline=None)
@given(samples, st.data())
def test_all_subsets(drawn, data):
    answers, right = zip(*drawn)
    n = len(drawn)
    k = data.draw(st.integers(1, n))
    subsets = list(combinations(range(n), k))
    passed = Fraction(sum(any(right[i] for i in chosen) for chosen in subsets), len(subsets))
    assert pass_at_k(n, sum(right), k) == float(passed)
    voted = sum(vote(answers, right, chosen) for chosen in subsets) / Fraction(len(subsets))
    assert maj_at_k(answers, right, k) == pytest.approx(float(voted), abs=1e-12)


def test_by_hand():
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(4, 3, 2) == 1.0
    assert pass_at_k(5, 0, 5) == 0.0
    # of the pairs of (a, a, b): one aa, two ab with an even draw
    assert maj_at_k(["a", "a", "b"], [True, True, False], 2) == pytest.approx(2 / 3)
    assert maj_at_k(["a", "a", "b"], [True, True, False], 3) == 1.0
    # None neither wins nor takes part in ties
    assert maj_at_k([None, None, "b"], [False, False, True], 3) == 1.0
    assert maj_at_k([None, None], [True, True], 1) == 0.0
    # one answer judged in two ways
    assert maj_at_k(["a", "a"], [True, False], 1) == 0.5


def test_maj_at_1_is_pass_at_1_of_samples_with_answers():
    generator = np.random.default_rng(1)
    answers = [str(x) for x in generator.integers(6, size=64)]
    right = [answer == "3" for answer in answers]
    assert maj_at_k(answers, right, 1) == pytest.approx(pass_at_k(64, sum(right), 1), abs=1e-12)


def test_many_samples():
    assert pass_at_k(500, 1, 250) == 0.5
    assert pass_at_k(700, 350, 1) == 0.5
    assert pass_at_k(400, 3, 100) == 1 - comb(397, 100) / comb(400, 100)
    # two answers in equal numbers win equally often, whatever n
    assert maj_at_k(["a", "b"] * 300, [True, False] * 300, 100) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("kinds", [2, 16, 64])
def test_64_samples_take_milliseconds(kinds):
    answers = [str(i % kinds) for i in range(64)]
    right = [answer == "0" for answer in answers]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        value = maj_at_k(answers, right, 16)
        times.append(time.perf_counter() - start)
    assert value == pytest.approx(1 / kinds)
    assert min(times) < 0.1  # a few milliseconds; the machine may be busy


def test_a_vote_among_all_samples_is_counted():
    answers = ["a"] * 300 + ["b"] * 300 + [None] * 424
    right = [i % 3 == 0 for i in range(300)] + [True] * 300 + [True] * 424
    start = time.perf_counter()
    assert maj_at_k(answers, right, 1024) == pytest.approx((1 / 3 + 1) / 2)  # a tie of a and b
    assert maj_at_k(["b", *answers], [True, *right], 1025) == 1
    assert time.perf_counter() - start < 1


def test_wrong_arguments():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k={k}"):
            pass_at_k(3, 1, k)
        with pytest.raises(ValueError, match=f"k={k}"):
            maj_at_k(["a"] * 3, [True] * 3, k)
    with pytest.raises(ValueError, match="c=4"):
        pass_at_k(3, 4, 1)
    with pytest.raises(ValueError, match="right"):
        maj_at_k(["a"], [True, False], 1)
    with pytest.raises(ValueError, match="values_per_problem"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval([1.0], level=1)


def test_bootstrap():
    values = np.random.default_rng(2).random(400)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(list(values), seed=1) != (low, high)
    # at 400 values the interval is the normal one
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    narrow = bootstrap_interval(values, level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.674 * error, rel=0.1)
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    assert bootstrap_interval([0.25]) == (None, None)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.random(60) < 0.4, resamples=500, seed=trial)
        covered += low <= 0.4 <= high
    assert 175 <= covered <= 199


def test_distinct_right():
    assert distinct_right(["1", "2", "2", None, "3"], [True, True, True, True, False]) == 2
    assert distinct_right([], []) == 0
