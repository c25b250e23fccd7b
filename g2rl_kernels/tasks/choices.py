"""Multiple choice: letters the options, and takes the letter that a completion chooses (letters.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, text_fault
from .answers import extractor
from .base import Item, Question, brief, check_rows, is_text
from .letters import LETTERS, choice_letter

__all__ = ["LETTERS", "ChoiceTask", "choice_letter", "chosen", "read_options", "right_letter"]


class ChoiceTask:
    """Multiple choice: the options stand below the question with letters, and the answer is a letter.

    Args:
        rows: the items.
        source: where they came from, for messages.
        question, answer, choices: the names of these fields in a row. `read_options` and `right_letter` say
            which values choices and answer may have. The options are put below the last message of a question
            that is a list of messages.
        extract: which part of a completion is searched for the letter, a key of EXTRACTORS.

    Raises ConfigError, with item and field, for a row that cannot be used.
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
        check_rows(rows, source, question, others=(answer, choices))
        self.extract, self.rows = extractor(extract), list[Item]()
        for number, row in enumerate(rows, 1):
            where = f"task: {source}, item {number}"
            options, labels = read_options(row[choices], f"{where}: {choices}")
            letter = right_letter(row[answer], options, labels, f"{where}: {answer}")
            text = _with_options(row[question], options)
            self.rows.append({"question": text, "choices": options, "letter": letter})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        return self.rows[index]

    def score(self, completion: str, item: Item) -> float:
        return float(self.answer(completion, item) == item["letter"])

    def answer(self, completion: str, item: Item) -> str | None:
        return chosen(self.extract(completion), item["choices"])


def chosen(text: str, options: Sequence[str]) -> str | None:
    """The letter that a text chooses (`choice_letter`); the first one of options with equal texts."""
    letter = choice_letter(text, len(options), options)
    return None if letter is None else LETTERS[options.index(options[LETTERS.index(letter)])]


def read_options(value: Any, where: str) -> tuple[list[str], list[Any] | None]:
    """The options' texts, and their labels if they have some.

    value: a list of texts, or {"text": [...], "label": [...]}, whose labels are texts or numbers. where: item
    and field, for messages. Raises ConfigError for anything else, fewer than 2 options or more than 26.
    """
    labels: Any = None
    texts = value
    if isinstance(value, dict):
        texts, labels = value.get("text"), value.get("label")
    if not isinstance(texts, list) or (isinstance(value, dict) and not isinstance(labels, list)):
        form = "a list of texts, or {'text': [...], 'label': [...]}"
        raise ConfigError(f"{where}={brief(value)}: needs {form}")
    for place, text in enumerate(texts):
        if not is_text(text):
            raise ConfigError(f"{where}[{place}]={brief(text)}: needs a text: options are texts, in quotes")
        if fault := text_fault(text):
            raise ConfigError(f"{where}[{place}]{fault}")
    if not 2 <= len(texts) <= len(LETTERS):
        raise ConfigError(f"{where} has {len(texts)} options: needs 2 to {len(LETTERS)}")
    if labels is not None:
        wrong = [one for one in labels if not is_text(one) and type(one) is not int]
        if wrong or len(labels) != len(texts) or len({str(one).strip() for one in labels}) != len(labels):
            what = f"needs {len(texts)} different texts or numbers, one for each option"
            raise ConfigError(f"{where}: label={brief(labels)}: {what}")
    return [text.strip() for text in texts], labels


def right_letter(value: Any, options: Sequence[str], labels: Sequence[Any] | None, where: str) -> str:
    """The letter of the right option; the first one of options with equal texts.

    value: with labels a label, else the option's letter, or its index from 0 as a number; or the option's
    text. where: item and field, for messages. Raises ConfigError for another value, and for one that could be
    one option's letter or index and another one's text.
    """
    text = value.strip() if isinstance(value, str) else str(value) if type(value) is int else None
    names = LETTERS[: len(options)] if labels is None else [str(label).strip() for label in labels]
    found = {place for place, name in enumerate(names) if name == text}
    if labels is None and type(value) is int and 0 <= value < len(options):
        found.add(value)
    if text in options and not (found and labels):
        found.add(options.index(text))
    found = {options.index(options[place]) for place in found}
    if len(found) == 1:
        return LETTERS[found.pop()]
    got = f"{where}={brief(value)}"
    if found:
        both = " and ".join(LETTERS[place] for place in sorted(found))
        hint = "give the choices as {'text': [...], 'label': [...]}, and the label here"
        raise ConfigError(f"{got} may be option {both}, by its place or by its text: {hint}")
    form = "the label" if labels else "the letter, the index from 0 as a number,"
    raise ConfigError(f"{got} is not one of its {len(options)} options: needs {form} or the text")


def _with_options(question: Question, options: Sequence[str]) -> Question:
    """The question with the options and their letters below."""
    listed = "\n".join(f"{name}. {option}" for name, option in zip(LETTERS, options))
    if isinstance(question, str):
        return f"{question.strip()}\n\n{listed}"
    *before, last = question
    return [*before, {**last, "content": f"{last['content'].strip()}\n\n{listed}"}]
