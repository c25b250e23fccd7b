"""linear_logprobs: values and gradients against float64 autograd, memory, determinism."""

from collections.abc import Callable, Sequence

import pytest
import torch
from examples import given
from marks import dtypes
from oracle import (
    CPU_BACKENDS,
    Case,
    Sizes,
    environment,
    logit_size,
    logits,
    low_rounding,
    make_case,
    products_repeat,
)
from strategies import DTYPES, LAYOUTS, cases, restride

import g2rl_kernels as g2
from g2rl_kernels.head import logprobs

Backend = tuple[str | None, str | None]
DEFAULT = (None, None)
backends = pytest.mark.parametrize(
    "backend", [("reference", None), *CPU_BACKENDS], ids=lambda backend: backend[1] or backend[0]
)


Results = dict[str, torch.Tensor]


def gradients(
    function: Callable[[dict[str, torch.Tensor]], Sequence[torch.Tensor]],
    tensors: dict[str, torch.Tensor | None],
    grads: tuple[torch.Tensor, torch.Tensor],
) -> Results:
    """Log-probs and entropy as `function` gives them, and the gradient of each tensor."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None}
    logprobs, H = function(leaves)
    torch.autograd.backward([logprobs, H], [grad.to(logprobs) for grad in grads])
    results = {"logprobs": logprobs.detach(), "entropy": H.detach()}
    return {**results, **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def parameters(case: Case) -> dict[str, torch.Tensor | None]:
    low = (None, None) if case.lora is None else case.lora[:2]
    return {"hidden": case.hidden, "weight": case.weight, "bias": case.bias, "A": low[0], "B": low[1]}


def with_leaves(case: Case, leaves: dict[str, torch.Tensor]) -> Case:
    return case if case.lora is None else case.replace(lora=(leaves["A"], leaves["B"], case.lora[2]))


def plain(case: Case, grads: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> Results:
    """What a user would write in `dtype`, softmax in at least float32. "dz" is the gradient of W h + b."""

    def function(leaves: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        bias = leaves["dz"] + leaves["bias"] if "bias" in leaves else leaves["dz"]
        z = logits(with_leaves(case, leaves), leaves["hidden"], leaves["weight"], bias)
        log_p = z.to(torch.promote_types(dtype, torch.float32)).log_softmax(1)
        finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
        H = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * finite).sum(1)
        return log_p.gather(1, case.tokens[:, None]).squeeze(1), H

    tensors = {name: None if t is None else t.to(dtype) for name, t in parameters(case).items()}
    tensors["dz"] = torch.zeros(len(case.tokens), len(case.weight), dtype=dtype)
    return gradients(function, tensors, grads)


def ours(case: Case, grads: tuple[torch.Tensor, torch.Tensor], backend: Backend = DEFAULT) -> Results:
    def function(leaves: dict[str, torch.Tensor]) -> g2.LinearLogprobs:
        options = {**with_leaves(case, leaves).head, "bias": leaves.get("bias")}
        return g2.linear_logprobs(
            leaves["hidden"], leaves["weight"], case.tokens, backend=backend[0], **options
        )

    with environment("G2RL_CPU_ISA", backend[1]):
        return gradients(function, parameters(case), grads)


def rounded_dz(case: Case, dz: torch.Tensor, relative: float = 2.0**-8) -> dict[str, float]:
    """What rounding dz to bf16 adds to a gradient's error: each product is off by at most 2^-8 of itself,
    signs at random. Twice the root of the sum of squares, 5 standard deviations, is allowed."""
    squares = dz.double() ** 2
    h = case.hidden.double() ** 2
    sums = {"hidden": squares @ case.merged**2, "weight": squares.T @ h}
    if case.lora is not None:
        A, B, scaling = case.lora_in(torch.float64)
        low = (scaling * case.hidden.double() @ A.T) ** 2
        sums |= {"A": scaling**2 * (squares @ B**2).T @ h, "B": squares.T @ low}
    return {name: 2 * relative * float(s.amax().sqrt()) if s.numel() else 0.0 for name, s in sums.items()}


def rounded_low_rank(case: Case, dz: torch.Tensor) -> dict[str, float]:
    """What rounding a low-rank part to 16 bits adds: to products with it, and through the logits to dz."""
    if case.lora is None or case.hidden.dtype == torch.float32 or not len(case.tokens):
        return {}
    off = float(low_rounding(case).max())
    return {
        "bias": 2 * off * float((dz.double() ** 2).sum(0).amax().sqrt()),
        **rounded_dz(case, dz, torch.finfo(case.hidden.dtype).eps / 2 + off),
        **dict.fromkeys(("logprobs", "entropy"), off),
    }


def check(case: Case, backend: Backend = DEFAULT) -> None:
    N = len(case.tokens)
    grads = (torch.randn(N), torch.randn(N))
    assert_as_exact_as_torch(case, backend, grads, ours(case, grads, backend))


def assert_as_exact_as_torch(
    case: Case, backend: Backend, grads: tuple[torch.Tensor, torch.Tensor], actual: Results
) -> None:
    """Errors relative to the largest value: at most twice torch's own in the same dtype, plus rounding."""
    dtype = case.hidden.dtype
    exact, torchs = plain(case, grads, torch.float64), plain(case, grads, dtype)
    pairs = dtype == torch.bfloat16 and backend == ("cpu", "avx512bf16")
    extra = rounded_dz(case, exact["dz"]) if pairs else {}
    low = rounded_low_rank(case, exact["dz"])
    # Of logits to float32: four roundings each of a logit and of the logsumexp, of the size of logits.
    of_logits = 2.0**-24 * max(30.0, 8 * float(logit_size(case).amax()) if len(case.tokens) else 0.0)
    for name, value in actual.items():
        assert value.shape == exact[name].shape
        inputs = parameters(case)
        assert value.dtype == (inputs[name].dtype if name in inputs else torch.float32)
        if not value.numel():
            continue
        # A gradient is rounded to its own dtype at the end, logits before.
        scale = exact[name].abs().max() + (1 if name in ("logprobs", "entropy") else 0)
        floor = (torch.finfo(value.dtype).eps / 2 + of_logits) * scale + torch.finfo(value.dtype).tiny
        floor += extra.get(name, 0.0) + low.get(name, 0.0)
        error = (value.double() - exact[name]).abs().max()
        their = (torchs[name].double() - exact[name]).abs().max().nan_to_num(0.0)
        assert error <= 2 * their + floor, f"{name}: {error:.3g}, torch's {their:.3g}, rounding {floor:.3g}"


