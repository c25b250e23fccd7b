"""Letters in completions: a table read by hand, generated sentences of a known letter, hostile texts."""

from __future__ import annotations

import re
import time

import pytest
from endings_letters import CITIES, ENDINGS, LEFT, OTHERS
from endings_letters_held_out import HELD_OUT, LEFT_OUT
from endings_letters_more import MORE, MORE_OTHERS
from endings_letters_prose import FAULTS, FRESH, FRESH_AGAIN, FRESH_LAST, FRESH_TOO, LEFT_IN_PROSE
from hypothesis import given
from hypothesis import strategies as st

from g2rl_kernels.integrations.rewards import choice_letter as letter_reward
from g2rl_kernels.tasks.letters import LETTERS, choice_letter
from g2rl_kernels.trainer import ConfigError

TABLE = (
    [(CITIES, text, letter) for text, letter in ENDINGS + MORE]
    + OTHERS
    + MORE_OTHERS
    + FAULTS
    + FRESH
    + FRESH_AGAIN
    + HELD_OUT
    + FRESH_LAST
    + FRESH_TOO
)


def test_the_table_is_large_and_has_no_row_twice() -> None:
    assert len(TABLE) > 400
    assert len({(options, text) for options, text, _ in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("options", "text", "letter"), TABLE)
def test_endings(options: tuple[str, ...], text: str, letter: str | None) -> None:
    assert choice_letter(text, len(options), options) == letter


@pytest.mark.parametrize(("options", "text", "letter", "reason"), LEFT + LEFT_IN_PROSE + LEFT_OUT)
def test_endings_that_are_not_read(
    request: pytest.FixtureRequest, options: tuple[str, ...], text: str, letter: str | None, reason: str
) -> None:
    request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    assert choice_letter(text, len(options), options) == letter


def test_a_letter_needs_no_texts_of_options() -> None:
    for text, letter in ENDINGS + MORE:
        if letter is not None and not re.search("paris|rome|london", text, re.I):
            assert choice_letter(text, 4) == letter, text


# --- generated sentences ----------------------------------------------------------------------------------

WRAPPED = (
    "{}",
    "({})",
    "**{}**",
    "**({})**",
    "$\\text{{{}}}$",
    "\\boxed{{{}}}",
    "[{}]",
    '"{}"',
    "option {}",
    "choice ({})",
)
STATED = (
    "The answer is {}.",
    "The correct answer is {}.",
    "So the final answer must be {}.",
    "Answer: {}.",
    "**Final answer:** {}\n",
    "I would go with {}.",
    "Therefore, {}.",
    "Hence the right option is {}.",
    "I choose {}.",
    "The best choice would be {}.",
    "It has to be {}.",
    "答案是{}。",
)
NOISE = (
    "Let us look at every option.",
    "A train leaves at noon.",
    "I think this needs some care.",
    "Option {} is wrong.",
    "({}) is incorrect, because it is too small.",
    "We can rule out {}.",
    "One might think the answer is {}.",
    "The answer is not {}.",
    "If x were 2, the answer would be {}.",
    "Is it {}?",
    "Let {} = 5 and y = 3.",
    "Then \\boxed{{{} = 7}} is the current.",
    "Points {} and Q lie on a line.",
    "Many students choose {} here.",
)
LETTER = st.sampled_from("ABCD")
SENTENCE = st.builds(str.format, st.sampled_from(NOISE), LETTER)
NOISE_TEXT = st.lists(SENTENCE, max_size=4)
BREAK = st.sampled_from((" ", "\n", "\n\n"))


@st.composite
def statements(draw: st.DrawFn) -> tuple[str, str]:
    """A statement, and its letter."""
    letter = draw(LETTER)
    return draw(st.sampled_from(STATED)).format(draw(st.sampled_from(WRAPPED)).format(letter)), letter


@given(NOISE_TEXT, statements(), NOISE_TEXT, BREAK)
def test_a_statement_is_found_among_other_sentences(
    before: list[str], said: tuple[str, str], after: list[str], between: str
) -> None:
    assert choice_letter(between.join([*before, said[0], *after]), 4, CITIES) == said[1]


@given(NOISE_TEXT, statements(), statements(), BREAK)
def test_the_last_statement_counts(
    before: list[str], first: tuple[str, str], second: tuple[str, str], between: str
) -> None:
    text = between.join([*before, first[0], "Wait, that is wrong.", second[0]])
    assert choice_letter(text, 4, CITIES) == second[1]
    assert choice_letter(f"<think>{first[0]}</think>{between}{second[0]}", 4, CITIES) == second[1]


@given(statements(), LETTER, st.sampled_from(("Question", "Problem 2", "**Q", "Human")))
def test_the_next_question_is_not_read(said: tuple[str, str], other: str, turn: str) -> None:
    text = f"{said[0]}\n\n{turn}: Which is older?\nAnswer: {other}\nThe answer is {other}."
    assert choice_letter(text, 4, CITIES) == said[1]


BESIDE = (
    "{}. {}",
    "The answer is {}. {}.",
    "Answer: {}) {}",
    "\\boxed{{{}. {}}}",
    "<answer>({}) {}</answer>",
)


@given(st.sampled_from(BESIDE), LETTER, st.sampled_from(CITIES))
def test_a_letter_with_another_text_is_no_answer(form: str, letter: str, city: str) -> None:
    right = CITIES[LETTERS.index(letter)] == city
    assert choice_letter(form.format(letter, city), 4, CITIES) == (letter if right else None)
    assert choice_letter(f"<think>The answer is A.</think>{form.format(letter, city)}", 4, CITIES) == (
        letter if right else None
    )


NAMED = (
    "The capital is {}.",
    "It lies in {}, a large city.",
    "So **{}** is the oldest one.",
    "{} has a wall.",
)
UNNAMED = (
    "Is it {}?",
    "It is not {}.",
    "{} is wrong.",
    "If it were {}, it would rain.",
    "Some think it is {}.",
)


@given(st.lists(st.sampled_from(UNNAMED), max_size=3), st.sampled_from(NAMED), st.sampled_from(CITIES), BREAK)
def test_an_option_in_prose(others: list[str], form: str, city: str, between: str) -> None:
    other = next(one for one in CITIES if one != city)
    before = [one.format(other) for one in others]
    letter = LETTERS[CITIES.index(city)]
    assert choice_letter(between.join([*before, form.format(city)]), 4, CITIES) == letter
    assert choice_letter(between.join([form.format(city), *before]), 4, CITIES) == letter
    if before:
        assert choice_letter(between.join(before), 4, CITIES) is None
    assert choice_letter(f"<think>{form.format(city)}</think>I can not tell.", 4, CITIES) is None
    assert choice_letter(f"<think>{form.format(city)}", 4, CITIES) is None


@given(NOISE_TEXT, BREAK)
def test_without_a_statement_there_is_no_letter(sentences: list[str], between: str) -> None:
    assert choice_letter(between.join(sentences), 4, CITIES) is None


@given(st.lists(LETTER, min_size=2, max_size=4, unique=True), st.sampled_from((", ", " or ", " and ", "/")))
def test_several_letters_are_no_answer(letters: list[str], between: str) -> None:
    several = between.join(letters)
    for text in (f"The answer is {several}.", f"\\boxed{{{several}}}", f"Answer: {several}", several):
        assert choice_letter(text, 4, CITIES) is None, text


@given(
    st.integers(2, 26),
    st.integers(0, 25),
    st.sampled_from(("\\boxed{{{}}}", "The answer is ({}).", "Answer: {}")),
)
def test_only_letters_of_options(count: int, place: int, form: str) -> None:
    letter = LETTERS[place]
    assert choice_letter(form.format(letter), count) == (letter if place < count else None)


@given(st.text(st.sampled_from("AB CDabi.,:;()[]{}*_\\\"'\nanswer is boxed option so not or"), max_size=200))
def test_no_text_raises(text: str) -> None:
    assert choice_letter(text, 4, CITIES) in (None, "A", "B", "C", "D")


# --- hostile texts ----------------------------------------------------------------------------------------

UNITS = (
    *(
        "a",
        " ",
        "\n",
        "A ",
        "(",
        "(A",
        "{",
        "}",
        "\\",
        "$",
        "*",
        "_",
        "**a",
        "* ",
        "_a",
        "'",
        '"',
        "~",
        "A, ",
        "选",
        "答案",
    ),
    *(
        "\\boxed{",
        "\\boxed ",
        "<answer>",
        "<answer>A</answer>",
        "\\text ",
        "\\text{",
        "</think>",
        "<think>",
        "a\u0300\u0327",
    ),
    *(
        "answer ",
        "answer is ",
        "answer:",
        "the answer is A? ",
        "the answer is not A. ",
        "I choose B or ",
        "so ",
        "so A, ",
    ),
    *(
        "A and B, ",
        "if ",
        "option A ",
        "(A) and ",
        "(A) is wrong, ",
        "not A, ",
        "A is correct if ",
        "A. ",
        "B) ",
        "correct ",
    ),
    *(
        "the correct answer ",
        "very ",
        "A. xxx ",
        "Answer: -",
        "it is ",
        "Paris ",
        "the answer is Paris and ",
        "one might ",
    ),
    *(
        "Paris",
        "Paris is ",
        "Paris. ",
        "Paris\n",
        "not Paris, ",
        "A. Paris\n",
        "C. Paris is ",
        "\nQuestion: A",
        "\nQ: ",
        "Q: x? A: ",
        "wait, ",
        "wait, no: ",
        "no: ",
        "which is ",
        "A ✅ ",
        "A. x ",
        "✅",
        "actually ",
        "5 - ",
        "it is x ",
    ),
)


@pytest.mark.parametrize("unit", UNITS)
def test_hostile_texts_take_no_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    for end in ("", "\nB"):
        start = time.process_time()
        choice_letter(text + end, 4, CITIES)
        assert time.process_time() - start < 5  # quadratic time would take minutes


# --- TRL's reward function --------------------------------------------------------------------------------


def test_the_reward_function() -> None:
    completions = ["Answer: B", [{"role": "assistant", "content": "It is \\boxed{\\text{Paris}}"}], "A or B"]
    choices = [list(CITIES), {"text": list(CITIES), "label": ["1", "2", "3", "4"]}, list(CITIES)]
    assert letter_reward(completions, answer=["B", "3", 0], choices=choices, prompts=["?"] * 3) == [
        1.0,
        1.0,
        0.0,
    ]
    assert letter_reward(completions, answer=["B", None, 0], choices=choices) == [1.0, None, 0.0]
    with pytest.raises(ConfigError, match=r"choice_letter: row 1: answer='5' is not one of its 4 options"):
        letter_reward(completions, answer=["B", "5", 0], choices=choices)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{A} or \boxed{B}",
        r"$\boxed{A}$, or maybe $\boxed{B}$",
        r"\boxed{A}, \boxed{B}, \boxed{C}, \boxed{D}",
        "<answer>A</answer> or <answer>B</answer>",
        r"\boxed{(A)(B)}",
        "(A) (B) (C) (D)",
    ],
)
def test_several_containers_choose_nothing(text: str) -> None:
    assert choice_letter(text, 4, CITIES) is None


def test_a_later_container_replaces_an_earlier_one() -> None:
    assert choice_letter("\\boxed{A} is wrong, so \\boxed{B}", 4, CITIES) == "B"
    assert choice_letter("<answer>A</answer><answer>B</answer>", 4, CITIES) == "B"
    assert choice_letter("<answer>\\boxed{A}</answer> and again \\boxed{A}", 4, CITIES) == "A"
