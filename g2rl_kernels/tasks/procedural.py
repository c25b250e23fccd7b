"""Procedural tasks of reasoning-gym."""

from __future__ import annotations

import importlib.util
import pickle
import warnings

from ..errors import ConfigError, need
from .answers import extractor
from .base import Item
from .gym import process
from .gym.judge import GymJudge, GymSpec
from .gym.maker import FEWEST_ITEMS, PROBES, Probed
from .verify import verify

CONSTANT_SHARE = 2 / 3  # warn of a constant answer that is right this often; yes or no is by chance at 1/2


class ReasoningGymTask:
    """A procedural data set of reasoning-gym, by name; `cfg` goes to its configuration.

    An item is made when it is asked for, by a process of its own (gym/maker.py): the same one in every
    process and after resuming. Warns if a constant answer is right for most items.

    Raises:
        ConfigError: a value cannot work; the message names it.
        TrainerError: reasoning-gym is not installed.
    """

    def __init__(
        self, name: str, size: int = 1000, seed: int = 0, cfg: dict | None = None, extract: str = "all"
    ):
        _check_installed()
        extractor(extract)
        for key, value, least in (("size", size, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"task: reasoning-gym {name}: {key}={value!r}: needs an integer from {least}"
                )
        if cfg is not None and (not isinstance(cfg, dict) or {"size", "seed"} & set(cfg)):
            what = "needs a mapping; size and seed stand beside it"
            raise ConfigError(f"task: reasoning-gym {name}: cfg={cfg!r}: {what}")
        self.spec = GymSpec(str(name), size, seed, dict(cfg or {}))
        self.judge = GymJudge(self.spec, extract)
        self._items: dict[int, bytes] = {}  # pickled, so that nobody changes them
        self._length, probed = process.process.ask("open", self.spec)
        warning = constant_answer(probed, extract)
        if warning:
            warnings.warn(f"task: reasoning-gym {name}: {warning}", stacklevel=2)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        index = range(self._length)[index]
        if index not in self._items:
            self._items[index] = process.process.ask("item", self.spec, index)
        item: Item = pickle.loads(self._items[index])
        return item

    def fingerprint(self) -> str:
        """A text that changes with the items, as another version of reasoning-gym may make them."""
        first = [self[index] for index in range(min(len(self), 3))]
        return repr([(item["question"], item["answer"]) for item in first])

    def known(self, item: Item) -> Item:
        return item

    def score(self, completion: str, item: Item) -> float:
        """1 for a right completion, at most 0.999 for partial credit, 0 where the scorer fails."""
        return verify([(self, item, completion)], answers=False)[0].score

    def answer(self, completion: str, item: Item) -> str | None:
        return verify([(self, item, completion)])[0].answer


def constant_answer(probed: Probed, extract: str = "all") -> str | None:
    """The warning about constant answers that are right for CONSTANT_SHARE of the items; None without."""
    found = {
        text: count
        for text, count in probed.credits.items()
        if count >= CONSTANT_SHARE * probed.items
        and (extract != "last_number" or extractor(extract)(text) == text)
    }
    if probed.items < FEWEST_ITEMS or not found:
        return None
    text = max(found, key=found.__getitem__)
    what = "almost any answer" if len(found) > len(PROBES) // 2 else f"the answer {text[:80]!r}"
    return (
        f"{what} earns full reward on {found[text]} of its first {probed.items} items: a model can learn to "
        "give it whatever the question. Change cfg, or leave the task out"
    )


def _check_installed() -> None:
    try:
        if importlib.util.find_spec("reasoning_gym") is not None:
            return
    except ValueError:  # sys.modules says that it cannot be imported
        pass
    raise need("reasoning-gym", ImportError("not installed"))
