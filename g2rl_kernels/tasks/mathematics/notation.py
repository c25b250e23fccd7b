"""One notation for an answer: what LaTeX and Unicode write differently, lists, words. Imports no sympy."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_SYMBOLS = {
    **dict(zip("−–‒﹣-", "-----")),
    **{
        "×": "\\times ",
        "✕": "\\times ",
        "·": "\\cdot ",
        "⋅": "\\cdot ",
        "÷": "\\div ",
        "∗": "*",
        "⁄": "/",
        "∕": "/",
    },
    **{
        "π": "\\pi ",
        "∞": "\\infty ",
        "√": "\\sqrt ",
        "∛": "\\sqrt[3]",
        "±": "\\pm ",
        "°": "^\\circ ",
        "º": "^\\circ ",
    },
    **{
        "≤": "\\le ",
        "≥": "\\ge ",
        "≠": "\\ne ",
        "≈": "\\approx ",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∈": "\\in ",
    },
    **{"∅": "\\emptyset ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil "},
    **{
        "θ": "\\theta ",
        "α": "\\alpha ",
        "β": "\\beta ",
        "γ": "\\gamma ",
        "λ": "\\lambda ",
        "φ": "\\phi ",
        "ω": "\\omega ",
    },
    **{"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8"},
    **{"‘": "'", "’": "'", "“": '"', "”": '"', "「": '"', "」": '"', "、": ",", "\u200b": "", "\ufeff": ""},
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿˣ", "0123456789-+nx")
_IN_PROSE = {"∈": "\\in ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "⩽": "\\le ", "⩾": "\\ge "}
_FRACTIONS = {ord(symbol): _SYMBOLS[symbol].strip() for symbol in "½⅓⅔¼¾⅕⅛"}
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
TEXT = (
    r"\\(?:text(?:normal|bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|[mh]box|operatorname|boldsymbol|bm|emph)\*?"
)
_SHORTER = {
    **{"\\leq": "\\le", "\\leqslant": "\\le", "\\geq": "\\ge", "\\geqslant": "\\ge"},
    **{"\\neq": "\\ne", "\\to": "\\to", "\\varnothing": "\\emptyset"},
}
_REWRITES: list[tuple[str, Any]] = [
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|bf|rm)(?![a-zA-Z])\s*\.?(?=\S|$)", ""),
    (r"(?<!\\)\\!\s*", ""),
    (r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|thinspace|enspace|hspace\{[^{}]*\})(?![a-zA-Z])|~|&nbsp;", " "),
    (r"\\(?:d|t|c)frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:d|t)binom(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:leq|leqslant|geqslant|geq|neq|to|varnothing)(?![a-zA-Z])", lambda m: _SHORTER[m[0]]),
    (r"\{\s*,\s*\}(?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\{\s*,\s*\}(?=\d)", "."),
    (r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])", "|"),
    (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
    (r"\\(?:ldots|cdots|dots)(?![a-zA-Z])", "..."),
    (r"\\degree(?![a-zA-Z])|\\textdegree(?![a-zA-Z])", r"^\\circ "),
    (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"\\sqrt\s*(\d+|[a-z](?![a-z]))", r"\\sqrt{\1}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))", r"\\times "),
    (r"(?<![\\a-zA-Z])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"(?<![\\a-zA-Z])(?:pi|Pi|PI)(?![a-zA-Z])", r"\\pi "),
    (r"(?<=[\w)}])\s*\*\*\s*(?=[-\d({a-zA-Z])", "^"),
    (r"(\\(?:text|mathrm)\s*\{[^{}]*)\^\s*\{\s*([-+]?\d)\s*\}", r"\1^\2"),  # \text{cm^{2}}
    (r"(?<=\d) out of (?=\d)", "/"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=", r"\\ne "),
]
_REWRITES_COMPILED = [(re.compile(pattern), new) for pattern, new in _REWRITES]
_PERCENT = re.compile(
    rf"\s*(?:\\%|{TEXT}\{{\s*\\?%\s*\}}|{TEXT}\{{\s*(?:percent|per cent)\s*\}}|\bper ?cent\b|\bpct\b)"
)
# What is no list and no thousands: 1.234,5 and 15,00
_DECIMAL_COMMA = re.compile(
    r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+(?=,\d+)|\d+(?=,0\d(?!\d)|,0\d{3})),(\d+)(?![\d,])"
)
_QUOTES = "\"'`*_"
JOINT = r"(?:and|or|und|oder|et|ou|и|или|和|或|與|与)"


def ascii_powers(text: str) -> str:
    """Unicode powers, indices, relations, fractions in LaTeX: x² as x^2, x₁ as x_1, ½ as 1/2, ≤ as \\le."""
    text = re.sub(
        "[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿˣ]+(?=(\\d?))", lambda m: _group("^", m[0].translate(_SUPERSCRIPTS), m[1]), text
    )
    text = re.sub("[₀-₉]+(?=(\\d?))", lambda m: _group("_", m[0].translate(_SUBSCRIPTS), m[1]), text)
    for symbol, latex in _IN_PROSE.items():
        if symbol in text:
            text = text.replace(symbol, latex)
    text = re.sub("[½⅓⅔¼¾⅕⅛](?=[a-zA-Z(√π])", lambda m: _fraction(_SYMBOLS[m[0]].strip()), text)
    return re.sub("(?<=\\d)[½⅓⅔¼¾⅕⅛]", lambda m: _SYMBOLS[m[0]], text).translate(_FRACTIONS)


def _fraction(quotient: str) -> str:
    top, _, bottom = quotient.partition("/")
    return f"\\frac{{{top}}}{{{bottom}}}"


def _group(mark: str, inner: str, following: str) -> str:
    return f"{mark}{inner}" if len(inner) == 1 and inner.isalnum() and not following else f"{mark}{{{inner}}}"


def clean(text: str) -> str:
    """An answer's text in one notation: ASCII or LaTeX symbols, without spacing, delimiters and end marks."""
    rows = re.search(
        r"\\begin\{(aligned|align\*?|gathered|split|eqnarray\*?)\}(.*)\\end\{\1\}", text, re.DOTALL
    )
    if rows:  # a derivation: its last line
        text = [row for row in re.split(r"\\\\|\n", rows[2]) if row.strip()][-1:][0].replace("&", "")
    for symbol, ascii_text in _SYMBOLS.items():
        if symbol in text:
            text = text.replace(symbol, ascii_text)
    text = ascii_powers(text)
    text = unicodedata.normalize("NFKC", text)
    text = _DECIMAL_COMMA.sub(lambda m: m[1].replace(".", "") + "." + m[2], text)
    for pattern, new in _REWRITES_COMPILED:
        text = pattern.sub(new, text)
    text = _PERCENT.sub("%", text)
    text = re.sub(rf"{TEXT}\{{\s*(\\?[$€£¥]?\s*[-+]?[\d.,]+\s*%?)\s*\}}", r"\1", text)  # \textbf{42}
    text = re.sub(
        r"(?<!\d)(\d{1,3}(?:[ \u2009\u202f]\d{3})+)(?![ \d])", lambda m: re.sub(r"\s", "", m[0]), text
    )
    return strip(text)


