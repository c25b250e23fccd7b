"""Reward functions that recipes name by dotted path: 1 for a right answer, 0 for a wrong one."""

from __future__ import annotations

from typing import Any

from ..tasks.answers import EXTRACTORS


def last_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1.0 where the last number in a completion (a text or a conversation) is the data set's `answer`."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    found = map(EXTRACTORS["last_number"], texts)
    return [float(number == str(right).strip()) for number, right in zip(found, answer)]


def choice_letter(completions: list[Any], answer: list[Any], choices: list[Any], **_: Any) -> list[float]:
    """1.0 where a completion (a text or a conversation) chooses the right option.

    answer, choices: columns of the data set, with the values that `kind: jsonl, choices: ...` takes. Raises
    ConfigError for a row with other values.
    """
    from ..tasks import choices as multiple_choice

    found = []
    for number, (completion, right, row) in enumerate(zip(completions, answer, choices)):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        options, labels = multiple_choice.read_options(row, f"choice_letter: row {number}: choices")
        letter = multiple_choice.right_letter(right, options, labels, f"choice_letter: row {number}: answer")
        found.append(float(multiple_choice.chosen(text, options) == letter))
    return found
