"""From the rows of the experiments to the tables and figures of docs/evidence.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results" / "learning"


def value(row: dict[str, Any], measure: str) -> float:
    """Of one run: the mean over held-out problems, or a number of the geometry."""
    if measure in row["problems"]:
        numbers = row["problems"][measure]
        return sum(numbers) / len(numbers)
    return float(row["geometry"][measure])


def of_seeds(rows: Sequence[dict[str, Any]], system: str, measure: str) -> dict[int, float]:
    return {row["seed"]: value(row, measure) for row in rows if row["system"] == system}


def mean_of(rows: Sequence[dict[str, Any]], system: str, measure: str) -> float:
    values = of_seeds(rows, system, measure)
    return sum(values.values()) / len(values)
