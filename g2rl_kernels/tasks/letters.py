"""Finds the letter that a completion chooses, as a careful reader would.

`choice_letter` reads a completion from its end. The last of these decides:

    a container    \\boxed{B}, <answer>B. Paris</answer>: a letter or an option's text, and nothing else
    a statement    the answer is B; Answer: B; I'd go with B; B is correct; it must be B; Hence (B).

Without any of them: a hedged statement ("it might be B"), then the one option that the last sentence
concludes or ends with ("this leaves (C), as ..."), then a last line that is a letter, an option ("B. Paris")
or an option's text.

Options that are called wrong, hypothetical or other people's choice are not chosen. Several letters, or one
without an option, are no answer.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from . import letter_patterns as p

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
READ = 200_000  # characters that are read, from the end
READ_BACK = 300  # statements of each kind, and containers, that are looked at from the end
SENTENCE = 240  # characters of a sentence that are looked at on each side of a statement
CONTENT = 400  # characters of a container's content; a longer one is no answer


class Said(NamedTuple):
    """What a statement or container says."""

    letter: str | None  # None: several letters, or one without an option
    end: int  # where it ends
    several: bool = False


def choice_letter(text: str, count: int, options: Sequence[str] = ()) -> str | None:
    """The letter, A, B, ..., of the option that a completion chooses among `count`; None without a choice.

    options: their texts, if known: the answer may then be one of them. What follows </think> counts first.
    """
    reader = _reader(count, tuple(options))
    text = text[-READ:]
    thought, _, rest = text.rpartition("</think>")
    return (reader.read(rest) if thought else None) or reader.read(text)


@lru_cache(maxsize=64)
def _reader(count: int, options: tuple[str, ...]) -> _Reader:
    return _Reader(count, options)


class _Reader:
    """Reads completions about some options."""

    def __init__(self, count: int, options: tuple[str, ...]):
        self.letters, self.options = LETTERS[:count], options
        words = [_words(option) for option in options]
        self.texts = [" ".join(some).casefold() for some in words]
        self.patterns = [  # in sentences, texts of one letter are not looked for
            (name, re.compile(r"(?:(?:the|an?)\s{1,2})?" + r"[\s{}]{1,6}".join(map(re.escape, some)), re.I))
            for name, some, text in zip(self.letters, words, self.texts)
            if len(text) > 1 or text.isdigit()
        ]

    def read(self, text: str) -> str | None:
        text = p.plain(text)
        hedged: Said | None = None
        for said, sure in self._last_first(text):
            if sure:
                return said.letter
            hedged = hedged or said
        if hedged is not None:
            return hedged.letter
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return (self._last_sentence(lines[-1]) or self._last_line(lines)) if lines else None

    # --- statements and containers -------------------------------------------------------------------------

    def _last_first(self, text: str) -> Iterator[tuple[Said, bool]]:
        """What each statement and container says, and whether it is sure of it; the last first."""
        kinds = {
            p.STATED: self._stated,
            p.CHINESE: self._chinese,
            p.PICKED: self._picked,
            p.CONCLUDED: self._concluded,
            p.CALLED: self._called,
        }
        found = [
            (match.start(), read, match)
            for pattern, read in kinds.items()
            for match in deque(pattern.finditer(text), READ_BACK)
        ]
        contents = list(deque(_contents(text), READ_BACK))
        found += [(match.start(), self._contained, match) for match in contents]
        before = {after.start(): one for one, after in pairwise(contents)}
        found.sort(key=lambda one: one[0], reverse=True)
        for _, read, match in found:
            said = read(text, match)
            other = before.get(match.start()) if read == self._contained else None
            if said and other and p.JOINED.fullmatch(text[other.end() : match.start()][:100]):
                first = self._contained(text, other)
                if first and first.letter != said.letter:
                    said = Said(None, match.end(), several=True)
            if said is not None:
                yield said, match.groupdict().get("may") is None

    def _stated(self, text: str, match: re.Match[str]) -> Said | None:
        """The answer is B; Answer: B; the answer is Paris, which is option (C)."""
        before, rest = _before(text, match.start()), _after(text, match.end())
        gap = (match["gap"] or "") + " "
        if p.OTHERS.search(before) or p.NOT_THIS.search(before) or p.NOT_THIS.search(gap):
            return None
        if "would" in (match["be"] or "") and p.UNREAL.search(before + rest):
            return None
        said = self._object(text, match)
        if match["negated"]:  # not A but B
            but = p.BUT.match(text, said.end) if said else None
            return self._at(text, but.end()) if but else None
        if said is None and match["be"] and not rest.rstrip().endswith("?") and not p.WRONG.match(rest):
            marked = {letter for letter, _, _ in self._marked(rest)}
            if len(marked) == 1:
                return Said(marked.pop(), match.end() + len(rest))
        return said

    def _chinese(self, text: str, match: re.Match[str]) -> Said | None:
        return self._at(text, match.end())

    def _picked(self, text: str, match: re.Match[str]) -> Said | None:
        """I'd go with B; not: choose B such that ..."""
        said = self._object(text, match)
        if said is None or p.OTHERS.search(_before(text, match.start())):
            return None
        return said if p.PAUSE.match(text, said.end) or text[said.end - 1] in ")]}\"'" else None

    def _concluded(self, text: str, match: re.Match[str]) -> Said | None:
        """It must be B. Hence (B)."""
        said = self._object(text, match)
        if said is None or said.several or not p.OVER.match(text, said.end):
            return None
        return None if p.OTHERS.search(_before(text, match.start())) else said

    def _called(self, text: str, match: re.Match[str]) -> Said | None:
        """B is correct."""
        before = _before(text, match.start())
        if p.OTHERS.search(before) or p.LISTED.search(before) or p.QUESTION.match(text, match.end()):
            return None
        if "would" in match[0] and p.UNREAL.search(before + _after(text, match.end())):
            return None
        return self._letter(match[1], match.end())

    def _contained(self, text: str, match: re.Match[str]) -> Said | None:
        """A container's content, if it is a letter or an option's text, and nothing else."""
        content = " ".join(re.sub(r"[{}]", " ", match[0]).split())
        at = _skip(p.KIND, content, 0)
        letter = p.LETTER.match(content, at)
        end = _skip(p.CLOSE, content, letter.end()) if letter else 0
        bare = letter is not None and not content[end:].strip(" .")
        if not (bare and letter and letter[1].isupper()):
            option = self._option(content, match.end())
            if option is not None:
                return option
        if p.BRACKETED.fullmatch(content) and len(set(re.findall("[A-Z]", content))) > 1:
            return Said(None, match.end(), several=True)
        if (
            p.SEVERAL.fullmatch(content)
            and len(set(content)) == len(content)
            and set(content) <= set(self.letters)
        ):
            return Said(None, match.end(), several=True)
        if letter is None:
            return None
        if bare:
            return self._letter(letter[1].upper(), match.end())
        said = self._at(content, at, wrapped=True)
        if said is None or (said.several and content[said.end :].strip(" .")):
            return None
        separated = p.SEPARATOR.match(content, end) and letter[1].isupper()
        closed = end > letter.end() or self._own_text(content, end, letter[1])
        return said if said.several or separated or closed else None

    # --- the letter or text in a statement -----------------------------------------------------------------

    def _object(self, text: str, match: re.Match[str]) -> Said | None:
        """What follows a statement's words: an option's text, which may begin like a filler, or a letter."""
        return self._option_at(text, match.start("filler")) or self._at(text, match.end())

    def _at(self, text: str, at: int, wrapped: bool = False) -> Said | None:
        """The option's text or the letter here; None for other words, a question, and a wrong option.

        wrapped: the letter is in brackets or quotes, so A and I are no English words.
        """
        said = self._option_at(text, at)
        if said is not None:
            return said
        start = _skip(p.OPEN, text, at)
        letter = p.LETTER.match(text, start)
        if letter is None:
            return None
        name, end = letter[1].upper(), _skip(p.CLOSE, text, letter.end())
        wrapped = wrapped or end > letter.end() or not set("([{\"'").isdisjoint(text[at:start])
        own, pause = self._own_text(text, end, name), p.PAUSE.match(text, end)
        operator = (p.CLOSED_OPERATOR if end > letter.end() else p.OPERATOR).match(text, end)
        if p.QUESTION.match(text, end) or (operator and not own):
            return None
        word = name in "AI" and not wrapped
        if letter[1].islower():
            if not pause or (word and not p.OVER.match(text, end)):
                return None
            if letter[1] in self.texts:
                return self._option(letter[1], end)
        elif word and not own and not pause and p.WORD.match(text, end):
            return None
        several = self._several(text, end)
        if p.WRONG.match(text, several or end) and not own:
            return self._letter(name, end) if several else None  # "B, C and D are wrong" chooses B
        return Said(None, several, several=True) if several else self._letter(name, end)

    def _option_at(self, text: str, at: int) -> Said | None:
        """The longest option whose text stands here, if it ends there."""
        start = _skip(p.OPEN, text, _skip(p.MARKS, text, at))
        ends = [match.end() for _, one in self.patterns if (match := one.match(text, start))]
        if not ends:
            return None
        said, end = text[start : max(ends)], _skip(p.CLOSE, text, max(ends))
        over = p.PAUSE.match(text, end) and not p.AND.match(text, end) and not p.WRONG.match(text, end)
        return (
            self._option(re.sub(r"^(?:the|an?)\s+", "", said), end) or self._option(said, end)
            if over
            else None
        )

    def _own_text(self, text: str, end: int, letter: str) -> bool:
        """Whether a letter that ends here is followed by its option's text."""
        at = _skip(p.BETWEEN, text, end)
        return at > end and any(one.match(text, at) for name, one in self.patterns if name == letter.upper())

    def _several(self, text: str, end: int) -> int:
        """Where a list of more letters (", C and D") ends; 0 without one."""
        last = 0
        for _ in self.letters:
            between = p.NEXT.match(text, end)
            letter = p.LETTER.match(text, between.end()) if between else None
            if letter is None or letter[1] in "ai":
                break
            end = _skip(p.CLOSE, text, letter.end())
            word = letter[1].islower() or (letter[1] in "AI" and p.WORD.match(text, end))
            if word and not p.PAUSE.match(text, end) and not p.WRONG.match(text, end):
                break
            last = end
        return last

    def _letter(self, name: str, end: int) -> Said:
        return Said(name if name in self.letters else None, end)

    def _option(self, text: str, end: int) -> Said | None:
        """The option with this text, if there is one; no answer if several have it, and not to the letter."""
        words = _words(text)
        alike = [place for place, one in enumerate(self.texts) if one == " ".join(words).casefold()]
        exact = [place for place in alike if _words(self.options[place]) == words]
        if not alike:
            return None
        found = exact or alike
        several = len({self.options[place].strip() for place in found}) > 1
        return Said(None if several else self.letters[found[0]], end, several)

    # --- the last sentence and line ------------------------------------------------------------------------

    def _marked(self, sentence: str) -> Iterator[tuple[str, int, int]]:
        """Letters marked as options, (B) or option B, that are not called wrong; with start and end."""
        for found in p.MARKED.finditer(sentence):
            letter, end = found["inside"] or found["after"], found.end()
            if letter not in self.letters or p.CLOSED_OPERATOR.match(sentence, end):
                continue
            before = sentence[max(0, found.start() - SENTENCE) : found.start()]
            if not p.UNLIKE.search(before) and not p.WRONG.match(
                sentence, self._several(sentence, end) or end
            ):
                yield letter, found.start(), end

    def _last_sentence(self, line: str) -> str | None:
        """The one option that the last sentence ends with, or gives after a word of conclusion."""
        sentence = p.SENTENCES.split(line[-4 * SENTENCE :].rstrip())[-1]
        marked = list(self._marked(sentence))
        if sentence.endswith("?") or len({letter for letter, _, _ in marked}) != 1:
            return None
        letter, start, end = marked[-1]
        ends = start > 0 and p.OVER.match(sentence, end)
        return letter if ends or p.CONCLUDES.search(sentence[:start]) else None

    def _last_line(self, lines: list[str]) -> str | None:
        """A last line that is a letter, an option, or an option's text."""
        line = lines[-1][_skip(p.BULLET, lines[-1], 0) :]
        if p.BRACKETED.fullmatch(line.strip(" .")) and len(set(re.findall("[A-Z]", line))) > 1:
            return None
        letter = p.LETTER.match(line, _skip(p.OPEN, line, 0))
        end = _skip(p.CLOSE, line, letter.end()) if letter else 0
        if letter and not line[end:].strip(" .,:!"):
            small = letter[1].islower()
            option = self._option(letter[1], end) if small else None
            if option is not None:
                return option.letter
            return None if small and len(lines) > 1 else self._letter(letter[1].upper(), end).letter
        option = self._option(line, 0) if len(line) <= CONTENT else None
        if option is not None:
            return option.letter
        label = p.LABEL.match(line)
        if label is None or label[1] not in self.letters:
            return None
        if p.WRONG.search(line[:SENTENCE]) and not self._own_text(line, label.end(), label[1]):
            return None
        labels = {found[1] for found in map(p.LABEL.match, lines) if found}
        return label[1] if labels == {label[1]} else None


