"""Two processes train as one does: DDP, FSDP2 and FSDP1 on CPUs, with a group of responses on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from safetensors.torch import load_file
from tiny_trl import save_model
from trl_ddp_script import run

import g2rl_kernels

WRAPPED = {
    "ddp": ("DistributedDataParallel", "Parameter"),
    "fsdp2": ("FSDPQwen3ForCausalLM", "DTensor"),
    "fsdp1": ("FullyShardedDataParallel", "Parameter"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process wrote, and two in each way."""
    path = tmp_path_factory.mktemp("runs")
    model = save_model(path / "model")
    run(model, path, "alone")
    script = str(Path(__file__).with_name("trl_ddp_script.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    root = str(Path(g2rl_kernels.__file__).parent.parent)
    found = subprocess.run(
        [*launcher, model, str(path), *WRAPPED],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return path


@pytest.mark.parametrize("way", WRAPPED)
def test_two_processes_train_as_one(runs: Path, way: str) -> None:
    alone = json.loads((runs / "alone/rank0.json").read_text())
    first, second = (json.loads((runs / way / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert (first["wrapped"], first["parameter"]) == WRAPPED[way]
    assert first["bonus"] == second["bonus"]  # every process shapes all groups, and sees the same
    assert first["advantages"] == second["advantages"]
    assert first["completion"] == alone["completion"]
    assert any(bonus != 0 for bonus in alone["bonus"][4:8])  # the group that lies on both
    for key in ("bonus", "advantages", "loss", "entropy", "grad_norm", "g2rl/cos_mean"):
        assert first[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-5), key
    theirs, ours = (load_file(runs / name / "weights.safetensors") for name in ("alone", way))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5)
