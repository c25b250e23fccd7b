"""Marked answers are read as a whole: expressions, units, equations, roundings, lists, hedges."""

from __future__ import annotations

import pytest

from g2rl_kernels.tasks.mathematics import MathJudge
from g2rl_kernels.tasks.mathematics.judge import known_text, read

pytest.importorskip("math_verify", reason="needs math-verify: pip install 'g2rl-kernels[train]'")

JUDGE = MathJudge()


def agrees(gold: str, completion: str, right: bool) -> None:
    """The verdict, and the vote: `same` says of the answer what `score` says, in both orders."""
    assert JUDGE.score(completion, gold) == float(right)
    answer = JUDGE.answer(completion, gold)
    if answer is not None:
        known = known_text(gold)
        assert JUDGE.same(answer, known) == JUDGE.same(known, answer) == right
        assert read(answer).text == answer


WAYS = ["The answer is {}.", "Answer: {}", "**Answer:** {}", "#### {}", "**{}**", "<answer>{}</answer>", "{}"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("text", "gold", "wrong"),
    [
        ("x² + 2x + 1", "x^2+2x+1", ["1", "x^2", "2x+1"]),
        ("x^2/2 + C", r"\frac{x^2}{2}+C", ["2", "x^2"]),
        ("x³ − 1", "x^3-1", ["1", "x^3"]),
        ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}", ["2", "1", r"\sqrt{2}"]),
        ("2*sqrt(3)", r"2\sqrt{3}", ["2", "3"]),
        ("(sqrt(5) - 1)/2", r"\frac{\sqrt5-1}{2}", ["2", "1", "5"]),
        ("pi/2", r"\frac{\pi}{2}", ["2", r"\pi"]),
        ("ln 2", r"\ln 2", ["2"]),
        ("log(2)", r"\log 2", ["2"]),
        ("cos x", r"\cos x", ["x"]),
        ("|x|", "|x|", ["x"]),
        ("x + y", "x+y", ["x", "y"]),
        ("n!", "n!", ["n"]),
        ("2¹⁰", "1024", ["2", "10", "210"]),
        ("2^n", "2^n", ["2", "n"]),
        ("x ≤ 3", r"x \le 3", ["3", "x<3"]),
        ("x >= 3", r"x \ge 3", ["3", "x>3"]),
        ("x ≠ 2", r"x \ne 2", ["2"]),
        ("9π", r"9\pi", ["9"]),
        ("9π cm²", r"9\pi", ["9", "9 cm"]),
        ("5√2 cm", r"5\sqrt{2}", ["5", "2"]),
        ("60 km/h", "60 km/h", ["60 km", "60 h", "60 m/s"]),
        ("60 km per hour", "60 km/h", ["60 km", "60 h"]),
        ("90 km/h", "25 m/s", ["25 m", "90 km"]),
        ("9.8 m/s²", "9.8 m/s^2", ["9.8 m", "9.8 m/s"]),
        ("15 cm²", "15 cm^2", ["15 cm", "15 m^2", "15 kg"]),
        ("15 square cm", "15 cm^2", ["15 cm"]),
        ("1 g/cm³", "1000 kg/m^3", ["1 g", "1000 kg"]),
        ("1,000 + 234 = 1,234", "1234", ["1", "234", "1000"]),
        ("4,500,000 = 4.5 × 10⁶", r"4.5 \times 10^6", ["4", "500", "6"]),
        ("¾", "3/4", ["3", "4"]),
        ("5⅓", "16/3", ["5", "1/3"]),
        ("y = −½x + 4", "y = -x/2+4", ["4", "1/2"]),
        ("2√3 ≈ 3.46", r"2\sqrt{3}", ["2", "3", "3.4"]),
        ("10/3 ≈ 3.33", r"\frac{10}{3}", ["3", "3.3", "10"]),
        ("3 out of 4", "3/4", ["3", "4"]),
    ],
)
def test_a_marked_answer_is_read_as_a_whole(way: str, text: str, gold: str, wrong: list[str]) -> None:
    agrees(gold, way.format(text), True)
    for other in wrong:
        agrees(other, way.format(text), False)


