"""Tasks: where prompts come from and how completions are verified.

A task is any object with three methods; nothing needs to be inherited:

    len(task)                    -> int    how many items there are
    task[i]                      -> dict   with "question" (text); everything else is the task's own
    task.score(completion, item) -> float  1 for a right completion, less for others; `score_gate` decides

and, for votes (labels=majority, maj@k), optionally a fourth:

    task.answer(completion, item) -> str | None   the final answer, the same text for equal ones

In a configuration a task is one mapping, and `tasks` is a list of them (their items are joined):

    kind: reasoning_gym, name: chain_sum, size: 1000, seed: 0, cfg: {max_terms: 2}, extract: last_number
    kind: jsonl,  path: train.jsonl, question: problem, answer: solution       # checked by math-verify
    kind: hub,    path: org/dataset, split: train, question: ..., answer: ...  # the same, from a data set hub
    kind: python, function: my_package.my_module:make_task, args: {level: 3}   # returns any task

jsonl and hub take `score: module:function`, called with (completion, item), in place of math-verify.
With `choices: options` (a field with a list of texts) they are multiple choice, answered by a letter.
`extract` says which part of the completion is the answer: all | boxed | answer_tag | last_number.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from .errors import ConfigError, RewardError, TrainerError, need

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


def _boxed(text: str) -> str:
    """The content of the last \\boxed{...}, braces balanced; "" if there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 7 : end].strip()
    return ""


def _last(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.DOTALL)
    return found[-1].strip() if found else ""


EXTRACTORS: dict[str, Callable[[str], str]] = {
    "all": str.strip,
    "boxed": _boxed,
    "answer_tag": lambda text: _last(r"<answer>(.*?)</answer>", text),
    "last_number": lambda text: _last(r"-?\d+(?:\.\d+)?", text.replace(",", "")),
}


def _extractor(name: str) -> Callable[[str], str]:
    if name not in EXTRACTORS:
        raise ConfigError(f"task: extract={name!r}: choose one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]


class ReasoningGymTask:
    """A procedural data set of reasoning-gym, by name; `cfg` goes to its configuration."""

    def __init__(
        self, name: str, size: int = 1000, seed: int = 0, cfg: dict | None = None, extract: str = "all"
    ):
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise need("reasoning-gym", error) from None
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=1)
            raise ConfigError(
                f"task: reasoning-gym has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        self.extract = _extractor(extract)
        try:
            self.data = reasoning_gym.create_dataset(name, size=size, seed=seed, **(cfg or {}))
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"task: reasoning-gym {name}: cfg {cfg}: {error}") from None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        return self.data[index]

    def score(self, completion: str, item: Item) -> float:
        return float(self.data.score_answer(self.extract(completion), item))

    def answer(self, completion: str, item: Item) -> str:
        return self.extract(completion)


class AnswerTask:
    """Questions with a known answer, checked by math-verify or by a function of yours."""

    def __init__(
        self,
        rows: Sequence[Item],
        source: str,
        question: str = "question",
        answer: str = "answer",
        score: str | None = None,
        extract: str = "all",
    ):
        if not rows:
            raise ConfigError(f"task: {source} holds no items")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise ConfigError(
                    f"task: {source}, item {number}: expected an object, got a {type(row).__name__}"
                )
            for key in (question, *(() if score else (answer,))):
                if key not in row:
                    raise ConfigError(
                        f"task: {source}, item {number}: no field {key!r}, only {', '.join(row)}"
                    )
        self.rows, self.question_key, self.answer_key = rows, question, answer
        self.extract = _extractor(extract)
        self.function = import_function(score) if score else None
        if self.function is None:
            try:
                import math_verify  # noqa: F401
            except ImportError as error:
                raise need("math-verify", error) from None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        row = self.rows[index]
        return {**row, "question": str(row[self.question_key])}

    def score(self, completion: str, item: Item) -> float:
        completion = self.extract(completion)
        if self.function is not None:
            return self.function(completion, item)
        from math_verify import parse, verify

        gold = self._parsed_gold(item)
        if not gold:
            return float(completion.strip() == str(item[self.answer_key]).strip())
        return float(verify(gold, parse(completion)))

    def answer(self, completion: str, item: Item) -> str | None:
        """What the extractor finds; where math-verify judges, its reading, so that 0.5 and 1/2 are one."""
        completion = self.extract(completion)
        by_text = self.function is not None or not self._parsed_gold(item)
        return completion if by_text else math_answer(completion)

    def _parsed_gold(self, item: Item) -> list[Any]:
        """Empty, where math-verify finds no mathematics in it: then texts are compared."""
        from math_verify import parse

        # A bare answer (3/4, 1,024, (0, 2]) is parsed as mathematics, a worked solution as text with a \boxed
        gold = str(item[self.answer_key])
        return parse(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}")