@backends
@given(cases())
def test_any_case(backend, case):
    check(case, backend)


@backends
@dtypes
def test_many_tiles(dtype, backend):
    """More tokens than a chunk, more vocabulary than a block or strip, an odd number of columns."""
    case = make_case([1100], V=5003, d=25, dtype=dtype, bias=torch.randn(5003).to(dtype))
    check(case, backend)
    check(case.replace(temperature=0.6, logit_scale=1.5, logit_softcap=4.0), backend)


@backends
def test_sums_over_a_large_vocabulary(backend):
    """A hundred thousand small terms keep their digits beside what was added up before them."""
    check(make_case([20], V=100003, d=16), backend)


@backends
@dtypes
@pytest.mark.parametrize("N", [150, 700], ids="N={}".format)
def test_sums_in_borrowed_memory(monkeypatch, dtype, backend, N):
    """float32 sums of hidden's gradient in the last rows of the weight's: in a part of them, or in all and in
    several chunks."""
    monkeypatch.setattr(logprobs, "SUMS", 1000)
    check(make_case([N], V=513, d=21, dtype=dtype, bias=torch.randn(513)), backend)
    check(make_case([N], V=1, d=21, dtype=dtype), backend)


def test_exact_in_float64():
    case = make_case([30], V=201, d=8, dtype=torch.float64, bias=torch.randn(201, dtype=torch.float64))
    case = case.replace(temperature=0.6, logit_scale=1.5, logit_softcap=4.0)
    grads = (torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64))
    exact, actual = plain(case, grads, torch.float64), ours(case, grads)
    for name, value in actual.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (7, 3), (7,))]
    tokens = torch.tensor([0, 6, 3, 3])

    def function(hidden, weight, bias):
        return tuple(
            g2.linear_logprobs(
                hidden, weight, tokens, bias=bias, temperature=0.7, logit_scale=1.3, logit_softcap=softcap
            )
        )

    assert torch.autograd.gradcheck(function, inputs)


