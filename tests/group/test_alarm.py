"""The alarm of a collapsing run: on recorded runs, and on made series."""

import json
import math
import random
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from benchmarks.learning.collapse import collapses
from benchmarks.learning.settings import SETTINGS
from g2rl_kernels.group.alarm import WINDOW, CollapseAlarm, remedy
from g2rl_kernels.group.options import ShapingOptions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "learning"
COLLAPSED = json.loads(Path(__file__).with_name("collapsed.json").read_text())  # a run of SmolLM2 on gcd

Point = tuple[float, float, float]  # accuracy, mean cosine, entropy


def rung(points: Iterable[Point]) -> int | None:
    """The step at which the alarm rings."""
    alarm = CollapseAlarm("")
    return next((step for step, point in enumerate(points, 1) if alarm.feed(step, *point)), None)


def recorded(row: dict) -> list[Point]:
    """A row's curves with one point a step; they are stored as means over some steps."""
    curves, steps = row["curves"], SETTINGS[row["setting"]].base["steps"]
    points = list(zip(curves["accuracy"], curves["cos_mean"], curves["entropy"]))
    return [point for point in points for _ in range(-(-steps // len(points)))]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_runs_that_learned_do_not_ring(path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def right(row: dict) -> float:
        return sum(row["problems"]["pass@1"]) / len(row["problems"]["pass@1"])

    grpo = [right(row) for row in rows if row["keys"]["algorithm"] == "grpo"]
    recovered = {("scarce", "G2RL intent, shape, 0.5", seed) for seed in (3, 5)}  # from a cosine of 0.8
    for row in rows:
        if rung(recorded(row)) and (row["setting"], row["system"], row["seed"]) not in recovered:
            assert right(row) < sum(grpo) / len(grpo) / 2, (row["system"], row["seed"])


def test_every_recorded_collapse_on_gcd_rings() -> None:
    rows = json.loads((RESULTS / "smollm2-gcd.json").read_text(encoding="utf-8"))["rows"]
    collapsed = [row for row in rows if row["seed"] in collapses(rows, row["system"])]
    assert collapsed
    assert all(rung(recorded(row)) for row in collapsed)


def test_recorded_collapses_ring_in_the_middle_of_the_run() -> None:
    """Seed 0 of the same variant twice, with two threads and, step by step, with one."""
    assert WINDOW < (rung(recorded(COLLAPSED)) or 0) <= 18
    alarm = CollapseAlarm("")
    alarm.replay(COLLAPSED["steps"])
    assert alarm.message is not None
    assert WINDOW < int(alarm.message.split()[1].rstrip(":")) <= 18
    assert "accuracy fell from" in alarm.message


def line(start: float, end: float, steps: int) -> list[float]:
    return [start + (end - start) * step / (steps - 1) for step in range(steps)]


def noisy(accuracies: list[float], cosines: list[float], entropies: list[float], n: int) -> Iterator[Point]:
    """Series of a batch of n answers: accuracies scatter as shares of n."""
    draw = random.Random(0)
    for accuracy, cosine, entropy in zip(accuracies, cosines, entropies):
        right = sum(draw.random() < accuracy for _ in range(n))
        yield right / n, cosine + draw.gauss(0, 0.05), entropy * math.exp(draw.gauss(0, 0.1))


HEALTHY = {
    "learns": (line(0.1, 0.9, 300), line(0.1, 0.5, 300), line(1.0, 0.1, 300)),
    "learns all and becomes certain": (line(0.3, 1.0, 300), line(0.1, 0.95, 300), line(0.5, 0.003, 300)),
    "stays": ([0.3] * 300, [0.2] * 300, [0.4] * 300),
    "nothing right for long": ([0.0] * 200 + line(0, 0.5, 100), line(0.1, 0.5, 300), line(1, 0.1, 300)),
    "alike from the start": (line(0.05, 0.6, 300), [0.9] * 300, [0.1] * 300),
    "harder prompts": ([0.6] * 150 + [0.15] * 150, [0.2] * 300, [0.3] * 300),
    "few right answers": ([0.02] * 300, line(0.1, 0.3, 300), line(1.0, 0.5, 300)),
}


@pytest.mark.parametrize("n", [16, 32, 512])
@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_series_do_not_ring(kind: str, n: int) -> None:
    assert rung(noisy(*HEALTHY[kind], n)) is None


COLLAPSING = {
    "accuracy falls, cosine rises": (line(0.4, 0.0, 100), line(0.1, 0.9, 100), [math.nan] * 100),
    "after success": (line(0.2, 0.8, 100) + [0.1] * 50, [0.1] * 100 + [0.7] * 50, [0.3] * 150),
    "certain of wrong answers from the start": ([0.0] * 100, [0.9] * 100, line(0.3, 0.0, 100)),
    "certain, without a change of the cosine": (line(0.4, 0.0, 100), [0.5] * 100, line(0.3, 0.0, 100)),
}


@pytest.mark.parametrize("n", [32, 512])
@pytest.mark.parametrize("kind", COLLAPSING)
def test_collapsing_series_ring(kind: str, n: int) -> None:
    assert rung(noisy(*COLLAPSING[kind], n))


def collapsing(steps: int = 40) -> list[dict[str, float | None]]:
    made = zip(line(0.5, 0.0, steps), line(0.1, 1.0, steps), line(1.0, 0.01, steps))
    return [dict(zip(("accuracy", "cos_mean", "entropy"), point)) for point in made]


def test_the_warning_comes_once_and_the_metric_stays() -> None:
    alarm, found = CollapseAlarm("try uniform_groups=skip"), []
    with pytest.warns(UserWarning, match="accuracy fell from .* try uniform_groups=skip") as said:
        found = [alarm.watch(step, metrics) for step, metrics in enumerate(collapsing(), 1)]
    assert len(said) == 1
    first = found.index({"alarm": 1.0})
    assert found == [{}] * first + [{"alarm": 1.0}] * (40 - first)
    message = str(said[0].message)
    assert message.startswith(f"g2rl: step {first + 1}: answers become alike and wrong: ")
    assert "\n" not in message


def test_a_rank_that_does_not_log_says_nothing() -> None:
    alarm = CollapseAlarm("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [alarm.watch(step, metrics, warn=False) for step, metrics in enumerate(collapsing(), 1)]
    assert found[-1] == {"alarm": 1.0}


def test_a_resumed_run_rings_at_the_same_step() -> None:
    rows = [{"step": step, **metrics} for step, metrics in enumerate(collapsing(), 1)]
    whole = CollapseAlarm("")
    rings = [whole.feed(row["step"], row["accuracy"], row["cos_mean"], row["entropy"]) for row in rows]
    at = rings.index(True)
    for cut in (3, at - 1, at, at + 1, 39):
        resumed = CollapseAlarm("")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.replay(rows[:cut])
        again = [resumed.feed(r["step"], r["accuracy"], r["cos_mean"], r["entropy"]) for r in rows[cut:]]
        assert again == rings[cut:]
        assert resumed.message == whole.message


def test_steps_without_numbers_are_left_out() -> None:
    rows = collapsing()
    alarm = CollapseAlarm("")
    for step, row in enumerate(rows, 1):
        for name in ("accuracy", "cos_mean"):
            for nothing in (None, math.nan):
                assert not alarm.feed(step, **_arguments({**row, name: nothing}))
    assert alarm.message is None


def test_entropy_missing_at_the_start_keeps_the_quarter() -> None:
    """A policy that has little entropy from the start has not lost it, with or without one number."""
    for missing in (None, 3):
        alarm = CollapseAlarm("")
        for step in range(1, 40):
            assert not alarm.feed(step, 0.04, 0.3, math.nan if step == missing else 0.015)


def _arguments(row: dict) -> dict:
    return {"accuracy": row["accuracy"], "cosine": row["cos_mean"], "entropy": row["entropy"]}


def test_the_remedy_names_what_can_be_changed() -> None:
    for uniform_groups in ("shape", "skip"):
        options = ShapingOptions(shaping="intent", uniform_groups=uniform_groups)
        assert remedy(options, prefix="g2rl_") == "try g2rl_shaping=right"
    for plain in (
        remedy(ShapingOptions()),
        remedy(ShapingOptions(shaping="equation")),
        remedy(ShapingOptions(shaping="none")),
        remedy(ShapingOptions(shaping="intent", lam=0)),
        remedy(ShapingOptions(shaping="intent"), "grpo"),
    ):
        assert "learning rate" in plain
        assert "=" not in plain
