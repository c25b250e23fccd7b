"""The `Task` protocol, and checked access to a task's items, scores and answers."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from ..errors import ConfigError, RewardError, one_line

Item = dict[str, Any]  # "question" (text), and whatever the task's score needs


class Task(Protocol):
    """Prompts and their verifier; the package's docstring explains the methods."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Item: ...
    def score(self, completion: str, item: Item) -> float: ...


class Judge(Protocol):
    """A library's verifier. It runs in worker processes, with limits (verify.py).

    Picklable, and its module does not import torch. `known` is what the judge needs of an item, from
    `task.known(item)`, picklable too; None in a vote without known answers. Methods may raise anything, use
    up memory or never return: the response then scores 0.
    """

    def score(self, completion: str, known: Any) -> float:
        """The score of a completion; 1 for a right one."""
        ...

    def answer(self, completion: str, known: Any) -> str | None:
        """The completion's final answer; None without one."""
        ...

    def same(self, first: str, second: str) -> bool:
        """Whether two texts returned by `answer` are the same answer."""
        ...


class Verdict(NamedTuple):
    """What a verifier says about a completion."""

    score: float  # 0 where the verifier failed
    answer: str | None  # the final answer; None for no answer
    failure: str | None = None  # why the verifier could not judge


def item_of(task: Task, index: int) -> Item:
    """task[index]. Raises ConfigError if that fails, or is not a dict with a text "question"."""
    where = f"task: {type(task).__name__}[{index}]"
    try:
        item = task[index]
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(error, 200)}"
        raise ConfigError(f"{where} raised {what}: check the task's keys") from error
    if not isinstance(item, dict) or not isinstance(item.get("question"), str):
        raise ConfigError(f"{where} must be a dict with a text 'question', got {str(item)[:80]!r}")
    return item


def score_completion(task: Task, completion: str, item: Item) -> float:
    """task.score(completion, item). Raises RewardError, with the prompt, if that fails or is not finite."""
    where = f"{type(task).__name__} on the prompt {item['question'][:200]!r}, completion {completion[:200]!r}"
    try:
        value = float(task.score(completion, item))
    except Exception as error:
        raise RewardError(f"the score raised {type(error).__name__}: {error}: {where}") from error
    if not math.isfinite(value):
        raise RewardError(f"the score is {value}: {where}")
    return value


def final_answer(task: Task, completion: str, item: Item) -> str | None:
    """task.answer(completion, item), or the completion for a task without that method; None for no answer."""
    answer = getattr(task, "answer", None)
    text = completion if answer is None else answer(completion, item)
    return None if text is None else text.strip() or None


def check_rows(rows: Sequence[Any], source: str, fields: Sequence[str]) -> None:
    """Raises ConfigError unless there are rows, and each is a dict with these fields."""
    if not rows:
        raise ConfigError(f"task: {source} holds no items")
    for number, row in enumerate(rows, 1):
        where = f"task: {source}, item {number}"
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: expected an object, got a {type(row).__name__}")
        for field in fields:
            if field not in row:
                raise ConfigError(f"{where}: no field {field!r}, only {', '.join(row)}")


def import_function(dotted: str) -> Callable[..., Any]:
    """The function named `package.module:function`; the current directory is searched too.

    Raises ConfigError if it cannot be imported, or is not callable.
    """
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
