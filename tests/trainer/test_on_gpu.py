"""On a GPU: the numbers of a run on a CPU, and resuming from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_trainer

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    ),
]
KEYS: dict[str, Any] = {"steps": 4, "lr": 1e-4, "beta": 0.1, "gradient_checkpointing": True}


@pytest.mark.parametrize("device", DEVICES)
def test_measures_what_a_cpu_measures(tmp_path: Path, device: str) -> None:
    here = make_trainer(tmp_path / "cpu", **KEYS)
    there = make_trainer(tmp_path / "there", model=make_model().to(device), **KEYS)
    rollout = there.sampler.sample()
    moved = there.measure(rollout, there.verify(rollout))
    for part in ("ids", "attention", "mask", "truncated"):
        setattr(rollout, part, getattr(rollout, part).cpu())
    measured = here.measure(rollout, here.verify(rollout))
    torch.testing.assert_close(moved.logprobs.cpu(), measured.logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        moved.geometry.exploration_score.cpu(), measured.geometry.exploration_score, rtol=0, atol=1e-3
    )
    assert moved.entropy == pytest.approx(measured.entropy, abs=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_goes_on_from_a_checkpoint(tmp_path: Path, device: str) -> None:
    """The device's generators and AdamW's moments are restored. Only CPUs promise the same bits."""
    for name, stops in (("whole", 4), ("parts", 2)):
        trainer = make_trainer(tmp_path / name, model=make_model().to(device), **KEYS)
        trainer.begin()
        steps = [trainer.step() for _ in range(stops)]
        if name == "whole":
            whole = steps
    trainer.save_checkpoint()
    again = make_trainer(tmp_path / "parts", model=make_model().to(device), **KEYS)
    torch.manual_seed(99)
    again.begin()
    assert again.step_number == 2
    steps = [again.step() for _ in range(2)]
    for key in ("entropy", "length", "accuracy", "loss", "kl", "grad_norm"):
        assert [m[key] for m in steps] == pytest.approx([m[key] for m in whole[2:]], rel=1e-3, abs=1e-4)
