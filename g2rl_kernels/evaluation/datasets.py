"""Data sets that reasoning models are measured on, by name: read from the hub, or from a file in its format.

`load_data` reads what `--data` is given:
    math500                              from the hub
    math500=path.jsonl                   a file in the data set's own format: .jsonl, .json, .csv, .parquet
    reasoning_gym:chain_sum              200 problems, other ones than the trainer's default seed makes
    sums={kind: reasoning_gym, ...}      any task of a training recipe, here under the name sums
"""

from __future__ import annotations

import csv
import difflib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import home
from ..errors import ConfigError, TrainerError, need, one_line
from ..tasks.answers import AnswerTask
from ..tasks.base import Item, brief, is_number, is_text
from ..tasks.choices import LETTERS, ChoiceTask, read_options
from ..tasks.sources import load_task, read_hub, read_jsonl
from .samples import DataSet

MATH = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
CHOICE = "{question}\n\nPlease reason step by step, and put the letter of your answer within \\boxed{}."


def _answered(question: Sequence[str], answer: Sequence[str]) -> Callable[[Item], Item]:
    """A reader of rows as {question, answer}, each from the first of these fields that the row has.

    Copies of a data set name their fields differently.
    """

    def read(row: Item) -> Item:
        asked, known = _first(row, question), _first(row, answer)
        if not isinstance(asked[1], list):
            _need(is_text(asked[1]), *asked, "a text or a list of messages")
        _need(is_text(known[1]) or is_number(known[1]), *known, "a text or a number")
        return {"question": asked[1], "answer": known[1]}

    return read


def _gsm8k(row: Item) -> Item:
    """The answer is what follows "####" at the end of a worked solution."""
    answer = _first(row, ("answer",))[1]
    if not is_number(answer):
        answer = _text(row, "answer").rpartition("####")[2].strip()
    return {"question": _text(row, "question"), "answer": answer}


