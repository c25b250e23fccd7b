"""The processor for Megatron Core on two gloo ranks, against float64 on one.

It runs on a stand-in (megatron_stand_in.py), and where Megatron Core is installed on Core's own GPTModel too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from megatron_ranks import CASES, Case, batch
from torch import Tensor

HERE = Path(__file__).resolve().parent
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-5,
}  # of results, in units of the largest
ROUNDING = {**TOLERANCE, torch.bfloat16: 1e-2}  # of gradients, which have the dtype of what they belong to
names = pytest.mark.parametrize("name", CASES)


def run_ranks(
    script: str, factory: pytest.TempPathFactory, *args: str, world: int = 2
) -> list[dict[str, Any]]:
    """What each rank of a script wrote. Test processes beside one another share one run."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    base = factory.getbasetemp().parent if shared else factory.getbasetemp()
    folder = base / "-".join([Path(script).stem, *args])
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            start_ranks(script, folder, *args, world=world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def start_ranks(script: str, folder: Path, *args: str, world: int) -> None:
    """One process a rank; `folder` is there only if all went well."""
    paths = [*map(str, (HERE.parents[1], HERE.parent, HERE)), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        running = [
            subprocess.Popen(
                [sys.executable, str(HERE / script), str(rank), str(world), work, *args],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=600)[0] for process in running]
        finally:
            for process in running:
                process.kill()
        assert [process.returncode for process in running] == [0] * world, "\n".join(said)
        shutil.copytree(work, folder)


@pytest.fixture(scope="module", params=["stand-in", "core"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if request.param == "core" and importlib.util.find_spec("megatron") is None:
        pytest.skip("needs Megatron Core: pip install megatron-core")
    return run_ranks("megatron_ranks.py", tmp_path_factory, request.param)


def close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    assert found.shape == exact.shape
    exact = exact.detach().double()
    error = (found.double() - exact).abs().max()
    assert error <= tolerance * exact.abs().max(), float(error)


def joined(results: list[dict[str, Any]], name: str, sequence_parallel: bool) -> Tensor:
    """[s, b, d] of both ranks: each has its half, or all of the same."""
    parts = [result[name] for result in results]
    if sequence_parallel:
        return torch.cat(parts)
    close(parts[1], parts[0], 1e-6)
    return parts[0]


def exact(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """logprobs, entropy [b, s], and phi [b, s, d] in float64, from [b, s, d] and the whole vocabulary."""
    z = hidden @ weight[: case.vocab_size].T * (case.mup or 1.0) / case.temperature
    scores = z.log_softmax(-1)
    logprobs = scores.gather(-1, labels[..., None])[..., 0]
    phi = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0] * case.temperature
    return logprobs, -(scores.exp() * scores).sum(-1), phi


@names
def test_it_is_the_head_in_float64(found, name):
    case, results = CASES[name], [rank[name] for rank in found]
    inputs = batch(case)
    mask, labels = inputs["mask"].double(), inputs["labels"].clamp(min=0)
    whole = joined(results, "hidden", case.sequence_parallel).double().requires_grad_()
    weight = torch.cat([result["weight"] for result in results]).double().requires_grad_()
    logprobs, entropy, phi = exact(case, whole.transpose(0, 1), weight, labels)
    for result in results:
        close(result["logprobs"], logprobs * mask, TOLERANCE[case.dtype])
        close(result["entropy"], entropy * mask, TOLERANCE[case.dtype])
        assert (result["logprobs"][mask == 0] == 0).all()
        assert torch.equal(result["logprobs"], results[0]["logprobs"])
        assert ("features" in result) == case.features
        if case.features:
            features = (phi * mask[..., None]).sum(1) / mask.sum(1).clamp(min=1)[:, None]
            close(result["features"], features, TOLERANCE[case.dtype])
            assert torch.equal(result["features"], results[0]["features"])
    if not case.grad:
        return
    g, e = inputs["grads"].double()
    torch.autograd.backward([logprobs, entropy], [g * mask, e * mask])
    close(joined(results, "hidden grad", case.sequence_parallel), whole.grad, ROUNDING[case.dtype])
    if not case.tied:
        shards = torch.cat([result["ours"]["output_layer.weight"] for result in results])
        close(shards, weight.grad, ROUNDING[case.dtype])


def test_kept_logits_change_no_bit_in_float32(found):
    for rank in found:
        none, every = rank["no logits kept"], rank["all logits kept"]
        assert none["kept bytes"] == 0
        assert every["kept bytes"] > 0
        for name in ("logprobs", "entropy", "hidden grad"):
            assert torch.equal(none[name], every[name]), name
        for name, gradient in none["ours"].items():
            assert torch.equal(gradient, every["ours"][name]), name
        assert rank["float32, features"]["kept bytes"] > 0  # by default
        assert rank["no gradients"]["kept bytes"] == 0


@names
def test_every_gradient_is_that_of_cores_own_logits(found, name):
    case = CASES[name]
    if not case.grad:
        pytest.skip("without gradients")
    if case.dtype == torch.bfloat16:
        pytest.skip("Core's logits are rounded to bfloat16")
    for result in (rank[name] for rank in found):
        ours, theirs = result["ours"], result["theirs"]
        assert ours.keys() == theirs.keys()
        assert len(ours) >= 3
        close(result["logprobs"], result["their logprobs"], TOLERANCE[case.dtype])
        for parameter, gradient in theirs.items():
            assert max(rank[name]["theirs"][parameter].abs().max() for rank in found) > 1e-3
            close(ours[parameter], gradient, TOLERANCE[case.dtype])


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("packed", [0, 8, 8, 12, 20]),
        ("padded", [0, 8, 8, 12, 20]),
        ("context parallel", [0, 8, 12, 20]),
    ],
)
def test_features_of_packed_sequences(found, name, bounds):
    if "packed" not in found[0]:
        pytest.skip("needs no model")
    given = found[0]["packed"]
    case = Case(vocab_size=100, temperature=0.7)
    hidden, mask = given["hidden"].transpose(0, 1).double().requires_grad_(), given["mask"][0]
    _, _, phi = exact(case, hidden, given["weight"].double(), given["labels"])
    expected = []
    for begin, end in pairwise(bounds):
        rows = phi[0, begin:end][mask[begin:end]]
        expected.append(rows.sum(0) / max(1, len(rows)))
    for rank in found:
        close(rank["packed"][name], torch.stack(expected), 2e-5)
        assert torch.equal(rank["packed"][name], given[name])


ERRORS = {
    "no labels": "ValueError: labels: got None, needs [b, s]",
    "deferred": "ValueError: defer_embedding_wgrad_compute: got True",
    "no group": "ValueError: output_layer: got Linear without tp_group",
    "spread further": "ValueError: output_layer: SimpleNamespace has gtp_remat_size > 1",
    "vocabulary too large": "ValueError: vocab_size: got 129, needs the number of real tokens, at most 128",
    "labels of another shape": "ValueError: tokens: got shape [1, 23]",
    "mask of another shape": "ValueError: mask: got shape [1, 23]",
    "temperature": "ValueError: temperature: got 0",
    "logits memory": "ValueError: logits_memory: got -1, needs a number of bytes",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(found, name):
    if "errors" not in found[0]:
        pytest.skip("needs no model")
    for rank in found:
        assert rank["errors"].keys() == ERRORS.keys()
        assert rank["errors"][name].startswith(ERRORS[name])


@pytest.mark.parametrize("name", ["megatron", "slime"])
def test_without_megatron_the_import_says_how_to_install_it(name):
    code = f"import sys; sys.modules['megatron'] = None; import g2rl_kernels.integrations.{name}"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: g2rl_kernels.integrations.megatron needs Megatron Core"), (
        failed.stderr
    )
    assert "pip install" in last
