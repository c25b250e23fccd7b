"""Where a completion's final answer stands. Functions of text alone, in time proportional to its length."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..turns import TURN
from .conclusions import last_mathematics, last_words, listed
from .grammar import UNSIGNED
from .notation import JOINT, TEXT, ascii_powers
from .phrases import SIGN, is_mathematics, phrase

WINDOW = 50_000  # characters at the end of a completion that are searched
MAX_STATEMENTS = 100  # "the answer is ..." in a text; the last ones are read


class Found(NamedTuple):
    """An answer that a completion marks: its place, its text, and how it is marked."""

    start: int
    end: int
    text: str
    mark: str  # box | tag | line | statement


_THOUGHT = r"(?:think|thinking|thoughts?|reasoning|scratchpad)"
_OPENS = re.compile(rf"[<\[◁]{_THOUGHT}[>\]▷]", re.IGNORECASE)
_CLOSES = re.compile(rf"[<\[◁]/{_THOUGHT}[>\]▷]", re.IGNORECASE)
_CODE = re.compile(r"```[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)```", re.DOTALL)
_PROGRAM = re.compile(r"\bprint\s*\(|\bdef \w|\bimport \w|\breturn\b|;\s*$", re.MULTILINE)
_DATA = ("json", "output", "text", "txt", "yaml", "plaintext", "latex", "math", "markdown", "md")


# Full-width punctuation and digits, as in Chinese and Japanese
_WIDE = {
    0xFF0C: ", ",
    0xFF1A: ": ",
    0xFF1B: "; ",
    0xFF01: "! ",
    0xFF1F: "? ",
    0xFF08: "(",
    0xFF09: ")",
    0xFF05: "%",
}
_WIDE |= {0xFF1D: "=", 0xFF0D: "-", 0xFF0E: ".", **{0xFF10 + digit: str(digit) for digit in range(10)}}


def spoken(completion: str) -> str:
    """What follows </think>, "" while the completion still thinks; without programs and special tokens."""
    text = completion.rpartition("<|channel|>final<|message|>")[2]
    for close in _CLOSES.finditer(completion):
        text = completion[close.end() :]
    opens = _OPENS.search(text)
    text = (text[: opens.start()] if opens else text)[-WINDOW:]
    text = ascii_powers(text.translate(_WIDE))
    text = _CODE.sub(_without_program, text) if "```" in text else text
    text = re.sub(r"(?m)^[ \t]*>[ \t]+|[ \t][:;]-?[)(D](?=\s|$)", "", text)
    return re.sub(r"<\|(?!im_start|start_header_id)[^|<>\n]{1,40}\|>|</?s>", "\n", text)


def _without_program(block: re.Match[str]) -> str:
    data = block["language"].lower() in _DATA or (
        not block["language"] and not _PROGRAM.search(block["body"])
    )
    return f"\n{block['body']}\n" if data else "\n"


_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(-?[\w.]+))")
_PLACEHOLDER = re.compile(
    r"[\s.…_?*]*|(?:your |the |final |insert )*(?:answer|result|number|value|letter)(?: here)?|\\ldots"
    r"|\\text\{\s*\}",
    re.IGNORECASE,
)
_DELIMITERS = r"[\s$()\[\]\\]*"
_BETWEEN = rf"(?:[,;]|(?<!\w){JOINT}(?!\w)|{TEXT}\{{\s*,?\s*{JOINT}\s*\}}|\\quad|\\qquad|&)"
_NAMED = r"(?:[a-zA-Z](?:_\{?\w+\}?)?\s*=)"
_NEXT = re.compile(
    rf"{_DELIMITERS}(?:{_BETWEEN}{_DELIMITERS})+{_NAMED}?{_DELIMITERS}|{_DELIMITERS}{_NAMED}{_DELIMITERS}"
)


def _boxes(text: str) -> Iterator[Found]:
    """Boxes with balanced braces, or a number without; not those that are empty or hold a placeholder."""
    if "box" not in text:
        return
    partner, stack = dict[int, int](), list[int]()
    for brace in re.finditer(r"\\[{}\\]|[{}]", text):
        if brace[0] == "{":
            stack.append(brace.start())
        elif brace[0] == "}" and stack:
            partner[stack.pop()] = brace.start()
    end = 0
    for box in _BOX.finditer(text):
        opened = box.end() - 1
        if box.start() < end:
            continue  # a box in a box
        if box[1]:
            inner, end = box[1], box.end()
        elif opened in partner:
            end = partner[opened] + 1
            inner = text[opened + 1 : end - 1].strip()
        else:
            continue
        denied = re.search(r"\bnot\s*[$(\[\\]*\s*$", text[max(box.start() - 12, 0) : box.start()])
        if not denied and not _PLACEHOLDER.fullmatch(inner):
            yield Found(box.start(), end, inner, "box")


_TAKEN_BACK = re.compile(
    r"\b(?:wait|hmm|wrong|not|no|actually|corrected|mistake|instead|so|thus|fails?)\b|→", re.I
)


def _together(between: str) -> bool:
    """Whether two boxes stand in one sentence, or with nothing between them."""
    if re.fullmatch(rf"{_DELIMITERS}[.]?{_DELIMITERS}", between):
        return True
    return not re.search(r"[.!?][\s$]|\n", between) and not _TAKEN_BACK.search(between)


def _joined(found: Iterator[Found], text: str, several: bool = False) -> list[Found]:
    """Boxes with nothing but a joint between them ("and", a comma, "x =") as one list.

    several: also those of one sentence, or with nothing between them, for a known answer of several values.
    """
    joined: list[Found] = []
    for box in found:
        before = joined[-1] if joined else None
        if (
            before
            and len(between := text[before.end : box.start]) < (200 if several else 60)
            and (_NEXT.fullmatch(between) or (several and _together(between)))
        ):
            items = before.text if box.text in before.text.split(", ") else f"{before.text}, {box.text}"
            joined[-1] = before._replace(end=box.end, text=items)
        else:
            joined.append(box)
    return joined


def _tags(text: str) -> Iterator[Found]:
    """The texts between <answer> and </answer>."""
    lower, floor = text.lower(), 0
    for close in re.finditer("</answer>", lower):
        start = lower.rfind("<answer>", floor, close.start())
        floor = close.end()
        inner = text[start + 8 : close.start()].strip()
        if start >= 0 and not _PLACEHOLDER.fullmatch(inner):
            yield Found(start, close.end(), inner, "tag")


_MARKUP = r"[*_`\"']*"
_ANSWER = r"\b(?:answers?|ans|réponse|antwort|respuesta|resposta|risposta|ответ|antwoord|svar|jawaban)\b"
_IS = (
    r"(?:comes (?:out )?to(?: be)?|turns out to be|is equal to|is|are|would be|should be|must be|will be"
    r"|equals|remains|est|ist|lautet|es|é|è|är|adalah)"
)
_STATED = re.compile(
    rf"(?:{_ANSWER}\.?{_MARKUP}"
    rf"(?:[ \t]*[:=→-]"
    rf"|[^.\n:=!?]{{0,100}}?(?<!\w){_IS}(?!\w)(?!n['’]t|[ \t]+(?:not|in the)\b)[ \t]*:?"
    rf"|[ \t]+(?=-?\d)|{_MARKUP}[ \t]*(?=\n))"
    rf"|(?:答案|答え|答|정답은|답은|답|उत्तर|الجواب)[是为為はが: ]*"
    rf"|(?:^|(?<=\n))[ \t]*(?:A|Ans)[ \t]*:)[ \t]*{_MARKUP}",
    re.IGNORECASE,
)
_VERB = re.compile(r"\b(?:to|people|students|you|we|they|would|could|might|may|who)\s+$", re.IGNORECASE)
_SUPPOSED = re.compile(r"\s*(?:if|had|without|suppose|were)\b", re.IGNORECASE)
_HASHES = re.compile(r"(?:^|(?<=\n))[ \t]*####[ \t]*(.+)")


def _statements(text: str, words: bool | None) -> Iterator[Found]:
    """What "the answer is", "Answer:" and the like say, and lines that begin with ####."""
    for stated in list(_STATED.finditer(text))[-MAX_STATEMENTS:]:
        before = re.split(r"[.!?\n]", text[max(stated.start() - 200, 0) : stated.start()])[-1]
        if _VERB.search(before) or ("would" in stated[0] and _SUPPOSED.match(before)):
            continue
        rest = text[stated.end() : stated.end() + 1000]
        items = None
        if not rest.partition("\n")[0].strip(" *_`:\"'#."):  # a heading: the answer stands below
            items = listed(rest.partition("\n")[2].strip().partition("\n\n")[0])
            if not items and re.match(r"\W*1[.)]\s+\S.*\n+\s*2[.)]\s", rest):  # steps
                continue
            rest = re.sub(r"^[ \t*_`:\"'#.]*\n\s*(?:[-*•][ \t]+)?", "", rest)
        said = items or phrase(rest, words)
        if said and not _PLACEHOLDER.fullmatch(said):
            end = stated.end() + max(text[stated.end() : stated.end() + 1000].find(said), 0) + len(said)
            yield Found(stated.start(), end, said, "statement")
    for line in _HASHES.finditer(text):
        said = phrase(line[1], words)
        if said and (words or len(line[1]) < 30 or said in line[1].strip(" *$.")):
            yield Found(line.start(), line.end(), said, "line")


