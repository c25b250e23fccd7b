"""Endings of responses with the answer a careful person reads in them, from endings_numbers.txt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from g2rl_kernels.tasks.mathematics import MathJudge

pytest.importorskip("math_verify", reason="needs math-verify: pip install 'g2rl-kernels[train]'")

# Endings that the judge reads otherwise than a person does, by a part of their text, and why
LEFT = {
    "John has 9 marbles and Mary has 3": "a sentence names two numbers, and only the question tells which",
    "New York City? No": "a question and its answer stand in the place of the answer",
    "The animal is a cat.": "without a known answer, a sentence in words is not taken for an answer",
    "every second one at 60%": "one sentence names five numbers, and only its meaning tells the answer",
    "The first term is 2, the second": "a text cut off within a sentence looks like one without a full stop",
    "exactly two days": "numbers in words are read where an answer stands, not searched for in sentences",
    "is called equilateral": "without a known answer, a sentence in words is not taken for an answer",
    "limit does not exist": "without a known answer, a sentence in words is not taken for an answer",
    "Total cost: $20 (": "the sum in brackets after a value looks like a factor",
    "Final answer: 2/3π": "2/3π is read as 2/(3π)",
    "and carry the 1": "an explanation after the answer names a number of its own",
}


class Ending(NamedTuple):
    text: str
    answer: str  # "-": no answer
    right: str
    wrong: str


def endings() -> list[Ending]:
    text = (Path(__file__).parent / "endings_numbers.txt").read_text(encoding="utf-8")
    found = []
    for block in re.split(r"(?m)^--- ", text)[1:]:
        head, _, body = block.partition("\n")
        answer, right, wrong = (part.strip() for part in head.split(" | "))
        found.append(Ending(body.removesuffix("\n"), answer, right, wrong))
    return found


def marked(ending: Ending) -> object:
    reason = next((why for part, why in LEFT.items() if part in ending.text), None)
    marks = [] if reason is None else [pytest.mark.xfail(strict=True, reason=reason)]
    return pytest.param(ending, marks=marks, id=re.sub(r"\W+", "-", ending.text[-40:]).strip("-"))


def test_the_table_is_whole() -> None:
    table = endings()
    assert len(table) >= 570
    assert len({ending.text for ending in table}) == len(table)
    assert sum(ending.answer == "-" for ending in table) >= 6
    assert all(any(part in ending.text for ending in table) for part in LEFT)


@pytest.mark.parametrize("ending", [marked(ending) for ending in endings()])
def test_ending(ending: Ending) -> None:
    judge = MathJudge()
    assert judge.score(ending.text, ending.wrong) == 0
    read = judge.answer(ending.text, None)
    if ending.answer == "-":
        assert read is None
        return
    assert read is not None
    assert judge.same(read, ending.answer)
    assert judge.same(ending.answer, read)
    assert judge.score(ending.text, ending.right) == 1
