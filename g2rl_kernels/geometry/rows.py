"""Types of what measured.jsonl and geometry.json hold: the numbers of a pair, a group, a problem, a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast

from ..evaluation.metrics import Estimate
from ..evaluation.rows import Asked, Verdict

Statistic = Literal[
    "cos_mean",
    "negative_pairs",
    "effective_rank",
    "semantic_cosine",
    "distinct_answers",
    "distinct_right",
    "accuracy",
    "entropy",
    "length",
]
Extreme = Literal["redundant", "opposed"]  # the pair with the largest, and with the smallest cosine

# What each number of a group is; None in a group without a pair, an encoder, scores ... to compute it from.
STATISTICS: dict[Statistic, str] = {
    "cos_mean": "mean gradient cosine over pairs",
    "negative_pairs": "share of pairs with a negative gradient cosine",
    "effective_rank": "directions in the group: effective rank of its matrix of cosines, from 1 to its size",
    "semantic_cosine": "mean cosine over pairs of the texts' sentence embeddings",
    "distinct_answers": "different final answers",
    "distinct_right": "different right answers",
    "accuracy": "share of right responses",
    "entropy": "nats a token, mean over all tokens",
    "length": "tokens a response",
}


class Pair(TypedDict):
    """Two responses to one problem."""

    samples: list[int]  # their two places in the group
    cosine: float  # of their features
    semantic: float | None  # of their embeddings; None without an encoder


class PairStatistics(TypedDict):
    """The `STATISTICS` over pairs of responses, which features and embeddings decide."""

    cos_mean: float | None
    negative_pairs: float | None
    effective_rank: float | None
    semantic_cosine: float | None


class ResponseStatistics(TypedDict):
    """The `STATISTICS` over single responses."""

    distinct_answers: int | None
    distinct_right: int | None
    accuracy: float | None
    entropy: float | None
    length: float | None


class GroupStatistics(PairStatistics, ResponseStatistics):
    """`STATISTICS` of the responses to one problem, with their cosines; ready for JSON."""

    responses: int  # how many there are
    measured: list[int]  # the k of them whose feature is finite and not zero, as places in the group
    redundant: Pair | None  # of different texts, the pair with the largest cosine; None without pairs
    opposed: Pair | None  # the one with the smallest cosine
    cosine: list[list[float]]  # [k, k], of the features
    semantic: list[list[float]] | None  # [k, k], of the embeddings


class MeasuredProblem(Asked, GroupStatistics):
    """A problem and the statistics of its responses: an entry of "problems" in geometry.json."""


class MeasuredLine(MeasuredProblem):
    """A line of measured.jsonl."""

    digest: str  # of the responses measured


def without_digest(line: MeasuredLine) -> MeasuredProblem:
    """The line's problem, as geometry.json holds it."""
    return cast(MeasuredProblem, {key: value for key, value in line.items() if key != "digest"})


class ProblemMean(Estimate):
    """A mean over problems, with its interval."""

    problems: int  # how many have the statistic


Overall = dict[Statistic, ProblemMean | None]  # None: no problem has the statistic


class ShownSample(Verdict):
    """A response as the page shows it."""

    completion: str
    right: bool | None  # None: not verified


@dataclass
class ModelGeometry:
    """The measurements of one model, for the page and geometry.json."""

    name: str
    model: str  # as given on the command line
    settings: dict[str, Any]  # what else the numbers depend on
    problems: list[MeasuredProblem]
    overall: Overall
    samples: dict[tuple[str, int], ShownSample]  # by (problem, place in the group)
    difference: Overall | None = None  # to the first model

    def sample(self, problem: str, place: int) -> ShownSample:
        """The response at this place of the problem's group; an empty one if it is not in `samples`."""
        empty: ShownSample = {"completion": "", "score": None, "answer": None, "right": None}
        return self.samples.get((problem, place), empty)

    def to_json(self) -> dict[str, Any]:
        """The model's entry in geometry.json: everything but the responses."""
        return {
            "name": self.name,
            "model": self.model,
            "settings": self.settings,
            "overall": self.overall,
            "difference": self.difference,
            "problems": self.problems,
        }
