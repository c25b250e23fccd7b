"""The answer in a sentence of prose, and in a text that marks none. Imports no sympy."""

from __future__ import annotations

import re

from .notation import JOINT, TEXT, is_name, words_of
from .units import is_unit, number_word

_ENVIRONMENT = re.compile(
    r"\$\$([^$]+)\$\$|\\\[(.{1,1000}?)\\\]|(?<![\\$])\$((?:\\[$%]|[^$\n])+?)(?<!\\)\$(?!\d)|\\\((.{1,1000}?)\\\)",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=[\s\"”*)]|$)|。")
# Where what follows no longer belongs to the answer
_AFTERWARDS = re.compile(
    r"[,;]?\s+(?:because|since|as|so|which|where|when|not|and not|but|instead of|rather than|given|if|that is"
    r"|i\.e\.|for|after|before|in total|altogether|と)\b.*|,\s+(?:the|a|an|with|who|I|we|you)\b.*"
    r"|\s+[—–-]\s+.*|\s*\((?:see|or|not|as|\w+\)).*|\s+\((?=[^()]*[a-zA-Z]{3}).*",
    re.DOTALL,
)
_LEAD = re.compile(
    r"(?:[:\s*_`]|(?:approximately|about|around|exactly|roughly|either|simply|just|indeed|also|then|therefore|thus"
    r"|clearly|equal to|given by)(?!\w)|\\approx|≈|~|=)+",
    re.IGNORECASE,
)
UNSIGNED = (
    r"(?:\d{1,3}(?:(?:,|\{,\}|\\[,!]|[\u00a0\u2009\u202f])\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+]?\d+(?!\w))?"
)
SIGN = r"(?:(?<![\w)\]}])[-−–](?=\s?[$€£¥]?[\d.])(?!\s))"
_TIMES_TEN = r"\s*(?:×|x|\\times|\\cdot|\*)\s*10\s*(?:(?:\^|\*\*)\s*\{?\s*[-−+]?\d+\}?|[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)"
_QUANTITY = re.compile(
    rf"{SIGN}?(?:US)?[$€£¥]?(?:{UNSIGNED}(?:{_TIMES_TEN}|\s*[/:]\s*{UNSIGNED}|\s\d+/\d+|\^\{{?\d+\}}?)?"
    r"|\d{1,3}(?: \d{3})+(?!\d))"
    r"(?:\s*\\?%|\s+percent\b|\s+(?:million|billion|trillion|thousand|hundred|dozen)\b)?"
)
_JOINT_BETWEEN = re.compile(rf"\s*,?\s*(?:{JOINT}|,)\s*")
_NEGATED = re.compile(
    r"\s*(?:(?:is|are|was|were|does|do|did|can)\s*(?:not|n['’]t)"
    r"|(?:is|are)\s+(?:extraneous|invalid|rejected|impossible)|fails?)\b"
)


def is_mathematics(text: str) -> bool:
    """Whether a phrase as a whole is mathematics: its words are commands, variables, joints or a unit."""
    if len(text) > 200 or text.count("{") != text.count("}") or not re.search(r"[\d\\π√]|^[a-zA-Z]$", text):
        return False
    plain = re.sub(rf"\\[a-zA-Z]+|[\d.)}}]\s*[a-zA-Z]+\s*$|(?<!\w){JOINT}(?!\w)", " ", text)
    return not re.search(r"[^\W\d_]{2,}", plain)


def mathematics_at(text: str, place: int) -> str | None:
    """The mathematics in delimiters at a place, with what joints add to it and a unit or % after it."""
    parts: list[str] = []
    while environment := _ENVIRONMENT.match(text, place):
        parts.append(_content(environment))
        place = environment.end()
        joint = _JOINT_BETWEEN.match(text, place)
        following = _ENVIRONMENT.match(text, joint.end()) if joint else None
        if not joint or not following or not _alike(environment, following):
            break
        place = joint.end()
    if len(parts) == 1 and re.fullmatch(r"[-−\d.,\s]+", parts[0]):
        if re.compile(r"\s*(?:\\?%|percent\b)").match(text, place):
            return parts[0] + "\\%"
        unit = re.compile(r"\s*(?:\\text\{\s*)?([a-zA-Z]+)\b").match(text, place)
        if unit and is_unit(unit[1]):
            return f"{parts[0]} \\text{{{unit[1]}}}"
    return ", ".join(parts) or None


def _alike(first: re.Match[str], second: re.Match[str]) -> bool:
    """Whether two pieces of mathematics can be values of one answer: x = 1 and x = 2, or 1 and 2."""
    kinds = [re.search(r"[=<>]|\\[lg]e", _content(piece)) for piece in (first, second)]
    if not any(kinds):
        return True
    return all(re.match(r"[a-zA-Z](?:_\{?\w+\}?)?\s*=", _content(piece)) for piece in (first, second))


def _content(environment: re.Match[str]) -> str:
    return next(group for group in environment.groups() if group is not None).strip()


def phrase(text: str, words: bool | None) -> str | None:
    """The answer that a sentence gives after "the answer is"; None if it gives none.

    words: whether the answer is in words; None: not known, then mathematics is preferred.
    """
    text = text.lstrip(" \t:*_`\"'>")
    lead = _LEAD.match(text)
    text = text[lead.end() :] if lead else text
    mathematics = mathematics_at(text, 0)
    if mathematics is not None:
        return mathematics
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text
    whole = _AFTERWARDS.sub("", sentence, count=1).split("**")[0].strip("*_`\"' ")
    whole = re.sub(r"^([-\d.,]+)\s+\([^a-zA-Z]*\)$", r"\1", whole)  # 9 (3 + 6)
    if whole.endswith("}") and whole.count("}") > whole.count("{"):  # JSON
        whole = whole[:-1].strip("\"' \n")
    if words:
        return whole if whole and len(whole.split()) <= 8 else None
    if whole and (is_mathematics(whole) or number_word(words_of(whole) or "") is not None):
        return whole
    bold = re.search(r"\*\*([^*]+)\*\*", sentence)
    if bold and re.search(r"\d", bold[1]):
        return phrase(bold[1], words)
    bracketed = re.match(r"\([^()]*,[^()]*\)|\[[^\[\]]*\]", text)
    if bracketed:
        return bracketed[0]
    environments = list(_ENVIRONMENT.finditer(sentence))
    if environments:
        return mathematics_at(sentence, environments[-1].start())
    first = _QUANTITY.match(whole)
    if first:
        return _with_unit(whole, first)
    numbers = list(_QUANTITY.finditer(sentence))
    if numbers:
        return _with_unit(sentence, numbers[-1])
    return whole if words is None and whole and len(whole.split()) <= 4 else None


def _with_unit(text: str, number: re.Match[str]) -> str:
    unit = re.compile(r"\s*([a-zA-Z]+)").match(text, number.end())
    return number[0] + (f" {unit[1]}" if unit and len(unit[1]) > 1 and is_unit(unit[1]) else "")


def _denied(text: str, found: re.Match[str]) -> bool:
    return bool(re.search(r"(?:\bnot\s+|[\^_]\{?)$", text[max(found.start() - 6, 0) : found.start()]))


_YES_NO = re.compile(r"\W*(yes|no)\b[*_]*[,.;:!]", re.IGNORECASE)
_IT_IS = re.compile(
    r"^(?:(?:so|thus|therefore|hence|then)\b,?\s*)?(?:(?:it|this|that|he|she|they)(?:['’]s|\s+is|\s+are)\s+)?",
    re.IGNORECASE,
)


_CONCLUDED = re.compile(
    r"(?:(so|thus|therefore|hence)\b,?\s*)?(?:the|this|that|it|my|our)\b[^,.]*\s(?:is|are|was|were)\s+([^,.]+)[.!]?$",
    re.IGNORECASE,
)


def last_words(text: str, most: int = 6) -> str | None:
    """The answer in words: "Yes, ...", a text or last line of at most `most` words, or a phrase in bold."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    yes = _YES_NO.match(lines[-1]) or _YES_NO.match(text)
    if yes:
        return yes[1]
    concluded = _CONCLUDED.match(lines[-1].strip())
    if concluded and (most > 1 or concluded[1]) and len(concluded[2].split()) <= 3:
        return concluded[2]
    bold = [part for part in re.findall(r"\*\*([^*\n]+)\*\*", lines[-1]) if not part.endswith(":")]
    if bold and len(bold[-1].split()) <= max(most, 3):
        return str(bold[-1])
    for short in (text.strip(), lines[-1].strip()):
        short = _IT_IS.sub("", short, count=1)
        if len(short.split()) <= most:
            return short.strip() or None
    return None


def last_mathematics(text: str) -> str | None:
    """The last mathematics of a text: in bold or in delimiters, the right side of an equation, or a number.

    A text that breaks off within a sentence, more than four words after the number, has none.
    Looks at the last line with any of them, and leaves out what the text denies ("x = 3 is not a solution").
    """
    lines = [line.replace("**", "").strip(" \t.*`>") for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    explained = len(lines[-1].split()) > 3 and not re.search(
        r"\b(?:so|thus|hence|therefore)\b", lines[-1], re.I
    )
    alone = len(lines) == 1 or (explained and "=" not in lines[0])
    if (
        alone and len(lines[0]) < 100 and is_mathematics(lines[0])
    ):  # the answer alone, or before its explanation
        return lines[0]
    place = len(text)
    for line in reversed(text.split("\n")):
        place -= len(line) + 1
        line = re.sub(r"\*\*(\s*,?\s*or\s+)\*\*", r"\1", line)  # **3** or **4**
        bold = [part for part in re.findall(r"\*\*([^*]+)\*\*", line) if not part.rstrip().endswith(":")]
        said = next((s for s in (phrase(part, False) for part in reversed(bold)) if s), None)
        if said:
            return said
        if re.search(r"\d|\\[a-zA-Z(\[\])]|\$", line):
            break
    else:
        return None
    after, text = text[place + 1 + len(line) :], text[: place + 1 + len(line)]
    environments = [
        e
        for e in _ENVIRONMENT.finditer(text)
        if re.search(r"^(?!\^).*(?:\d|\\[a-zA-Z]|=)", _content(e), re.S)
    ]
    kept = [
        e for e in environments if not _NEGATED.match(text, e.end()) and not _denied(text, e)
    ] or environments
    numbers = [n for n in _QUANTITY.finditer(text) if not _denied(text, n)]
    if kept and (not numbers or numbers[-1].end() <= environments[-1].end()):
        first = len(kept) - 1
        while first and _alike(kept[first - 1], kept[first]):
            if not _JOINT_BETWEEN.fullmatch(text[kept[first - 1].end() : kept[first].start()]):
                break
            first -= 1
        found = mathematics_at(text, kept[first].start()) or ""
        return f"={found}" if re.search(r"=\s*$", text[: kept[first].start()]) else found
    sentence = re.split(r"[.!?]\s", line.strip().rstrip(".;,! "))[-1]
    equation = re.search(r"(?:^|\s)(\S{1,20})?\s*=\s*([^=]+)$", sentence)
    if equation and is_mathematics(equation[2]) and (not equation[1] or is_name(equation[1])):
        return equation[2].strip()
    pair = re.search(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]$", sentence)
    if pair and is_mathematics(pair[0]):
        return pair[0]
    copula = re.search(r"(?:\b(?:is|are|equals|becomes|be)\b|:)\s+((?:(?!\b(?:is|are)\b)[^:])+)$", sentence)
    if copula and is_mathematics(copula[1]) and not re.search(rf"{TEXT}", copula[1]):
        return copula[1].strip()
    if not numbers:
        return None
    rest = text[numbers[-1].end() :] + after
    cut_off = len(rest.split()) > 4 and not re.search(r"[.!?)\]}$*:|`。]\s*$", rest)
    if cut_off:
        return None
    last = _with_unit(text, numbers[-1])
    if len(numbers) > 1 and re.fullmatch(r"\s*,?\s*or\s+", text[numbers[-2].end() : numbers[-1].start()]):
        return f"{numbers[-2][0]} or {last}"
    return last