def _words(option: str) -> list[str]:
    """An option's text as words, without emphasis, braces and a full stop."""
    return [word for word in re.split(r"[\s{}]+", p.plain(option).rstrip(" \t\r\n{}.")) if word]


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where the pattern, which matches anywhere, ends."""
    match = pattern.match(text, at)
    return match.end() if match else at


def _before(text: str, at: int) -> str:
    """The sentence up to here."""
    window = text[max(0, at - SENTENCE) : at]
    cuts = [window.rfind(mark) + len(mark) for mark in (". ", "! ", "? ", ": ", ";", "\n") if mark in window]
    return window[max(cuts, default=0) :]


def _after(text: str, at: int) -> str:
    """The sentence from here on."""
    window = text[at : at + SENTENCE]
    end = re.search(r"[.!?;](?=\s|$)|\n", window)
    return window[: end.end()] if end else window


def _contents(text: str) -> Iterator[re.Match[str]]:
    """The contents of boxes and answer tags, each as the match of a pattern; long ones are left out."""
    opened: list[int] = []  # where braces opened; -1: not a box
    tag = -1
    for found in p.CONTAINER.finditer(text):
        token, start = found[0], -1
        if token[0] == "<":
            start, tag = (tag, -1) if found[1] else (-1, found.end())
        elif token == "}":
            start = opened.pop() if opened else -1
        elif token == "{" or len(token) > 2:
            opened.append(found.end() if len(token) > 2 else -1)
        if start >= 0 and found.start() - start <= CONTENT:
            content = p.ANYTHING.match(text, start, found.start())
            assert content is not None
            yield content
