"""G2RLTrainer with each option of GRPOConfig beside GRPOTrainer: see three_ways.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trl.trainer.grpo_trainer as grpo_trainer
from agents import Engine
from options import ALL
from three_ways import Case, Place, compare

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case.fast else pytest.mark.slow, id=case.name) for case in ALL],
)
def test_trains_as_grpo_trainer(
    place: Callable[[Case], Place], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    compare(place(case))