def _marks(text: str, words: bool | None, several: bool = False) -> list[Found]:
    """Marked answers in order, up to where the text goes on with another problem.

    A statement about a box or tag is that box or tag. Beside one, statements in words are no answers.
    """
    strong = sorted([*_joined(_boxes(text), text, several), *_tags(text)])
    marks = list(strong)
    for stated in _statements(text, words):
        near = next((box for box in strong if box.end >= stated.start), None)
        between = text[stated.end : near.start] if near else ""
        if near and len(between) < 40 and "\n" not in between.strip():
            continue
        if not strong or is_mathematics(stated.text) or re.search(r"\d", stated.text):
            marks.append(stated)
    marks.sort()
    turns = (turn.start() for turn in TURN.finditer(text) if marks and turn.start() > marks[0].start)
    turn = next(turns, len(text))
    return [mark for mark in marks if mark.start < turn]


_REJECTED = re.compile(
    r"\b(?:that|this|it|which)(?:['’]s| is| was) (?:wrong|incorrect|not (?:right|correct))|\b(?:mistake|error"
    r"|sorry|correction)\b|\bshould (?:actually |really )?(?:be|have been)\b|\bI mean\b",
    re.IGNORECASE,
)
_INSTEAD = re.compile(
    r"(?:\b(?:it|that|this|result|value|total|sum|answer)(?:['’]s| is| equals)"
    r"|\bshould (?:actually |really )?(?:be|have been)|\bI mean|\bcorrection:?)[ \t]+",
    re.IGNORECASE,
)


