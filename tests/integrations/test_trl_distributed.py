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

import geometry_ddp
from safetensors.torch import load_file
from tiny_trl import save_model
from trl_ddp_script import LOGGED, run

import g2rl_kernels
from g2rl_kernels.integrations import systems, trl_methods

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers
WRAPPED = {
    "ddp": ("DistributedDataParallel", "Parameter"),
    "ddp-evol": ("DistributedDataParallel", "Parameter"),
    "ddp-setpo": ("DistributedDataParallel", "Parameter"),
    "ddp-dirl": ("DistributedDataParallel", "Parameter"),
    "ddp-gar": ("DistributedDataParallel", "Parameter"),
    "ddp-mask": ("DistributedDataParallel", "Parameter"),
    "fsdp2": ("FSDPQwen3ForCausalLM", "DTensor"),
    "fsdp2-head": ("FSDPQwen3ForCausalLM", "DTensor"),
    "fsdp2-mask": ("FSDPQwen3ForCausalLM", "DTensor"),
    "fsdp1": ("FullyShardedDataParallel", "Parameter"),
}


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test for all ways: starting the processes takes longer than training in them."""
    save_model(tmp_path / "model")
    save_model(tmp_path / "model-head", tie_word_embeddings=False)
    monkeypatch.setattr(systems, "SentenceEncoder", None)  # the script sets it; restored at the end
    monkeypatch.setattr(trl_methods, "reasoning_direction", None)
    for way in ("alone", "alone-evol", "alone-setpo", "alone-dirl", "alone-gar", "alone-mask", "alone-head"):
        run(tmp_path, way)
    geometry_ddp.run(tmp_path, "alone")
    script = str(Path(__file__).with_name("trl_ddp_script.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    paths = map(str, (Path(g2rl_kernels.__file__).parents[1], Path(__file__).parents[1]))  # tests/tiny_trl.py
    found = subprocess.run(
        [*launcher, str(tmp_path), *WRAPPED, "geometry-ddp", "geometry-fsdp2"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert found.returncode == 0, found.stderr[-4000:]
    for way in WRAPPED:
        compare(tmp_path / "-".join(["alone", *way.split("-")[1:]]), tmp_path / way)
    compare_geometry(tmp_path)


def compare(alone: Path, together: Path) -> None:
    one = json.loads((alone / "rank0.json").read_text())
    first, second = (json.loads((together / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert (first["wrapped"], first["parameter"]) == WRAPPED[together.name]
    assert first["bonus"] == second["bonus"]  # every process shapes all groups, and sees the same
    assert first["advantages"] == second["advantages"]
    assert first["completion"] == one["completion"]
    if not together.name.endswith("setpo"):  # which moves advantages alone
        assert any(bonus != 0 for bonus in one["bonus"][4:8])  # the group that straddles the ranks
    assert len(first["g2rl/kept_ids"]) == 2 * together.name.endswith("mask")  # generations
    for key in ("bonus", "advantages", *LOGGED):
        assert first[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), (together.name, key)
    theirs, ours = (load_file(path / "weights.safetensors") for path in (alone, together))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        where = f"{together.name}, {name}: "
        torch.testing.assert_close(
            weight, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, where=where: where + text
        )


def compare_geometry(folder: Path) -> None:
    """GeometryCallback: the same numbers with rollouts; responses that it samples differ between ranks."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("geometry-*.json")}
    one = found["geometry-grpo-alone"]
    for way in ("ddp", "fsdp2"):
        two = found[f"geometry-grpo-{way}"]
        assert one.keys() == two.keys() >= {"g2rl/cos_mean", "g2rl/accuracy", "g2rl/distinct_answers"}
        for key, values in one.items():
            assert two[key] == pytest.approx(values, rel=1e-4, abs=1e-5), (way, key)
    one, two = found["geometry-sft-alone"], found["geometry-sft-ddp"]  # an odd number of prompts
    assert one.keys() == two.keys() >= {"g2rl/cos_mean", "g2rl/effective_rank"}
    assert len(one["g2rl/cos_mean"]) == len(two["g2rl/cos_mean"]) == 2
    assert all(1 <= rank <= 2 for rank in two["g2rl/effective_rank"])
