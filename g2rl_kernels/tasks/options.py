"""Options' texts in a completion: which of them it names, and which of these it affirms.

A text that names one option in its last finished sentence, or only one in all, chooses it. Denied and
supposed options, questions, restated lists of options, and numbers of a computation are not named.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from . import letter_patterns as p

READ_BACK = 300  # options named in prose that are looked at, from the end
SENTENCE = 240  # characters of a sentence that are looked at on each side of an option


class Said(NamedTuple):
    """What a part of a completion says."""

    letter: str | None  # None: several letters, or one without an option
    end: int  # where it ends
    several: bool = False
    unread: bool = False  # a short answer that names no option


class Options:
    """The options of a question.

    Args:
        letters: a letter for each option.
        options: their texts; none if they are not known.
    """

    def __init__(self, letters: str, options: Sequence[str]):
        self.letters, self.options = letters, options
        words = [_words(option) for option in options]
        self.texts = [" ".join(some).casefold() for some in words]
        named = [  # in sentences, texts of one letter are not looked for
            (name, r"[\s{}]{1,6}".join(map(re.escape, some)), text)
            for name, some, text in zip(letters, words, self.texts)
            if len(text) > 1 or text.isdigit()
        ]
        self._patterns = [
            (name, re.compile(rf"(?:(?:the|an?)\s{{1,2}})?{one}", re.I)) for name, one, _ in named
        ]
        prose = [
            _bounded(one, text)
            for _, one, text in named
            if len(text) > 2 or not text.isalpha() or text == "no"
        ]
        prose.sort(key=len, reverse=True)
        self._named = re.compile("|".join(prose), re.I) if prose else None

    # --- an option's text at a place ------------------------------------------------------------------------

    def exactly(self, text: str, end: int) -> Said | None:
        """The option with this text, if there is one; no answer if several have it, and not to the letter."""
        words = _words(text)
        alike = [place for place, one in enumerate(self.texts) if one == " ".join(words).casefold()]
        exact = [place for place in alike if _words(self.options[place]) == words]
        if not alike:
            return None
        found = exact or alike
        several = len({self.options[place].strip() for place in found}) > 1
        return Said(None if several else self.letters[found[0]], end, several)

    def at(self, text: str, at: int) -> Said | None:
        """The longest option whose text stands here, if it ends there."""
        start = skip(p.OPEN, text, skip(p.MARKS, text, at))
        ends = [match.end() for _, one in self._patterns if (match := one.match(text, start))]
        if not ends:
            return None
        said, end = text[start : max(ends)], skip(p.CLOSE, text, max(ends))
        if not p.PAUSE.match(text, end) or p.AND.match(text, end) or p.WRONG.match(text, end):
            return None
        if text[start].isdigit() and p.COMPUTED.match(text, max(ends)):
            return None
        option = self.exactly(re.sub(r"^(?:the|an?)\s+", "", said), end) or self.exactly(said, end)
        letter = p.ITS_LETTER.match(text, max(ends))
        if option and letter and letter[1] in self.letters and letter[1] != option.letter:
            return Said(None, end, several=True)
        return option

    def beside(self, text: str, end: int, letter: str, label: bool = False) -> tuple[int, bool]:
        """Where the option's text beside a letter that ends here ends, or 0; whether it is another option's.

        label: the letter begins a line, so that the text behind it is not a sentence of its own.
        """
        at = skip(p.BETWEEN, text, end)
        ends = [(found.end(), name) for name, one in self._patterns if (found := one.match(text, at))]
        own = [stop for stop, name in ends if name == letter.upper()]
        if at == end or not ends or "\n" in text[end:at].strip(" "):
            return (max(own), False) if own and at > end else (0, False)
        stop = max(ends)[0]
        if own and max(own) == stop:
            return stop, False
        gap = text[end:at].strip()
        own_sentence = set(".,").intersection(gap) or not (gap or text[end - 1] in ")]")
        over = p.ENDED if own_sentence and not label else p.ASIDE
        other = p.BOUND if label else over
        if other.match(text, stop):
            return stop, True
        return (max(own), False) if own else (0, False)

    # --- options in prose -----------------------------------------------------------------------------------

    def phrase(self, text: str) -> str | None:
        """The option that a short marked text names: by its text, or by a part of a name."""
        found = self.affirmed(text)
        if len(found) == 1:
            return found.pop()
        return None if found or self._mentioned(text) else self.named_part(text)

    def affirmed(self, text: str) -> set[str]:
        """The letters of the options that a text affirms."""
        return {name for name, _, affirmed in self._mentions(text) if affirmed and name}

    def prose(self, text: str) -> str | None:
        """The option that the last finished sentence affirms, else the only one that the text affirms."""
        mentions = list(self._mentions(text))
        if not mentions:
            return None
        start, end = _last_sentence(text)
        everywhere = {name for name, _, affirmed in mentions if affirmed}
        last = {name for name, at, affirmed in mentions if affirmed and start <= at < end}
        if len(last) == 1 and (everywhere == last or self._concludes(text[start:end])):
            return last.pop() or None
        if len(last) > 1:
            so = list(p.SO.finditer(text, start, end))
            behind = {name for name, at, affirmed in mentions if so and affirmed and so[-1].end() <= at < end}
            behind = behind if len(behind) == 1 else self._predicate(text[start:end])
            return behind.pop() or None if behind else None
        if len(everywhere) == 1 and self._alone(text, *everywhere):
            return everywhere.pop()
        return None

    def actual(self, text: str) -> str | None:
        """The one option behind "actual" or "actually" in the last sentence."""
        start, end = _last_sentence(text)
        words = list(p.ACTUAL.finditer(text, max(start, end - 4 * SENTENCE), end))
        found = self.affirmed(text[words[-1].end() : end]) if words else set()
        return found.pop() if len(found) == 1 else None

    def _predicate(self, sentence: str) -> set[str]:
        """The option that a sentence with one verb ends with: half of 36 is 18."""
        verbs = list(islice(p.IS.finditer(sentence), 2))
        mentions = list(self._mentions(sentence))
        name, at, affirmed = mentions[-1] if mentions else ("", 0, False)
        ends = [one.end() for one in (self._named or p.NEVER).finditer(sentence, at)]
        if len(verbs) != 1 or not affirmed or len(ends) != 1 or not p.OVER.match(sentence, ends[0]):
            return set()
        start = verbs[0].end()
        return {name} if start <= at and sentence[start:at].casefold() in ("", "the ", "a ", "an ") else set()

    def _concludes(self, sentence: str) -> bool:
        """Whether a sentence is a conclusion, beside others that name other options."""
        return bool(p.CONCLUSION.search(sentence[: 4 * SENTENCE])) or any(
            p.OVER.match(sentence, one.end()) for one in (self._named or p.NEVER).finditer(sentence)
        )

    def _alone(self, text: str, name: str) -> bool:
        """Whether an option that is a number is the only number of the text."""
        option = self.texts[self.letters.index(name)] if name else ""
        if not re.fullmatch(r"[\d.,/-]+", option):
            return bool(name)
        numbers = {found[0] for found in re.finditer(r"(?<![\w.])\d{1,20}(?:\.\d{1,20})?", text)}
        return numbers == {option}

    def _mentioned(self, text: str) -> bool:
        return bool(self._named and self._named.search(text))

    def _mentions(self, text: str) -> Iterator[tuple[str, int, bool]]:
        """Each option that is named: its letter ("": not exactly), its place, and whether it is affirmed."""
        if self._named is None:
            return
        found = list(deque(self._named.finditer(text), READ_BACK))
        labels = [p.LABELLED.search(text[max(0, one.start() - 8) : one.start()]) for one in found]
        listed = len({label[1] for label in labels if label}) > 1
        for one, label in zip(found, labels):
            said = self.exactly(one[0], one.end())
            name = said.letter or "" if said else ""
            wrong = (label is not None and (listed or label[1] != name)) or self._mismatched(text, one, name)
            yield name, one.start(), not wrong and self._stands(text, one)

    def mismatched(self, text: str) -> bool:
        """Whether an option's text stands beside another option's letter: Paris (option A)."""
        if self._named is None:
            return False
        found = deque(self._named.finditer(text), READ_BACK)
        return any(
            self._mismatched(text, one, said.letter or "")
            for one in found
            if (said := self.exactly(one[0], one.end()))
        )

    def _mismatched(self, text: str, one: re.Match[str], name: str) -> bool:
        letter = p.ITS_LETTER.match(text, one.end())
        return letter is not None and letter[1] in self.letters and letter[1] != name

    def _stands(self, text: str, one: re.Match[str]) -> bool:
        """Whether an option is affirmed where it stands."""
        before, after = sentence_before(text, one.start()), sentence_after(text, one.end())
        if after.rstrip().endswith("?") or any(
            pattern.search(before) for pattern in (p.DENIED, p.SUPPOSED, p.BESIDE)
        ):
            return False
        if p.WRONG.match(after) or p.CROSSED.match(after) or p.PEOPLE.search(before):
            return False
        if one[0][0].isdigit() and (
            p.COMPUTED.match(after)
            or p.COUNTED.match(after)
            or p.OPERATOR_BEFORE.search(before)
            or p.NUMBERED.search(before)
        ):
            return False
        if one[0][0].isdigit() and not before.strip() and re.match(r"[.)]\s", after):
            return False  # 4. in a list
        if one[0].casefold() in p.COMMON:
            first = not before.strip() and p.FIRST_WORD.match(after)
            return bool(first or (p.COMMON_BEFORE.search(before) and p.OVER.match(after)))
        return True

    def named_part(self, text: str) -> str | None:
        """The option, a name of several words, whose distinctive end, or beginning, is all of the text."""
        said = [word for word in re.findall(r"[^\W\d_]+", text) if word.casefold() not in ("the", "a", "an")]
        if not said or len(text) > SENTENCE or re.search(r"\d", text):
            return None
        found = []
        for name, option in zip(self.letters, self.options):
            words = re.findall(r"[^\W\d_]+", option)
            some, size = [word.casefold() for word in words], len(said)
            low = [word.casefold() for word in said]
            if size >= len(words) or not all(word[0].isupper() or word in p.PARTICLES for word in words):
                continue
            if some[-size:] == low or (some[:size] == low and set(some[size:]) <= p.KINDS):
                found.append(name)
        return found[0] if len(found) == 1 else None


def _bounded(pattern: str, text: str) -> str:
    """A pattern of an option's text that does not match in a longer word or number."""
    before = r"(?<![\w.,/^-])" if text[0].isalnum() else r"(?<!\w)"
    if not text[-1].isalnum():
        return before + pattern
    digit = r"(?![%/^]|[.,:]\d|\s?[°%]| [A-Z]\b)" if text[-1].isdigit() else ""
    return rf"{before}{pattern}(?!\w|-\w|'\w){digit}"