def marked(text: str, words: bool | None = False, several: bool = False) -> str | None:
    """The last answer marked by a box, <answer>, ####, or words such as "the answer is"; None without one.

    What the text puts in its place ("that is wrong: it should be 5") counts instead.
    """
    marks = _marks(text, words, several)
    if not marks:
        return None
    last = marks[-1]
    if last.mark == "tag":
        return marked(last.text, words, several) or last.text
    turn = TURN.search(text, last.end)
    tail = text[last.end : turn.start() if turn else len(text)][:2000]
    if words is not True and _REJECTED.search(tail):
        for instead in reversed(list(_INSTEAD.finditer(tail))):
            said = phrase(tail[instead.end() :], False)
            if said:
                return said
    return last.text


def final(text: str, words: bool | None, several: bool = False) -> str | None:
    """The final answer of a text: the last that it marks, else the last that it names; None without one.

    words: whether the known answer is in words; None: not known, then mathematics is preferred.
    """
    said = marked(text, words, several)
    if said is not None:
        return said
    text = text.strip()
    turn = TURN.search(text)
    if turn and re.search(r"\d", text[: turn.start()]):
        text = text[: turn.start()]
    if words:
        return last_words(text)
    decided = re.match(r"\W*(yes|no)\b\W+(?:because|since|as)\b[^\n]*$", text, re.IGNORECASE)
    if decided:
        return decided[1]
    said = last_mathematics(text)
    if (
        words is None
        and "\n" not in text
        and (said is None or re.match(r"\W*(?:yes|no)\b[*_]*,", text, re.I))
    ):
        return last_words(text, most=1)
    return said


def boxed(text: str) -> str:
    """The content of the last \\boxed{...} with balanced braces; "" without one."""
    found = list(_boxes(text))
    return found[-1].text if found else ""


def answer_tag(text: str) -> str:
    """The content of the last <answer>...</answer>; "" without one."""
    found = list(_tags(text))
    return found[-1].text if found else ""


_LAST = re.compile(rf"(?P<sign>{SIGN}\$?)?(?P<number>{UNSIGNED})(?P<percent>\s*\\?%)?")


def last_number(text: str, percent: bool = False) -> str:
    """The last number as Python writes it, -1024.5 for "−1,024.5"; "" without one.

    percent: keep a percent sign.
    """
    last = None
    for last in _LAST.finditer(text[-WINDOW:]):  # noqa: B007
        pass
    if last is None:
        return ""
    number = re.sub(r"[,{}\\!\s]", "", last["number"])
    number = ("0" if number.startswith(".") else "") + number
    return ("-" if last["sign"] else "") + number + ("%" if percent and last["percent"] else "")


def _boxed_list(completion: str, words: bool | None, several: bool) -> str | None:
    text = spoken(completion)
    found = _joined(_boxes(text), text, several)
    return found[-1].text if found else None


def _tagged(completion: str, words: bool | None, several: bool) -> str | None:
    inner = answer_tag(spoken(completion))
    return (marked(inner, words, several) or inner or None) if inner else None


# How MathJudge finds an answer: (completion, whether the known answer is in words, whether it is several
# values in no order) -> its text
FINDERS: dict[str, Callable[[str, bool | None, bool], str | None]] = {
    "all": lambda completion, words, several: final(spoken(completion), words, several),
    "boxed": _boxed_list,
    "answer_tag": _tagged,
    "last_number": lambda completion, words, several: last_number(spoken(completion), percent=True) or None,
}
