"""The answer of a text that marks none: what its last finished sentences say. Imports no sympy."""

from __future__ import annotations

import re

from .grammar import MINUS, run
from .notation import TEXT, is_name, words_of
from .phrases import (
    ENVIRONMENT,
    JOINT_BETWEEN,
    NEGATED,
    QUANTITY,
    YES_NO,
    alike,
    content,
    is_mathematics,
    mathematics_at,
    phrase,
    with_unit,
)
from .units import number_word

_DENIAL = re.compile(
    r"(?:(?:\bnot|cannot|n['’]t)\s+(?:be\s+)?|[\^_]\{?|\\[lg]e\s*|\\ne\s*|[<>]=?\s*|!=\s*"
    r"|\bat (?:least|most)\s+|\bthan\s+|\(\s*mod\s+)$"
)


def _denied(text: str, found: re.Match[str]) -> bool:
    """Whether a number is denied, bounded, asked for, or a power or index."""
    before = text[max(found.start() - 12, 0) : found.start()]
    asked = text[found.end() : found.end() + 1] == "?"
    return asked or bool(_DENIAL.search(before) or NEGATED.match(text, found.end()))


_IT_IS = re.compile(
    r"^(?:(?:so|thus|therefore|hence|then)\b,?\s*)?(?:(?:it|this|that|he|she|they)(?:['’]s|\s+is|\s+are)\s+)?",
    re.IGNORECASE,
)


_CONCLUDED = re.compile(
    r"(?:(so|thus|therefore|hence)\b,?\s*)?(?:the|this|that|it|my|our)\b[^,.]*\s(?:is|are|was|were)\s+([^,.]+)"
    r"(?:,[^.]*)?[.!]?$",
    re.IGNORECASE,
)


