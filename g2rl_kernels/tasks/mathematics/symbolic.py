"""Equality of symbolic answers by math-verify, for text that a guard has found small enough to evaluate."""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from . import arithmetic

MAX_LENGTH = 600  # characters of a symbolic answer
MAX_NUMBER = 300  # digits of one number in it
MAX_EXPONENT = 1000  # also of factorials, binomials and bounds of sums
MAX_SOLVED = 12  # powers in equations and inequalities
MAX_TOWER = 2  # powers above each other
DIGITS = 40  # of an irrational number's approximation


def small(text: str) -> bool:
    """Whether a text can be handed to sympy: bounds on its length, nesting, numbers and powers."""
    if len(text) > MAX_LENGTH or re.search(rf"\d{{{MAX_NUMBER}}}", text) or not _balanced(text):
        return False
    if re.search(r"\\int(?![a-zA-Z])(?!\s*(?:\\limits)?\s*_)", text):  # not definite
        return False
    if len(re.findall(r"\\(?:int|sum|prod|lim|exp)(?![a-zA-Z])", text)) > 2:
        return False
    counted = re.sub(r"\((?:(?!\d{3})[-+a-z\d\s])+\)\s*!", "x", text)  # (n-1)!
    for factorial in re.finditer(r"(\d*)\s*([)}\]!]?)\s*!(?!=)", counted):
        if factorial[2] or int(factorial[1] or 0) > MAX_EXPONENT:
            return False
    if re.search(r"\\Gamma\s*[({]*\s*\d{4}", text):
        return False
    for number in re.findall(r"\\binom\s*\{(.*?)\}", text):
        if len(re.sub(r"\D", "", number)) > 3:
            return False
    return all(_exponent(group, 1) for group in _raised(text))


def _balanced(text: str) -> bool:
    depth = deepest = 0
    for letter in re.sub(r"\\[{}]", "", text):
        depth += (letter in "{(") - (letter in "})")
        deepest = max(deepest, depth)
        if letter == "}" and depth < -5:
            return False
    return deepest <= arithmetic.MAX_DEPTH and text.replace("\\{", "").count("{") == text.replace(
        "\\}", ""
    ).count("}")


def _raised(text: str) -> list[str]:
    """What follows each ^ of a text, outside the groups that follow another ^."""
    groups, place = [], text.find("^")
    while place >= 0:
        start = end = place + 1
        while end < len(text) and text[end] in " -+":
            end += 1
        if end < len(text) and text[end] in "{(":
            depth = 0
            while end < len(text):
                depth += (text[end] in "{(") - (text[end] in "})")
                end += 1
                if depth == 0:
                    break
        else:
            run = re.match(r"\\[a-zA-Z]+|[\d.]+|.|$", text[end:])
            end += len(run[0]) if run else 0
        if re.match(r"\s*(?:\^|\*\*)", text[end:]):  # a^b^c without braces
            end = len(text)
        groups.append(text[start:end].strip())
        place = text.find("^", end)
    return groups


def _exponent(group: str, height: int) -> bool:
    if height > MAX_TOWER:
        return False
    try:
        return abs(arithmetic.value(group)) <= MAX_EXPONENT
    except arithmetic.TooLarge:
        return False
    except arithmetic.NotPlain:
        numbers = re.findall(r"\d+", group)
        return all(len(n) < 5 for n in numbers) and all(_exponent(g, height + 1) for g in _raised(group))


@lru_cache(maxsize=1)
def _config() -> Any:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    for name in ("math_verify.parser", "math_verify.grader"):  # they warn that limits are left to the caller
        logging.getLogger(name).setLevel(logging.ERROR)
    normal = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="last", equations=False
    )
    return [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal)]


