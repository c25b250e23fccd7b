"""Which runs collapsed. docs/evidence.md has had this definition since before the runs that it counts.

A run collapsed if, on the held-out problems after training,

- its pass@1 is below the start's, by more than two standard errors of the samples; or
- its entropy is under 0.02 nats a token, and its pass@1 under half of what GRPO reached from the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .experiment import POINTS, Row
from .settings import SETTINGS

BASELINE = "GRPO"
ERRORS = 2.0  # standard errors below the start
ENTROPY = 0.02  # nats a token
SHARE = 0.5  # of GRPO's pass@1


def accuracy(row: Row) -> tuple[float, float]:
    """pass@1 of a run on the held-out problems, and its variance over other samples to them."""
    return _of_problems(row["problems"]["pass@1"], row["setting"])


def start_accuracy(row: Row) -> tuple[float, float]:
    """`accuracy` of the start model.

    Rows of before it was stored have the accuracy in the first twentieth of training in its place.
    """
    if "start" in row:
        return _of_problems(row["start"]["problems"]["pass@1"], row["setting"])
    base, first = SETTINGS[row["setting"]].base, row["curves"]["accuracy"][0]
    count = base["batch_size"] * -(-base["steps"] // POINTS)
    return first, first * (1 - first) / count


def _of_problems(shares: Sequence[float], setting: str) -> tuple[float, float]:
    samples = SETTINGS[setting].samples
    variance = sum(share * (1 - share) for share in shares) / samples / len(shares) ** 2
    return sum(shares) / len(shares), variance


def reason(row: Row, rows: Sequence[Row]) -> str | None:
    """Why a run counts as collapsed, in a few words; None if it does not.

    rows: of the same setting. Where GRPO lacks the seed, and for GRPO itself, its mean over seeds counts.
    """
    now, start = accuracy(row), start_accuracy(row)
    if now[0] < start[0] - ERRORS * math.sqrt(now[1] + start[1]):
        return f"pass@1 {now[0]:.3f}, at the start {start[0]:.3f}"
    grpo = {one["seed"]: accuracy(one)[0] for one in rows if one["system"] == BASELINE}
    entropy = row["geometry"]["entropy"]
    if not grpo or entropy >= ENTROPY:
        return None
    mean = sum(grpo.values()) / len(grpo)
    theirs = mean if row["system"] == BASELINE else grpo.get(row["seed"], mean)
    if now[0] < SHARE * theirs:
        return f"entropy {entropy:.3f} nats, pass@1 {now[0]:.3f}, GRPO's {theirs:.3f}"
    return None


def collapses(rows: Sequence[Row], system: str) -> dict[int, str]:
    """The seeds of a system that collapsed, with the reason of each."""
    found = {row["seed"]: reason(row, rows) for row in rows if row["system"] == system}
    return {seed: said for seed, said in sorted(found.items()) if said is not None}
