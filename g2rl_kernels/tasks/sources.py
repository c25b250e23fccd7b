"""Builds tasks from a configuration: reasoning-gym, JSONL files, hub data sets, Python functions."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._files import home
from ..errors import ConfigError, TrainerError, one_line
from .answers import AnswerTask
from .base import Item, Task, import_function
from .choices import ChoiceTask
from .procedural import ReasoningGymTask


def rows_task(rows: Sequence[Item], source: str, **keys: Any) -> AnswerTask | ChoiceTask:
    """A `ChoiceTask` if keys name a field of choices, else an `AnswerTask`."""
    return ChoiceTask(rows, source, **keys) if "choices" in keys else AnswerTask(rows, source, **keys)


def jsonl_task(path: str, **keys: Any) -> AnswerTask | ChoiceTask:
    """kind: jsonl, with the keys of `rows_task`; ConfigError for a file or row that cannot be read."""
    return rows_task(read_jsonl(path), str(path), **keys)


def read_jsonl(path: str) -> list[Any]:
    """The JSON values of a file, one a line; empty lines are skipped, ConfigError names a wrong line.

    Lines end at \\n or \\r\\n only: JSON texts may hold U+2028 and other line separators.
    """
    try:
        # Some editors begin a file with a byte order mark.
        text = Path(home(path)).read_text(encoding="utf-8-sig")
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
    """kind: hub, a data set of the Hugging Face hub; name: its configuration. Else as `jsonl_task`."""
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
        raise ConfigError(f"task: data set {path}: {one_line(error, 300)}") from None


def python_task(function: str, args: dict | None = None) -> Task:
    """kind: python, what module:function gives for `args`; ConfigError if that is no `Task`."""
    task = import_function(function)(**(args or {}))
    missing = [name for name in ("__len__", "__getitem__", "score") if not hasattr(task, name)]
    if missing:
        raise ConfigError(f"task: {function} returned a {type(task).__name__} without {', '.join(missing)}")
    return task


KINDS: dict[str, Callable[..., Task]] = {
    "reasoning_gym": ReasoningGymTask,
    "jsonl": jsonl_task,
    "hub": hub_task,
    "python": python_task,
}


def load_task(spec: dict[str, Any]) -> Task:
    """The task that a mapping of the configuration describes; ConfigError names a wrong key or value."""
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
    """The tasks of a configuration, each a mapping with `kind`; ConfigError for none, or a wrong one."""
    if not specs:
        raise ConfigError("tasks: none given; e.g. tasks: [{kind: reasoning_gym, name: chain_sum}]")
    return [load_task(spec) for spec in specs]
