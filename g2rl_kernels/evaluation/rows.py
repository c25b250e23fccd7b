"""One line of samples.jsonl: its fields as a type, and how a line is read, checked and written."""

from __future__ import annotations

import json
import math
import sys
from typing import Any, TypedDict, cast

from ..errors import TrainerError, short


class Asked(TypedDict):
    """A problem of a data set: what samples and measurements of it share."""

    problem: str  # its name, <data set>/<index in it>
    question: str  # before any template


class Verdict(TypedDict):
    """What a task says about a response."""

    score: float | None  # None: not verified yet
    answer: str | None  # the final answer, the same text for equal ones of a problem; None for no answer


class _Needed(Asked, Verdict):
    """The fields that every line has."""

    sample: int  # 0 to n - 1
    completion: str  # the response without special tokens


class Sample(_Needed, total=False):
    """One response to a problem.

    `g2rl eval` writes all fields but `length`; a file from elsewhere may leave out those below.
    """

    data: str  # the data set's name
    prompt: str  # the text that the model saw
    add_special_tokens: bool  # whether the tokenizer put its own tokens around the prompt
    tokens: list[int]  # the response, with its end token
    truncated: bool  # no end token came
    failure: str  # why the verifier could not judge the response, which then scores 0
    length: int  # tokens of the response, where `tokens` was left out (`without_texts`)


# The types that a line's values may have.
NEEDED: dict[str, tuple[type, ...]] = {
    "problem": (str,),
    "sample": (int,),
    "question": (str,),
    "completion": (str,),
    "score": (int, float, type(None)),
    "answer": (str, type(None)),
}
CHECKED = {**NEEDED, "data": (str,), "prompt": (str,), "tokens": (list,)}


def read_line(line: bytes, where: str) -> Sample:
    """The sample in a line of JSON. Raises TrainerError for a missing or wrong field of the line `where`."""
    try:
        row: dict[str, Any] = json.loads(line)
        missing = [key for key in NEEDED if key not in row]
    except (ValueError, TypeError):
        raise TrainerError(f"{where} is not a sample of g2rl eval") from None
    if missing:
        raise TrainerError(f"{where} is not a sample of g2rl eval: it has no {missing[0]!r}")
    for key in CHECKED:
        if key in row and not _fits(key, row[key]):
            raise TrainerError(f"{where} is not a sample of g2rl eval: {key}={short(row[key])}")
    return cast(Sample, row)


def write_line(row: Sample) -> str:
    """The sample as a line of JSON, with its line end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def without_texts(row: Sample) -> Sample:
    """The sample with `length` in place of prompt, completion and tokens: all that the metrics need."""
    kept = {key: value for key, value in row.items() if key not in ("prompt", "completion", "tokens")}
    kept["question"] = sys.intern(row["question"])  # n samples share one text
    kept["length"] = len(row.get("tokens", ()))
    return cast(Sample, kept)


def is_right(row: Sample, gate: float) -> bool:
    """Whether the sample's score reaches `gate`; False for one that is not verified."""
    return row["score"] is not None and row["score"] >= gate


def _fits(key: str, value: Any) -> bool:
    if isinstance(value, list) and not {int}.issuperset(map(type, value)):
        return False
    return isinstance(value, CHECKED[key]) and not (isinstance(value, float) and not math.isfinite(value))
