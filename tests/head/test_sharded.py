"""The ops under DDP, FSDP1 and FSDP2 on 2 gloo ranks: the numbers of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded
import torch

TESTS = Path(__file__).resolve().parent
PATHS = os.pathsep.join(map(str, (TESTS.parents[1], TESTS.parent, TESTS)))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("sharded")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": PATHS,
    }
    done = subprocess.run(
        [*torchrun, str(TESTS / "sharded.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    model = sharded.Policy()
    return sharded.step(model, 0, 1) | sharded.gradients(model)


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP1", "FSDP2"])
def test_the_numbers_of_one_process(found, alone, wrapper):
    """Log-probabilities of each rank's own tokens; all else whole, and the same on both ranks."""
    first, second = (results[wrapper] for results in found)
    first["logprobs"] = torch.cat([first["logprobs"], second.pop("logprobs")])
    assert set(first) == set(alone)
    for name, expected in alone.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-6)
        assert name == "logprobs" or torch.equal(first[name], second[name]), name
    assert alone["embedding.weight"].abs().max() > 0.01  # of a size that 1e-6 says something about


def test_the_group_that_straddles_the_ranks_is_shaped(alone):
    """Else the test above would show little. By default the two right ones of it are shaped."""
    shaped, raw = alone["shaped"], torch.tensor(sharded.REWARDS)
    assert (shaped[3:7] != raw[3:7]).tolist() == [reward > 0 for reward in sharded.REWARDS[3:7]]


def test_a_sharded_weight_is_refused_outside_of_the_forward(found):
    for results in found:
        assert "weight.full_tensor()" in results["FSDP2, outside of forward"]
        assert results["FSDP2, gathered"]["features"].shape == (1, sharded.D)