def _gpqa(row: Item) -> Item:
    """The file lists the right answer first; the options are shuffled with the question as the seed."""
    names = ("Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))
    options = [_text(row, name).strip() for name in names]
    question, order = _text(row, "Question"), list(range(4))
    random.Random(question).shuffle(order)
    return _lettered(question, [options[i] for i in order], order.index(0))


def _mmlu_pro(row: Item) -> Item:
    """Up to ten options; earlier copies of the data set fill them up with "N/A", which is dropped."""
    _, options = _first(row, ("options",))
    if isinstance(options, str):  # as a CSV file holds them
        with suppress(ValueError):
            options = json.loads(options)
    options, _ = read_options(options, "options")
    letter = _first(row, ("answer",))[1]
    letter, letters = letter.strip() if isinstance(letter, str) else letter, LETTERS[: len(options)]
    if letter not in tuple(letters):
        raise ValueError(f"answer={brief(letter)} is not a letter of its {len(options)} options")
    right = letters.index(letter)
    kept = [at for at, option in enumerate(options) if option != "N/A" or at == right]
    return _lettered(_text(row, "question"), [options[at] for at in kept], kept.index(right))


def _lettered(question: str, options: Sequence[str], right: int) -> Item:
    """A row in which the answer cannot be taken for an option's text."""
    letters = list(LETTERS[: len(options)])
    return {"question": question, "choices": {"text": options, "label": letters}, "answer": letters[right]}


def _first(row: Item, names: Sequence[str]) -> tuple[str, Any]:
    """The first of these fields that the row has, and its value; KeyError without one."""
    for name in names:
        if name in row:
            return name, row[name]
    raise KeyError(" or ".join(names))


def _text(row: Item, name: str) -> str:
    """row[name]; ValueError unless it is a text that is not blank."""
    value = _first(row, (name,))[1]
    _need(is_text(value), name, value, "a text")
    return str(value)


def _need(fits: bool, name: str, value: Any, what: str) -> None:
    if not fits:
        raise ValueError(f"{name}={brief(value)}: needs {what}")


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub, and how its rows become {question, answer} or {question, choices, answer}."""

    hub: str  # its name there, owner/name
    split: str
    read: Callable[[Item], Item]
    config: str | None = None
    choice: bool = False  # multiple choice

    @property
    def template(self) -> str:
        """The prompt template: asks for steps, then for an answer in a box."""
        return CHOICE if self.choice else MATH


_COMPETITION = _answered(("problem", "Problem", "question"), ("answer", "Answer", "solution"))
HUB_DATASETS = {
    "math500": HubDataset("HuggingFaceH4/MATH-500", "test", _COMPETITION),
    "amc23": HubDataset("math-ai/amc23", "test", _COMPETITION),
    "aime24": HubDataset("HuggingFaceH4/aime_2024", "train", _COMPETITION),
    "aime25": HubDataset("math-ai/aime25", "test", _COMPETITION),
    "gsm8k": HubDataset("openai/gsm8k", "test", _gsm8k, config="main"),
    "gpqa": HubDataset("Idavidrein/gpqa", "train", _gpqa, config="gpqa_diamond", choice=True),
    "mmlu_pro": HubDataset("TIGER-Lab/MMLU-Pro", "test", _mmlu_pro, choice=True),
}


def load_data(spec: str, limit: int | None = None) -> DataSet:
    """One data set from a text as in `--data` (top of this file), cut to its first `limit` problems.

    Raises ConfigError for an unknown name, a file or hub that cannot be read, a row without its fields.
    """
    _check_limit(limit)
    name, equals, rest = spec.partition("=")
    if equals and rest.lstrip().startswith("{"):
        return DataSet(name, rest, load_task(_mapping(rest)), limit=limit)
    if not equals and name.startswith("reasoning_gym:"):
        kind = name.partition(":")[2]
        size = max(limit or 0, 200)  # the first problems are the same for all limits up to 200, acre's too
        task = load_task({"kind": "reasoning_gym", "name": kind, "size": size, "seed": 1_000_000})
        return DataSet(kind, name, task, limit=limit)
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    found = {re.sub(r"[^a-z0-9]", "", known): known for known in HUB_DATASETS}.get(key)
    if found is None:
        near = difflib.get_close_matches(name.lower(), HUB_DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(HUB_DATASETS)},"
        raise ConfigError(
            f"data {name!r}: {hint} or give reasoning_gym:<task>, or a task as "
            f"{name.partition(':')[0] or 'name'}='{{kind: jsonl, path: file.jsonl}}'"
        )
    dataset = HUB_DATASETS[found]
    source = rest if equals else dataset.hub
    raw = read_file(Path(home(rest))) if equals else _from_hub(found, dataset)
    rows = []
    for number, row in enumerate(raw, 1):
        try:
            _need(isinstance(row, dict), "row", row, "an object")
            _need(None not in row, "row", row.get(None), "as many values as the header has names")  # of CSV
            rows.append(dataset.read(row))
        except (KeyError, ValueError, ConfigError) as error:
            what = str(error)
            if isinstance(error, KeyError):
                what = f"no field {error.args[0]!r}, only {', '.join(map(str, row))}"
            where = f"data {found}: {source}, item {number}"
            raise ConfigError(f"{where}: {what}: expected rows of {dataset.hub}") from None
    task = ChoiceTask(rows, source) if dataset.choice else AnswerTask(rows, source)
    return DataSet(found, source, task, dataset.template, limit)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: must be at least 1, the number of problems")


def load_specs(specs: Iterable[dict[str, Any]], limit: int | None = None) -> list[DataSet]:
    """The tasks of a training recipe as data sets, each under its own name, cut as by `load_data`."""
    _check_limit(limit)
    found: list[DataSet] = []
    for spec in specs:
        task = load_task(spec)
        name = str(spec.get("name") or Path(str(spec.get("path") or spec.get("function"))).stem)
        taken = [one.name for one in found]
        unique = name if name not in taken else f"{name}-{sum(t.startswith(name) for t in taken) + 1}"
        found.append(DataSet(unique, json.dumps(spec), task, limit=limit))
    return found


def read_file(path: Path) -> list[Any]:
    """The rows of a .jsonl, .json (a list), .csv or .parquet file; ConfigError if it cannot be read."""
    kind = path.suffix.lower()
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is too small for long texts
    try:
        if kind == ".json":
            text = path.read_text(encoding="utf-8-sig")
            try:
                rows = json.loads(text)
            except ValueError:  # JSON lines under the name .json
                return read_jsonl(str(path))
            if not isinstance(rows, list):
                raise ConfigError(f"data: {path}: expected a list of objects, got a {type(rows).__name__}")
            return rows
        if kind == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file))
        if kind == ".parquet":
            try:
                from pyarrow import ArrowException, parquet
            except ImportError as error:
                raise need("pyarrow", error, "trl") from None
            try:
                table: list[Any] = parquet.read_table(path).to_pylist()
            except ArrowException as error:
                raise ConfigError(f"data: {path} is not a Parquet file: {one_line(error, 200)}") from None
            return table
        return read_jsonl(str(path))
    except OSError as error:
        raise ConfigError(f"data: {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"data: {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except csv.Error as error:
        raise ConfigError(f"data: {path} is not a CSV file: {error}") from None


def _from_hub(name: str, dataset: HubDataset) -> list[Any]:
    try:
        return read_hub(dataset.hub, dataset.split, dataset.config)
    except TrainerError as error:
        raise ConfigError(
            f"data {name}: cannot read {dataset.hub} from the hub: give a file in its format, "
            f"--data {name}=FILE.jsonl ({error})"
        ) from None
    except Exception as error:  # the hub's client raises many types of its own
        raise ConfigError(
            f"data {name}: cannot read {dataset.hub} from the hub: give a file in its format, "
            f"--data {name}=FILE.jsonl ({type(error).__name__}: {one_line(error, 200)})"
        ) from None


def _mapping(text: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise need("pyyaml", error) from None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"data: {text!r} is not a mapping, e.g. {{kind: jsonl, path: file.jsonl}}")
    return value
