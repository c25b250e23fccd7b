"""Procedural tasks of reasoning-gym."""

from __future__ import annotations

import difflib

from ..errors import ConfigError, need
from .answers import extractor
from .base import Item


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
        self.extract = extractor(extract)
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