@backends
def test_near_certain_tokens_keep_their_digits(backend):
    """z = (30, 0, ..): d log p / d z_y = 1 - p = 66 e^-30, of which p - 1 in float32 has no digit left."""
    weight = torch.zeros(67, 2)
    weight[5, 0] = 30.0
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight.requires_grad_()
    with environment("G2RL_CPU_ISA", backend[1]):
        logprobs, H = g2.linear_logprobs(hidden, weight, torch.tensor([5]), backend=backend[0])
        gradient, to_weight = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    tail = 66 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    close = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(-logprobs[0].double(), tail, **close)
    torch.testing.assert_close(H[0].double(), 31 * tail, **close)
    torch.testing.assert_close(gradient[0, 0].double(), 30 * tail, **close)
    torch.testing.assert_close(to_weight[5, 0].double(), tail, **close)


@backends
def test_masked_entries(backend):
    """-inf in the bias: p = 0, no gradient, behind a softcap too; if realised, log p = -inf."""
    for softcap in (None, 3.0):
        case = make_case([6], V=9, d=4, bias=torch.randn(9), logit_softcap=softcap)
        case.bias[4] = -torch.inf
        case.tokens[case.tokens == 4] = 5
        check(case, backend)
        results = ours(case, (torch.ones(6), torch.ones(6)), backend)
        assert not results["weight"][4].any()
        case.tokens[2] = 4
        out = g2.linear_logprobs(case.hidden, case.weight, case.tokens, backend=backend[0], **case.head)
        assert out.logprobs[2] == -torch.inf
        assert torch.isfinite(out.entropy).all()


@backends
def test_one_entry_vocabulary_and_no_tokens(backend):
    check(make_case([3], V=1, d=4), backend)
    check(make_case([0], V=5, d=4, bias=torch.randn(5)), backend)


@backends
@dtypes
def test_logits_far_above_zero(dtype, backend):
    """exp(256) is no float32, in places of a tile that hold no token either."""
    check(make_case([3], V=31, d=6, dtype=dtype, bias=torch.full((31,), 256.0)), backend)


@backends
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout, backend):
    case = make_case([20], V=31, d=6, dtype=dtype, bias=torch.randn(62)[::2])
    check(case.replace(hidden=restride(case.hidden, layout), weight=restride(case.weight, layout)), backend)


def test_agrees_with_head_features():
    case = make_case([20], V=310, d=16, bias=torch.randn(310), temperature=0.7)
    out = g2.linear_logprobs(case.hidden, case.weight, case.tokens, **case.head)
    features = g2.head_features(case.hidden, case.weight, case.tokens, case.cu_seqlens, **case.head)
    torch.testing.assert_close(out.logprobs, features.logprobs)
    torch.testing.assert_close(out.entropy, features.entropy)


def test_autocast_changes_no_bit():
    """Inside autocast a bf16 product would be silent."""
    case = make_case([20], V=310, d=16)
    grads = (torch.randn(20), torch.randn(20))
    expected = ours(case, grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ours(case, grads)
    for name, value in expected.items():
        assert torch.equal(value, actual[name])


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained):
    case = make_case([5], V=11, d=4, bias=torch.randn(11))
    full = ours(case, (torch.ones(5), torch.ones(5)))
    leaves = {name: getattr(case, name).clone() for name in ("hidden", "weight", "bias")}
    leaves[trained].requires_grad_()
    out = g2.linear_logprobs(leaves["hidden"], leaves["weight"], case.tokens, bias=leaves["bias"])
    (out.logprobs + out.entropy).sum().backward()
    torch.testing.assert_close(leaves[trained].grad, full[trained])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != trained)


