"""The `Task` protocol, and checked access to a task's items, scores and answers."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from ..errors import ConfigError, RewardError, one_line, short, text_fault

Item = dict[str, Any]  # "question" (a `Question`), and whatever the task's score needs
Question = str | list[dict[str, Any]]  # a text, or messages with "role" and "content"


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
    """task[index]. Raises ConfigError if that fails, or is not a dict with a "question" (a `Question`)."""
    where = f"task: {type(task).__name__}[{index}]"
    try:
        item = task[index]
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(error, 200)}"
        raise ConfigError(f"{where} raised {what}: check the task's keys") from error
    question = item.get("question") if isinstance(item, dict) else None
    if not isinstance(question, (str, list)):
        got = f"got {str(item)[:80]!r}: a list of messages would do too"
        raise ConfigError(f"{where} must be a dict with a text 'question', {got}")
    fault = _messages_fault(question) if isinstance(question, list) else text_fault(question)
    if fault:
        raise ConfigError(f"{where}: question{fault}")
    return item


def question_text(question: Question) -> str:
    """A question as one text, different for different questions: messages as JSON."""
    if isinstance(question, str):
        return question
    ordered = ({"role": m["role"], "content": m["content"], **dict(sorted(m.items()))} for m in question)
    return json.dumps(list(ordered), ensure_ascii=False, default=str)


def score_completion(task: Task, completion: str, item: Item) -> float:
    """task.score(completion, item). Raises RewardError, with the prompt, if that fails or is not finite."""
    prompt = question_text(item["question"])[:200]
    where = f"{type(task).__name__} on the prompt {prompt!r}, completion {completion[:200]!r}"
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


def check_rows(
    rows: Sequence[Any], source: str, question: str, answer: str | None = None, others: Sequence[str] = ()
) -> None:
    """Checks rows of a file or a data set.

    Args:
        rows, source: the rows, and where they came from.
        question: the field with a `Question`.
        answer: the field with a text or a finite number; None: rows need no answer.
        others: fields that a row must have.

    Raises:
        ConfigError: there are no rows, or one is wrong. The message names the item, from 1, and the field.
    """
    if not rows:
        raise ConfigError(f"task: {source} holds no items")
    needed = [question, *([] if answer is None else [answer]), *others]
    for number, row in enumerate(rows, 1):
        where = f"task: {source}, item {number}"
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: expected an object, got a {type(row).__name__}")
        for field in needed:
            if field not in row:
                raise ConfigError(f"{where}: no field {field!r}, only {', '.join(map(str, row))}")
        asked = row[question]
        if isinstance(asked, list):
            fault = _messages_fault(asked)
        else:
            blank = f"={brief(asked)}: needs a text or a list of messages"
            fault = text_fault(asked) if is_text(asked) else blank
        if fault:
            raise ConfigError(f"{where}: {question}{fault}")
        if answer is not None and not is_text(row[answer]) and not is_number(row[answer]):
            hint = "; write the word that is to be answered" if isinstance(row[answer], bool) else ""
            raise ConfigError(f"{where}: {answer}={brief(row[answer])}: needs a text or a number{hint}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_text(value: Any) -> bool:
    """Whether a value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def brief(value: Any) -> str:
    """A value as Python writes it, cut to 80 characters, with its type if that does not show."""
    text = short(value, 80)
    plain = value is None or isinstance(value, (str, bool, int, float, list, dict))
    return text if plain else f"{text} (a {type(value).__name__})"


def _messages_fault(messages: list[Any]) -> str | None:
    """What is wrong with a list of messages, to follow the field's name; None if it can be a prompt."""
    if not messages:
        return "=[]: needs at least one message"
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"[{place}]={brief(message)}: needs a message, {{'role': ..., 'content': ...}}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return f"[{place}]: {key}={brief(message.get(key))}: needs a text"
            if fault := text_fault(message[key]):
                return f"[{place}]: {key}{fault}"
    if messages[-1]["role"] == "assistant":
        return f"[{len(messages) - 1}] is the assistant's: remove it, the model answers the last message"
    if not messages[-1]["content"].strip():
        return f"[{len(messages) - 1}]: content={messages[-1]['content']!r}: needs a text"
    return None


def digest(items: Iterable[Any]) -> str:
    """16 hexadecimal digits that change with the items, JSON values; others are taken by their text."""
    found = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        text = json.dumps(item, sort_keys=True, default=str)
        found.update((", " * (number > 0) + text).encode())
    found.update(b"]")
    return found.hexdigest()[:16]


def fingerprint(task: Any) -> dict[str, Any]:
    """{"items", "sha256"} of a task's data: what must be the same to resume a run.

    A task that keeps its items in a list `rows` is read whole. Others compute them: the number and the first
    question count, if the question is the same when it is read twice. A method `fingerprint`, which returns a
    text, replaces that.
    """
    own = getattr(task, "fingerprint", None)
    if callable(own):
        return {"items": len(task), "sha256": digest([own()])}
    if isinstance(getattr(task, "rows", None), list):
        return {"items": len(task), "sha256": digest(task[index] for index in range(len(task)))}
    first, again = (question_text(item_of(task, 0)["question"]) for _ in range(2))
    return {"items": len(task), "sha256": digest([first]) if first == again else None}


def stored_messages(task: Any) -> Iterator[Item]:
    """The first item with messages, if the task keeps its items in a list `rows`: to try a chat template."""
    count = len(task) if isinstance(getattr(task, "rows", None), list) else 0
    return islice(
        (item for item in map(task.__getitem__, range(count)) if isinstance(item["question"], list)), 1
    )


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
