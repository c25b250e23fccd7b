"""Finds the letter that a completion chooses, as a careful reader would.

`choice_letter` reads a completion from its end. The last of these decides:

    a container    \\boxed{B}, <answer>B. Paris</answer>: a letter or an option's text, and nothing else
    a statement    the answer is B; Answer: B; I'd go with B; B is correct; it must be B; Hence (B).

Without any of them: a hedged statement ("it might be B"), then a ticked letter ("C ✅"), the one option that
the last sentence concludes or ends with ("this leaves (C), as ..."), a last line that is a letter, an option
("B. Paris") or an option's text, a first line that is a letter or an option, the option that the last
sentence affirms in prose, and the only option that the text affirms (options.py).

Options that are called wrong, hypothetical or other people's choice are not chosen. Several letters, one
without an option, and a letter with another option's text are no answer. What follows an answer and begins
another question is not read.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise

from . import letter_patterns as p
from .options import READ_BACK, SENTENCE, Options, Said, sentence_after, sentence_before, skip
from .turns import TURN

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
READ = 200_000  # characters that are read, from the end
CONTENT = 400  # characters of a container's content; a longer one is no answer
TURNS = 50  # further questions of a completion that are told apart
SHORT = 4  # words of a statement that is an answer although it names no option


def choice_letter(text: str, count: int, options: Sequence[str] = ()) -> str | None:
    """The letter, A, B, ..., of the option that a completion chooses among `count`; None without a choice.

    options: their texts, if known: the answer may then be one of them. What follows </think> counts first.
    """
    reader = _reader(count, tuple(options))
    text = text[-READ:]
    thought, closed, rest = text.rpartition("</think>")
    said = reader.read(rest, prose="<think>" not in rest) if thought or closed else None
    said = said or reader.read(text, prose=not closed and "<think>" not in text)
    return said.letter if said else None


@lru_cache(maxsize=64)
def _reader(count: int, options: tuple[str, ...]) -> _Reader:
    return _Reader(count, options)


class _Reader:
    """Reads completions about some options."""

    def __init__(self, count: int, options: tuple[str, ...]):
        self.letters = LETTERS[:count]
        self.options = Options(self.letters, options)

    def read(self, text: str, prose: bool = True) -> Said | None:
        """What the first part, up to another question, that answers says; in prose only if this is asked."""
        text = p.plain(text)
        cuts = [0, *(turn.start() for turn in islice(TURN.finditer(text), TURNS)), len(text)]
        for start, end in pairwise(cuts):
            said = self._part(text[start:end], prose)
            if said is not None:
                return said
        return None

    def _part(self, text: str, prose: bool) -> Said | None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            return None
        hedged: Said | None = None
        unread = False
        for said, sure in self._last_first(text):
            if said.unread:
                unread = True
            elif sure:
                return said
            else:
                hedged = hedged or said
        if hedged is not None:
            return hedged
        ticks = [
            text[max(0, tick.start() - 80) : tick.start()]
            for tick in deque(p.TICKS.finditer(text), READ_BACK)
        ]
        ticked = {found[1] for before in ticks if (found := p.TICKED.search(before))}
        letter = ticked.pop() if len(ticked) == 1 else None
        letter = letter or self._last_sentence(lines[-1]) or self.options.actual(text)
        letter = letter or self._last_line(lines) or self._first_line(lines)
        if letter is None and self._other_text(lines):
            return Said(None, len(text), several=True)
        if letter is None and prose and not unread:
            letter = self.options.prose(text)
            if letter is None and len(text.split()) <= SHORT:
                letter = self.options.phrase(text.strip())
            label = p.LABEL.match(lines[0])
            if label and label[1] == letter and not label[0].endswith("A:"):
                letter = None  # the text takes back what it begins with
        return Said(letter, len(text)) if letter and letter in self.letters else None

    # --- statements and containers -------------------------------------------------------------------------

    def _last_first(self, text: str) -> Iterator[tuple[Said, bool]]:
        """What each statement and container says, and whether it is sure of it; the last first."""
        kinds = {
            p.STATED: self._stated,
            p.CHINESE: self._chinese,
            p.PICKED: self._picked,
            p.CONCLUDED: self._concluded,
            p.CALLED: self._called,
            p.WHICH: self._concluded,
            p.CORRECTED: self._concluded,
            p.REPLY: self._reply,
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
        before, rest = sentence_before(text, match.start()), sentence_after(text, match.end())
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
        return said or self._phrase(match, rest)

    def _phrase(self, match: re.Match[str], rest: str) -> Said | None:
        """The option that a statement names among other words."""
        if rest.rstrip().endswith("?") or (match["be"] and p.WRONG.match(rest)):
            return None
        letter, end = self.options.phrase(rest), match.end() + len(rest)
        short = not self.options.affirmed(rest) and 0 < len(rest.split()) <= SHORT
        return Said(letter, end, unread=letter is None) if letter or short else None

    def _reply(self, text: str, match: re.Match[str]) -> Said | None:
        """Q: What colour? A: Purple"""
        asked = text[max(0, match.start() - 2 * SENTENCE) : match.start()]
        if not p.ASKED.search(asked):
            return None
        said = self._object(text, match)
        if said is not None:
            return said if p.PAUSE.match(text, said.end) else None
        letter = self.options.phrase(sentence_after(text, match.end()))
        return Said(letter, match.end()) if letter else None

    def _chinese(self, text: str, match: re.Match[str]) -> Said | None:
        return self._at(text, match.end())

    def _picked(self, text: str, match: re.Match[str]) -> Said | None:
        """I'd go with B; not: choose B such that ..."""
        said = self._object(text, match)
        if said is None or p.OTHERS.search(sentence_before(text, match.start())):
            return None
        return said if p.PAUSE.match(text, said.end) or text[said.end - 1] in ")]}\"'" else None

    def _concluded(self, text: str, match: re.Match[str]) -> Said | None:
        """It must be B. Hence (B)."""
        said = self._object(text, match)
        if said is None and match.groupdict().get("it"):
            letter = self.options.named_part(sentence_after(text, match.end()))
            return Said(letter, match.end()) if letter else None
        if said is None or said.several or not p.OVER.match(text, said.end):
            return None
        before = sentence_before(text, match.start())
        return (
            None
            if p.OTHERS.search(before) or (match.groupdict().get("may") and p.BUT_MAYBE.search(before))
            else said
        )

    def _called(self, text: str, match: re.Match[str]) -> Said | None:
        """B is correct."""
        before = sentence_before(text, match.start())
        if p.OTHERS.search(before) or p.LISTED.search(before) or p.QUESTION.match(text, match.end()):
            return None
        if "would" in match[0] and p.UNREAL.search(before + sentence_after(text, match.end())):
            return None
        _, other = self.options.beside(text, match.end(1), match[1])
        return Said(None, match.end(), several=True) if other else self._letter(match[1], match.end())

    def _contained(self, text: str, match: re.Match[str]) -> Said | None:
        """A container's content, if it is a letter or an option's text, and nothing else."""
        content = " ".join(re.sub(r"[{}]", " ", match[0]).split())
        at = skip(p.KIND, content, 0)
        letter = p.LETTER.match(content, at)
        end = skip(p.CLOSE, content, letter.end()) if letter else 0
        bare = letter is not None and not content[end:].strip(" .")
        if not (bare and letter and letter[1].isupper()):
            option = self.options.exactly(content, match.end())
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
            return self._content(content, match.end())
        if bare:
            return self._letter(letter[1].upper(), match.end())
        said = self._at(content, at, wrapped=True)
        if said is None:
            return self._content(content, match.end())
        if said.several and content[said.end :].strip(" ."):
            return None
        separated = p.SEPARATOR.match(content, end) and letter[1].isupper()
        closed = end > letter.end() or self._own_text(content, end, letter[1])
        return said if said.several or separated or closed else None

    def _content(self, content: str, end: int) -> Said | None:
        """The option that a container's content names among other words."""
        letter = self.options.phrase(content)
        return Said(letter, end, unread=letter is None) if content else None

    # --- the letter or text in a statement -----------------------------------------------------------------

    def _object(self, text: str, match: re.Match[str]) -> Said | None:
        """What follows a statement's words: an option's text, which may begin like a filler, or a letter."""
        return self.options.at(text, match.start("filler")) or self._at(text, match.end())

    def _at(self, text: str, at: int, wrapped: bool = False) -> Said | None:
        """The option's text or the letter here; None for other words, a question, and a wrong option.

        wrapped: the letter is in brackets or quotes, so A and I are no English words.
        """
        said = self.options.at(text, at)
        if said is not None:
            return said
        start = skip(p.OPEN, text, at)
        letter = p.LETTER.match(text, start)
        if letter is None:
            return None
        name, end = letter[1].upper(), skip(p.CLOSE, text, letter.end())
        wrapped = wrapped or end > letter.end() or not set("([{\"'").isdisjoint(text[at:start])
        beside, other = self.options.beside(text, end, name)
        own, pause = beside > 0 and not other, p.PAUSE.match(text, end)
        if other:
            return Said(None, beside, several=True)
        operator = (p.CLOSED_OPERATOR if end > letter.end() else p.OPERATOR).match(text, end)
        if p.QUESTION.match(text, end) or (operator and not own):
            return None
        word = name in "AI" and not wrapped
        if letter[1].islower():
            if not pause or (word and not p.OVER.match(text, end)):
                return None
            if letter[1] in self.options.texts:
                return self.options.exactly(letter[1], end)
        elif word and not own and not pause and p.WORD.match(text, end):
            return None
        several = self._several(text, end)
        if p.WRONG.match(text, several or end) and not own:
            return self._letter(name, end) if several else None  # "B, C and D are wrong" chooses B
        return Said(None, several, several=True) if several else self._letter(name, end)

    def _own_text(self, text: str, end: int, letter: str) -> int:
        """Where the option's text behind its letter, which ends here, ends; 0 without it."""
        beside, other = self.options.beside(text, end, letter)
        return 0 if other else beside

    def _several(self, text: str, end: int) -> int:
        """Where a list of more letters (", C and D") ends; 0 without one."""
        last = 0
        for _ in self.letters:
            between = p.NEXT.match(text, end)
            letter = p.LETTER.match(text, between.end()) if between else None
            if letter is None or letter[1] in "ai":
                break
            end = skip(p.CLOSE, text, letter.end())
            word = letter[1].islower() or (letter[1] in "AI" and p.WORD.match(text, end))
            if word and not p.PAUSE.match(text, end) and not p.WRONG.match(text, end):
                break
            last = end
        return last

    def _letter(self, name: str, end: int) -> Said:
        return Said(name if name in self.letters else None, end)

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
        if self.options.mismatched(sentence):
            return None
        letter, start, end = marked[-1]
        ends = start > 0 and p.OVER.match(sentence, end)
        return letter if ends or p.CONCLUDES.search(sentence[:start]) else None

    def _last_line(self, lines: list[str]) -> str | None:
        """A last line that is a letter, an option, or an option's text."""
        line = lines[-1][skip(p.BULLET, lines[-1], 0) :]
        if p.BRACKETED.fullmatch(line.strip(" .")) and len(set(re.findall("[A-Z]", line))) > 1:
            return None
        letter = p.LETTER.match(line, skip(p.OPEN, line, 0))
        end = skip(p.CLOSE, line, letter.end()) if letter else 0
        if letter and not line[end:].strip(p.TRAILING):
            small = letter[1].islower()
            option = self.options.exactly(letter[1], end) if small else None
            if option is not None:
                return option.letter
            return None if small and len(lines) > 1 else self._letter(letter[1].upper(), end).letter
        option = self.options.exactly(line, 0) if len(line) <= CONTENT else None
        if option is not None:
            return option.letter
        if letter and letter[1].isupper() and p.REASONED.match(line, end):
            return self._letter(letter[1], end).letter
        return self._labelled(lines, line)

    def _first_line(self, lines: list[str]) -> str | None:
        """A first line that is a letter, or a letter with its option's text, and that is not taken back."""
        line = lines[0][skip(p.BULLET, lines[0], 0) :]
        letter = p.LETTER.match(line, skip(p.OPEN, line, 0))
        if letter is None or letter[1].islower() or len(lines) == 1:
            return None
        end = skip(p.CLOSE, line, letter.end())
        reasoned = p.REASONED.match(line, end)
        end = self._own_text(line, end, letter[1]) or end
        if not reasoned and (line[end:].strip(p.TRAILING) or any(map(p.TAKEN_BACK.search, lines[1:]))):
            return None
        return letter[1] if _labels(lines) <= {letter[1]} else None

    def _other_text(self, lines: list[str]) -> bool:
        """Whether the first or the last line is a letter with another option's text."""
        for line in (lines[0], lines[-1]):
            label = p.LABEL.match(line)
            if label and len(_labels(lines)) == 1:
                _, other = self.options.beside(line, label.end() - 1, label[1], label=True)
                if other:
                    return True
        return False

    def _labelled(self, lines: list[str], line: str) -> str | None:
        """The letter of a line "B. ..." that is not called wrong, if no other line has another letter."""
        label = p.LABEL.match(line)
        if label is None or label[1] not in self.letters or _labels(lines) != {label[1]}:
            return None
        end, other = self.options.beside(line, label.end() - 1, label[1], label=True)
        if other or (not end and (label[0].endswith("A:") or p.WRONG.search(line[:SENTENCE]))):
            return None
        if end and (p.DENIED_LATER.match(line, end) or p.QUESTION.match(line, end)):
            return None
        but = p.BUT_OTHER.search(line, end)
        return (
            None
            if p.CROSSED.match(line, label.end()) or (but and self.options.affirmed(line[but.end() :]))
            else label[1]
        )


def _labels(lines: list[str]) -> set[str]:
    """The letters that lines begin with."""
    return {found[1] for line in lines if (found := p.LABEL.match(line, skip(p.BULLET, line, 0)))}


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
