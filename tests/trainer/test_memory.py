"""Peak memory of a training step, which never holds the logits."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_trainer

from g2rl_kernels.cli import main as cli
from g2rl_kernels.trainer.sampling import Rollout
from g2rl_kernels.trainer.trainer import Verified

V, PROMPT = 151936, 4


def rollout_of(length: int) -> Rollout:
    """8 responses of `length` tokens."""
    ids = torch.randint(V, (8, PROMPT + length))
    mask = torch.ones(8, length, dtype=torch.bool)
    return Rollout(ids, torch.ones_like(ids), mask, torch.zeros(8, dtype=torch.bool), [], [])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark to reset")
def test_peak_memory_does_not_grow_by_vocabulary_times_tokens(tmp_path: Path) -> None:
    runner: Any = cli._benchmarks()
    extra_memory = import_module(f"{runner.__package__}.measure").extra_memory
    model = make_model(vocab_size=V, hidden_size=16, num_hidden_layers=1, max_position_embeddings=256)
    trainer = make_trainer(tmp_path, model=model, micro_batch_size=8)
    scores = torch.tensor([1.0, 0.0] * 4)

    def step(rollout: Rollout) -> None:
        trainer.update(rollout, trainer.measure(rollout, Verified(scores)))

    short, long = rollout_of(25), rollout_of(200)
    peaks = [extra_memory("cpu", lambda r=r: step(r), lambda: step(short))[0] for r in (short, long)]
    logits = 4 * V * (long.mask.numel() - short.mask.numel())
    assert peaks[1] - peaks[0] < logits / 20, f"{peaks[0] / 1e6:.0f} MB, then {peaks[1] / 1e6:.0f} MB"
