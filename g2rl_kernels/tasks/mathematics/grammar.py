"""How far mathematics reaches in a sentence, read token by token. Imports no sympy.

A sentence's answer is the whole run of mathematics that it starts with, "2*sqrt(3)" or "60 km/h", and
never a number out of the middle of it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .notation import JOINT, TEXT, words_of
from .units import ATTACHED, is_unit, unit_at

UNSIGNED = (
    r"(?:\d{1,3}(?:(?:,|\{,\}|\\[,!]|[\u00a0\u2009\u202f])\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+]?\d+(?!\w))?"
)
FUNCTIONS = r"(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|mod|pi|infinity|theta"
_MULTIPLE = r"million|billion|trillion|thousand|hundred|dozen"
_TOKEN = re.compile(
    rf"(?P<space>\s*)(?:(?P<number>(?:(?:US)?\\?[$€£¥₹]\s?)?(?:\d{{1,3}}(?: \d{{3}})+(?!\d)|{UNSIGNED})"
    rf"(?:\s+(?:{_MULTIPLE})\b)?)"
    rf"|(?P<text>{TEXT}\s*\{{[^{{}}]*\}})|(?P<operator>\\(?:cdot|times|div|le|ge|ne|approx|in|pm|mp|to|cup|cap)"
    r"(?![a-zA-Z])|\*\*|[-−–+*/^_=<>±·×÷≈~]|:(?=\s?\d)|out of(?=\s\d))"
    rf"|(?P<percent>\\?%|percent\b)|(?P<command>\\[a-zA-Z]+|\\[{{}}|!])"
    rf"|(?P<function>(?:{FUNCTIONS})(?![a-zA-Z]))"
    rf"|(?P<comma>[,;])|(?P<joint>{JOINT}(?!\w))|(?P<open>[(\[{{])|(?P<close>[)\]}}])"
    r"|(?P<bar>\|)|(?P<factorial>!)|(?P<symbol>[π√∞θ∅°…'′])|(?P<dots>\.\.\.)"
    r"|(?P<letters>[a-zA-Z]+)(?![^\W\d_]|['’][a-z]))"
)
MINUS = re.compile(r"(?:negative|minus)\s+(?=[\w\\(√π])", re.IGNORECASE)
MORE = (
    (
        r"(?:greater|more|larger|bigger|higher) than or equal to|at least|no (?:less|fewer) than",
        r"\ge",
    ),
    (r"(?:strictly )?(?:less|smaller|fewer|lower) than or equal to|at most|no more than|up to", r"\le"),
    (r"(?:strictly )?(?:greater|more|larger|bigger|higher) than|over|above", ">"),
    (r"(?:strictly )?(?:less|smaller|fewer|lower) than|under|below", "<"),
    (r"(?:different from|not equal to|other than|anything but)", r"\ne"),
)
COMPARED = [(re.compile(rf"(?:{words})\s+", re.IGNORECASE), sign) for words, sign in MORE]


class _Token(NamedTuple):
    kind: str
    start: int
    end: int
    word: str


def run(text: str) -> int:
    """Where the mathematics ends that a text starts with; 0 if it starts with none.

    The run has partners for its brackets and does not end in an operator, a comma or an article.
    """
    tokens, place = _tokens(text)
    word_follows = bool(re.match(r"\s*[^\W\d_]", text[place:]))
    while tokens:
        last = tokens[-1]
        article = last.word in ("a", "A", "I") and len(tokens) > 1 and text[last.start - 1].isspace()
        alone = last.word in ("a", "A", "I") and len(tokens) == 1
        if (
            last.kind in ("operator", "comma", "joint", "function")
            and last.word
            not in (
                "pi",
                "infinity",
                "theta",
            )
        ) or (word_follows and last.end == place and (article or alone)):
            tokens.pop()
        elif (cut := _unpaired(tokens)) is not None:
            del tokens[cut:]
        else:
            break
    if tokens and word_follows:  # "5, 3 more than 2": the last item begins a new clause
        cuts = [at for at, depth in _depths(tokens) if depth == 0 and tokens[at].kind in ("comma", "joint")]
        clause = not any(token.end == place for token in tokens[-1:]) or tokens[-1].kind in (
            "unit",
            "percent",
        )
        if (
            cuts
            and not clause
            and re.match(r"\s+(?:more|less|times|of|is|are|was|were|has|have|does)\b", text[place:])
        ):
            tokens = tokens[: cuts[-1]]
    if not any(t.kind in ("number", "letters", "command", "function", "symbol", "text") for t in tokens):
        return 0
    return tokens[-1].end


def _tokens(text: str) -> tuple[list[_Token], int]:
    tokens: list[_Token] = []
    place = 0
    while place < min(len(text), 400) and (found := _TOKEN.match(text, place)):
        kind, word = str(found.lastgroup), found[str(found.lastgroup)]
        before = tokens[-1] if tokens else None
        value = before is not None and before.kind in (
            "number",
            "close",
            "symbol",
            "command",
            "function",
            "percent",
        )
        attached = before is not None and not found["space"]
        if kind == "letters":
            unit = unit_at(text, place) if value else None
            if unit and unit[1] > place:
                tokens.append(_Token("unit", place, unit[1], unit[0]))
                place = unit[1]
                continue
            if len(word) > 1 and not _product(word, tokens, attached):
                break
            if before is not None and before.kind == "unit":
                break
        elif (
            (kind == "close" and not _opened(tokens))
            or (kind == "factorial" and not attached)
            or (
                kind == "number"
                and before is not None
                and before.kind in ("number", "unit")
                and not _mixed(text, found)
            )
        ):
            break
        if kind == "joint" and before is not None and before.kind == "open":  # 0.25 (or 25%)
            break
        tokens.append(_Token(kind, found.start() + len(found["space"]), found.end(), word))
        place = found.end()
    return tokens, place


def _mixed(text: str, found: re.Match[str]) -> bool:
    return bool(re.compile(r"\s\d+/\d").match(text, found.start()))


def _product(word: str, tokens: list[_Token], attached: bool) -> bool:
    """Whether letters are a product of variables, as in 2ab, or xy alone; no words, nor units."""
    before = tokens[-1] if tokens else None
    if attached and before is not None and before.kind in ("number", "close", "operator"):
        return (
            len(word) <= 3
            and word.lower() not in ATTACHED
            and not (before.kind == "number" and is_unit(word))
        )
    return (
        len(word) <= 3
        and words_of(word) is None
        and not is_unit(word)
        and (before is None or before.kind in ("operator", "open"))
    )


def _depths(tokens: list[_Token]) -> list[tuple[int, int]]:
    depth, found = 0, []
    for at, token in enumerate(tokens):
        opened = token.kind == "open" or token.word == "\\{"
        closed = token.kind == "close" or token.word == "\\}"
        depth += opened - closed
        found.append((at, depth))
    return found


def _opened(tokens: list[_Token]) -> bool:
    return bool(tokens) and _depths(tokens)[-1][1] > 0


def _unpaired(tokens: list[_Token]) -> int | None:
    """The place of the last bracket without a partner."""
    stack: list[int] = []
    for at, token in enumerate(tokens):
        if token.kind == "open" or token.word == "\\{":
            stack.append(at)
        elif (token.kind == "close" or token.word == "\\}") and stack:
            stack.pop()
    bars = [at for at, token in enumerate(tokens) if token.kind == "bar"]
    if stack:
        return stack[0]
    return bars[-1] if len(bars) % 2 else None
