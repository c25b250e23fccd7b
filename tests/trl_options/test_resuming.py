"""A run that is killed and resumed from a checkpoint gives GRPOTrainer's numbers, or its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SPLIT, adapter
from three_ways import Case, Ours, Plain, compared, run, same_to_the_bit
from tiny_trl import weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
CASES = [
    Case("plain", SAVES),
    Case("adapter", SAVES, adapter),
    Case("iterations", {**SAVES, "num_iterations": 2}),
    Case("accumulated", {**SAVES, **SPLIT, "steps_per_generation": 4}),
    Case(
        "adaptive-entropy",
        {**SAVES, "use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 2.5},
    ),
    Case("reference", {**SAVES, "beta": 0.1}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_resumed_run_gives_the_same_numbers(place: Any, case: Case) -> None:
    here = place(case)

    def resumed(kind: type, name: str, **own: Any) -> tuple[Any, Any]:
        whole = run(kind, here, name, **own)
        start = str(here.path / name / "checkpoint-2")
        return whole, run(kind, here, f"{name}-again", resume_from_checkpoint=start, **own)

    _, plain = resumed(Plain, "plain")
    _, unshaped = resumed(Ours, "unshaped", g2rl_lam=0)
    same_to_the_bit(unshaped, plain)
    whole, again = resumed(Ours, "default")
    last, other = (
        [compared(entry) for entry in trainer.state.log_history if entry["step"] > 2 and "loss" in entry]
        for trainer in (whole, again)
    )
    assert len(last) == 2
    assert last == other
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(whole).items())
