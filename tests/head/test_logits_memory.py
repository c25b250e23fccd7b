"""`logits_memory` of linear_logprobs: what is kept is not computed again, and no gradient is worse for it."""

import pytest
import torch
from examples import given, st
from oracle import BACKENDS, CPU_BACKENDS, GPU, TRITON, environment, make_case
from strategies import cases
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import g2rl_kernels as g2
from g2rl_kernels.head import cpu, logprobs
from g2rl_kernels.head.backend import backend as implementation

ISAS = [isa for _, isa in CPU_BACKENDS]
KEEPING = [one for one in BACKENDS if one[0] != "reference"]
keeping = pytest.mark.parametrize("backend", KEEPING, ids=[isa or name for name, isa in KEEPING])
ALL = 1 << 40


def gradients(case, memory: int, backend=(None, None)):
    """Gradients of hidden, weight and bias for random incoming ones."""
    name, isa = backend
    if name == "triton":
        case = case.to(GPU)
    with environment("G2RL_CPU_ISA", isa):
        return [found.cpu() for found in _gradients(case, memory, name)]


def _gradients(case, memory, name):
    g = torch.Generator().manual_seed(len(case.tokens))
    incoming = torch.randn(2, len(case.tokens), generator=g)
    leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight)]
    head = dict(case.head)
    if case.bias is not None:
        head["bias"] = case.bias.detach().clone().requires_grad_()
        leaves.append(head["bias"])
    found = g2.linear_logprobs(*leaves[:2], case.tokens, **head, logits_memory=memory, backend=name)
    loss = (torch.stack(found) * incoming.to(found.logprobs)).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("isa", ISAS)
@given(case=cases(), memory=st.sampled_from((5_000, 60_000, ALL)))
def test_kept_float32_logits_change_no_bit(isa, case, memory):
    """Float32 logits are those that a second product gives."""
    rounded = case.hidden.dtype == torch.bfloat16 and not case.logit_softcap
    if rounded and (case.bias is None or case.bias.dtype != torch.float32):
        return
    for found, expected in zip(
        gradients(case, memory, ("cpu", isa)), gradients(case, 0, ("cpu", isa)), strict=True
    ):
        assert torch.equal(found, expected)


@keeping
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])  # flat to peaked
@pytest.mark.parametrize("shift", [0.0, -400.0])
def test_16_bits_are_no_worse_than_computing_again(backend, scale, shift):
    """Largest and typical error of bfloat16 gradients, against float64, beside those with logits_memory=0."""
    case = make_case([100, 60], V=1000, d=64, dtype=torch.bfloat16)
    case.hidden = (case.hidden * scale).to(torch.bfloat16)
    case.temperature = 0.7
    case.bias = torch.full((1000,), shift).to(torch.bfloat16)
    case.bias[5::7] = -torch.inf
    case.tokens = torch.where(case.tokens % 7 == 5, case.tokens - 1, case.tokens)
    exact = make_case([100, 60], V=1000, d=64, dtype=torch.float64)
    exact.hidden, exact.weight = case.hidden.double(), case.weight.double()
    exact.bias, exact.tokens, exact.temperature = case.bias.double(), case.tokens, case.temperature
    truth, kept, anew = gradients(exact, 0), gradients(case, ALL, backend), gradients(case, 0, backend)
    for name, right, found, other in zip(("hidden", "weight", "bias"), truth, kept, anew, strict=True):
        mine, theirs = found.double() - right, other.double() - right
        assert mine.norm() <= 1.03 * theirs.norm(), name
        assert mine.abs().max() <= 1.1 * theirs.abs().max(), name
        if name != "hidden":
            assert (found[case.bias == -torch.inf] == 0).all()


@keeping
def test_rare_entries_keep_their_digits(backend):
    """Rows of the weight's gradient whose probabilities are 1e-4 to 1e-12 of the likeliest."""
    generator = torch.Generator().manual_seed(0)
    N, V, d = 64, 960, 32
    hidden = torch.randn(N, d, generator=generator).to(torch.bfloat16)
    weight = (torch.randn(V, d, generator=generator) / 8).to(torch.bfloat16)
    bias = -torch.linspace(0, 28, V).to(torch.bfloat16)
    tokens = torch.zeros(N, dtype=torch.int64)

    name, isa = backend
    device = GPU if name == "triton" else torch.device("cpu")

    def weight_gradient(dtype, memory):
        options = {"backend": None if dtype == torch.float64 else name, "logits_memory": memory}
        h, w, b = (t.to(device, dtype) for t in (hidden, weight, bias))
        w.requires_grad_()
        out = g2.linear_logprobs(h, w, tokens.to(device), bias=b, **options)
        return torch.autograd.grad(out.logprobs.sum(), w)[0].double().cpu()

    with environment("G2RL_CPU_ISA", isa):
        truth, kept, anew = (
            weight_gradient(torch.float64, 0),
            weight_gradient(torch.bfloat16, ALL),
            weight_gradient(torch.bfloat16, 0),
        )
    row = truth.norm(dim=1)
    assert ((kept - truth).norm(dim=1) / row).max() <= 1.1 * ((anew - truth).norm(dim=1) / row).max()


