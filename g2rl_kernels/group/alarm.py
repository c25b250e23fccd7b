"""Says once when a run is collapsing: its answers become alike and wrong."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .options import ShapingOptions

WINDOW = 8  # measurements
FALL = 0.5  # of the best window's accuracy
RISE = 0.2  # of the mean cosine since that window
ERRORS = 2.0  # standard errors of a difference between windows
ENTROPY = 0.02  # nats a token
ENTROPY_FALL = 0.25  # of the first window's entropy
RARE = 0.05  # accuracy that counts as wrong throughout
NAMES = ("accuracy", "cos_mean", "entropy")


@dataclass(frozen=True)
class _Window:
    """Means over the latest `WINDOW` measurements."""

    step: int  # of the last one
    accuracy: float
    error: float  # standard error of the accuracy
    cosine: float
    entropy: float  # NaN: not measured


class CollapseAlarm:
    """Watches the metrics of a run and warns once, in one sentence, when it collapses.

    It compares the mean of the latest `WINDOW` measurements with the best and the first of such means. A run
    is collapsing if

    - accuracy fell to half of the best or less, by more than two standard errors, while the mean cosine
      rose by 0.2 or more since then; or
    - entropy is under 0.02 nats and a quarter of the first, with accuracy at most half of the best, or 0.05.

    Accuracy near 1 with little entropy is success; noise, harder prompts and a slow start ring no alarm.

    Args:
        remedy: what to change, as the user writes it; see `remedy`.
    """

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        self.message: str | None = None  # of the alarm, once it has rung
        self._latest: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        self._best: _Window | None = None
        self._first = math.nan  # entropy of the first window that has one

    def watch(self, step: int, metrics: Mapping[str, Any], warn: bool = True) -> dict[str, float]:
        """Takes the metrics of a step, and warns if the alarm rings.

        step: steps done. metrics: `accuracy`, `cos_mean` and, where it is known, `entropy`. A step without
        accuracy is left out. warn: False on the ranks that do not log.

        Returns {"alarm": 1.0} from the alarm on, before it nothing.
        """
        if self.feed(step, *(metrics.get(name) for name in NAMES)) and warn:
            warnings.warn(f"g2rl: {self.message}", stacklevel=2)
        return {"alarm": 1.0} if self.message else {}

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes the metrics of the steps before a run is resumed, each with `step`; warns of nothing."""
        for row in rows:
            self.feed(row["step"], *(row.get(name) for name in NAMES))

    def feed(
        self, step: int, accuracy: float | None, cosine: float | None, entropy: float | None = None
    ) -> bool:
        """Takes one step's numbers; whether the alarm rings now, for the first and only time.

        accuracy: from 0 to 1; cosine: from -1 to 1; entropy: nats a token. None: not measured.
        """
        numbers = [math.nan if number is None else number for number in (accuracy, cosine, entropy)]
        if self.message or not (math.isfinite(numbers[0]) and math.isfinite(numbers[1])):
            return False
        self._latest.append((numbers[0], numbers[1], numbers[2]))
        if len(self._latest) < WINDOW:
            return False
        now = _means(step, self._latest)
        self._best = self._best or now
        if math.isnan(self._first):
            self._first = now.entropy
        found = self._fall(now, self._best) or self._certain(now, self._best, self._first)
        if now.accuracy > self._best.accuracy:
            self._best = now
        if found:
            back = f"from a checkpoint of step {self._best.step} or earlier"
            self.message = f"step {step}: {found}; {self.remedy}, {back}"
        return found is not None

    @staticmethod
    def _fall(now: _Window, best: _Window) -> str | None:
        fell = now.accuracy <= FALL * best.accuracy
        clear = best.accuracy - now.accuracy > ERRORS * math.hypot(now.error, best.error)
        if not (fell and clear and now.cosine - best.cosine >= RISE):
            return None
        return (
            f"answers become alike and wrong: accuracy fell from {best.accuracy:.2g} (step {best.step}) to "
            f"{now.accuracy:.2g} while the mean cosine rose from {best.cosine:.2f} to {now.cosine:.2f}"
        )

    @staticmethod
    def _certain(now: _Window, best: _Window, first: float) -> str | None:
        certain = now.entropy < min(ENTROPY, ENTROPY_FALL * first)
        if not (certain and now.accuracy <= max(FALL * best.accuracy, RARE)):
            return None
        return (
            f"the policy is certain of wrong answers: entropy fell from {first:.2g} to "
            f"{now.entropy:.2g} nats at an accuracy of {now.accuracy:.2g}"
        )


def _means(step: int, values: deque[tuple[float, float, float]]) -> _Window:
    accuracy, cosine, entropy = (sum(column) / len(values) for column in zip(*values))
    variance = sum((value[0] - accuracy) ** 2 for value in values) / (len(values) - 1)
    return _Window(step, accuracy, math.sqrt(variance / len(values)), cosine, entropy)


def remedy(options: ShapingOptions, algorithm: str = "g2rl", prefix: str = "") -> str:
    """What to change in a collapsing run, by the trainer's names: `prefix` + an option's.

    No shaping rule but `intent` draws wrong answers together (docs/evidence.md).
    """
    if algorithm == "g2rl" and options.lam > 0 and options.shaping == "intent":
        return f"try {prefix}shaping=right"
    return "try a lower learning rate or easier prompts"
