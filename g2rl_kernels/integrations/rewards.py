"""Reward functions, for trainers that take them by dotted path; 1 for right, 0 for wrong."""

from __future__ import annotations

from typing import Any

from ..tasks.answers import EXTRACTORS


def last_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Whether the last number in each completion (a text or a conversation) is the data set's `answer`."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    found = map(EXTRACTORS["last_number"], texts)
    return [float(number == str(right).strip()) for number, right in zip(found, answer)]
