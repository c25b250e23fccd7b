"""Generated answers whose truth is known: forms of one number, near misses, words, lists, expressions."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from g2rl_kernels.tasks.mathematics import MathJudge

pytest.importorskip("math_verify", reason="needs math-verify: pip install 'g2rl-kernels[train]'")

JUDGE = MathJudge()
CALM = settings(deadline=None, max_examples=150, derandomize=True)


def decimal(number: Fraction) -> str | None:
    """A number as a decimal without exponent; None if it has no end within 12 places."""
    for places in range(13):
        if (number * 10**places).denominator == 1:
            digits = str(abs(int(number * 10**places))).rjust(places + 1, "0")
            whole, rest = digits[: len(digits) - places], digits[len(digits) - places :]
            return ("-" if number < 0 else "") + whole + (f".{rest}" if places else "")
    return None


def forms(number: Fraction) -> list[str]:
    """Ways to write one number."""
    sign, top, bottom = "-" if number < 0 else "", abs(number.numerator), number.denominator
    written = [
        rf"{sign}\frac{{{top}}}{{{bottom}}}",
        f"{sign}{top}/{bottom}",
        rf"{sign}\dfrac{{{2 * top}}}{{{2 * bottom}}}",
    ]
    text = decimal(number)
    if text is not None:
        written += [
            text,
            f"{text}e0",
            rf"{decimal(number / 1000)} \times 10^{{3}}" if decimal(number / 1000) else text,
        ]
        written += [
            rf"{decimal(number * 100)} \cdot 10^{{-2}}",
            text.replace("-", "−"),
            f"{text}0" if "." in text else text,
        ]
        if "." in text and text.lstrip("-").startswith("0."):
            written.append(text.replace("0.", ".", 1))
        percent = number * 100
        if number.denominator > 1:
            written += [rf"{decimal(percent)}\%", f"{decimal(percent)} %", f"{decimal(percent)} percent"]
    if bottom == 1:
        grouped = f"{top:,}"
        written += [sign + grouped, sign + grouped.replace(",", r"\,"), sign + grouped.replace(",", " ")]
        written += [sign + grouped.replace(",", "{,}"), f"{sign}{top}.0"]
    elif top > bottom:
        written.append(rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
    return written


def settings_of(text: str) -> list[str]:
    """Ways to give an answer."""
    return [
        rf"So the answer is \boxed{{{text}}}.",
        rf"$x = \boxed{{{text}}}$",
        rf"\[\boxed{{x = {text}}}\]",
        f"<answer>{text}</answer>",
        f"The answer is ${text}$.",
        rf"Final answer: \({text}\)",
        f"After 3 steps we get 17 and then 4.\n\n**Answer:** ${text}$",
    ]


def plain_settings_of(text: str) -> list[str]:
    return [
        f"The answer is {text}.",
        f"Answer: {text}",
        f"It is 3 less than that, so the answer is {text}",
        text,
    ]


numbers = st.one_of(
    st.integers(-20, 20).map(Fraction),
    st.integers(-(10**9), 10**9).map(Fraction),
    st.fractions(-50, 50, max_denominator=40),
    st.builds(lambda n, places: Fraction(n, 10**places), st.integers(-99_999, 99_999), st.integers(1, 8)),
)


@CALM
@given(numbers, st.data())
def test_forms_of_one_number_are_one_answer(number: Fraction, data: st.DataObject) -> None:
    first, second = data.draw(st.sampled_from(forms(number))), data.draw(st.sampled_from(forms(number)))
    plain = not set(second) & set("\\{") and "percent" not in second
    ways = settings_of(second) + (plain_settings_of(second) if plain else [])
    completion = data.draw(st.sampled_from(ways))
    assert JUDGE.score(completion, first) == 1, (completion, first)
    assert JUDGE.answer(completion, None) == JUDGE.answer(rf"\boxed{{{first}}}", None)


@CALM
@given(numbers, st.data())
def test_near_misses_are_wrong(number: Fraction, data: st.DataObject) -> None:
    scales = [Fraction(1, 1000), Fraction(1, 100), Fraction(1, 10), Fraction(101, 100), -1, 2, 10, 100, 1000]
    misses = [number + 1, number - 1, number + Fraction(1, 10), *(number * scale for scale in scales)]
    miss = data.draw(st.sampled_from(misses))
    assume(miss != number)
    completion = data.draw(st.sampled_from(settings_of(data.draw(st.sampled_from(forms(miss))))))
    for gold in forms(number):
        assert JUDGE.score(completion, gold) == 0, (completion, gold)


@CALM
@given(st.fractions(Fraction(1, 1000), 10**6, max_denominator=1000), st.integers(-200, 200), st.data())
def test_scientific_numbers_are_compared_relatively(
    mantissa: Fraction, power: int, data: st.DataObject
) -> None:
    places = data.draw(st.integers(1, 4))
    text = f"{float(mantissa):.{places}f}"
    assume(float(text) > 0)
    gold, other = (
        rf"{text} \times 10^{{{power}}}",
        rf"{text} \times 10^{{{power + data.draw(st.sampled_from([-1, 1, 2]))}}}",
    )
    assert JUDGE.score(rf"\boxed{{{text}e{power}}}", gold) == 1
    assert JUDGE.score(rf"\boxed{{{other}}}", gold) == 0
    assert JUDGE.score(f"The answer is {text}e{power}.", gold) == 1


WORDS = ["red", "green", "blue", "north", "south", "Paris", "London", "even", "odd", "silent", "listen"]
WORDS += ["stone", "notes", "angel", "glean", "Tuesday", "triangle"]


@CALM
@given(st.sampled_from(WORDS), st.randoms(use_true_random=False))
def test_words_and_their_anagrams(word: str, shuffle: random.Random) -> None:
    ways = [
        rf"\boxed{{{word}}}",
        rf"\boxed{{\text{{{word}}}}}",
        f"The answer is {word}.",
        f"<answer>{word.upper()}</answer>",
    ]
    ways += [f"Answer: **{word}**", f'The answer is "{word}".', word, f"{word.capitalize()}."]
    assert all(JUDGE.score(way, word) == 1 for way in ways)
    letters = list(word)
    shuffle.shuffle(letters)
    other = "".join(letters)
    assume(other.lower() != word.lower())
    assert JUDGE.score(rf"\boxed{{{other}}}", word) == 0
    assert JUDGE.score(f"The answer is {other}.", word) == 0
    assert not JUDGE.same(word, other)


@CALM
@given(
    st.lists(st.sampled_from(WORDS), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False)
)
def test_word_lists_are_ordered(words: list[str], shuffle: random.Random) -> None:
    gold = ", ".join(words)
    assert JUDGE.score(f"<answer>{','.join(words)}</answer>", gold) == 1
    assert JUDGE.score(rf"\boxed{{\text{{{gold}}}}}", gold) == 1
    other = words.copy()
    shuffle.shuffle(other)
    assume(other != words)
    assert JUDGE.score(f"<answer>{', '.join(other)}</answer>", gold) == 0


@CALM
@given(st.lists(st.integers(-30, 30), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_lists_of_numbers(values: list[int], shuffle: random.Random) -> None:
    other = values.copy()
    shuffle.shuffle(other)
    bare, shuffled = ", ".join(map(str, values)), ", ".join(map(str, other))
    assert JUDGE.score(rf"\boxed{{{shuffled}}}", bare) == 1
    assert JUDGE.score(" and ".join(rf"$x = \boxed{{{value}}}$" for value in other), bare) == 1
    assert JUDGE.score(rf"\boxed{{\{{{shuffled}\}}}}", rf"\{{{bare}\}}") == 1
    assert JUDGE.score(rf"\boxed{{({shuffled})}}", f"({bare})") == (other == values)
    assert JUDGE.score(rf"\boxed{{{bare}, 31}}", bare) == 0
    assert JUDGE.score(rf"\boxed{{{', '.join(map(str, values[:-1]))}}}", bare) == 0


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 9), st.integers(-9, 9), st.integers(1, 9), st.sampled_from(["x", "n", "t", "k"]))
def test_expressions(a: int, b: int, c: int, x: str) -> None:
    product, sum_ = f"({a}{x}{b:+})({x}+{c})", f"{a}{x}^2{a * c + b:+}{x}{b * c:+}"
    assert JUDGE.same(product, sum_)
    assert JUDGE.same(sum_, product)
    assert JUDGE.score(rf"\boxed{{{sum_}}}", product) == 1
    assert JUDGE.score(rf"\boxed{{{sum_}+1}}", product) == 0
    assert JUDGE.score(rf"\boxed{{\frac{{{sum_}}}{{{x}+{c}}}}}", f"{a}{x}{b:+}") == 1
    root = rf"{a}\sqrt{{{c * c * 2}}}"
    assert JUDGE.score(rf"\boxed{{{root}}}", rf"{a * c}\sqrt{{2}}") == 1
    assert JUDGE.score(rf"\boxed{{{root}}}", rf"{a * c + 1}\sqrt{{2}}") == 0


@CALM
@given(st.text(max_size=60), st.text(max_size=20))
def test_any_text_has_a_verdict(completion: str, gold: str) -> None:
    assert JUDGE.score(completion, gold) in (0, 1)
    answer = JUDGE.answer(completion, None)
    assert answer is None or (
        JUDGE.same(answer, answer) and JUDGE.same(gold, answer) == JUDGE.same(answer, gold)
    )
