"""The answer that a sentence of prose gives, read as a whole. Imports no sympy."""

from __future__ import annotations

import re

from .grammar import COMPARED, FUNCTIONS, MINUS, UNSIGNED, run
from .notation import JOINT, words_of
from .units import ATTACHED, number_word, unit_at

ENVIRONMENT = re.compile(
    r"\$\$([^$]+)\$\$|\\\[(.{1,1000}?)\\\]|(?<![\\$])\$((?:\\[$%]|[^$\n])+?)(?<!\\)\$(?!\d)|\\\((.{1,1000}?)\\\)",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"\n|(?:[.?]|(?<!\b[a-z])!)(?=[\s\"”*)]|$)|。")
# Where what follows no longer belongs to the answer
_AFTERWARDS = re.compile(
    r"[,;]?\s+(?:because|since|as|so|which|where|when|not|and not|but|instead of|rather than|given|if|that is"
    r"|i\.e\.|for|after|before|in total|altogether|と)\b.*|,\s+(?:the|a|an|with|who|I|we|you)\b.*"
    r"|\s+(?:—|[–-](?=\s+(?!sin|cos|tan|log|ln|sqrt|exp|pi\b)[a-zA-Z]{2}))\s+.*"
    r"|\s*\((?:see|or|not|as)\b.*|\s+\(\w+\).*|\s+\((?=[^()]*[a-zA-Z]{3}).*",
    re.DOTALL,
)
_LEAD = re.compile(
    r"(?:[:\s*_`]|(?:approximately|about|around|exactly|roughly|simply|just|indeed|also|then|therefore|thus|clearly"
    r"|equal to|given by|either)(?!\w)|\\approx|≈|~|=)+",
    re.IGNORECASE,
)
SIGN = r"(?:(?<![\w)\]}])[-−–](?=\s?[$€£¥]?[\d.])(?!\s))"
_TIMES_TEN = r"\s*(?:×|x|\\times|\\cdot|\*)\s*10\s*(?:(?:\^|\*\*)\s*\{?\s*[-−+]?\d+\}?|[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)"
_ENDS = rf"(?!\d|\s?(?:[π√]|\\pi|\\sqrt)|(?!(?:{'|'.join(sorted(ATTACHED))}|x)(?![a-zA-Z]))[a-zA-Z])"
QUANTITY = re.compile(
    rf"{SIGN}?(?:US)?[$€£¥]?(?:{UNSIGNED}"
    rf"(?:{_TIMES_TEN}|\s*(?:[/:]|out of\b)\s*{UNSIGNED}|\s\d+/\d+|\^\{{?\d+\}}?)?{_ENDS}"
    rf"|\d{{1,3}}(?: \d{{3}})+{_ENDS})"
    r"(?:\s*\\?%|\s+percent\b|\s+(?:million|billion|trillion|thousand|hundred|dozen)\b)?"
)
YES_NO = re.compile(r"\W*(yes|no)\b[*_]*(?:[,.;:!]|\s+[–—-]\s)", re.IGNORECASE)
JOINT_BETWEEN = re.compile(rf"\s*,?\s*(?:{JOINT}|,)\s*")
NEGATED = re.compile(
    r"\s*(?:(?:is|are|was|were|does|do|did|can)\s*(?:not|n['’]t)"
    r"|(?:is|are)\s+(?:extraneous|invalid|rejected|impossible|wrong|incorrect|too (?:large|small|big))"
    r"|fails?)\b"
)
_RESERVED = re.compile(
    r"\b(?:multiples?|divisible|divisors?|factors?|less|greater|more|fewer|between|least|most|not|n['’]t|never|no"
    r"|wrong|above|below|over|under|except|if|either|modulo|digits?)\b",
    re.IGNORECASE,
)


def is_mathematics(text: str) -> bool:
    """Whether a phrase as a whole is mathematics: its words are commands, variables, joints or a unit."""
    if len(text) > 200 or text.count("{") != text.count("}") or re.search(r"\(\s*(?:or|and)\b", text):
        return False
    marks = rf"[\d+*/^=<>|√π]|^[a-zA-Z]!?$|[a-zA-Z] - [a-zA-Z]|^(?:{FUNCTIONS})\b"
    if re.search(marks, text) and run(text) == len(text.rstrip()):
        return True
    if not re.search(r"[\d\\π√]|^[a-zA-Z]$", text):
        return False
    plain = re.sub(rf"\\[a-zA-Z]+|[\d.)}}]\s*[a-zA-Z]+\s*$|(?<!\w){JOINT}(?!\w)", " ", text)
    return not re.search(r"[^\W\d_]{2,}", plain)


