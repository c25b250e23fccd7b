"""What an answer's text says: numbers, words, lists, equations. Imports no sympy but for expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from . import arithmetic, notation, units
from .forms import Form, assigns, compact, equal

MAX_ANSWER = 2000  # characters of an answer; a longer text is no answer
MAX_ITEMS = 100  # of a list or set


@lru_cache(maxsize=2048)
def read(text: str) -> Form:
    """The form of an answer's text. One that is too large to evaluate is symbolic, equal to its text only."""
    if len(text) > MAX_ANSWER:
        return Form("text", text, text)
    return _read(notation.clean(text))


def _read(text: str, depth: int = 0) -> Form:
    if depth > 8:
        return Form("text", text, text)
    if re.search(r"[=+*/^]|\\(?:approx|times|cdot|div)|\d\s*-\s*\d", text) and notation.only_thousands(text):
        text = notation.without_thousands(text)
    number = _number(notation.without_thousands(text))
    if number:
        return number
    based = re.fullmatch(r"([0-9a-fA-F]+)\s*_\s*\{?\s*(\d+)\s*\}?", text)
    if based and re.search(r"\d", based[1]):  # a number in another base is its text
        return Form("words", f"{based[1]}_{based[2]}".lower(), f"{based[1]}_{based[2]}")
    words = notation.words_of(text)
    decided = re.match(r"(yes|no)\s*[,.;:]", words or "")
    parts = notation.items_of(text)
    if words and decided and not all(notation.words_of(part) in ("yes", "no") for part in parts):
        return Form("words", decided[1], decided[1])
    if words and (len(parts) < 2 or not all(map(notation.words_of, parts))):
        named = units.number_word(words)
        named = -named if named is not None and text.startswith("-") else named
        return Form("words", words, words) if named is None else Form("number", named, str(named))
    if 1 < len(parts) <= MAX_ITEMS and not _binds(text):
        listed = _listed("", parts, depth)
        first = listed.value[0]
        if (
            re.search(r"\bor\b", text)
            and first.kind == "number"
            and all(equal(first, f) for f in listed.value)
        ):
            return first  # 3/5 or 0.6
        return listed
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
    around = notation.split_top(text, r"\\approx(?![a-zA-Z])")
    if len(around) > 1:
        return _rounded(around, text, depth)
    sides = [side.strip() for side in notation.split_top(text, r"(?<![<>!:\\])=(?!=)|:=")]
    if len(sides) > 1:
        return _equation(sides, text, depth)
    belongs = re.match(r"\s*([^\\{}\[\]()]{1,20}|\\[a-z]+)\s*\\in(?![a-zA-Z])\s*", text)
    if belongs and notation.is_name(belongs[1]):
        return _read(text[belongs.end() :].strip(), depth + 1)._replace(name=belongs[1].strip())
    ratio = re.fullmatch(
        rf"([\d.]+(?:\s*:\s*[\d.]+)+)\s*(?:{notation.TEXT}\{{\s*)?([ap]\.?m\.?)?\s*\}}?", text, re.IGNORECASE
    )
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
        value = compact(quantity)
        return Form("symbolic", value, f"{value} \\text{{{unit}}}", unit=unit)
    return Form("symbolic", compact(text), compact(text))


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
    if assigns(forms):
        texts = [form.text if "=" in form.text else f"{compact(form.name)}={form.text}" for form in forms]
    elif brackets in ("", "{}") and all(form.kind == "number" for form in forms):
        texts = [form.text for form in sorted(forms, key=lambda form: form.value)]
    return Form(
        "list", forms, left + (":" if brackets == ":" else ", ").join(texts) + right, brackets=brackets
    )


def _equation(sides: list[str], text: str, depth: int) -> Form:
    """x = 5 is 5, named x, and so is x = 10/2 = 5; 2 + 3 = 5 is 5; 2 = 3 is its text; 2x = 6 no number."""
    last = _read(sides[-1], depth + 1)
    if last.kind == "text" or (last.kind == "symbolic" and last.value == ""):
        return Form("text", compact(text), compact(text))
    name = sides[0] if notation.is_name(sides[0]) else ""
    named = bool(name) or not sides[0]
    for side in sides[named:-1]:
        form = _remainder(side) or _read(re.sub(r"\\?\$(?=\s*[\d.])", "", side), depth + 1)
        if form.kind == "symbolic":  # 5 cm * 3 cm
            bare = _read(units.without(side), depth + 1)
            form = bare if bare.kind == "number" else form
        if form.kind == "number" and last.kind == "number":
            if not arithmetic.close(form.value, last.value) and not equal(form, last):
                return Form("text", compact(text), compact(text))
            continue
        from . import symbolic

        true = symbolic.holds(side, sides[-1])
        if true is False:
            return Form("text", compact(text), compact(text))
        if true is None and not named and not equal(form, last):
            return Form("symbolic", compact(text), compact(text))
    name = name or last.name
    text = f"{compact(name)}={last.value}" if last.kind == "symbolic" and name else last.text
    return last._replace(name=name, text=text)


def _remainder(text: str) -> Form | None:
    """17 mod 5 as a number."""
    found = re.fullmatch(r"\s*(-?\d{1,300})\s*\\?b?mod(?![a-z])\s*(\d{1,300})\s*", text)
    if not found or not int(found[2]):
        return None
    value = int(found[1]) % int(found[2])
    return Form("number", Fraction(value), str(value))


def _rounded(sides: list[str], text: str, depth: int) -> Form:
    """9\\pi \\approx 28.27 is 9\\pi, for they are near; 12 \\approx 13 is its text."""
    exact, last = sides[0].strip().removesuffix("=").strip(), _read(notation.strip(sides[-1]), depth + 1)
    if not exact or (notation.is_name(exact) and "=" not in exact):
        return last._replace(name=exact or last.name)
    form = _read(exact, depth + 1)
    value = form.value if form.kind == "number" else None
    if form.kind == "symbolic":
        from . import symbolic

        value = symbolic.approximation(form.value)
    if value is None or last.kind != "number" or not arithmetic.near(value, last.value):
        return Form("text", compact(text), compact(text))
    return form._replace(rounded=last if last.value.denominator > 1 else None)
