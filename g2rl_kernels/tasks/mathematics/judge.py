"""The judge of mathematics, numbers and words: what a completion answers, and which answers are equal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from . import arithmetic, extract, notation, units

MAX_ANSWER = 2000  # characters of an answer; a longer text is no answer
MAX_ITEMS = 100  # of a list or set


class Form(NamedTuple):
    """What an answer is, by `kind`: number (Fraction), words (str), list (of Form), symbolic (LaTeX)."""

    kind: str
    value: Any
    text: str  # the answer in one notation
    unit: str = ""
    brackets: str = ""  # of a list: () [] {} [) (] or : for a ratio; "" without
    name: str = ""  # x of x = 5


@lru_cache(maxsize=2048)
def read(text: str) -> Form:
    """The form of an answer's text. One that is too large to evaluate is symbolic, equal to its text only."""
    if len(text) > MAX_ANSWER:
        return Form("symbolic", text, text)
    return _read(notation.clean(text))


def _read(text: str, depth: int = 0) -> Form:
    if depth > 8:
        return Form("symbolic", text, text)
    number = _number(notation.without_thousands(text))
    if number:
        return number
    based = re.fullmatch(r"([0-9a-fA-F]+)\s*_\s*\{?\s*(\d+)\s*\}?", text)
    if based and re.search(r"\d", based[1]):  # a number in another base is its text
        return Form("words", f"{based[1]}_{based[2]}".lower(), f"{based[1]}_{based[2]}")
    words = notation.words_of(text)
    parts = notation.items_of(text)
    if words and (len(parts) < 2 or not all(map(notation.words_of, parts))):
        named = units.number_word(words)
        return Form("words", words, words) if named is None else Form("number", named, str(named))
    if 1 < len(parts) <= MAX_ITEMS and not _binds(text):
        return _listed("", parts, depth)
    inner = text[1:-1] if text[:1] in "([" and text[-1:] in ")]" else None
    brackets = text[:1] + text[-1:]
    if text.startswith("\\{") and text.endswith("\\}"):
        inner, brackets = text[2:-2], "{}"
    if inner is not None and notation.split_top(inner, r"(?!)"):
        parts = notation.items_of(inner)
        if 1 < len(parts) <= MAX_ITEMS:
            return _listed(brackets, parts, depth)
        if len(parts) == 1 and (brackets in ("()", "{}", "[]")):
            return _read(notation.strip(inner), depth + 1)
    sides = [
        side.strip() for side in notation.split_top(text, r"(?<![<>!:\\])=(?!=)|\\approx(?![a-zA-Z])|:=")
    ]
    if len(sides) > 1:
        return _equation(sides, text, depth)
    belongs = re.match(r"\s*([^\\{}\[\]()]{1,20}|\\[a-z]+)\s*\\in(?![a-zA-Z])\s*", text)
    if belongs and notation.is_name(belongs[1]):
        return _read(text[belongs.end() :].strip(), depth + 1)._replace(name=belongs[1].strip())
    ratio = re.fullmatch(r"([\d.]+(?:\s*:\s*[\d.]+)+)\s*([ap]\.?m\.?)?", text, re.IGNORECASE)
    if ratio:
        listed = _listed(":", re.split(r"\s*:\s*", ratio[1]), depth)
        label = (ratio[2] or "").lower().replace(".", "")
        return listed._replace(unit=label, text=f"{listed.text} {label}".strip())
    plus_minus = re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text)
    if plus_minus and notation.split_top(text, r"(?!)"):
        signs = (("+", "-"), ("-", "+"))
        both = [re.sub(r"\\pm(?![a-zA-Z])", a, re.sub(r"\\mp(?![a-zA-Z])", b, text)) for a, b in signs]
        return _listed("", [side.strip().lstrip("+") for side in both], depth)
    return _symbolic(text)


def _symbolic(text: str) -> Form:
    quantity, unit, multiple = units.split_label(text)
    if "\\circ" in text and re.search(r"sin|cos|tan|cot|sec|csc", text):
        unit = ""
    if unit and multiple == 1 and quantity and re.search(r"[\d)}]", quantity):
        value = _compact(quantity)
        return Form("symbolic", value, f"{value} \\text{{{unit}}}", unit=unit)
    return Form("symbolic", _compact(text), _compact(text))


def _compact(text: str) -> str:
    """Without spaces, but for those that end a LaTeX command or part words."""
    return re.sub(r"(?<![a-zA-Z])\s+|\s+(?![a-zA-Z])", "", text)


def _binds(text: str) -> bool:
    """Whether commas belong to an environment, such as a matrix."""
    return "\\begin" in text