def mathematics_at(text: str, place: int) -> str | None:
    """The mathematics in delimiters at a place, with what joints add to it and a unit or % after it."""
    parts: list[str] = []
    while environment := ENVIRONMENT.match(text, place):
        parts.append(content(environment))
        place = environment.end()
        joint = JOINT_BETWEEN.match(text, place)
        following = ENVIRONMENT.match(text, joint.end()) if joint else None
        if not joint or not following or not alike(environment, following):
            break
        place = joint.end()
    if len(parts) == 1 and re.fullmatch(r"[-−\d.,\s]+", parts[0]):
        if re.compile(r"\s*(?:\\?%|percent\b)").match(text, place):
            return parts[0] + "\\%"
        raised = re.compile(r"\s*([a-zA-Z]+)\s*\$(\^\{?\d\}?)\$").match(text, place)  # 36 cm$^3$
        unit = unit_at(f"0 {raised[1]}{raised[2]}", 1) if raised else unit_at(text, place)
        if unit:
            return f"{parts[0]} {unit[0]}"
    return ", ".join(parts) or None


def alike(first: re.Match[str], second: re.Match[str]) -> bool:
    """Whether two pieces of mathematics can be values of one answer: x = 1 and x = 2, or 1 and 2."""
    kinds = [re.search(r"[=<>]|\\[lg]e", content(piece)) for piece in (first, second)]
    if not any(kinds):
        return True
    return all(re.match(r"[a-zA-Z](?:_\{?\w+\}?)?\s*=", content(piece)) for piece in (first, second))


def content(environment: re.Match[str]) -> str:
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
    decided = YES_NO.match(sentence) if words is not True or len(whole.split()) > 1 else None
    if decided:
        return decided[1]
    if words:
        return whole if whole and len(whole.split()) <= 8 else None
    for compared, sign in COMPARED:
        bound = compared.match(sentence)
        if bound and run(sentence[bound.end() :]):
            return f"{sign} {sentence[bound.end() :]}".strip()
    said = _run(whole, sentence)
    if said:
        return said
    counted = words_of(whole) or ""
    for number in (counted, counted.rpartition(" ")[0]):  # five, five apples
        if number_word(number) is not None:
            return number
    bold = re.search(r"\*\*([^*]+)\*\*", sentence)
    if bold and (re.search(r"\d", bold[1]) or is_mathematics(bold[1])):
        return phrase(bold[1], words)
    environments = list(ENVIRONMENT.finditer(sentence))
    if environments:
        return mathematics_at(sentence, environments[-1].start())
    result = re.search(r"=([^=]*)$", sentence)
    if result and (said := _run(result[1].strip(), result[1].strip())):
        return said
    numbers = list(QUANTITY.finditer(sentence))
    if len(numbers) == 1 and not re.search(
        r"[=<>^√π\\]|\d\s*[-+*/]|[-+*/]\s*\d", sentence.replace(numbers[0][0], "")
    ):
        return None if _RESERVED.search(sentence[: numbers[0].start()]) else with_unit(sentence, numbers[0])
    if numbers and not re.search(r"\d", text[len(sentence) :]):
        return whole  # not understood: equal to its own text only
    return whole if words is None and whole and len(whole.split()) <= 4 else None


def _run(whole: str, sentence: str) -> str | None:
    """The mathematics that a sentence starts with, with a noun after it that ends the sentence."""
    minus = MINUS.match(sentence)
    if minus:
        said = _run(whole[minus.end() :], sentence[minus.end() :])
        return f"-{said}" if said else None
    end = run(whole)
    if not end or re.match(r"[a-zA-Z_^/√π]", whole[end:]):
        end = run(sentence) if not end else 0
    if not end:
        return None
    said = sentence[:end] if not whole.startswith(sentence[:end]) else whole[:end]
    noun = re.fullmatch(r"\s+[a-zA-Z]+", whole[end:])
    if noun and QUANTITY.fullmatch(said):
        said += noun[0]
    return said.strip()


def with_unit(text: str, number: re.Match[str]) -> str:
    unit = None if re.match(r"(?:US)?[$€£¥]", number[0]) else unit_at(text, number.end())
    return number[0] + (f" {unit[0]}" if unit else "")
