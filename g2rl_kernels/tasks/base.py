"""What a task is, and how one is asked for items, scores and answers."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import ConfigError, RewardError

Item = dict[str, Any]


class Task(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Item: ...
    def score(self, completion: str, item: Item) -> float: ...


def item_of(task: Task, index: int) -> Item:
    """task[index]; ConfigError where that raises or is no mapping with a text "question"."""
    where = f"task: {type(task).__name__}[{index}]"
    try:
        item = task[index]
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"{where} raised {what}: check the task's keys") from error
    if not isinstance(item, dict) or not isinstance(item.get("question"), str):
        raise ConfigError(f"{where} must be a dict with a text 'question', got {str(item)[:80]!r}")
    return item


def score_completion(task: Task, completion: str, item: Item) -> float:
    """task.score, or RewardError naming the prompt where it raises or is no finite number."""
    where = f"{type(task).__name__} on the prompt {item['question'][:200]!r}, completion {completion[:200]!r}"
    try:
        value = float(task.score(completion, item))
    except Exception as error:
        raise RewardError(f"the score raised {type(error).__name__}: {error}: {where}") from error
    if not math.isfinite(value):
        raise RewardError(f"the score is {value}: {where}")
    return value


def final_answer(task: Task, completion: str, item: Item) -> str | None:
    """task.answer, which a task need not have: then the completion as it stands. None for no answer."""
    answer = getattr(task, "answer", None)
    text = completion if answer is None else answer(completion, item)
    return None if text is None else text.strip() or None


def import_function(dotted: str) -> Callable[..., Any]:
    """`package.module:function`, looked up from the current directory too."""
    module, colon, name = dotted.partition(":")
    if not colon:
        raise ConfigError(f"task: {dotted!r}: expected module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"task: cannot import {dotted}: {error}") from None
    if not callable(function):
        raise ConfigError(f"task: {dotted} is a {type(function).__name__}, not a function")
    return function