def _number(text: str) -> Form | None:
    """The form of a number, with or without a unit; None for anything else, or a value too large to hold."""
    if not re.search(r"\d", text):
        return None
    quantity, unit, multiple = units.split_label(text)
    for part, label, factor in ((quantity, unit, multiple), (text, "", Fraction(1))):
        percent = label.lower() in ("percent", "percentage", "percentages")
        try:
            value = arithmetic.value(part) * factor * (Fraction(1, 100) if percent else 1)
            label = "" if percent else label
            if (percent or "%" in part) and value.denominator == 1 and abs(value) > 1:
                return Form("number", value, f"{_written(value * 100, text)}%".replace("%%", "%"), "%")
            return Form(
                "number", value, _written(value, text) + (f" \\text{{{label}}}" if label else ""), label
            )
        except arithmetic.TooLarge:
            return Form("symbolic", text, text)
        except arithmetic.NotPlain:
            continue
    return None


def _written(value: Fraction, text: str) -> str:
    try:
        return arithmetic.written(value)
    except arithmetic.TooLarge:
        return text


def _listed(brackets: str, parts: Sequence[str], depth: int) -> Form:
    read_parts = [_read(notation.strip(part), depth + 1) for part in parts]
    if brackets in ("", "{}"):  # 2 \pm 1 in a list is two of its items
        forms = tuple(
            item
            for form in read_parts
            for item in (form.value if form.kind == "list" and not form.brackets else [form])
        )
    else:
        forms = tuple(read_parts)
    left, right = (
        ("\\{", "\\}") if brackets == "{}" else ("", "") if brackets in ("", ":") else tuple(brackets)
    )
    texts = [form.text for form in forms]
    if _assigns(forms):
        texts = [form.text if "=" in form.text else f"{_compact(form.name)}={form.text}" for form in forms]
    elif brackets in ("", "{}") and all(form.kind == "number" for form in forms):
        texts = [form.text for form in sorted(forms, key=lambda form: form.value)]
    return Form(
        "list", forms, left + (":" if brackets == ":" else ", ").join(texts) + right, brackets=brackets
    )


def _assigns(forms: Sequence[Form]) -> bool:
    """Whether a list gives values to several names, as x = 1, y = 2 does; x = 1, x = 2 are values of one."""
    names = [form.name for form in forms]
    return all(names) and len(set(names)) == len(names)


def _equation(sides: list[str], text: str, depth: int) -> Form:
    """x = 5 is 5, named x, and so is x = 10/2 = 5; 2 + 3 = 5 is 5; 2 = 3 and 2x = 6 are no numbers."""
    last = _read(sides[-1], depth + 1)
    if last.kind == "symbolic" and last.value == "":
        return Form("symbolic", text, text)
    name = sides[0] if notation.is_name(sides[0]) else ""
    named = bool(name) or not sides[0]
    for side in sides[named:-1]:
        form = _read(side, depth + 1)
        if form.kind == "number" and last.kind == "number":
            if not arithmetic.close(form.value, last.value):
                return Form("symbolic", _compact(text), _compact(text))
            continue
        from . import symbolic

        true = symbolic.holds(side, sides[-1])
        if true is False or (true is None and not named and not equal(form, last)):
            return Form("symbolic", _compact(text), _compact(text))
    name = name or last.name
    text = f"{_compact(name)}={last.value}" if last.kind == "symbolic" and name else last.text
    return last._replace(name=name, text=text)


_SETS = re.compile(
    r"[<>]|\\(?:l|g)[et](?![a-zA-Z])|\\(?:cup|cap|setminus|backslash|mathbb|emptyset)(?![a-zA-Z])"
)


def equal(first: Form, second: Form) -> bool:
    """Whether two forms are the same answer; symmetric."""
    if first.text == second.text and first.unit == second.unit:
        return True
    if "%" in (first.unit, second.unit) and first.unit != second.unit:
        return False
    if first.unit and second.unit:
        (dimension, factor), (other, other_factor) = map(units.unit_of, (first.unit, second.unit))
        if dimension != other and not units.same_noun(first.unit, second.unit):
            return False
        if factor != other_factor:
            both = first.kind == second.kind == "number"
            return both and arithmetic.close(first.value * factor, second.value * other_factor)
    kinds = {first.kind, second.kind}
    if kinds == {"number"}:
        return arithmetic.close(first.value, second.value)
    if kinds == {"words"}:
        return bool(first.value == second.value)
    if kinds == {"list"}:
        return _equal_lists(first, second)
    if "list" in kinds:  # an interval may be written as an inequality, a set with signs
        single, listed = (first, second) if second.kind == "list" else (second, first)
        if single.kind == "number" and _is_ratio(listed):
            return arithmetic.close(listed.value[0].value, listed.value[1].value * single.value)
        if single.kind != "symbolic" or not _SETS.search(single.value):
            return False
    if "words" in kinds:
        words, other_form = (first, second) if first.kind == "words" else (second, first)
        return bool(words.value == re.sub(r"[\\{}$]", "", other_form.text).casefold())
    from . import symbolic

    if kinds == {"number", "symbolic"}:
        number, expression = (first, second) if first.kind == "number" else (second, first)
        if not re.search(r"[a-zA-Z]|\\", expression.value):
            return False
        value = symbolic.approximation(expression.value)
        return value is not None and arithmetic.close(number.value, value, written=False)
    if "=" in first.text and "=" in second.text and kinds == {"symbolic"}:
        return symbolic.same(first.value, second.value) or symbolic.same(first.text, second.text)
    return symbolic.same(
        *(str(form.value) if form.kind == "symbolic" else form.text for form in (first, second))
    )