def _words(option: str) -> list[str]:
    """An option's text as words, without emphasis, braces and a full stop."""
    return [word for word in re.split(r"[\s{}]+", p.plain(option).rstrip(" \t\r\n{}.")) if word]


def skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where the pattern, which matches anywhere, ends."""
    match = pattern.match(text, at)
    return match.end() if match else at


def sentence_before(text: str, at: int) -> str:
    """The sentence up to here."""
    window = text[max(0, at - SENTENCE) : at]
    cuts = [window.rfind(mark) + len(mark) for mark in (". ", "! ", "? ", ": ", ";", "\n") if mark in window]
    return window[max(cuts, default=0) :]


def sentence_after(text: str, at: int) -> str:
    """The sentence from here on."""
    window = text[at : at + SENTENCE]
    end = re.search(r"[.!?;](?=\s|$)|\n", window)
    return window[: end.end()] if end else window


def _last_sentence(text: str) -> tuple[int, int]:
    """Where the last finished sentence begins and ends; a line without a full stop is one."""
    text = text.rstrip()
    cuts = [0, *(found.end() for found in p.SENTENCE_ENDS.finditer(text))]
    if cuts[-1] != len(text):
        cuts.append(len(text))
    if len(cuts) > 2 and text[-1] not in ".!?;)\"'" and text[cuts[-2] - 1] != "\n":
        del cuts[-1]
    return (cuts[-2], cuts[-1]) if len(cuts) > 1 else (0, 0)
