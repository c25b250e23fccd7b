"""The judge of mathematics, numbers and words: what is right and what is wrong."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from g2rl_kernels.errors import ConfigError
from g2rl_kernels.tasks.answers import AnswerTask
from g2rl_kernels.tasks.base import final_answer
from g2rl_kernels.tasks.mathematics.judge import MathJudge, known_text, read
from g2rl_kernels.tasks.verify import answers_of

pytest.importorskip("math_verify", reason="needs math-verify: pip install 'g2rl-kernels[train]'")


def task(gold: Any, extract: str = "all") -> AnswerTask:
    return AnswerTask([{"question": "?", "answer": gold}], "a test", extract=extract)


def agrees(gold: Any, completion: str, right: bool, extract: str = "all") -> None:
    """The verdict of the task and of the judge, and the vote: `same` says of the answer what `score` says."""
    judge, asked = MathJudge(extract), task(gold, extract)
    assert asked.score(completion, asked[0]) == float(right)
    assert judge.score(completion, gold) == float(right)
    answer = final_answer(asked, completion, asked[0])
    if answer is not None:
        known = known_text(gold)
        assert judge.same(answer, known) == judge.same(known, answer) == right
        assert read(answer).text == answer  # the form is final


def test_verdicts_in_a_thread() -> None:
    found: list[float] = []
    asked = task(r"\frac{\sqrt{2}}{2}")
    worker = threading.Thread(
        target=lambda: found.append(asked.score(r"\boxed{\frac{1}{\sqrt{2}}}", asked[0]))
    )
    worker.start()
    worker.join()
    assert found == [1]


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"1.6 \times 10^{-19}", r"9.1 \times 10^{-31}", False),
        (r"1.6 \times 10^{-19}", r"1.6 \cdot 10^{-19}", True),
        (r"1.6 \times 10^{-19}", r"1.7 \times 10^{-19}", False),
        ("0.0000012", "0.0000008", False),
        ("0.0000012", r"1.2 \times 10^{-6}", True),
        ("(1, 0.0000012)", "(1, 0.0000008)", False),
        (r"\{0.0000012\}", r"\{0.0000008\}", False),
        (r"10^{-20}\pi", r"10^{-20}", False),
        (r"10^{-100}\pi", r"10^{-101}\pi", False),
        (r"10^{-20}x", r"2 \cdot 10^{-20}x", False),
        (r"\frac{1}{3}", "0.333333", True),
        (r"\frac{1}{3}", "0.333", False),
        ("0.333", r"\frac{1}{3}", False),
        (r"\frac{2}{3}", "0.666667", True),
        (r"\pi", "3.14", False),
        (r"\pi", "3.14159", True),
        ("3.14159", r"\pi", True),
        (r"\sqrt{2}", "1.41421", True),
        (r"\sqrt{2}", "1.41422", False),
        ("1000000", "1000001", False),
        ("1000000", "1000000.4", False),
        ("123456.7", "123456.71", True),
        ("123456.7", "123456.8", False),
        ("0.1", "0.1000001", False),
    ],
)
def test_numbers_are_compared_relatively(gold: str, answer: str, right: bool) -> None:
    agrees(gold, rf"\boxed{{{answer}}}", right)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (0.00001, "0.00001", True),
        (0.00001, r"10^{-5}", True),
        (0.00001, "0.0001", False),
        ("3.0e-7", "0.0000003", True),
        ("3.0e-7", r"3 \times 10^{-7}", True),
        ("1e-05", "0.00001", True),
        (1e16, "10000000000000000", True),
        (1e16, r"10^{16}", True),
        (1e22, r"10^{22}", True),
        (1e22, r"10^{21}", False),
        (12345678901234567890, "12345678901234567890", True),
        (12345678901234567890, "12345678901234567891", False),
        (1.5e300, r"1.5 \times 10^{300}", True),
        (0.1 + 0.2, "0.3", True),
        (1 / 3, r"\frac13", True),
        (2 / 3, r"\frac23", True),
        (7.0, "7", True),
        (7, "7.0", True),
        (-0.5, r"-\frac12", True),
        (1, "1", True),
    ],
)
def test_json_numbers(gold: Any, answer: str, right: bool) -> None:
    agrees(gold, rf"\boxed{{{answer}}}", right)
    agrees(gold, f"The answer is {answer}." if "\\" not in answer else f"The answer is ${answer}$.", right)


def test_booleans_reach_the_judge_from_columns_of_a_data_set() -> None:
    """Rows of tasks must say what to write: base.py `check_rows` refuses them there."""
    judge = MathJudge()
    assert judge.score(r"\boxed{\text{true}}", True) == judge.score("The answer is False.", False) == 1
    assert judge.score("The answer is True.", False) == 0
    with pytest.raises(ConfigError, match="answer=True: needs a text or a number; write the word"):
        AnswerTask([{"question": "?", "answer": True}], "a test")


def test_a_known_answer_of_another_kind_is_told() -> None:
    with pytest.raises(TypeError, match="known answer: got a dict, needs a text or a number"):
        MathJudge().score("5", {"value": 5})
    assert MathJudge().score("5", None) == 0


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        ("yes", "yes", True),
        ("yes", "The answer is yes.", True),
        ("yes", r"\boxed{\text{yes}}", True),
        ("yes", "Yes!", True),
        ("yes", "no", False),
        ("Paris", "The answer is Paris.", True),
        ("Paris", "The answer is paris", True),
        ("Paris", "The answer is Paris, the capital of France.", True),
        ("Paris", "The answer is London.", False),
        ("north", r"\boxed{\text{north}}", True),
        ("north", r"\boxed{\text{south}}", False),
        ("the left one", r"\boxed{\text{Left one}}", True),
        ("no", r"\boxed{on}", False),
        ("listen", r"\boxed{silent}", False),
        ("ABCD", r"\boxed{DCBA}", False),
        ("ABCD", r"\boxed{ABCD}", True),
        (r"\text{no}", r"\boxed{\text{on}}", False),
        ("xy", r"\boxed{yx}", True),
        ("xyz", r"\boxed{zyx}", True),
        ("2ab", r"\boxed{2ba}", True),
        ("ab+1", r"\boxed{1+ba}", True),
        ("red, green, blue", r"\boxed{\text{red, green, blue}}", True),
        ("red, green, blue", "<answer>blue, green, red</answer>", False),
        ("five", r"\boxed{5}", True),
        ("no solution", r"\boxed{\text{No solution.}}", True),
        ("no solution", r"\boxed{0}", False),
        ("Málaga", "The answer is málaga.", True),
        ("5", "The answer is correct.", False),
    ],
)
def test_words(gold: str, completion: str, right: bool) -> None:
    agrees(gold, completion, right)


def test_words_beside_a_box_are_no_answer() -> None:
    agrees("5", r"\boxed{5}. I am sure that the answer is correct.", True)


def test_one_answer_in_several_forms_is_one_vote() -> None:
    judge = MathJudge()
    forms = [r"\boxed{10^{-3}}", r"\boxed{x = 0.001}", r"\boxed{0.1\%}", r"\boxed{\frac{1}{1000}}", "0.001"]
    assert {judge.answer(form, None) for form in forms} == {"1/1000"}
    assert judge.answer(r"\boxed{0.01}", None) == "1/100"
    assert answers_of(MathJudge(), [r"so \boxed{0.5}", r"\boxed{\frac{1}{2}}"]) == ["1/2", "1/2"]
    for first, second in ((r"2\sqrt{3}", r"\sqrt{12}"), ("(x+1)^2", "x^2+2x+1"), ("1, 2", r"\{2, 1\}")):
        assert judge.same(first, second)
        assert judge.same(second, first)


@pytest.mark.parametrize("extract", ["all", "boxed", "answer_tag"])
@pytest.mark.parametrize("text", [r"2\sqrt{3}", r"\pi", "(1,2)", "x+1", "1,2,3", r"\frac{1}{2}", "yes"])
def test_extractors_hand_the_whole_answer_on(text: str, extract: str) -> None:
    completion = f"so <answer>{text}</answer>" if extract == "answer_tag" else rf"so $\boxed{{{text}}}$."
    agrees(text, completion, True, extract)
    for other in (r"3\sqrt{2}", "2", "(2,1)", "x", "1,3", "3", "no"):
        agrees(other, completion, False, extract)


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        ("3", "The roots are 2,3", True),
        ("23", "The roots are 2,3", False),
        ("2", "(1,2)", True),
        ("-3", "x = −3", True),
        ("3", "x = −3", False),
        ("0.5", ".5", True),
        ("3", "10-3", True),
        ("1,024", "1024", True),
        ("1,024", "it is 1,024.", True),
        ("7", "7.0", True),
        ("7.0", "it is 7", True),
        (7, "7.0", True),
        ("12%", "it is 12 %", True),
        ("12", "nothing", False),
    ],
)
def test_last_number(gold: Any, completion: str, right: bool) -> None:
    agrees(gold, completion, right, "last_number")


WRONG_FIRST = r"\boxed{3}. Wait, that is wrong. The answer is \boxed{5}"
BOTH = r"So $x=\boxed{1}$ and $x=\boxed{2}$."


@pytest.mark.parametrize("extract", ["all", "boxed"])
@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        ("5", WRONG_FIRST, True),
        ("3", WRONG_FIRST, False),
        ("3, 5", WRONG_FIRST, False),
        ("1, 2", BOTH, True),
        (r"\{1,2\}", BOTH, True),
        ("2, 1", BOTH, True),
        (r"x=1 \text{ or } x=2", BOTH, True),
        ("2", BOTH, False),
        ("1, 3", BOTH, False),
        ("5", r"\boxed{5} \boxed{6}", False),
        ("6", r"\boxed{5} \boxed{6}", True),
        ("5", r"\boxed{5}, that is, \boxed{5}", True),
        ("5", r"\boxed{3}, \boxed{5}", False),
        ("5", r"<think>\boxed{3}</think>\boxed{5}", True),
        ("3", r"<think>\boxed{3}</think>I cannot tell.", False),
        ("3", r"<think>It is \boxed{3}", False),
        ("5", "\\boxed{5}\n\nQuestion: what is 3 + 4?\nAnswer: \\boxed{7}", True),
    ],
)
def test_the_last_answer_counts(gold: str, completion: str, right: bool, extract: str) -> None:
    if extract == "boxed" and "Question:" in completion:
        return
    agrees(gold, completion, right, extract)


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        ("5", "<answer>5</answer>", True),
        ("5", "<answer> 5 </answer>", True),
        ("5", "(5)", True),
        ("5", '"5"', True),
        ("5", "US$5", True),
        ("5", r"\boxed{\$5}", True),
        ("5", "5 dollars", True),
        ("1000", r"\boxed{1\,000}", True),
        ("1000", r"\boxed{1 000}", True),
        ("1000", r"\boxed{1{,}000}", True),
        ("1000", "1,000", True),
        ("1000", "1 000", True),
        ("0", r"\boxed{1\,000}", False),
        ("1000000", r"\boxed{1\,000\,000}", True),
        ("300000000", r"\boxed{3e8}", True),
        ("3e8", r"\boxed{3 \times 10^8}", True),
        ("3e", r"\boxed{3e}", True),
        ("3", r"\boxed{2=3}", False),
        ("3", r"\boxed{x=3}", True),
        ("3", r"\boxed{1+2=3}", True),
        ("3", r"\boxed{x=6/2=3}", True),
        ("3", r"\boxed{x=7/2=3}", False),
        ("6", r"\boxed{2x=6}", False),
        ("27", r"\boxed{m+n=27}", True),
        ("5", r"\boxed{f(2)=5}", True),
        ("x=3", r"\boxed{3}", True),
        ("2x+y=6", r"\boxed{y=6-2x}", True),
        ("2x+1", r"\boxed{y=2x+1}", True),
        ("12", r"\boxed{12\%}", False),
        ("12", r"\boxed{1200\%}", False),
        (r"12\%", r"\boxed{12}", False),
        (r"12\%", r"\boxed{1200\%}", False),
        ("0.12", r"\boxed{12\%}", True),
        ("12%", r"\boxed{0.12}", True),
        ("12 percent", r"\boxed{\frac{3}{25}}", True),
        ("1200%", r"\boxed{1200\%}", True),
        ("1", r"\boxed{100\%}", True),
        ("5", r"\boxed{5\text{ cm}}", True),
        ("5 cm", r"\boxed{5}", True),
        ("5 cm", r"\boxed{50\text{ mm}}", True),
        ("5 cm", r"\boxed{5\text{ m}}", False),
        ("5 cm", r"\boxed{5\text{ cm}^2}", False),
        ("25", r"\boxed{25\text{ square units}}", True),
        ("25 cm^2", r"\boxed{25\text{ square units}}", True),
        ("25 cm^2", r"\boxed{25\text{ square centimeters}}", True),
        ("25 cm^2", r"\boxed{25\text{ cm}}", False),
        ("3 apples", r"\boxed{3\text{ red apples}}", True),
        ("4 July", r"\boxed{4\text{ August}}", False),
        ("1:2", r"\boxed{\frac{1}{2}}", True),
        ("1:2", r"\boxed{2}", False),
        ("90", r"\boxed{90^\circ}", True),
        ("0.5", "50 cents", False),
        ("$0.50", "50 cents", True),
        ("5m", r"\boxed{5}", False),
        ("2t", r"\boxed{2}", False),
        ("7/2", r"\boxed{3\frac{1}{2}}", True),
        ("7/2", r"\boxed{3 1/2}", True),
        ("3/2", r"\boxed{3\frac{1}{2}}", False),
        (r"\frac{1}{2}", r"\boxed{\dfrac12}", True),
        (r"\frac{1}{3}", r"\boxed{0.\overline{3}}", True),
        ("(1,2)", r"\boxed{[1,2]}", False),
        ("(1,2)", r"\boxed{(2,1)}", False),
        ("(1,2)", r"\boxed{\left(1,\,2\right)}", True),
        ("(1,2)", r"\boxed{x\in(1,2)}", True),
        ("(1,2)", r"\boxed{1<x<2}", True),
        ("[0,1)", r"\boxed{[0,1]}", False),
        ("x=1, y=2", r"\boxed{x=2, y=1}", False),
        ("x=1, y=2", r"\boxed{y=2, x=1}", True),
        ("2:3", r"\boxed{3:2}", False),
        ("101_2", r"\boxed{101_3}", False),
        ("101_2", r"\boxed{101_{2}}", True),
        (r"2\pm\sqrt{3}", r"\boxed{2-\sqrt3, 2+\sqrt3}", True),
        (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", True),
        (r"\sin x", r"\boxed{\cos(\frac{\pi}{2}-x)}", True),
        (r"\ln(x^2)", r"\boxed{2\ln x}", True),
        ("|x|", r"\boxed{x}", False),
        ("x>5", r"\boxed{5<x}", True),
        ("x>5", r"\boxed{x\ge5}", False),
        ("1+i", r"\boxed{i+1}", True),
        ("2i", r"\boxed{(1+i)^2}", True),
        (r"\frac12", r"\boxed{\sin 30^\circ}", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}", False),
    ],
)
def test_notation(gold: str, completion: str, right: bool) -> None:
    agrees(gold, completion, right)


def test_same_is_symmetric() -> None:
    judge = MathJudge()
    texts = [
        *(
            "5",
            "5 cm",
            "50 mm",
            "1/2",
            "12%",
            "1200%",
            "12",
            r"\pi",
            "3.14159",
            "x+1",
            "1+x",
            "yes",
            "on",
            "no",
        ),
        *(
            "(1,2)",
            "[1,2]",
            r"\{1,2\}",
            "1, 2",
            "2, 1",
            "x=1, y=2",
            "x>5",
            "5<x",
            "2x=6",
            "6",
            "1<x<2",
            "2:3",
        ),
        *(r"\emptyset", r"\infty", "e", "2.718282", "", "()", "y=2x+1", "2x+1", r"(0,1)\cup(2,3)"),
    ]
    for first in texts:
        for second in texts:
            assert judge.same(first, second) == judge.same(second, first), (first, second)