@keeping
def test_a_nan_stays_with_its_token(backend):
    case = make_case([40], V=300, d=20, dtype=torch.bfloat16)
    case.hidden[7] = torch.nan
    hidden, _ = gradients(case, ALL, backend)
    assert hidden[7].isnan().all()
    assert not hidden[torch.arange(40) != 7].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "V", "more"), [("cpu", 960, 1.03), ("triton", 1024, 1.07)])
def test_all_logits_take_the_bytes_documented(dtype, backend, V, more):
    """2 bytes a logit for bfloat16, 4 otherwise, up to whole tiles of 96 x 16 or units of 256; no more than
    asked for."""
    if backend == "triton":
        pytest.importorskip("triton")
    kept_bytes = implementation(backend).kept_bytes
    case = make_case([160], V=V, d=8, dtype=dtype)
    size = 2 if dtype == torch.bfloat16 else 4
    whole = kept_bytes(case.hidden, case.spec, ALL)
    assert 160 * V * size <= whole <= 160 * V * size * more
    for most in (0, 1, whole // 3, whole - 1, whole, whole + 1):
        assert kept_bytes(case.hidden, case.spec, most) <= most
    assert whole // 3 < kept_bytes(case.hidden, case.spec, whole // 2 + 8 * whole // V) <= whole * 0.6
    assert kept_bytes(case.hidden[:0], case.spec, ALL) <= 20 * V * 16


@pytest.mark.parametrize("backend", ["cpu", *(["triton"] if TRITON in BACKENDS else [])])
def test_what_fits_is_not_computed_again(backend):
    """A weight that changes between the passes shows which logits the backward pass computes."""
    case = make_case([33], V=1000, d=16, dtype=torch.float32)
    if backend == "triton":
        case = case.to(GPU)
    weight, tokens = case.weight.clone(), case.tokens
    for memory, changed in ((0, True), (ALL, False)):
        hidden = case.hidden.clone().requires_grad_()
        bias = torch.zeros(1000, device=hidden.device, requires_grad=True)
        case.weight.copy_(weight)
        out = g2.linear_logprobs(
            hidden, case.weight, tokens, bias=bias, logits_memory=memory, backend=backend
        )
        before = torch.softmax(hidden.detach() @ weight.T, 1)
        case.weight.data.mul_(0.5)  # behind autograd's back
        expected = torch.nn.functional.one_hot(tokens, 1000).float().sub(before).sum(0)
        (found,) = torch.autograd.grad(out.logprobs.sum(), bias)
        assert torch.allclose(found, expected, atol=1e-4) != changed


def test_nothing_is_kept_without_gradients(monkeypatch):
    asked = []
    kept_bytes = cpu.kept_bytes
    monkeypatch.setattr(cpu, "kept_bytes", lambda *args: asked.append(args[-1]) or kept_bytes(*args))
    case = make_case([33], V=1000, d=16, dtype=torch.float32)
    g2.linear_logprobs(case.hidden, case.weight, case.tokens)
    with torch.no_grad():
        g2.linear_logprobs(case.hidden.requires_grad_(), case.weight, case.tokens)
    assert asked == [0, 0]
    g2.linear_logprobs(case.hidden, case.weight, case.tokens)
    assert asked == [0, 0, logprobs.LOGITS_MEMORY]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_has_the_same_gradients(reentrant):
    case = make_case([33], V=1000, d=16, dtype=torch.float32)
    leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight)]

    def loss(hidden, weight):
        return sum(one.sum() for one in g2.linear_logprobs(hidden, weight, case.tokens))

    plain = torch.autograd.grad(loss(*leaves), leaves)
    checkpoint(loss, *leaves, use_reentrant=reentrant).backward()  # reentrant ones refuse autograd.grad
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, plain, strict=True))
    assert min(gradient.abs().max() for gradient in plain) > 0


def test_the_backward_pass_makes_nothing_as_large():
    """No gradient of zeros is made for the kept logits themselves."""
    case = make_case([33], V=100_000, d=16, dtype=torch.float32)
    out = g2.linear_logprobs(case.hidden.requires_grad_(), case.weight, case.tokens, logits_memory=ALL)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out.logprobs.sum().backward()
    made = max(event.self_cpu_memory_usage for event in profiled.events())
    assert made < 1e6  # kept: 19 MB


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (True, TypeError), (1.5, TypeError), (2**63, ValueError)]
)
def test_a_wrong_budget_is_named(value, error):
    case = make_case([3], V=20, d=4, dtype=torch.float32)
    with pytest.raises(error, match="logits_memory"):
        g2.linear_logprobs(case.hidden, case.weight, case.tokens, logits_memory=value)