@pytest.mark.parametrize("way", ["The answer is {}.", "Answer: {}", "{}"])
@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("negative 7", "-7"),
        ("minus 7", "-7"),
        ("negative seven", "-7"),
        ("twenty-one", "21"),
        ("one third", r"\frac13"),
        ("three quarters", "0.75"),
    ],
)
def test_numbers_in_words(way: str, text: str, gold: str) -> None:
    agrees(gold, way.format(text), True)
    agrees(gold.lstrip("-") if gold.startswith("-") else f"-{gold}", way.format(text), False)
    agrees("3", way.format(text), False)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        (r"60\text{ km per hour}", "60 km/h", True),
        (r"60\text{ km/hr}", "60 km/h", True),
        (r"60\,\frac{\text{km}}{\text{h}}", "60 km/h", True),
        (r"60\text{ km}\cdot\text{h}^{-1}", "60 km/h", True),
        (r"60\frac{\text{km}}{\text{h}}", "60 km", False),
        (r"60\frac{\text{km}}{\text{h}}", "60 m/s", False),
        ("15 cm²", "15 cm^2", True),
        (r"15\text{ cm}^{2}", "15 cm^2", True),
        ("15 cm²", "15 cm", False),
        ("9π cm²", r"9\pi", True),
        ("9π cm²", "9", False),
        (r"3000\text{ cm}^3", "3 L", True),
        (r"60\text{ mph}", "60 miles per hour", True),
        ("5m", "5", False),
        (r"3:30\text{ PM}", "3:30 PM", True),
        (r"3:30\text{ PM}", "3:30 AM", False),
        (r"9\pi \approx 28.27", r"9\pi", True),
        (r"9\pi \approx 28.27", "28.27", True),
        (r"A = 9\pi \approx 28.27", r"9\pi", True),
        (r"9\pi \approx 28.27", "28.3", False),
        (r"9\pi \approx 28.27", "9", False),
        (r"9\pi \approx 100", r"9\pi", False),
        (r"9\pi \approx 100", "100", False),
        (r"12 \approx 13", "12", False),
        (r"12 \approx 13", "13", False),
        (r"\sqrt{2} \approx 1.5", r"\sqrt{2}", False),
        (r"1000 + 234 = 1,234", "1234", True),
        (r"\$1,500 + \$2,000 = \$3,500", "3500", True),
        (r"5\text{ cm} \cdot 3\text{ cm} = 15\text{ cm}^2", "15", True),
        (r"5\text{ cm} \cdot 3\text{ cm} = 16\text{ cm}^2", "16", False),
        ("2=3", "3", False),
        ("2=3", "2", False),
        ("x = 12 = 13", "13", False),
        ("x_1 = 3, x_2 = 2", "2, 3", True),
        ("x₁ = 3, x₂ = 2", "2, 3", True),
        ("x_1 = 3, x_2 = 2", "x_1 = 2, x_2 = 3", False),
        ("x_1 = 3, x_2 = 4", "2, 3", False),
        ("x_1 = 3, x_2 = 2", "3", False),
        ("x = 3, y = 2", "2, 3", False),
        ("15,00", "15", True),
        ("1.234,5", "1234.5", True),
        ("3,75", "3.75", True),
        ("0,5", "0.5", True),
        ("0,5", "0, 5", True),
        ("3,75", "3, 75", True),
        ("3,75", "375", False),
        ("1,234", "1234", True),
        ("1,234", "1.234", False),
        ("(3,75)", "3.75", False),
        (r"\text{No, it is not}", "no", True),
        (r"\text{No, it is not}", "yes", False),
        (r"\text{yes, no, yes}", "yes", False),
        (r"\text{yes, no, yes}", "yes, no, yes", True),
        ("(2, 3", "3", False),
        ("12 +", "12", False),
    ],
)
def test_boxes(answer: str, gold: str, right: bool) -> None:
    agrees(gold, rf"\boxed{{{answer}}}", right)


