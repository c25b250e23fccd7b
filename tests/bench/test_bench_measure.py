"""The floor, memory, reasons, ceilings and budget: they measure what they say. No figures of time."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_helpers import (
    Floor,
    Method,
    Unavailable,
    logprobs,
    measure,
    methods,
    problem,
    registry,
    run,
    small,
)


@pytest.mark.parametrize(("limit", "rows", "chunks"), [(None, 10, 1), (4 * 4096 * 4, 4, 3), (1, 1, 10)])
def test_the_floor_is_the_whole_product_in_chunks_that_fit(limit, rows, chunks):
    p = problem(small(10))
    floor = Floor(p, limit)
    assert (floor.rows, floor.chunks) == (rows, chunks)
    seen = []
    real = torch.mm

    def spy(hidden, weight, out):
        seen.append(real(hidden, weight, out=out).clone())

    torch.mm = spy
    try:
        floor.logits(p)
    finally:
        torch.mm = real
    torch.testing.assert_close(torch.cat(seen), p.hidden @ p.weight.T)


@pytest.mark.parametrize(("limit", "chunks"), [(None, 1), (4 * 4096 * 4, 3)])
def test_the_floor_of_the_backward_pass_is_both_products(limit, chunks):
    p = problem(small(10, distribution="2.3 sigma"))
    floor = Floor(p, limit)
    floor.logits(p)
    assert list(logprobs.products(floor, p)) == ["logits", "dX", "dW"]
    assert list(logprobs.products(floor, p, frozen=True)) == ["logits", "dX"]
    # What stands for dz are the logits of the last chunk; each chunk has as many rows of it as tokens.
    dz = floor.out.repeat(chunks, 1)[:10]
    torch.testing.assert_close(floor.grad_hidden(p), dz @ p.weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(floor.grad_weight(p), dz.T @ p.hidden, atol=1e-4, rtol=1e-4)
    before = floor.out
    floor.move()
    assert floor.out.data_ptr() != before.data_ptr()
    assert torch.equal(floor.out, before)


def test_quantiles():
    assert measure.quantiles([5.0, 1, 2, 4, 3, 6, 7, 8, 9, 10, 11]) == [3, 6, 9]
    assert measure.quantiles([2.0]) == [2, 2, 2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark to reset")
def test_extra_memory_counts_what_the_call_holds_at_its_peak():
    def call() -> torch.Tensor:
        torch.ones(48 << 20, dtype=torch.uint8)  # gone before the next
        return torch.ones(16 << 20, dtype=torch.uint8)

    extra, out = measure.extra_memory("cpu", call)
    assert out.numel() == 16 << 20
    assert 47 << 20 <= extra <= 60 << 20  # what the process let go elsewhere counts too


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark to reset")
@pytest.mark.parametrize(
    ("N", "V", "d", "dtype", "frozen", "kept"),
    [
        (1500, 50021, 1024, torch.bfloat16, False, 0),
        (1500, 20021, 1024, torch.bfloat16, True, 0),
        (1500, 20021, 1024, torch.float32, False, 0),
        (1500, 20021, 1024, torch.float32, True, 64),
        (1500, 20021, 1024, torch.bfloat16, False, 64),
        (12000, 2001, 2048, torch.bfloat16, False, 0),  # hidden's gradient in float32 alone would be more
    ],
)
def test_linear_logprobs_takes_64_MiB_at_most_beside_gradients_and_logits(N, V, d, dtype, frozen, kept):
    hidden = torch.randn(N, d).to(dtype)
    weight = torch.empty(V, d, dtype=dtype).uniform_(-0.05, 0.05)
    nothing = torch.empty(0)
    p = registry.Problem(
        hidden, weight, torch.randint(V, (N,)), nothing, (0, N), None, nothing, nothing, entropy=0.0
    )
    options = {"entropy": True, "backend": "cpu", "logits_memory": kept << 20}
    method = Method("", lambda p: methods._logprobs(p, **options), frozen=frozen)
    extra = logprobs.first_pass(method, p, "cpu", None)["extra_bytes"]
    assert kept << 20 < extra <= (64 + kept) << 20, f"{extra / 2**20:.1f} MiB"


def why_not(error: Exception) -> dict[str, Any]:
    """Reason and fault, without the names."""
    found = measure.why_not("a case", "a method", error)
    assert (found.pop("case"), found.pop("method")) == ("a case", "a method")
    return found


def test_reasons_tell_faults_from_absence_and_name_no_paths():
    assert why_not(Unavailable("x is not there")) == {"reason": "x is not there", "fault": False}
    assert why_not(torch.OutOfMemoryError("Tried to allocate")) == {
        "reason": "out of memory",
        "fault": False,
    }
    assert not why_not(ModuleNotFoundError("no quack", name="quack"))["fault"]
    missing = why_not(ModuleNotFoundError("No module named 'transformers'", name="transformers"))
    remedy = "No module named 'transformers': pip install 'g2rl-kernels[train]'"
    assert missing == {"reason": remedy, "fault": False}
    assert why_not(ModuleNotFoundError("gone", name="g2rl_kernels.head.triton.driver"))["fault"]
    found = why_not(RuntimeError("in /home/me/lib/file.py:3: bad"))
    assert found == {"reason": "RuntimeError: in file.py:3: bad", "fault": True}


def test_ceilings_are_of_products_and_copies_that_were_made(monkeypatch):
    seen = []
    took = {"bf16": 1e-6, "fp32": 4e-6, "copy": 2e-6}

    def round_(turns, calls):
        seen.append(calls)
        for call in calls.values():
            call()
        return took

    monkeypatch.setattr(measure.Turns, "round", round_)
    found = measure.ceilings("cpu")
    flops = 2 * 64**3
    assert found["product_tflops"] == {
        "bf16": pytest.approx(flops / 1e-6 / 1e12, 1e-3),
        "fp32": pytest.approx(flops / 4e-6 / 1e12, 1e-3),
    }
    assert found["copy_gb_s"] == pytest.approx(2 * 4096 / 2e-6 / 1e9, 1e-3)
    assert [call().dtype for call in seen[0].values()] == [torch.bfloat16, torch.float32, torch.uint8]


def test_the_least_time_is_that_of_the_ceiling_met_first():
    machine = {"ceilings": {"product_tflops": {"bf16": 800.0, "fp32": 50.0}, "copy_gb_s": 3000.0}}
    assert measure.least_seconds(machine, "bf16", 8e14, 3e9) == pytest.approx(1.0)
    assert measure.least_seconds(machine, "fp16", 8e14, 3e9) == pytest.approx(1.0)
    assert measure.least_seconds(machine, "fp32", 8e14, 3e9) == pytest.approx(16.0)
    assert measure.least_seconds(machine, "bf16", 8e11, 6e12) == pytest.approx(2.0)
    assert measure.least_seconds({}, "bf16", 8e14, 3e9) is None  # results of before


def test_a_run_out_of_time_says_what_it_did_not_begin(monkeypatch, tmp_path):
    clock = iter([0, 0, 40, 40, 50, 50, 90, 90])  # of 40, 10 and 40 seconds
    monkeypatch.setattr(run, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    out = tmp_path / "result.json"
    result = run.Recorder("head", "cpu", out)
    begun = []

    def measured(case):
        begun.append(case)
        return [], []

    run.within_budget(100, [(name, name) for name in "abcd"], measured, result)
    assert begun == ["a", "b", "c"]
    left = json.loads(out.read_text())["left_out"]
    assert [(one["case"], one["reason"]) for one in left] == [("d", "no time left (--budget)")]