def _equal_lists(first: Form, second: Form) -> bool:
    """Bare lists match in any order, unless of words; braces too; other brackets in order.

    A bare list is equal to a set, and in its order to a tuple; (1, 2), [1, 2] and \\{1, 2\\} differ.
    """
    ones, twos, kinds = list(first.value), list(second.value), {first.brackets, second.brackets}
    assigned = _assigns(ones), _assigns(twos)
    if any(assigned):
        if all(assigned):
            ones, twos = (sorted(forms, key=lambda form: _compact(form.name)) for forms in (ones, twos))
            if [_compact(form.name) for form in ones] != [_compact(form.name) for form in twos]:
                return False
        return len(ones) == len(twos) and all(map(equal, ones, twos))
    if kinds <= {"", "{}"}:
        ones, twos = _distinct(ones), _distinct(twos)
    if len(ones) != len(twos):
        return False
    if _is_ratio(first) and _is_ratio(second):
        return arithmetic.close(ones[0].value * twos[1].value, ones[1].value * twos[0].value)
    if len(kinds) > 1 and not (
        kinds <= {"", "{}"} or kinds == {"", "()"} or (kinds == {"", "[]"} and len(ones) > 2)
    ):
        return False
    if all(map(equal, ones, twos)):
        return True
    if not kinds <= {"", "{}"} or (kinds == {""} and all(form.kind == "words" for form in ones)):
        return False
    for one in ones:
        place = next((i for i, two in enumerate(twos) if equal(one, two)), None)
        if place is None:
            return False
        del twos[place]
    return True


def _is_ratio(form: Form) -> bool:
    """Whether a list is the ratio of two numbers, 1:2, which has their quotient's value."""
    return form.brackets == ":" and len(form.value) == 2 and all(item.kind == "number" for item in form.value)


def _distinct(forms: list[Form]) -> list[Form]:
    kept: list[Form] = []
    for form in forms:
        if not any(form.text == other.text for other in kept):
            kept.append(form)
    return kept


def known_text(known: Any) -> str:
    """A known answer as text: a worked solution's final answer, a JSON number in full, true or false.

    A float is read to 15 significant digits, so that 0.1 + 0.2 is 0.3.

    Raises TypeError for what is no text, number or boolean.
    """
    if isinstance(known, bool):
        return str(known).lower()
    if isinstance(known, float):
        short = format(known, ".15g")
        return repr(known) if known.is_integer() and float(short) != known else short
    if isinstance(known, int):
        return str(known)
    if not isinstance(known, str):
        raise TypeError(f"known answer: got a {type(known).__name__}, needs a text or a number")
    return _known_text(known)


@lru_cache(maxsize=2048)
def _known_text(known: str) -> str:
    stated = extract.marked(known, words=None)
    if stated is not None:
        return stated
    if len(re.findall(r"(?<![\\{a-zA-Z])[a-zA-Z]{2,}", known)) > 8 or "\n" in known.strip():
        return extract.final(known, words=False) or known
    return known


@lru_cache(maxsize=4096)
def _same(first: str, second: str) -> bool:
    return equal(read(first), read(second))


@dataclass(frozen=True)
class MathJudge:
    """Finds final answers in completions and compares them.

    extract: where the answer stands, a key of `extract.FINDERS`.

    Two answers are equal if they are
    - numbers of the same value in any notation (`arithmetic.close` has the rule for decimals). A percentage
      is a hundredth of its number, but no whole number above 1: 12 is not 1200 %. A unit counts where both
      have one;
    - the same words, without case, articles and end marks (`notation.words_of` says what words are);
    - lists of equal items: in any order without brackets or in braces, in order in others and for words;
    - expressions of the same value at several values of their variables; for equations, inequalities and
      sets, what math-verify takes for the same.

    An equation stands for its right side if its left side is a name or has the same value. An answer too
    large to evaluate (`symbolic.small`, `arithmetic.MAX_BITS`) is equal to its own text only.
    """

    extract: str = "all"

    def score(self, completion: str, known: Any) -> float:
        """1 if the completion's answer is the known one, else 0. Raises TypeError for another `known`."""
        if known is None:
            return 0.0
        gold = known_text(known)
        found = self.answer(completion, known)
        if found is None:
            return float(not gold.strip() and not completion.strip())
        return float(self.same(found, gold))

    def answer(self, completion: str, known: Any = None) -> str | None:
        """The final answer in a short form: the same text for equal numbers, words, and lists of them."""
        words: bool | None = None
        if known is not None:
            gold = known_text(known)
            words = read(gold).kind == "words" or not gold.strip()
        found = extract.FINDERS[self.extract](completion, words)
        if found is None or len(found) > MAX_ANSWER:
            return None
        return read(found).text or None

    def same(self, first: str, second: str) -> bool:
        """Whether two answers are equal; symmetric."""
        return first == second or _same(*sorted((first, second)))
