"""The forms of answers, and which of them are equal. Imports no sympy but for symbolic answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import arithmetic, units


class Form(NamedTuple):
    """What an answer is, by `kind`: number (Fraction), words (str), list (of Form), symbolic (LaTeX).

    Kind text is what is not understood or contradicts itself, such as 2 = 3: equal to the same text only.
    """

    kind: str
    value: Any
    text: str  # the answer in one notation
    unit: str = ""
    brackets: str = ""  # of a list: () [] {} [) (] or : for a ratio; "" without
    name: str = ""  # x of x = 5
    rounded: Any = None  # the Form of 28.27 in 9\\pi \\approx 28.27


def compact(text: str) -> str:
    """Without spaces, but for those that end a LaTeX command or part words."""
    return re.sub(r"(?<![a-zA-Z])\s+|\s+(?![a-zA-Z])", "", text)


def assigns(forms: Sequence[Form]) -> bool:
    """Whether a list gives values to several names, as x = 1, y = 2 does; x = 1, x = 2 are values of one."""
    names = [form.name for form in forms]
    return all(names) and len(set(names)) == len(names)


_SETS = re.compile(
    r"[<>]|\\(?:l|g)[et](?![a-zA-Z])|\\(?:cup|cap|setminus|backslash|mathbb|emptyset)(?![a-zA-Z])"
)


def equal(first: Form, second: Form) -> bool:
    """Whether two forms are the same answer; symmetric."""
    if first.text == second.text and first.unit == second.unit:
        return True
    if "text" in (first.kind, second.kind):
        return False
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
    assigned = assigns(ones), assigns(twos)
    if all(assigned):
        ones, twos = (sorted(forms, key=lambda form: compact(form.name)) for forms in (ones, twos))
        named = [[compact(form.name) for form in forms] for forms in (ones, twos)]
        return named[0] == named[1] and all(map(equal, ones, twos))
    if any(assigned) and not _indexed(ones if assigned[0] else twos):
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


def _indexed(forms: Sequence[Form]) -> bool:
    """Whether all names are one letter with indices, x_1 and x_2: values of one unknown, in no order."""
    letters = {re.sub(r"_\s*(?:\{[^{}]*\}|\w)$", "", form.name.strip()) for form in forms}
    return len(letters) == 1 and all("_" in form.name for form in forms)


def _is_ratio(form: Form) -> bool:
    """Whether a list is the ratio of two numbers, 1:2, which has their quotient's value."""
    return form.brackets == ":" and len(form.value) == 2 and all(item.kind == "number" for item in form.value)


def _distinct(forms: list[Form]) -> list[Form]:
    kept: list[Form] = []
    for form in forms:
        if not any(form.text == other.text for other in kept):
            kept.append(form)
    return kept