@lru_cache(maxsize=1024)
def parse(text: str) -> Any:
    """The sympy object of a LaTeX text; None if it is not small or not understood."""
    if not small(text):
        return None
    from math_verify import parse as read

    text = re.sub(
        r"(?<![a-zA-Z\\])(sin|cos|tan|cot|sec|csc|log|ln|arcsin|arccos|arctan)(?![a-zA-Z])", r"\\\1", text
    )
    text = re.sub(r"\^\s*\\circ", r" \\cdot \\frac{\\pi}{180} ", text)
    found = read(
        f"\\boxed{{{text}}}",
        extraction_config=_config(),
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    if not found or isinstance(found[0], str):
        return None
    return _complex(_exact(found[0]), text) if _finite_products(found[0]) else None


def _finite_products(expression: Any) -> bool:
    """Whether products have whole numbers, or variables, as bounds: sympy takes minutes for others."""
    import sympy

    products = getattr(expression, "atoms", lambda *_: ())(sympy.Product)
    bounds = [bound for product in products for _, *bounds in product.limits for bound in bounds]
    return all(bound.is_Integer or bound.free_symbols for bound in bounds)


def _exact(expression: Any) -> Any:
    """Without decimals: each is the fraction that it writes."""
    import sympy

    decimals = getattr(expression, "atoms", lambda *_: ())(sympy.Float)
    return expression.xreplace({d: sympy.Rational(str(d)) for d in decimals}) if decimals else expression


def _complex(expression: Any, text: str) -> Any:
    """With the letter i as the imaginary unit, unless it counts terms."""
    import sympy

    letters = {name for name in getattr(expression, "free_symbols", ()) if str(name) == "i"}
    if (
        not letters
        or not isinstance(expression, (sympy.Expr, sympy.MatrixBase))
        or re.search(r"\\(?:sum|prod|hat|vec)|_\{?i", text)
    ):
        return expression
    return expression.subs(dict.fromkeys(letters, sympy.I))


def same(first: str, second: str) -> bool:
    """Whether two LaTeX texts are equal: as numbers, as functions of their variables, else by math-verify."""
    if first == second:
        return True
    one, two = parse(first), parse(second)
    if one is None or two is None:
        return False
    import sympy

    if isinstance(one, sympy.Expr) and isinstance(two, sympy.Expr):
        equal = _same_expressions(one, two)
        if equal is not None or one.has(sympy.Product) or two.has(sympy.Product):
            return bool(equal)  # math-verify takes minutes for products
    expressions = [isinstance(x, (sympy.Expr, sympy.MatrixBase)) for x in (one, two)]
    if any(expressions) and not all(expressions) and any("=" in text for text in (first, second)):
        return False  # math-verify would take 2x = 6 for 6
    if isinstance(one, sympy.MatrixBase) and isinstance(two, sympy.MatrixBase):
        return one.shape == two.shape and all(map(_same_entries, one, two))
    if any(int(power) > MAX_SOLVED for power in re.findall(r"\^\s*\{?\s*(\d{1,9})", first + second)):
        return False  # math-verify solves equations and inequalities
    from math_verify import verify

    return any(verify([a], [b], strict=True, timeout_seconds=None) for a, b in ((one, two), (two, one)))


def _same_entries(one: Any, two: Any) -> bool:
    return bool(one == two or _same_expressions(_exact(one), _exact(two)))


_COMPARES = re.compile(r"[<>]|\\(?:approx|equiv|sim|simeq|cong|neq?)(?![a-zA-Z])")


def approximation(text: str) -> Fraction | None:
    """The value of a real constant such as \\pi to DIGITS digits; None for anything else."""
    import sympy

    expression = None if _COMPARES.search(text) else parse(text)
    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    return _real(_evaluated(expression, {}))


def _real(value: Any) -> Fraction | None:
    if value is None or not value.is_finite:
        return None
    import sympy

    real, imaginary = value.as_real_imag()
    if abs(imaginary) > abs(real) * sympy.Float(10) ** -30:
        return None
    value = real
    if value.is_Float and abs(value._mpf_[2]) > arithmetic.MAX_BITS:
        return None  # the fraction would be long
    if value.is_Rational:
        return Fraction(int(value.p), int(value.q))
    return Fraction(str(sympy.Float(value, DIGITS)))


def _evaluated(expression: Any, point: dict[Any, Any]) -> Any:
    """The expression's value at a point, as a sympy number, perhaps infinite; None without one."""
    import sympy
    from sympy.core.evalf import PrecisionExhausted

    value = expression.subs(point) if point else expression
    if value.has(sympy.Limit, sympy.Derivative):
        value = value.doit()
    if not _finite_products(value):
        return None
    try:
        value = value.evalf(DIGITS)
    except PrecisionExhausted:
        return None
    if value.is_infinite or value.is_Float or value.is_Rational:
        return value
    parts = value.as_real_imag()
    return value if all(part.is_Float or part.is_Rational for part in parts) else None


# Values of variables: positive ones first, then of both signs, where only real values count
_POINTS = ([("17/13", "29/23", "31/37"), ("43/19", "5/11", "53/47")], [("-23/17", "19/29", "-41/31")])


def _same_expressions(one: Any, two: Any) -> bool | None:
    """Equality by values; None where there are none, as for undefined functions."""
    import sympy

    if one == two:
        return True
    names = sorted(one.free_symbols | two.free_symbols, key=str)
    if len({str(name).lower() for name in names}) < len(names):
        return None
    counting = one.has(sympy.Sum, sympy.Product) or two.has(sympy.Sum, sympy.Product)
    counts = [("3", "5", "2"), ("7", "4", "6")]
    compared = 0
    for signs, points in enumerate(_POINTS):
        for values in counts if counting else points:
            chosen = (sympy.Rational(values[i % 3]) + sympy.Rational(i // 3, 7) for i in range(len(names)))
            point = dict(zip(names, chosen))
            try:
                a, b = _evaluated(one, point), _evaluated(two, point)
                if a is not None and b is not None and (a.is_infinite or b.is_infinite):
                    return bool(a == b)
            except (TypeError, ValueError, AttributeError, NotImplementedError, ZeroDivisionError):
                return None
            if a is None or b is None or (signs and not (a.is_real and b.is_real)):
                continue
            size = max(abs(a), abs(b))
            if abs(a - b) > size * sympy.Float(10) ** -25 and size > sympy.Float(10) ** -110:
                return False
            compared += 1
            if not names:
                return True
    return True if compared else None


def holds(left: str, right: str) -> bool | None:
    """Whether an equation without variables is true; None with variables, or if it is not understood."""
    a, b = approximation(left), approximation(right)
    if a is None or b is None:
        return None
    return abs(a - b) <= max(abs(a), abs(b)) * Fraction(1, 10**25)
