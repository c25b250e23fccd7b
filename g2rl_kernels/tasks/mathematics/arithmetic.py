"""Exact values of plain arithmetic in LaTeX or plain text, as fractions of bounded size. Imports no sympy."""

from __future__ import annotations

import math
import re
from fractions import Fraction

MAX_BITS = 1 << 15  # of a numerator or denominator: 9864 digits
MAX_DIGITS = 4000  # of a number as it is written; Python converts up to 4300
MAX_DEPTH = 30
NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,6})?"

_TOKEN = re.compile(
    rf"\s*(?:(?P<number>{NUMBER})(?:\\overline\{{?(?P<period>\d+)\}}?)?"
    r"|(?P<command>\\(?:frac|sqrt|binom|cdot|times|div)(?![a-zA-Z]))|(?P<sign>\*\*|[-+*/^!(){}\[\]%]))"
)
_TIMES, _DIVIDE = ("*", "\\cdot", "\\times"), ("/", "\\div")


class NotPlain(ValueError):
    """A text that is not plain arithmetic, or has no rational value."""


class TooLarge(ValueError):
    """A value with more digits than are worth writing out."""


def value(text: str) -> Fraction:
    """The value of plain arithmetic: + - * / ^ ! %, brackets, \\frac, \\sqrt, \\binom, mixed numbers.

    Raises:
        NotPlain: it is something else, or has no rational value.
        TooLarge: a value on the way has more than MAX_BITS bits, or the text nests deeper than MAX_DEPTH.
    """
    return _Reader(text).whole()


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent, where it is rational. Raises NotPlain and TooLarge as `value` does."""
    if exponent.denominator != 1:
        return power(_root(base, exponent.denominator), Fraction(exponent.numerator))
    if base == 0 and exponent < 0:
        raise NotPlain("division by zero")
    bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and base != 0 and (bits - 1 or 1) * abs(exponent) > MAX_BITS:
        raise TooLarge("a power")
    if abs(base) == 1 or base == 0:
        exponent = exponent % 2 if base == -1 else min(exponent, Fraction(1))
    return Fraction(base ** int(exponent))


def _root(base: Fraction, degree: int) -> Fraction:
    if degree > 64 or base < 0:
        raise NotPlain("a root that is not rational")
    parts = []
    for part in (base.numerator, base.denominator):
        if degree > 2 and part.bit_length() > 4096:
            raise TooLarge("a root")
        root = math.isqrt(part) if degree == 2 else _integer_root(part, degree)
        if root**degree != part:
            raise NotPlain("an irrational root")
        parts.append(root)
    return Fraction(*parts)


def _integer_root(part: int, degree: int) -> int:
    low, high = 0, 1 << (part.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= part else (low, middle - 1)
    return low


class _Reader:
    """A recursive-descent reader; `place` is the next token."""

    def __init__(self, text: str):
        self.tokens: list[tuple[str, str]] = []
        self.place = self.depth = 0
        end, text = 0, text.strip()
        while end < len(text):
            found = _TOKEN.match(text, end)
            if not found:
                raise NotPlain(text[end : end + 20])
            kind = found.lastgroup if found.lastgroup != "period" else "number"
            written = found[found.lastgroup or 0]
            if found["number"]:
                written = found["number"] + (f"|{found['period']}" if found["period"] else "")
            self.tokens.append((str(kind), written))
            end = found.end()

    def peek(self, ahead: int = 0) -> str:
        at = self.place + ahead
        return self.tokens[at][1] if at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise NotPlain(f"{token!r} where {expected!r} is needed")
        self.place += 1
        return token

    def whole(self) -> Fraction:
        result = self.sum()
        if self.peek():
            raise NotPlain(self.peek())
        return result

    def checked(self, result: Fraction) -> Fraction:
        if max(abs(result.numerator).bit_length(), result.denominator.bit_length()) > MAX_BITS:
            raise TooLarge("a value")
        return result

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge(f"brackets nested deeper than {MAX_DEPTH}")
        result = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            result = self.checked(result + sign * self.product())
        self.depth -= 1
        return result

    def product(self) -> Fraction:
        result = self.signed()
        while True:
            token = self.peek()
            if token in _TIMES:
                self.take()
                result = self.checked(result * self.signed())
            elif token in _DIVIDE:
                self.take()
                divisor = self.signed()
                if divisor == 0:
                    raise NotPlain("division by zero")
                result = self.checked(result / divisor)
            elif token in ("(", "{", "[", "\\frac", "\\sqrt", "\\binom"):
                result = self.checked(result * self.powered())
            else:
                return result

    def signed(self) -> Fraction:
        minus = False
        while self.peek() in ("+", "-"):
            minus ^= self.take() == "-"
        result = self.powered()
        return -result if minus else result

    def powered(self) -> Fraction:
        result = self.atom()
        while self.peek() in ("^", "**", "!", "%"):
            token = self.take()
            if token == "%":
                result /= 100
            elif token == "!":
                if result.denominator != 1 or result < 0:
                    raise NotPlain("a factorial of no natural number")
                if result > 5000:
                    raise TooLarge("a factorial")
                result = self.checked(Fraction(math.factorial(int(result))))
            else:
                self.depth += 1
                if self.depth > MAX_DEPTH:
                    raise TooLarge("a tower of powers")
                result = self.checked(power(result, self.signed()))
                self.depth -= 1
        return result

    def atom(self) -> Fraction:
        kind = self.tokens[self.place][0] if self.peek() else ""
        token = self.take()
        if kind == "number":
            return self.mixed(_number(token))
        if token in ("(", "{", "["):
            result = self.sum()
            self.take({"(": ")", "{": "}", "[": "]"}[token])
            return result
        if token == "\\frac":
            top, bottom = self.argument(), self.argument()
            if bottom == 0:
                raise NotPlain("division by zero")
            return self.checked(top / bottom)
        if token == "\\binom":
            top, bottom = self.argument(), self.argument()
            if top.denominator != 1 or bottom.denominator != 1 or min(top, bottom) < 0:
                raise NotPlain("a binomial of no natural numbers")
            if top > 5000:
                raise TooLarge("a binomial")
            return Fraction(math.comb(int(top), int(bottom)))
        if token == "\\sqrt":
            degree = Fraction(2)
            if self.peek() == "[":
                self.take()
                degree = self.sum()
                self.take("]")
            if degree.denominator != 1 or not 1 < degree <= 64:
                raise NotPlain("a root")
            return _root(self.argument(), int(degree))
        raise NotPlain(token)

    def argument(self) -> Fraction:
        self.take("{")
        result = self.sum()
        self.take("}")
        return result

    def mixed(self, whole: Fraction) -> Fraction:
        """3\\frac{1}{2} and 3 1/2 are 7/2."""
        if whole.denominator == 1 and self.peek() == "\\frac":
            start = self.place
            part = self.atom()
            if 0 < part < 1:
                return whole + part
            self.place = start
        if (
            whole.denominator == 1
            and self.place < len(self.tokens)
            and self.tokens[self.place][0] == "number"
        ):
            top, slash, bottom = self.peek(), self.peek(1), self.peek(2)
            if slash == "/" and top.isdigit() and bottom.isdigit() and 0 < int(top) < int(bottom):
                self.place += 3
                return whole + Fraction(int(top), int(bottom))
        return whole


def _number(token: str) -> Fraction:
    written, _, period = token.partition("|")
    if len(written) > MAX_DIGITS:
        raise TooLarge("a number")
    mantissa, _, exponent = written.lower().partition("e")
    if abs(int(exponent or 0)) > MAX_BITS // 4:
        raise TooLarge("a number")
    result = Fraction(mantissa.rstrip(".")) * Fraction(10) ** int(exponent or 0)
    if period:
        places = len(mantissa.partition(".")[2])
        result += Fraction(int(period), (10 ** len(period) - 1) * 10**places)
    return result


def close(first: Fraction, second: Fraction, written: bool = True) -> bool:
    """Whether two values are the same answer.

    Equal values are. So is a decimal of six or more significant digits and any value that rounds to it:
    0.333333 for 1/3, 3.14159 for \\pi; but 0.333 is not 1/3, and 3.14 is not \\pi. The measure is the
    decimal's own last digit, so it is relative: 0.0000012 is not 0.0000008. Integers, and decimals of fewer
    digits, are equal to their own value only.

    written: second is a written number as well; False: it is the approximation of an irrational number.
    """
    if first == second:
        return True
    lengths = [_places(first), _places(second) if written else None]
    for short, other, place in ((first, second, lengths[0]), (second, first, lengths[1])):
        longer = lengths[1] if short is first else lengths[0]
        if place is None or (longer is not None and longer <= place):
            continue
        digits = abs(short.numerator) * 10**place // short.denominator
        if digits >= 10**5 and _rounded(other, place) == short:
            return True
    return False


def near(exact: Fraction, rounded: Fraction) -> bool:
    """Whether a number is a value rounded or cut off at the number's last digit, as 28.27 is 9\\pi."""
    places = _places(rounded)
    if places is None and rounded.denominator > 1:
        return close(exact, rounded)
    gap, unit = abs(exact - rounded), Fraction(1, 10 ** (places or 0))
    if not places:
        digits = str(abs(rounded.numerator))[-400:]
        unit = Fraction(10 ** (len(digits) - len(digits.rstrip("0"))))
        return gap < unit and gap <= abs(exact) / 20
    return gap <= unit / 2 or (gap < unit and abs(rounded) < abs(exact))


