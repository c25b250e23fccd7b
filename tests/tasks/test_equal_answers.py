"""Answers of data sets: other forms of the same, and that no other answer is taken for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from g2rl_kernels.tasks.mathematics.judge import MathJudge, read

pytest.importorskip("math_verify", reason="needs math-verify: pip install 'g2rl-kernels[train]'")

HERE = Path(__file__).parent
JUDGE = MathJudge()


def lines(name: str) -> list[str]:
    return (HERE / name).read_text(encoding="utf-8").split("\n\n", 1)[1].splitlines()


PAIRS = [tuple(line.split("    <=>    ")) for line in lines("answers_equal.txt")]
DIFFERENT = lines("answers_different.txt")


@pytest.mark.parametrize(("gold", "answer"), PAIRS)
def test_another_form(gold: str, answer: str) -> None:
    assert JUDGE.same(gold, answer)
    assert JUDGE.same(answer, gold)
    assert JUDGE.score(rf"\[\boxed{{{answer}}}\]", gold) == 1
    assert JUDGE.score(rf"\[\boxed{{{gold}}}\]", answer) == 1
    assert JUDGE.score(f"<answer>{answer}</answer>", rf"Some solution, hence $\boxed{{{gold}}}$.") == 1


@pytest.mark.parametrize("gold", DIFFERENT)
def test_an_answer_is_equal_to_itself(gold: str) -> None:
    ways = [rf"so $\boxed{{{gold}}}$.", f"<answer>{gold}</answer>", f"The answer is ${gold}$."]
    assert [JUDGE.score(way, gold) for way in ways] == [1, 1, 1]
    answer = JUDGE.answer(ways[0], None)
    assert answer is not None
    assert read(answer).text == answer


@pytest.mark.parametrize("gold", DIFFERENT)
def test_other_answers_are_wrong(gold: str) -> None:
    others = random.Random(gold).sample(DIFFERENT, 12)
    assert [other for other in others if other != gold and JUDGE.same(gold, other)] == []
