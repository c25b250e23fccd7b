"""What only a GPU can show of the head's kernels: all candidates, large sizes, streams, graphs, devices."""

import dataclasses

import pytest
import torch
from head_modes import (
    known_mode,
    mode_options,
    modes,
    on_gpu,
    plain_features,
)
from marks import dtypes
from oracle import (
    GPU,
    TRITON,
    allowed_errors,
    assert_as_exact_as_torch,
    autograd_head,
    errors,
    make_case,
    run_head,
)

import g2rl_kernels as g2
from g2rl_kernels.head.triton import tile, tuning


@on_gpu
@dtypes
def test_every_candidate_is_right(monkeypatch, dtype):
    case = make_case([700, 0, 33, 1, 290], V=5003, d=192, dtype=dtype, bias=torch.randn(5003))
    exact, form = autograd_head(case), "ieee" if dtype == torch.float32 else "plain"
    twice, four_times = allowed_errors(case, TRITON), allowed_errors(case, TRITON, multiple=4)
    for config in tuning.candidates_on(torch.device("cuda", 0), form):
        monkeypatch.setattr(tile, "choose", lambda *_, config=config: config)
        known = known_mode(case, exact.logprobs.float())
        for out, allowed in ((run_head(case, TRITON), twice), (known, four_times)):
            for name, error, limit in zip(out._fields, errors(out, exact), allowed):
                assert (error <= limit).all(), (name, config)


@on_gpu
def test_beyond_two_to_the_31_logits():
    V, N, last = 151936, 15000, 40
    case = make_case([N - last, last], V=V, d=64, dtype=torch.bfloat16)
    tail = case.replace(
        hidden=case.hidden[-last:], tokens=case.tokens[-last:], cu_seqlens=torch.tensor([0, last])
    )
    known = autograd_head(tail).logprobs.float()
    seeds = torch.cat([run_head(case, TRITON).logprobs[:-last], known])
    for out in (run_head(case, TRITON), known_mode(case, seeds)):
        end = g2.HeadFeatures(out.features[1:], *(t[-last:] for t in out[1:]))
        assert_as_exact_as_torch(tail, end, TRITON)


@on_gpu
@modes
def test_nothing_waits_for_the_device_and_a_graph_captures_it(mode):
    case = make_case([70, 0, 33], V=5003, d=64, dtype=torch.bfloat16).to(GPU)
    options = mode_options(mode, torch.full((103,), -8.0, device=GPU))
    expected = plain_features(case, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain_features(case, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plain_features(case, **options)
    keep = case.hidden.clone()
    case.hidden.copy_(case.hidden.flip(0))
    graph.replay()
    case.hidden.copy_(keep)
    graph.replay()
    for a, b in zip(expected, out):
        assert torch.equal(a, b)


@on_gpu
def test_a_stream_of_ones_own():
    case = make_case([70, 0, 33], V=5003, d=64, dtype=torch.bfloat16)
    expected = run_head(case, TRITON)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        there = case.to(GPU)
        torch.cuda._sleep(10**7)  # were it on another stream, the kernels would run before the copies
        there.hidden.mul_(1.0)
        out = run_head(dataclasses.replace(there), TRITON)
    stream.synchronize()
    for a, b in zip(expected, out):
        assert torch.equal(a, b)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    case = make_case([70, 0, 33], V=503, d=64, dtype=torch.bfloat16)
    expected, there = run_head(case, TRITON), case.to(torch.device("cuda:1"))
    out = g2.head_features(there.hidden, there.weight, there.tokens, there.cu_seqlens)
    for a, b in zip(expected, out):
        assert torch.equal(a, b.cpu())