@pytest.mark.parametrize(
    ("completion", "gold", "right"),
    [
        ("She pays $6.75 in total.", "$6.75", True),
        ("It is 3 in the end.", "3 m", True),
        ("It is 3 in.", "3 inches", True),
        ("It is 3 in.", "3 m", False),
        ("It is 5 in long.", "5 cm", False),
        ("The answer is 60 km/zorp.", "60 m", True),
        ("The answer is 5 a day.", "5", True),
        ("1,500 + 2,000 = **3,500**", "3500", True),
        ("Total: $1,500 + $2,000 = $3,500", "3500", True),
        ("Total: $1,500 + $2,000 = $3,500", "1", False),
        ("**Antwort: 15,00 $**", r"\$15", True),
        ("La respuesta es 3,75.", "3.75", True),
        ("Le résultat est 12,5.", "12.5", True),
        ("The answer is greater than 5.", "5", False),
        ("The answer is at least 5.", "5", False),
        ("It is at most 5.", "5", False),
        ("5 is wrong.", "5", False),
        ("5 is wrong. It is 6.", "6", True),
        ("The answer cannot be 7.", "7", False),
        ("No, because 9 is odd.", "9", False),
        ("Answer: No, 51 is not prime.", "no", True),
        ("Answer: No, 51 is not prime.", "51", False),
        ("Yes - since 4 divides 12.", "yes", True),
        ("12 is a square? (No, the root is 12.)", "12", True),
        ("(The answer is 12)", "12", True),
        (r"One is $\boxed{2}$ and the other is $\boxed{3}$.", "2, 3", True),
        (r"One is $\boxed{2}$ and the other is $\boxed{3}$.", "3", True),
        (r"One is $\boxed{2}$ and the other is $\boxed{3}$.", "2", False),
        ("\\boxed{2}\n\n\\boxed{3}", "2, 3", True),
        (r"I get \boxed{2}. Wait, it is \boxed{3}.", "2, 3", False),
        (r"First \boxed{2}, no, \boxed{3}.", "2, 3", False),
        ("17 + 26 = 43\n\nThe calculation of 17 + 26 was done column by column.", "43", True),
        ("17 + 26 is 43, which is the result of adding 26 to 17.", "43", True),
        ("17 + 26 is 43, which is the result of adding 26 to 17.", "17", False),
        ("Since 2*3 = 6, there are 10 ways.", "10", True),
        ("Since n = 5, there are 10 ways.", "5", False),
        ("The midpoint is (2, 3), as required.", "(2, 3)", True),
        ("So 1 - 0.3 = 0.7.\n\nTo find it, you subtract this value from 1. So, in this case we", "0.7", True),
        ("The capital of France is Paris, City of Lights.", "Paris", True),
        ("The primes are:\n\n1. 2\n2. 3\n3. 5", "2, 3, 5", True),
        ("The primes are:\n\n1. 2\n2. 3\n3. 5", "5", False),
        ("Answer:\n1. 2 + 3 = 5\n2. 5 * 2 = 10", "10", True),
        ("Answer:\n1. 2 + 3 = 5\n2. 5 * 2 = 10", "1", False),
        ("1. Add.\n2. Then\n3.", "3", False),
        ("8 - 3 =", "3", False),
        ("The answer must be a multiple of 3 below 20. The only even one is 18.", "18", True),
    ],
)
def test_sentences(completion: str, gold: str, right: bool) -> None:
    agrees(gold, completion, right)


def test_false_equations_are_votes_of_their_own() -> None:
    judge = MathJudge()
    votes = [judge.answer(text, "43") for text in ("17+26=43", "17+26=42", "17+26=38", r"\boxed{17+26=42}")]
    assert votes == ["43", "17+26=42", "17+26=38", "17+26=42"]
    assert not judge.same("17+26=42", "17+26=38")
    assert not judge.same("17+26=42", "42")
    assert judge.same("17+26=42", "17 + 26 = 42")


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("So the solutions are **x = 2** and **x = 3**.", r"\{2, 3\}", "3"),
        ("They are **1**, **2** and **5**.", "1, 2, 5", "5"),
        ("It is **3** or **4**.", "3, 4", "4"),
        ("See **Step 1** and **Step 2**. The result is **7**.", "7", "2"),
        ("The **first term** and the **last term** give **12**.", "12", "1"),
    ],
)
def test_values_in_bold_side_by_side_are_one_answer(text: str, right: str, wrong: str) -> None:
    assert MathJudge().score(text, right) == 1
    assert MathJudge().score(text, wrong) == 0
