"""Metrics of n sampled responses to each problem: pass@k, maj@k, distinct right answers, and intervals.

Expectations over subsets of the samples are exact; only the bootstrap draws at random, from a fixed seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import TypedDict

import numpy as np


class Estimate(TypedDict):
    """A mean over problems, with its 95 % bootstrap interval; low and high are None for a single problem."""

    mean: float
    low: float | None
    high: float | None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is right, drawn without replacement from n of which c are right.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374, computed in integers and rounded
    once. Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: must be from 1 to n={n}, the number of samples")
    if not 0 <= c <= n:
        raise ValueError(f"c={c}: must be from 0 to n={n}, the number of samples")
    subsets = comb(n, k)
    return (subsets - comb(n - c, k)) / subsets


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Chance that the majority answer of k samples, drawn without replacement from n, is right.

    The most frequent answer wins; a tie is broken by a uniform draw. A sample without an answer does not
    vote, and a vote without answers is wrong. Where samples with the same answer have different verdicts, the
    answer counts as right by the share of those that are.

    The expectation is exact: a sum over the winning count j of the multivariate hypergeometric distribution
    of all counts, in O(n k) vector operations.

    Args:
        answers: the final answers of the n samples; None for no answer.
        right: the verdicts on the n samples.
        k: samples in a vote.

    Raises:
        ValueError: k is not in [1, n], or answers and right differ in length.
    """
    n = len(answers)
    if len(right) != n:
        raise ValueError(f"right: {len(right)} verdicts for {n} answers")
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: must be from 1 to n={n}, the number of samples")
    sizes = Counter(answer for answer in answers if answer is not None)
    hits = Counter(answer for answer, is_right in zip(answers, right) if is_right)
    if not any(hits[answer] for answer in sizes):
        return 0.0
    if k == n:  # a single vote is possible
        tied = [answer for answer, size in sizes.items() if size == max(sizes.values())]
        return sum(hits[answer] / sizes[answer] for answer in tied) / len(tied)
    # table[drawn, i]: chance that i of `drawn` samples have this answer, among it and the answers before it
    seen, tables = n - sum(sizes.values()), []
    unanswered = seen
    for size in sizes.values():
        tables.append(_hypergeometric(seen, size, k))
        seen += size
    expected = 0.0
    for j in range(1, min(k, max(sizes.values())) + 1):
        # state[0][drawn, t]: chance that no answer came more than j times among `drawn`, and t came j times;
        # state[1]: the same times the sum of those t answers' shares of right
        state = np.zeros((2, k + 1, k // j + 1))
        state[0, : min(unanswered, k) + 1, 0] = 1
        for (answer, size), table in zip(sizes.items(), tables):
            new = np.zeros_like(state)
            for i in range(min(size, j - 1, k) + 1):
                new[:, i:] += state[:, : k + 1 - i] * table[i:, i, None]
            if size >= j:
                tied = state[:, : k + 1 - j, :-1] * table[j:, j, None]
                tied[1] += hits[answer] / size * tied[0]
                new[:, j:, 1:] += tied
            state = new
        expected += float((state[1, k, 1:] / np.arange(1, state.shape[2])).sum())
    return min(expected, 1.0)


def _hypergeometric(others: int, size: int, k: int) -> np.ndarray:
    """[k + 1, min(size, k) + 1]: chance that i of `drawn` samples are among `size` of `others` + `size`."""
    table = np.zeros((k + 1, min(size, k) + 1))
    for drawn in range(min(k, others + size) + 1):
        for i in range(max(0, drawn - others), min(size, drawn) + 1):
            table[drawn, i] = comb(size, i) * comb(others, drawn - i) / comb(others + size, drawn)
    return table


def bootstrap_interval(
    values_per_problem: Sequence[float] | np.ndarray,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | tuple[None, None]:
    """Percentile bootstrap interval (low, high) of a mean over P problems; (None, None) for P = 1.

    Resamples problems with replacement; the n samples of a problem stay together. The same arguments give the
    same interval.

    Args:
        values_per_problem: [P], P > 0.
        level: in (0, 1).
        resamples: bootstrap means to draw.
        seed: of the random generator.

    Raises:
        ValueError: there are no values, or level is not in (0, 1).
    """
    values = np.asarray(values_per_problem, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values_per_problem: needs [P] values, P > 0; got shape {list(values.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: must be between 0 and 1")
    if len(values) == 1:
        return None, None
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 250):  # in batches: with P = 12000 all draws at once take 1 GB
        batch = means[start : start + 250]
        batch[:] = values[generator.integers(len(values), size=(len(batch), len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of [P] values, one for each problem, with its 95 % `bootstrap_interval`."""
    low, high = bootstrap_interval(values)
    return {"mean": float(np.mean(values)), "low": low, "high": high}


def excludes_zero(value: Estimate) -> bool:
    """Whether 0 lies outside of the interval."""
    return value["low"] is not None and value["high"] is not None and (value["low"] > 0 or value["high"] < 0)


def distinct_right(answers: Sequence[str | None], right: Sequence[bool]) -> int:
    """How many different right answers there are; None, no answer, does not count."""
    return len({answer for answer, is_right in zip(answers, right) if is_right and answer is not None})