def math_answer(completion: str) -> str | None:
    """math-verify's reading of a response's final answer, the same text for 0.5 and 1/2; None without one."""
    from math_verify import parse

    parsed = parse(completion)
    return str(_exact(parsed[0])) if parsed else None


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
    boxed = re.match(_LETTER, _boxed(text))
    stated = _STATED.findall(text)
    last = _LAST_LINE.match(lines[-1]) if lines else None
    for letter in (boxed and boxed[1], stated and stated[-1], last and last[1]):
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
        self.extract, self.items = _extractor(extract), []
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


def rows_task(rows: Sequence[Item], source: str, **keys: Any) -> AnswerTask | ChoiceTask:
    """Multiple choice where a field of choices is named, else questions with a known answer."""
    return ChoiceTask(rows, source, **keys) if "choices" in keys else AnswerTask(rows, source, **keys)


def _exact(expression: Any) -> Any:
    """A number as a fraction where it is one, anything else as it is."""
    if not getattr(expression, "is_number", False):
        return expression
    import sympy

    return sympy.nsimplify(expression, rational=True)


def jsonl_task(path: str, **keys: Any) -> AnswerTask | ChoiceTask:
    return rows_task(read_jsonl(path), str(path), **keys)


def read_jsonl(path: str) -> list[Any]:
    """The values in a file of one JSON text a line, but for empty lines; ConfigError names a wrong line.

    A line ends at \\n or \\r\\n and nowhere else: JSON texts may hold U+2028 and other line separators.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except OSError as error:
        raise ConfigError(f"task: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"task: {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ConfigError(f"task: {path}, line {number} is not JSON: {error}") from None
    return rows


def hub_task(
    path: str, split: str = "train", name: str | None = None, **keys: Any
) -> AnswerTask | ChoiceTask:
    return rows_task(read_hub(path, split, name), path, **keys)


def read_hub(path: str, split: str, name: str | None) -> list[Any]:
    try:
        import datasets
    except ImportError:
        raise TrainerError(
            f"task: {path}: pip install datasets, or save it as JSONL and use kind: jsonl"
        ) from None
    try:
        return list(datasets.load_dataset(path, name, split=split))
    except (OSError, ValueError) as error:
        raise ConfigError(f"task: data set {path}: {' '.join(str(error).split())[:300]}") from None


def python_task(function: str, args: dict | None = None) -> Task:
    task = import_function(function)(**(args or {}))
    missing = [name for name in ("__len__", "__getitem__", "score") if not hasattr(task, name)]
    if missing:
        raise ConfigError(f"task: {function} returned a {type(task).__name__} without {', '.join(missing)}")
    return task


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


KINDS: dict[str, Callable[..., Task]] = {
    "reasoning_gym": ReasoningGymTask,
    "jsonl": jsonl_task,
    "hub": hub_task,
    "python": python_task,
}


def load_task(spec: dict[str, Any]) -> Task:
    """One task from its mapping in the configuration."""
    if not isinstance(spec, dict) or spec.get("kind") not in KINDS:
        raise ConfigError(f"task {spec!r}: needs kind: one of {', '.join(KINDS)}")
    build, keys = KINDS[spec["kind"]], {key: value for key, value in spec.items() if key != "kind"}
    rows = set(inspect.signature(AnswerTask).parameters) | set(inspect.signature(ChoiceTask).parameters)
    known = set(inspect.signature(build).parameters) | rows - {"rows", "source"}
    if spec["kind"] in ("reasoning_gym", "python"):
        known = set(inspect.signature(build).parameters)
    for key in keys:
        if key not in known - {"keys"}:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"task: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        return build(**keys)
    except TypeError as error:
        raise ConfigError(f"task {spec['kind']}: {error}") from None


def load_tasks(specs: Sequence[dict[str, Any]]) -> list[Task]:
    if not specs:
        raise ConfigError("tasks: none given; e.g. tasks: [{kind: reasoning_gym, name: chain_sum}]")
    return [load_task(spec) for spec in specs]
