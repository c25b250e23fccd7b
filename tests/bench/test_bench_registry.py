"""The cases: heads of real models, distributions with their entropy, tokens sampled from them."""

import math

import pytest
import torch
from bench_helpers import HEAD, SOFTCAPPED, Shape, problem, registry, small, softmax
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize(
    ("name", "V", "d", "softcap"),
    [
        ("qwen3-0.6b", 151936, 1024, None),
        ("qwen3-4b", 151936, 2560, None),
        ("qwen3-32b", 151936, 5120, None),
        ("llama3-70b", 128256, 8192, None),
        ("gemma2-2b", 256000, 2304, 30.0),
        ("gemma2-27b", 256000, 4608, 30.0),
        ("gemma3-1b", 262144, 1152, None),
        ("gemma3-27b", 262208, 5376, None),
        ("smollm2-135m", 49152, 576, None),
        ("smollm2-1.7b", 49152, 2048, None),
    ],
)
def test_heads_are_those_of_the_models(name, V, d, softcap):
    shape = registry.SHAPES[name]
    assert (shape.V, shape.d, shape.softcap) == (V, d, softcap)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("op", ["head", "logprobs"])
def test_default_cases_are_distinct_and_in_the_registry(op, gpu, quick):
    cases = registry.default_cases(op, gpu, quick)
    assert len({*cases}) == len(cases) > 0
    for case in cases:
        assert registry.SHAPES[case.shape.name] is case.shape
        assert case.distribution in registry.DISTRIBUTIONS
        assert 1 <= case.responses <= case.N


@pytest.mark.parametrize("shape", [HEAD, SOFTCAPPED], ids=lambda shape: shape.name)
@pytest.mark.parametrize(("distribution", "nats"), registry.NATS.items())
def test_peaked_distributions_have_their_entropy(shape, distribution, nats):
    p = problem(small(1024, shape, distribution))
    log_p = softmax(p)
    entropy = -(log_p.exp() * log_p).sum(1).mean().item()
    assert entropy == pytest.approx(nats, rel=0.15)
    assert p.entropy == pytest.approx(entropy, rel=1e-3)


def test_flat_and_random_logits_have_the_entropy_of_theory():
    for distribution, sigma in registry.SIGMAS.items():
        p = problem(small(256, Shape("wide", 65536, 64), distribution))
        assert p.entropy == pytest.approx(math.log(65536) - sigma**2 / 2, abs=0.15)


def test_a_peaked_model_is_sure_of_most_tokens_and_a_chat_model_of_few():
    sure = {}
    for distribution in registry.NATS:
        p = problem(small(1024, HEAD, distribution))
        sure[distribution] = (1 - p.logprobs.exp() < 0.01).float().mean().item()
    assert sure["0.15 nats"] > 0.5
    assert sure["1.5 nats"] < 0.2
    assert sure["1.5 nats"] < sure["0.5 nats"] < sure["0.15 nats"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tokens_are_sampled_from_the_softmax_and_their_logprobs_are_right(dtype):
    p = problem(small(2048, SOFTCAPPED, "1.5 nats", dtype))
    right = softmax(p).gather(1, p.tokens[:, None])[:, 0]
    torch.testing.assert_close(p.logprobs.double(), right, atol=2e-4, rtol=0)
    assert -right.mean().item() == pytest.approx(p.entropy, rel=0.1)  # what sampling gives on average
    assert len({*p.tokens.tolist()}) > 500
    rounding = (p.rounded_logprobs - p.logprobs).abs().max()
    assert rounding == 0 if dtype == "fp32" else 1e-3 < rounding < 0.3


def test_the_same_seed_gives_the_same_problem():
    one, same, other = (problem(small(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.hidden, same.hidden)
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("distribution", ["flat", "0.5 nats"])
def test_no_tensor_of_tokens_times_vocabulary_is_made(distribution):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    N, V = 512, 65536
    with Largest() as largest:
        problem(small(N, Shape("wide", V, 16), distribution))
    assert V * 16 <= largest.numbers <= N * V // 2


def test_cuts_are_the_same_tokens_in_other_responses():
    p = problem(small(10))
    assert p.cuts == (0, 2, 5, 7, 10)
    cut = p.cut(3)
    assert cut.cu_seqlens.tolist() == [*cut.cuts] == [0, 3, 6, 10]
    assert cut.hidden is p.hidden
    moved = p.moved()
    assert torch.equal(moved.weight, p.weight)
    assert moved.weight.data_ptr() != p.weight.data_ptr()