def _rounded(number: Fraction, places: int) -> Fraction:
    """Rounded half away from zero."""
    scaled = abs(number) * 10**places + Fraction(1, 2)
    return Fraction((1 if number >= 0 else -1) * (scaled.numerator // scaled.denominator), 10**places)


def _places(number: Fraction) -> int | None:
    """The decimal places of a terminating decimal, 1 to 400; None for integers and other fractions."""
    rest, count = number.denominator, {2: 0, 5: 0}
    if rest == 1 or rest.bit_length() > 1000:
        return None
    for prime in count:
        while rest % prime == 0:
            rest //= prime
            count[prime] += 1
    places = max(count.values())
    return places if rest == 1 and places <= 400 else None


def written(number: Fraction) -> str:
    """A number as text that `value` reads back: 3, 3/4, or 1.6e-19 where the fraction would be long.

    Raises TooLarge for more than a thousand digits.
    """
    top, bottom = number.numerator, number.denominator
    if max(abs(top), bottom).bit_length() > 3300:
        raise TooLarge("a number")
    if bottom == 1 and abs(top) >= 10**30:
        zeros = len(str(top)) - len(str(top).rstrip("0"))
        return f"{top // 10**zeros}e{zeros}" if zeros > 20 else str(top)
    places = _places(number)
    if bottom <= 10**6 or places is None:
        return f"{top}/{bottom}" if bottom > 1 else str(top)
    digits = str(abs(top) * 10**places // bottom)
    exponent = len(digits) - 1 - places
    mantissa = digits[0] + ("." + digits[1:] if len(digits) > 1 else "")
    return f"{'-' if top < 0 else ''}{mantissa}e{exponent}"
