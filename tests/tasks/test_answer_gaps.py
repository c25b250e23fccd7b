"""Answers that found a gap: slow or raising ones, hedges, contradictions."""

from __future__ import annotations

import time

import pytest

from g2rl_kernels.tasks.mathematics import MathJudge


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("(" + "1" * 50, "x + 1"),  # a pattern that tried all ways to part the digits
        (r"\prod_{k=1}^{1/2} k", "x + 1"),
        (r"0.5 = 3 + \prod_{k=1}^{0.5} k", "x + 1 = 0"),
        (r"\prod_{k=1}^{\infty} (1 + 1/k^2)", "3"),
        (r"\Gamma(1000000)", "3"),
        (r"\lfloor \pi \cdot 10^{900} \rfloor", "3"),
        ("i < x < y", "x < 3"),
    ],
)
def test_answers_that_took_minutes_or_raised(answer: str, gold: str) -> None:
    started = time.process_time()
    assert MathJudge().score(rf"\boxed{{{answer}}}", gold) == 0
    assert time.process_time() - started < 10  # with sympy's import


@pytest.mark.parametrize(
    "text", ["either 3 or 4", "It is either **3** or **4**.", "The answer is either 3 or 4.", "So 3, or 4"]
)
def test_a_hedge_between_numbers_is_both_of_them(text: str) -> None:
    judge = MathJudge()
    assert [judge.score(text, gold) for gold in ("3", "4", "3, 4")] == [0, 0, 1]


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        (r"3 \approx 5", "3", False),
        (r"0.5 \approx 3", "1/2", False),
        (r"\frac13 \approx 0.33", r"\frac13", True),
        (r"x \approx 3.14", "3.14", True),
    ],
)
def test_approximations(answer: str, gold: str, right: bool) -> None:
    assert MathJudge().score(rf"\boxed{{{answer}}}", gold) == right