def strip(text: str) -> str:
    """Without quotation marks, markdown, math delimiters and end marks around it."""
    before = None
    while text != before:
        before = text = text.strip()
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) and left not in inner:
                text = inner.strip()
        text = re.sub(
            r"(?<!\\)(?<!\.)[.;:,]+$|(?<=[a-zA-Z]{2})[!?]+$" if not re.search(r"\d!+$", text) else r"\.$",
            "",
            text,
        )
        text = text.strip(_QUOTES).strip()
        if re.fullmatch(rf"{TEXT}\s*\{{[^{{}}]*\}}", text) or re.fullmatch(r"\{[^{}]*\}", text):
            text = text[text.index("{") + 1 : -1]
    return text


_FUNCTIONS = re.compile(r"(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|mod|lim|det")
_NOT_WORDS = re.compile(
    r"[\d+*/^=<>|&#@%]|\\(?!text|math(?!bb|cal|frak|scr)|mbox)[a-zA-Z{}(\[]|[()\[\]{}]\s*[-,]"
)


def words_of(text: str) -> str | None:
    """The text as words in lower case, one space apart, without articles and end marks; None for mathematics.

    A text is words if it has no digit, no operator, and no LaTeX command but \\text{...} and its kin, and has
    a run of two or more letters that names no function, or is a single letter. Runs of two or three
    lower-case consonants, such as xy, are products of variables.
    """
    if not text or len(text) > 400:
        return None
    plain = re.sub(rf"{TEXT}\s*\{{([^{{}}]*)\}}", r" \1 ", text)
    plain = re.sub(r"\\[,;:! ]|~", " ", plain)
    if _NOT_WORDS.search(plain):
        return None
    runs = re.findall(r"[^\W\d_]+", plain)
    texts = re.search(rf"{TEXT}", text)
    long = [run for run in runs if len(run) > 1 and not _FUNCTIONS.fullmatch(run)]
    if not long and not (texts and runs):
        if len(runs) != 1 or runs[0] in ("e", "i", "π") or not plain.strip().isalpha():
            return None
    elif not texts and all(re.fullmatch("[b-df-hj-np-tv-z]{1,3}", run) for run in runs):
        return None
    result = re.sub(r"[\s\-–—]+", " ", plain.casefold()).strip(_QUOTES + " .,;:!?()[]{}。!?")
    return re.sub(r"^(?:the|a|an) (?=\w)", "", result) or None


