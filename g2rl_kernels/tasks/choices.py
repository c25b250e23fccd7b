"""Multiple choice: letters the options, and finds the letter that a completion chooses."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import ConfigError
from .answers import boxed, extractor
from .base import Item, check_rows

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = r"[*_(\[{$\s]*(?:\\(?:text|textbf|mathrm|mathbf)\{)?[*_(\[\s]*([A-Z])(?![A-Za-z0-9'’])"
_STATED = re.compile(
    r"(?i:\b(?:answer|choice|option)\b(?:\s+(?:is|would be|must be|choice|option)\b)*)\s*[:=]?" + _LETTER
)
_LAST_LINE = re.compile(r"^" + _LETTER + r"(?:[*_)\]}$.,:\s]*$|[).:]\s)")


def choice_letter(text: str, count: int) -> str | None:
    """The letter, A, B, ..., of the option that a completion chooses among `count`; None without a choice.

    Looks at the last \\boxed{}, then at the last "answer is (B)" or "Answer: B", then at a last line that is
    a letter or begins as an option does ("B. Paris").
    """
    lines = [line for line in text.splitlines() if line.strip()]
    in_box = re.match(_LETTER, boxed(text))
    stated = _STATED.findall(text)
    last = _LAST_LINE.match(lines[-1]) if lines else None
    for letter in (in_box and in_box[1], stated and stated[-1], last and last[1]):
        if letter and LETTERS.index(letter) < count:
            return str(letter)
    return None


class ChoiceTask:
    """Multiple choice: the options stand below the question with letters, and the answer is a letter.

    Args:
        rows: the items.
        source: where they came from, for messages.
        question, answer, choices: the names of these fields in a row. choices holds a list of texts; answer
            holds the right option's letter, its index from 0, or its text.
        extract: which part of a completion is searched for the letter, a key of EXTRACTORS.
    """

    def __init__(
        self,
        rows: Sequence[Item],
        source: str,
        question: str = "question",
        answer: str = "answer",
        choices: str = "choices",
        extract: str = "all",
    ):
        check_rows(rows, source, (question, answer, choices))
        self.extract, self.items = extractor(extract), list[Item]()
        for number, row in enumerate(rows, 1):
            options, gold = [str(option) for option in row[choices]], row[answer]
            known = LETTERS[: len(options)]
            if isinstance(gold, int) and 0 <= gold < len(known):
                letter = known[gold]
            elif str(gold).strip() in tuple(known):
                letter = str(gold).strip()
            elif str(gold) in options:
                letter = known[options.index(str(gold))]
            else:
                what = f"{answer}={gold!r} is not one of its {len(options)} {choices}"
                raise ConfigError(f"task: {source}, item {number}: {what}")
            listed = "\n".join(f"{name}. {option}" for name, option in zip(known, options))
            text = f"{str(row[question]).strip()}\n\n{listed}"
            self.items.append({"question": text, "choices": options, "letter": letter})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def score(self, completion: str, item: Item) -> float:
        return float(self.answer(completion, item) == item["letter"])

    def answer(self, completion: str, item: Item) -> str | None:
        return choice_letter(self.extract(completion), len(item["choices"]))
