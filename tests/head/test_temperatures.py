"""`temperature` as a tensor [N]: each token's own, on every backend. strategies.py draws some."""

import pytest
import torch
from marks import backends, dtypes, isas
from oracle import (
    GPU,
    TRITON,
    Case,
    assert_as_exact_as_torch,
    environment,
    make_case,
    run_head,
)
from test_linear_logprobs import check as check_logprobs

import g2rl_kernels as g2

compiled = {"fullgraph": True, "backend": "aot_eager"}


def apart(dtype: torch.dtype = torch.float32, **options) -> Case:
    """From nearly greedy to nearly flat, with all other options of the head."""
    V = 203
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1))
    bias[5::9] = -torch.inf
    case = make_case([20, 0, 13], V, 24, dtype=dtype, bias=bias, **options)
    case.tokens = torch.where(case.tokens % 9 == 5, case.tokens - 1, case.tokens)
    return case.replace(temperature=torch.logspace(-1.5, 1.5, 33), logit_scale=1.3)


@backends
@dtypes
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_temperatures_far_apart(backend, dtype, softcap):
    case = apart(dtype, logit_softcap=softcap)
    assert_as_exact_as_torch(case, run_head(case, backend), backend)
    if backend != TRITON or GPU.type == "cuda":
        check_logprobs(case, backend)


@isas
@dtypes
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_a_token_has_the_bits_of_its_temperature_for_all(isa, dtype, memory):
    """With one temperature for all tokens, and so with equal ones."""
    case = apart(dtype)

    def outputs(temperature):
        hidden = case.hidden.detach().requires_grad_()
        head = {**case.head, "temperature": temperature, "backend": "cpu"}
        out = g2.linear_logprobs(hidden, case.weight, case.tokens, **head, logits_memory=memory)
        (gradient,) = torch.autograd.grad((out.logprobs - 2 * out.entropy).sum(), hidden)
        found = g2.head_features(hidden, case.weight, case.tokens, torch.arange(34), **head)
        return *(t.detach() for t in out), gradient, *found

    with environment("G2RL_CPU_ISA", isa):
        together = outputs(case.temperature)
        for t in (0, 7, 16, 32):
            for one, all_tokens in zip(outputs(float(case.temperature[t])), together, strict=True):
                assert torch.equal(one[t], all_tokens[t])


@dtypes
def test_any_dtype_and_strides(dtype):
    case = make_case([20], V=67, d=16)
    values = (0.5 + torch.arange(40) / 64).to(dtype)[::2]  # exact in any
    args = (case.hidden, case.weight, case.tokens, case.cu_seqlens)
    expected = g2.head_features(*args, temperature=values.float().contiguous())
    for one, other in zip(g2.head_features(*args, temperature=values), expected, strict=True):
        assert torch.equal(one, other)


def test_exact_in_float64():
    shapes = ((4, 3), (7, 3), (7,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    tokens, T = torch.tensor([0, 6, 3, 3]), torch.tensor([0.3, 0.7, 1.0, 2.1], dtype=torch.float64)

    def function(hidden, weight, bias):
        return tuple(g2.linear_logprobs(hidden, weight, tokens, bias=bias, temperature=T, logit_softcap=2.0))

    assert torch.autograd.gradcheck(function, inputs)
    hidden, weight, bias = inputs
    z = 2 * torch.tanh((hidden @ weight.T + bias) / 2) / T[:, None]
    expected = z.log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(function(*inputs)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_certificate_takes_them(backend):
    case = apart()
    args = (case.hidden, case.weight, case.tokens, case.cu_seqlens)
    exact = g2.head_features(*args, backend=backend, **case.head)
    out = g2.certified_head_features(*args, backend=backend, max_skipped=0.1, **case.head)
    assert torch.equal(out.logprobs, exact.logprobs)
    assert out.skipped_tokens.sum() > 0
    diameter = 1.3 * torch.cdist(case.weight, case.weight).max()
    assert ((out.features - exact.features).norm(dim=1) <= out.skipped_mass * diameter + 1e-5).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiled_to_the_same_bits(backend):
    torch._dynamo.reset()
    case = apart()

    def function(hidden, weight, T):
        head = {**case.head, "temperature": T, "backend": backend}
        features = g2.head_features(hidden, weight, case.tokens, case.cu_seqlens, **head)
        return *features, *g2.linear_logprobs(hidden, weight, case.tokens, **head)

    args = (case.hidden.requires_grad_(), case.weight, case.temperature)
    results = []
    for f in (function, torch.compile(function, **compiled)):
        out = f(*args)
        results.append([*out, *torch.autograd.grad(out[-2].sum() + out[-1].sum(), case.hidden)])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_opcheck():
    case = apart(logit_softcap=4.0)
    inputs = (case.hidden, case.tokens, *case.spec)
    torch.library.opcheck(torch.ops.g2rl.head_statistics, (*inputs, None, True))
    torch.library.opcheck(torch.ops.g2rl.head_features, (*inputs, *case.responses, None, True))


def test_wrong_temperatures_are_refused_at_run_time_too():
    """Where torch.compile leaves out the checks of values."""
    torch._dynamo.reset()
    case = make_case([4], V=11, d=8)
    function = torch.compile(
        lambda T: g2.linear_logprobs(case.hidden, case.weight, case.tokens, temperature=T), **compiled
    )
    with pytest.raises(Exception, match=r"temperatures\[2\] = 0"):
        function(torch.tensor([1.0, 1.0, 0.0, 1.0]))