_OPEN, _CLOSE = "([{", ")]}"


def split_top(text: str, separators: str) -> list[str]:
    """The parts between matches of a pattern outside brackets; [] if a bracket has no partner.

    Half-open intervals such as [0, 1) are brackets too: any closing bracket ends any opening one.
    """
    parts, depth, start, place = [], 0, 0, 0
    pattern = re.compile(separators)
    while place < len(text):
        found = pattern.match(text, place) if depth == 0 else None
        if found and found.end() > place:
            parts.append(text[start:place])
            start = place = found.end()
            continue
        letter = text[place]
        if letter == "\\" and place + 1 < len(text):
            depth += (text[place + 1] == "{") - (text[place + 1] == "}")
            place += 2
            continue
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if depth < 0:
            return []
        place += 1
    return [*parts, text[start:]] if depth == 0 else []


_LIST = rf"\s*(?:[,;]\s*)?(?:{TEXT}\{{\s*,?\s*{JOINT}\s*,?\s*\}}|(?<![\w\\]){JOINT}(?!\w))\s*|\s*[,;]\s*"
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def items_of(text: str) -> list[str]:
    """The items of a list: between commas, semicolons, "and", "or". [] if brackets do not match."""
    return [part.strip() for part in split_top(text, _LIST) if part.strip()]


def without_thousands(text: str) -> str:
    """1,024 as 1024; a list such as 1,2 unchanged."""
    return _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)


def only_thousands(text: str) -> bool:
    """Whether a text has commas, and all of them part thousands, as in 1,000 + 234 = 1,234."""
    return "," in text and "," not in without_thousands(text)


def decimal_comma(text: str) -> str:
    """3,75 as 3.75, where the answer is one number; 1,024, 3, 75 and (3,75) unchanged."""
    found = re.fullmatch(r"([^\d,()\[\]{}]*)(\d+),(\d+)([^\d,()\[\]]*)", text)
    if not found or (len(found[3]) == 3 and len(found[2]) <= 3 and not found[2].startswith("0")):
        return text
    return f"{found[1]}{found[2]}.{found[3]}{found[4]}"


_UNFINISHED = re.compile(
    r"(?:[-+*/^_=<>≤≥×÷·(\[]|\\(?:cdot|times|div|le|leq|ge|geq|ne|neq|approx|pm|in|frac|sqrt))\s*$"
)


def complete(text: str) -> bool:
    """Whether brackets have partners and no operator waits for what follows."""
    text = strip(text)
    turned = re.fullmatch(r"[\]\[(].*[\[\])]", text, re.DOTALL)  # ]0, 1[
    return (not _UNFINISHED.search(text) or bool(turned)) and bool(split_top(text, r"(?!)") or turned)


_NAME_PARTS = re.compile(
    rf"{TEXT}\s*\{{[^{{}}]*\}}|_\s*(?:\{{[^{{}}]*\}}|\w)|\^\s*(?:\{{\s*[-\w\\* ]*\s*\}}|\w|\\prime|')|'"
    r"|(?<=[a-zA-Z])\s*\((?:[^()]|\([^()]*\))*\)"
)


def is_name(text: str) -> bool:
    """Whether the left side of an equation names what is asked: x, f(2), m+n, AB, \\text{Area}; not 2x."""
    words = re.search(rf"{TEXT}", text)
    rest = _NAME_PARTS.sub(" ", text)
    return not re.search(r"\d|\\(?:pi|int|sum)(?![a-zA-Z])", rest) and bool(
        words or re.search(r"[a-zA-Z]", rest)
    )
