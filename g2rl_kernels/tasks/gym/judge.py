"""reasoning-gym's scorers as a judge, and the data sets they belong to. Runs in processes without torch."""

from __future__ import annotations

import difflib
import random
import re
import zlib
from decimal import Decimal
from typing import Any, NamedTuple

from ..answers import extractor

# Some scorers give nearly full credit to a wrong answer: 0.99 for one wrong cell of 100, 0.9999 for a second
# too many, 1 - 1e-16 for a word with a letter too many. Full credit is 1.0 to the bit in all data sets.
MOST_PARTIAL_CREDIT = 0.999
# Partial credit for each word in its place: full for the right words with others behind them.
_WORD_BY_WORD = {"letter_jumble", "word_sorting"}
_WORD = re.compile(r"[^\s,]+")
_NUMBER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)?(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3})?", re.ASCII)


class GymSpec(NamedTuple):
    """Which data set of reasoning-gym, and what goes to its configuration."""

    name: str
    size: int
    seed: int
    cfg: dict[str, Any]


def make_data(spec: GymSpec) -> Any:
    """The data set.

    Raises ImportError without reasoning-gym, LookupError for a name that it lacks, and whatever its
    configuration raises.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if spec.name not in DATASETS:
        near = difflib.get_close_matches(spec.name, DATASETS, n=1)
        raise LookupError("no such data set" + (f"; did you mean {near[0]!r}?" if near else ""))
    cfg = dict(spec.cfg)
    if spec.name == "composite" and isinstance(cfg.get("datasets"), list):
        from reasoning_gym.composite import DatasetSpec

        cfg["datasets"] = [DatasetSpec(**{"weight": 1, "config": {}, **one}) for one in cfg["datasets"]]
    seed_globally(spec.seed, -1)
    return reasoning_gym.create_dataset(spec.name, size=spec.size, seed=spec.seed, **cfg)


def seed_globally(seed: int, index: int) -> None:
    """Seeds the global generators, which a few data sets draw from beside their own."""
    import numpy

    value = zlib.crc32(f"{seed} {index}".encode())
    random.seed(value)
    numpy.random.seed(value)


class GymJudge:
    """Scores the part of a completion that `extract`, a key of EXTRACTORS, names. `known` is the item.

    A score is 1.0 for a right answer only: partial credit is cut to at most MOST_PARTIAL_CREDIT.
    """

    def __init__(self, spec: GymSpec, extract: str = "all", data: Any = None):
        self.spec, self.extract, self._data = spec, extract, data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def prepare(self) -> None:
        """Loads reasoning-gym, and makes the data set."""
        if self._data is None:
            self._data = make_data(self.spec)

    def score(self, completion: str, known: dict[str, Any]) -> float:
        """Raises what the scorer raises, and ValueError for a score that is not from 0 to 1."""
        self.prepare()
        answer = extractor(self.extract)(completion)
        score = float(self._data.score_answer(answer, known))
        if not 0 <= score <= 1 + 1e-9:  # NaN too
            raise ValueError(f"reasoning-gym {self.spec.name}: the score is {score}, not from 0 to 1")
        full = score == 1 and not (self._source(known) in _WORD_BY_WORD and _more_words(answer, known))
        return 1.0 if full else min(score, MOST_PARTIAL_CREDIT)

    def _source(self, known: dict[str, Any]) -> str:
        """The data set that an item is from: composite joins several."""
        return str(known["metadata"]["source_dataset"]) if self.spec.name == "composite" else self.spec.name

    def answer(self, completion: str, known: Any) -> str | None:
        return extractor(self.extract)(completion).strip() or None

    def same(self, first: str, second: str) -> bool:
        """Equal texts, or equal numbers: 3 and 3.0. A leading zero may matter: 011 is not 11."""
        if first == second:
            return True
        numbers = [Decimal(text) for text in (first, second) if _is_number(text)]
        return len(numbers) == 2 and numbers[0] == numbers[1]


def _more_words(answer: str, known: dict[str, Any]) -> bool:
    return len(_WORD.findall(answer)) > len(_WORD.findall(known["answer"]))


def _is_number(text: str) -> bool:
    return len(text) <= 1000 and any(map(str.isdigit, text)) and _NUMBER.fullmatch(text) is not None