def test_a_tied_embedding_gets_both_gradients():
    case = make_case([7], V=11, d=4)
    ids = torch.tensor([3, 0, 3, 9, 10, 1, 3])

    def grad(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        weight = case.weight.clone().requires_grad_()
        (function(weight[ids], weight) * torch.arange(7.0)).sum().backward()
        return weight.grad

    ours = grad(lambda hidden, weight: g2.linear_logprobs(hidden, weight, case.tokens).logprobs)
    rows = torch.arange(7)
    theirs = grad(lambda hidden, weight: (hidden @ weight.T).log_softmax(1)[rows, case.tokens])
    torch.testing.assert_close(ours, theirs)


def test_one_output_alone():
    case = make_case([5], V=11, d=4)
    for which, grads in ((0, (torch.ones(5), torch.zeros(5))), (1, (torch.zeros(5), torch.ones(5)))):
        hidden = case.hidden.clone().requires_grad_()
        g2.linear_logprobs(hidden, case.weight, case.tokens)[which].sum().backward()
        torch.testing.assert_close(hidden.grad, ours(case, grads)["hidden"])


@backends
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_tensor_of_tokens_times_vocabulary(frozen, backend):
    N, V, d = 1500, 20011, 32
    hidden = torch.randn(N, d).bfloat16().requires_grad_()
    weight = torch.randn(V, d).bfloat16().requires_grad_(not frozen)
    with Sizes() as sizes:
        tokens = torch.randint(V, (N,))
        out = g2.linear_logprobs(hidden, weight, tokens, logits_memory=0, backend=backend[0])
        (out.logprobs.sum() + out.entropy.sum()).backward()
    assert len(sizes.made) > (100 if backend[0] == "reference" else 20)  # it did look inside
    assert max(size for _, size in sizes.made) <= 2**20
    # The weight is never converted whole, and its gradient exists in float32 only by blocks.
    assert max(size for dtype, size in sizes.made if dtype == torch.float32 and size % d == 0) <= 2**20
    assert frozen == (weight.grad is None)


@backends
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype).split(".")[1])
def test_threads_and_runs_change_no_bit(backend, dtype):
    case = make_case([1100], V=3001, d=70, dtype=dtype, bias=torch.randn(3001))
    grads = (torch.randn(1100), torch.randn(1100))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(ours(case, grads, backend))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[1].items():
        assert torch.equal(value, results[2][name]), name
    if backend[0] == "reference" and not all(products_repeat(1100, k, 70) for k in (3001, 1024, 512)):
        pytest.skip("torch's own products depend on the number of threads on this CPU")
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@backends
@dtypes
def test_nan_stays_in_its_token(dtype, backend):
    case = make_case([9], V=31, d=4, dtype=dtype)
    clean = ours(case, (torch.ones(9), torch.ones(9)), backend)
    case.hidden[3, 1] = torch.nan
    out = ours(case, (torch.ones(9), torch.ones(9)), backend)
    others = torch.arange(9) != 3
    for name in ("logprobs", "entropy", "hidden"):
        assert torch.isnan(out[name][3]).all()
        assert torch.equal(out[name][others], clean[name][others])


def test_pack_responses():
    hidden = torch.randn(3, 4, 2, requires_grad=True)
    tokens = torch.arange(12).view(3, 4)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    for given_mask in (mask, mask.bool(), mask.to(torch.uint8)):
        packed, ids, cu_seqlens = g2.pack_responses(hidden, tokens, given_mask)
        assert ids.tolist() == [1, 2, 8, 10, 11]
        assert cu_seqlens.tolist() == [0, 2, 2, 5]
        assert cu_seqlens.dtype == torch.int64
        assert torch.equal(packed, hidden.reshape(12, 2)[ids])
    packed.sum().backward()
    assert torch.equal(hidden.grad, mask[:, :, None].expand(3, 4, 2).float())


def test_pack_responses_of_nothing():
    packed, ids, cu_seqlens = g2.pack_responses(
        torch.empty(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool)
    )
    assert (packed.shape, ids.shape, cu_seqlens.tolist()) == ((0, 4), (0,), [0, 0, 0])
