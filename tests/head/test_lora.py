"""`lora` of both ops: values and gradients of W + scaling B A without forming it. The random cases of
strategies.py have one in two with a low-rank part; here is what they do not reach.
"""

import pytest
import test_linear_logprobs as shared
import torch
from marks import backends, dtypes
from oracle import (
    CPU_BACKENDS,
    Sizes,
    assert_as_exact_as_torch,
    environment,
    make_case,
    run_head,
)
from strategies import DTYPES, low_rank

import g2rl_kernels as g2
from g2rl_kernels.head import logprobs

NOT_TRITON = [("reference", None), *CPU_BACKENDS]
not_triton = pytest.mark.parametrize("backend", NOT_TRITON, ids=lambda backend: backend[1] or backend[0])


def case_of(lengths, V, d, r, dtype=torch.float32, low_dtype=None, **options):
    case = make_case(lengths, V, d, dtype, **options)
    return case.replace(lora=low_rank(case, r, low_dtype))


@not_triton
@dtypes
@pytest.mark.parametrize("r", [1, 16, 40])
def test_many_tiles(dtype, r, backend):
    """More tokens than a chunk, more vocabulary than a slab."""
    case = case_of([1100], 1700, 25, r, dtype, torch.float32, bias=torch.randn(1700))
    shared.check(case, backend)
    shared.check(case.replace(temperature=0.6, logit_scale=1.5, logit_softcap=4.0), backend)


@not_triton
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("N", [150, 700])
def test_sums_in_several_chunks(monkeypatch, dtype, backend, N):
    """Chunks of hidden's sums, in their own memory and in the weight's gradient, share those of B."""
    monkeypatch.setattr(logprobs, "SUMS", 1000)
    case = case_of([N], 513, 21, 5, dtype)
    shared.check(case, backend)
    full = shared.ours(case, (torch.ones(N), torch.ones(N)), backend)
    frozen = trained_alone(case, backend, ("hidden", "A", "B"))
    for name, value in frozen.items():
        torch.testing.assert_close(
            value, full[name], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4
        )


def trained_alone(case, backend, names):
    """Gradients where only some are asked for, with ones coming in."""
    leaves = {
        name: t.clone().requires_grad_(name in names)
        for name, t in shared.parameters(case).items()
        if t is not None
    }
    options = {**shared.with_leaves(case, leaves).head, "backend": backend[0]}
    with environment("G2RL_CPU_ISA", backend[1]):
        out = g2.linear_logprobs(leaves["hidden"], leaves["weight"], case.tokens, **options)
        (out.logprobs + out.entropy).sum().backward()
    assert all((leaf.grad is None) == (name not in names) for name, leaf in leaves.items())
    return {name: leaves[name].grad for name in names}


@not_triton
@pytest.mark.parametrize("names", [("A",), ("B",), ("A", "B"), ("hidden",), ("weight", "B")], ids=str)
def test_only_what_is_trained_gets_a_gradient(names, backend):
    case = case_of([5, 6], 211, 12, 3)
    full = shared.ours(case, (torch.ones(11), torch.ones(11)), backend)
    for name, value in trained_alone(case, backend, names).items():
        torch.testing.assert_close(value, full[name], rtol=1e-5, atol=1e-6)


def test_exact_in_float64():
    case = case_of([30], 201, 8, 3, torch.float64, bias=torch.randn(201, dtype=torch.float64))
    case = case.replace(temperature=0.6, logit_scale=1.5, logit_softcap=4.0)
    grads = (torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64))
    exact, actual = shared.plain(case, grads, torch.float64), shared.ours(case, grads)
    merged = shared.ours(case.replace(weight=case.merged, lora=None), grads)
    for name, value in actual.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-11)
        if name in merged:  # of the effective weight: hidden's, and W's own
            torch.testing.assert_close(value, merged[name], rtol=1e-11, atol=1e-11)


def test_gradcheck():
    shapes = ((4, 3), (7, 3), (2, 3), (7, 2))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    tokens = torch.tensor([0, 6, 3, 3])

    def function(hidden, weight, A, B):
        return tuple(g2.linear_logprobs(hidden, weight, tokens, lora=(A, B, 0.7), logit_softcap=2.0))

    assert torch.autograd.gradcheck(function, inputs)


@backends
@dtypes
@pytest.mark.parametrize("r", [3, 16])
def test_features_of_the_effective_weight(backend, dtype, r):
    case = case_of([17, 0, 33, 1], 300, 24, r, dtype, torch.float32, token_weights=torch.rand(51))
    assert_as_exact_as_torch(case, run_head(case, backend), backend)
    case = case.replace(bias=torch.randn(300), logit_scale=1.3, logit_softcap=3.0, temperature=0.7)
    case.bias[7::5] = -torch.inf
    case.tokens[case.tokens % 5 == 2] = 0
    assert_as_exact_as_torch(case, run_head(case, backend), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=lambda backend: backend[1])
@dtypes
def test_known_log_probs_with_a_low_rank_part(backend, dtype):
    """Right ones, wrong ones in one response, and wrong ones in all."""
    case = case_of([40, 0, 33, 70], 500, 24, 5, dtype, logit_softcap=3.0, token_weights=torch.rand(143))
    known = run_head(case, backend).logprobs
    wrong = known.clone()
    wrong[50] -= 1.0
    for given in (known, wrong, known - 0.5):
        assert_as_exact_as_torch(case, run_head(case, backend, known_logprobs=given), backend)


