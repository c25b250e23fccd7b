"""Multiple choice: lettered options, and the letter that a completion chooses."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import ConfigError
from .answers import boxed, extractor
from .base import Item

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = r"[*_(\[{$\s]*(?:\\(?:text|textbf|mathrm|mathbf)\{)?[*_(\[\s]*([A-Z])(?![A-Za-z0-9'’])"
_STATED = re.compile(
    r"(?i:\b(?:answer|choice|option)\b(?:\s+(?:is|would be|must be|choice|option)\b)*)\s*[:=]?" + _LETTER
)
_LAST_LINE = re.compile(r"^" + _LETTER + r"(?:[*_)\]}$.,:\s]*$|[).:]\s)")


def choice_letter(text: str, count: int) -> str | None:
    """Which of `count` options a completion chooses: A, B, ..., or None.

    In this order: the last \\boxed{}, the last "answer is (B)" or "Answer: B", a last line that is a letter
    or begins as an option does ("B. Paris").
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
    """Multiple choice: the options are lettered below the question, and the answer is a letter.

    The field `answer` holds the letter, the option's index from 0, or its text.
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
        self.extract, self.items = extractor(extract), []
        if not rows:
            raise ConfigError(f"task: {source} holds no items")
        for number, row in enumerate(rows, 1):
            where = f"task: {source}, item {number}"
            for key in (question, answer, choices):
                if not isinstance(row, dict) or key not in row:
                    raise ConfigError(
                        f"{where}: no field {key!r}" + (f", only {', '.join(row)}" if row else "")
                    )
            options, gold = [str(option) for option in row[choices]], row[answer]
            known = LETTERS[: len(options)]
            if isinstance(gold, int) and 0 <= gold < len(known):
                letter = known[gold]
            elif str(gold).strip() in tuple(known):
                letter = str(gold).strip()
            elif str(gold) in options:
                letter = known[options.index(str(gold))]
            else:
                raise ConfigError(f"{where}: {answer}={gold!r} is none of its {len(options)} {choices}")
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
