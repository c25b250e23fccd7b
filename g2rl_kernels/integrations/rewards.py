"""Reward functions that recipes name by dotted path: 1 for a right answer, 0 for a wrong one."""

from __future__ import annotations

from typing import Any

from ..tasks.answers import EXTRACTORS


def last_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1.0 where the last number in a completion (a text or a conversation) is the data set's `answer`."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    found = map(EXTRACTORS["last_number"], texts)
    return [float(number == str(right).strip()) for number, right in zip(found, answer)]