def last_words(text: str, most: int = 6) -> str | None:
    """The answer in words: "Yes, ...", a text or last line of at most `most` words, or a phrase in bold."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    yes = YES_NO.match(lines[-1]) or YES_NO.match(text)
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


_ITEM = re.compile(r"[ \t]*(?:[-*•]|\d{1,3}[.)])[ \t]+(\S.*)")


def listed(text: str) -> str | None:
    """The items of a vertical list that ends a text, each a value without "=", as one list."""
    items: list[str] = []
    for line in reversed(text.rstrip().splitlines()[-100:]):
        item = _ITEM.fullmatch(line.rstrip(" .,;"))
        if not item:
            break
        said = item[1].strip("*$` ")
        if "=" in said or not is_mathematics(said):
            return None
        items.insert(0, said)
    return ", ".join(items) if len(items) > 1 else None


_BOLD_LIST = re.compile(r"\*\*[^*\n]{1,60}\*\*(?:(?:\s*,?\s*(?:or|and)\s+|\s*,\s*)\*\*[^*\n]{1,60}\*\*){1,9}")


def _joined(bold: re.Match[str]) -> str:
    """**x = 2** and **x = 3** as one part in bold, if each is mathematics."""
    parts = re.findall(r"\*\*([^*]+)\*\*", bold[0])
    return "**" + bold[0].replace("**", "") + "**" if all(map(is_mathematics, parts)) else bold[0]


def last_mathematics(text: str) -> str | None:
    """The last mathematics of a text: in bold or in delimiters, the right side of an equation, or a number.

    A text that breaks off within a sentence, more than four words after the number, has none.
    Looks at the last line with any of them, and leaves out what the text denies ("x = 3 is not a solution").
    """
    text = re.sub(r"(?:\n\s*\d{1,3}[.)]\s*)+$", "", text)  # the number of an item that is not written
    text = text.replace("=>", "→")
    lines = [line.replace("**", "").strip(" \t.*`>") for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    explained = len(lines[-1].split()) > 3 and not re.search(
        r"\b(?:so|thus|hence|therefore)\b", lines[-1], re.I
    )
    alone = len(lines) == 1 or (explained and "=" not in lines[0])
    if alone and len(lines[0]) < 100:  # the answer alone, or before its explanation
        said = MINUS.sub("-", lines[0])
        if is_mathematics(said):
            return said
        if number_word(words_of(lines[0]) or "") is not None:
            return lines[0]
    items = listed(text)
    if items:
        return items
    place = len(text)
    copula = re.search(r"\b(?:is|equals)\s+([a-z -]{3,30})$", lines[-1], re.IGNORECASE)
    if copula and number_word(words_of(copula[1]) or "") is not None:
        return copula[1]
    for line in reversed(text.split("\n")):
        place -= len(line) + 1
        line = _BOLD_LIST.sub(_joined, line)
        bold = [part for part in re.findall(r"\*\*([^*]+)\*\*", line) if not part.rstrip().endswith(":")]
        said = next((s for s in (phrase(part, False) for part in reversed(bold)) if s), "")
        if said:
            return said
        if re.search(r"\d|\\[a-zA-Z(\[\])]|\$", line) or is_mathematics(
            line.strip(" \t.*`>").rpartition("= ")[2]
        ):
            break
    else:
        return None
    after, text = text[place + 1 + len(line) :], text[: place + 1 + len(line)]
    environments = [
        e for e in ENVIRONMENT.finditer(text) if re.search(r"^(?!\^).*(?:\d|\\[a-zA-Z]|=)", content(e), re.S)
    ]
    kept = [
        e for e in environments if not NEGATED.match(text, e.end()) and not _denied(text, e)
    ] or environments
    numbers = [n for n in QUANTITY.finditer(text) if not _denied(text, n)]
    if kept and (not numbers or numbers[-1].end() <= environments[-1].end()):
        first = len(kept) - 1
        while first and alike(kept[first - 1], kept[first]):
            if not JOINT_BETWEEN.fullmatch(text[kept[first - 1].end() : kept[first].start()]):
                break
            first -= 1
        found = mathematics_at(text, kept[first].start()) or ""
        return f"={found}" if re.search(r"=\s*$", text[: kept[first].start()]) else found
    return _concluded(text, after, numbers)


_ASSIGN = r"[a-zA-Z](?:_\{?\w\}?)?\s*=\s*[^=,]{1,40}"
_ASSIGNS = rf"{_ASSIGN}(?:(?:,|\band\b|\bor\b)+\s*{_ASSIGN}){{1,9}}"
_BE = (
    r"\b(?:is|are|equals|becomes|(?<!not )(?<!n't )(?<!n’t )be|(?:simplif(?:ies|y)|reduces|comes) to"
    r"|gives(?: us)?|yields|get|est|ist|es|beträgt)\b"
)
_VALUE = re.compile(
    rf"(?:{_BE}|(?<!\d):|≈|=|\\approx)\s+"
    r"(?:(?:simply|just|about|exactly|approximately|therefore|thus|then|now|equal to|also) )?(?=\S)"
    r"|(?<=[\w)])=(?=\S)"
)


def _stated(sentence: str) -> str | None:
    """The value that a sentence gives last after "=", "is", "equals" or a colon, up to a comma or its end."""
    for value in reversed(list(_VALUE.finditer(sentence))[-6:]):
        rest = sentence[value.end() :]
        minus = MINUS.match(rest)
        end = run(rest[minus.end() :] if minus else rest)
        said = (f"-{rest[minus.end() : minus.end() + end]}" if minus else rest[:end]).strip()
        following = rest[(minus.end() if minus else 0) + end :]
        if not end or not re.search(r"[\d\\√π=]|^[a-zA-Z]$|[-+*/^]", said):
            continue
        counted = "=" in value[0] and re.search(r"\d\W*$", sentence[: value.start()])
        ended = re.match(r"\W*$|\s*[,;(—–]|\s+[a-zA-Z]+\W*$", following) or (
            counted and re.match(r"\s+[a-z]+(?![^,]*,)", following)
        )
        if not ended or (
            re.search(r"\d", following)
            and not _echoes(following, sentence[: value.end()] + said)
            and not counted
        ):
            continue
        left = re.search(r"(?:^|\s)(\S{1,20})\s*$", sentence[: value.start()])
        if (
            "=" in value[0]
            and left
            and not is_name(left[1])
            and re.search(r"[a-zA-Z]\w*[-+*/]|\d[a-zA-Z]", left[1])
        ):
            return None
        return said
    return None


def _echoes(later: str, earlier: str) -> bool:
    """Whether each number of a text stands in an earlier one."""
    number = re.compile(r"(?<![\^_{\w])\d+(?:\.\d+)?")
    return set(number.findall(later)) <= set(number.findall(earlier))


def _concluded(text: str, after: str, numbers: list[re.Match[str]]) -> str | None:
    """What the last finished sentences conclude: a stated value, a tuple, else the last number."""
    tail = text.rstrip()[-3000:]
    sentences = [
        part.strip()
        for part in re.split(r"(?<!\bvs)(?<!\d)[.!?]\s+|(?<=\d)[.!?]\s+(?=[^\d=+*/×)-])|\n+", tail)
        if part.strip()
    ]
    last = re.sub(r"^\W*[(\[](?=[^()\[\]]*[.!]?[)\]]$)", "", sentences[-1]) if sentences else ""
    last = last.rstrip(".;,! ") if "[" in last or "(" in last else last.rstrip(".;,!)] ")
    last = re.sub(r"(?<=\d) : (?=\d)", ":", last)
    main = re.split(r"[,(]?\s*\b(?:since|because|attained|reached)\b", last)[0].strip()
    if main != last and (said := _stated(main)):
        return said
    assigned = re.search(
        rf"(?:^|\b(?:so|thus|therefore|hence|then|is|are)\s|:\s)({_ASSIGNS})$", last, re.IGNORECASE
    )
    if assigned and is_mathematics(assigned[1]):
        return assigned[1]
    copula = re.search(rf"(?:{_BE}|:)\s+((?:(?!\b(?:is|are)\b)(?:[^:]|(?<=\d):(?=\d)))+)$", last)
    if copula and "=" in copula[1] and is_mathematics(copula[1]):
        return copula[1].strip()
    equation = re.search(r"(?:^|\s)(\S{1,20})?\s*=\s*([^=]+)$", last)
    if equation and is_mathematics(equation[2]) and (not equation[1] or is_name(equation[1])):
        return equation[2].strip()
    pair = re.search(r"([(\[][^()\[\]]*,[^()\[\]]*[)\]])(?:,?\s+(?:as|respectively|which)\b[^\d]*)?$", last)
    if pair and is_mathematics(pair[1]):
        return pair[1]
    if copula and is_mathematics(copula[1]) and not re.search(rf"{TEXT}", copula[1]):
        return copula[1].strip()
    compared = re.search(r"(?<!\S)([a-zA-Z]\s*(?:\\(?:le|ge|ne)|[<>]=?|!=)\s*\S+)$", last)
    if compared and is_mathematics(compared[1]):
        return compared[1]
    rest = (text[numbers[-1].end() :] if numbers else "") + after
    cut_off = len(rest.split()) > 4 and not re.search(r"[.!?)\]}$*:|`。]\s*$", rest)
    if cut_off and not after.strip():
        sentences = sentences[:-1]
    for place in range(len(sentences) - 1, max(len(sentences) - 4, -1), -1):
        said = _stated(sentences[place].rstrip(".;,! "))
        if said and _echoes(" ".join(sentences[place + 1 :]), sentences[place]):
            return said
    if not numbers or cut_off:
        return None
    number = with_unit(text, numbers[-1])
    if len(numbers) > 1 and re.fullmatch(r"\s*,?\s*or\s+", text[numbers[-2].end() : numbers[-1].start()]):
        return f"{numbers[-2][0]} or {number}"
    return number