@not_triton
def test_certified_features_of_the_effective_weight(backend):
    case = case_of([17, 33], 300, 24, 3)
    with environment("G2RL_CPU_ISA", backend[1]):
        out = g2.certified_head_features(
            case.hidden,
            case.weight,
            case.tokens,
            case.cu_seqlens,
            max_skipped=0.3,
            backend=backend[0],
            **case.head,
        )
        every = run_head(case, backend)
    W = case.merged
    diameter = torch.cdist(W[None], W[None]).max()
    error = (out.features - every.features).double().norm(dim=1)
    assert (out.skipped_tokens > 0).all()
    assert (error > 1e-4).all()
    assert (error <= out.skipped_mass * diameter).all()


@not_triton
def test_near_certain_tokens_keep_their_digits(backend):
    """z = (30, 0, ..), of which the low-rank part gives all."""
    A, B = torch.tensor([[30.0, 0.0]]), torch.zeros(67, 1)
    B[5] = 1.0
    hidden, B = torch.tensor([[1.0, 0.0]], requires_grad=True), B.requires_grad_()
    with environment("G2RL_CPU_ISA", backend[1]):
        found = g2.linear_logprobs(
            hidden, torch.zeros(67, 2), torch.tensor([5]), lora=(A, B, 1.0), backend=backend[0]
        )
        to_hidden, to_B = torch.autograd.grad(found.logprobs.sum(), (hidden, B))
    tail = 66 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    close = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(-found.logprobs[0].double(), tail, **close)
    torch.testing.assert_close(to_hidden[0, 0].double(), 30 * tail, **close)
    torch.testing.assert_close(to_B[5, 0].double(), 30 * tail, **close)


@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=lambda backend: backend[1])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_threads_and_kept_logits_change_no_bit(backend, dtype):
    """Float32 logits that are kept hold the low-rank part already."""
    case = case_of([1100], 1500, 30, 7, dtype, logit_softcap=9.0)
    grads = (torch.randn(1100), torch.randn(1100))
    threads, results = torch.get_num_threads(), []
    for n, memory in ((1, 0), (2, 0), (2, 1 << 30)):
        torch.set_num_threads(n)
        try:
            results.append(with_memory(case, grads, backend, memory))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def with_memory(case, grads, backend, memory):
    def function(leaves):
        options = {**shared.with_leaves(case, leaves).head, "backend": backend[0], "logits_memory": memory}
        return g2.linear_logprobs(leaves["hidden"], leaves["weight"], case.tokens, **options)

    with environment("G2RL_CPU_ISA", backend[1]):
        return shared.gradients(function, shared.parameters(case), grads)


@not_triton
def test_nothing_of_the_size_of_the_weight_or_the_logits_is_made(backend):
    N, V, d, r = 1500, 20011, 96, 4
    case = case_of([N], V, d, r, torch.bfloat16, torch.float32)
    hidden, (A, B, scaling) = case.hidden.requires_grad_(), case.lora
    A, B = A.requires_grad_(), B.requires_grad_()
    with Sizes() as sizes:
        options = {"lora": (A, B, scaling), "logits_memory": 0, "backend": backend[0]}
        out = g2.linear_logprobs(hidden, case.weight, case.tokens, **options)
        (out.logprobs.sum() + out.entropy.sum()).backward()
    assert len(sizes.made) > 20
    assert max(size for _, size in sizes.made) <= max(2**20, V * r)
    assert A.grad.abs().max() > 0
    assert B.grad.abs().max() > 0


def test_autocast_changes_no_bit():
    case = case_of([20], 310, 16, 4)
    grads = (torch.randn(20), torch.randn(20))
    expected = shared.ours(case, grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = shared.ours(case, grads)
    for name, value in expected.items():
        assert torch.equal(value, actual[name])


A, B = torch.randn(2, 4), torch.randn(9, 2)


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        ((A, B), TypeError, r"lora: got 2 values, needs a tuple of three, \(A, B, scaling\)"),
        (A, TypeError, "lora: got Tensor"),
        ((A, None, 1.0), TypeError, "lora: B: got NoneType"),
        ((A.double(), B, 1.0), TypeError, "lora: A: got torch.float64, needs torch.float32"),
        ((A[:, :3], B, 1.0), ValueError, r"lora: A: got shape \[2, 3\], needs \[r, 4\] with r > 0"),
        ((A[:0], B[:, :0], 1.0), ValueError, r"lora: A: got shape \[0, 4\], needs \[r, 4\] with r > 0"),
        ((A, B[:8], 1.0), ValueError, r"lora: B: got shape \[8, 2\], needs \[9, 2\]"),
        ((A, B.T, 1.0), ValueError, r"lora: B: got shape \[2, 9\], needs \[9, 2\]"),
        ((A, B, float("inf")), ValueError, "lora: scaling: got inf, needs a finite number"),
        ((A, B, 10**400), ValueError, "lora: scaling: got 1000"),
        ((A, B, "2"), TypeError, "lora: scaling: got str"),
        ((A.to("meta"), B, 1.0), ValueError, "lora: A: got device meta, needs cpu"),
    ],
)
def test_wrong_arguments_are_named(lora, error, message):
    case = make_case([3], 9, 4)
    for call in (
        lambda: g2.linear_logprobs(case.hidden, case.weight, case.tokens, lora=lora),
        lambda: g2.head_features(case.hidden, case.weight, case.tokens, case.cu_seqlens, lora=lora),
        lambda: g2.certified_head_features(case.hidden, case.weight, case.tokens, case.cu_seqlens, lora=lora),
    ):
        with pytest.raises(error, match=message):
            call()
