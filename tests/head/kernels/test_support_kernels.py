"""A head restricted to some ids a token, in Triton: its two products, and the backend made of them.

Without a GPU the kernels are interpreted (tests/conftest.py). The interpreter truncates where a GPU rounds to
bfloat16; `stored` allows for it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import test_linear_logprobs as shared
import torch
from marks import dtypes
from oracle import GPU, Case, entropy, logit_size, logits, make_case
from strategies import LAYOUTS, low_rank, restride
from torch import Tensor

import g2rl_kernels as g2

pytest.importorskip("triton", reason="pip install triton")

from live_bytes import LiveBytes, no_launches

from g2rl_kernels.head.spec import HeadSpec
from g2rl_kernels.head.support import ops, products
from g2rl_kernels.head.support import triton as kernels
from g2rl_kernels.head.triton import support_sum

HAS_GPU = GPU.type == "cuda"
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
Lists = tuple[Tensor, ...]  # as `support` takes them

STATISTICS = ("sum_p_squared", "top_token")


# --- the two products ---------------------------------------------------------------------------------------


def fenced(tensor: Tensor) -> Tensor:
    """The same tensor on the GPU, if there is one, between rows of NaN, or of 0 for integers."""
    fence = torch.full_like(tensor[:1], torch.nan if tensor.is_floating_point() else 0)
    fence = fence.expand(8, *tensor.shape[1:])
    return torch.cat([fence, tensor, fence]).to(GPU)[8:-8]


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    values = torch.randn(rows, columns).to(dtype)
    if layout == "contiguous":
        return fenced(values)
    values = restride(values, layout)
    assert values._base is not None
    return values._base.to(GPU).as_strided(values.shape, values.stride(), values.storage_offset())


def stored(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums in float32 as a kernel stores them in `dtype`."""
    if dtype == torch.bfloat16 and not HAS_GPU:
        return (sums.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    return sums.to(dtype)


@dtypes
@pytest.mark.parametrize(("layout", "d"), [*((layout, 300) for layout in LAYOUTS), ("contiguous", 1)])
def test_dot(dtype, layout, d):
    """d = 300: one block of columns and a part of one. Rows outside of either matrix are 0, and not read."""
    hidden, weight = matrix(7, d, dtype, layout), matrix(50, d, dtype, layout)
    rows, index = torch.randint(7, (83,)).to(GPU), torch.randint(50, (83,)).to(GPU)
    index[:4] = torch.tensor([-1, 50, 2**32 + 3, 3 - 2**32])  # the last two are 3 as int32
    rows[4:6] = torch.tensor([-1, 7])
    outside = torch.arange(83, device=GPU) < 6
    found = kernels.gather_dot(hidden, rows, weight, index)
    exact = products.gather_dot(hidden.double(), rows.clamp(0, 6), weight.double(), index)
    assert found.dtype == torch.float32
    assert not found[outside].any()
    size = products.gather_dot(hidden.double().abs(), rows.clamp(0, 6), weight.double().abs(), index)
    assert ((found - exact).abs() <= 2.0**-21 * size)[~outside].all()
    assert exact[~outside].all()


def ragged_lists() -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients, index and offsets: empty lists, rows that stand twice or lie outside of 50, and entries
    before the first list and behind the last."""
    offsets = torch.tensor([3, 3, 10, 11, 300, 300, 317, 317])
    index = torch.randint(50, (320,))
    index[5:9] = index[4]
    index[[3, 20, 299]] = torch.tensor([-1, 50, 2**32 + 3])
    return torch.randn(320), index, offsets


@dtypes
@pytest.mark.parametrize(
    ("layout", "d"), [*((layout, 300) for layout in LAYOUTS), ("contiguous", 1), ("offset", 1030)]
)
def test_sum(dtype, layout, d):
    """d = 1030: one wide block of columns and a part of one; 300: a part of a wide one; 1: a narrow one."""
    numbers = [fenced(t) for t in ragged_lists()]
    weight = matrix(50, d, dtype, layout)
    offsets = numbers[2]
    exact, size = torch.empty(2, 7, d, dtype=torch.float64, device=GPU)
    sums = torch.full((7, d), torch.nan, device=GPU)
    kernels.gather_sum(*numbers, weight, sums)
    products.gather_sum(numbers[0].double(), *numbers[1:], weight.double(), exact)
    products.gather_sum(numbers[0].double().abs(), *numbers[1:], weight.double().abs(), size)
    assert ((sums - exact).abs() <= 2.0**-21 * size).all()
    assert not sums[offsets.diff() == 0].any()
    assert exact[offsets.diff() > 0].any(1).all()

    out = torch.full((7, d + 3), torch.nan, dtype=dtype, device=GPU)
    kernels.gather_sum(*numbers, weight, out[:, 1:-2])
    assert torch.equal(out[:, 1:-2], stored(sums, dtype)), "rounded once"
    assert out[:, 0].isnan().all()
    assert out[:, -2:].isnan().all()


def test_a_long_list_keeps_its_digits():
    """One sum of so many equal terms would be off by 1e-6."""
    K = 200_000 if HAS_GPU else 5_000
    coefficients, index = torch.full((K,), 0.1, device=GPU), torch.arange(K, device=GPU) % 50
    weight, out = torch.full((50, 3), 1.1, device=GPU), torch.empty(1, 3, device=GPU)
    kernels.gather_sum(coefficients, index, torch.tensor([0, K], device=GPU), weight, out)
    exact = coefficients.double().sum() * weight[0, 0].double()
    assert ((out / exact - 1).abs() < 3e-7).all()


def test_unchecked_offsets_read_nothing_outside():
    """Offsets count as clamped to [0, K], and as their largest so far where they fall."""
    coefficients, index, _ = (fenced(t) for t in ragged_lists())
    weight = matrix(50, 5, torch.float32)
    found, expected = torch.empty(2, 6, 5, device=GPU)
    wild = torch.tensor([-(2**40), -1, 30, 7, 60, 2**40, 310], device=GPU)
    tame = torch.tensor([0, 0, 30, 30, 60, 320, 320], device=GPU)
    kernels.gather_sum(coefficients, index, wild, weight, found)
    kernels.gather_sum(coefficients, index, tame, weight, expected)
    assert torch.equal(found, expected)
    assert found.isfinite().all()


@pytest.mark.parametrize("d", [300, 20])
def test_bits_of_a_list_depend_on_no_other(d):
    coefficients, index, offsets = (t.to(GPU) for t in ragged_lists())
    weight = matrix(50, d, torch.float32)
    together, again = torch.empty(2, 7, d, device=GPU)
    kernels.gather_sum(coefficients, index, offsets, weight, together)
    kernels.gather_sum(coefficients, index, offsets, weight, again)
    assert torch.equal(together, again)
    for i, (begin, end) in enumerate(zip(offsets.tolist(), offsets[1:].tolist())):
        alone = torch.empty(1, d, device=GPU)
        own = coefficients[begin:end].clone(), index[begin:end].clone()
        kernels.gather_sum(*own, torch.tensor([0, end - begin], device=GPU), weight, alone)
        assert torch.equal(alone[0], together[i])
    rows = index % 7
    dots = kernels.gather_dot(weight[:7], rows, weight, index)
    assert torch.equal(dots, kernels.gather_dot(weight[:7], rows, weight, index))
    shifted = kernels.gather_dot(weight[:7], rows[5:].clone(), weight, index[5:].clone())
    assert torch.equal(dots[5:], shifted)


def test_nothing_to_do():
    weight, none = matrix(50, 5, torch.float32), torch.empty(0, dtype=torch.int64, device=GPU)
    assert kernels.gather_dot(weight, none, weight, none).shape == (0,)
    out, zeros = torch.full((2, 5), torch.nan, device=GPU), none.new_zeros(3)
    kernels.gather_sum(none.float(), none, zeros, weight, out)
    assert not out.any()
    kernels.gather_sum(none.float(), none, zeros[:1], weight, out[:0])


# --- the backend --------------------------------------------------------------------------------------------


def lists_for(case: Case, most: int, seed: int = 0) -> Lists:
    """For each token itself and some other ids, in no order; `most` at most."""
    g = torch.Generator().manual_seed(seed)
    lists = []
    for token in case.tokens.tolist():
        ids = torch.randperm(len(case.weight), generator=g)
        ids = ids[ids != token][: int(torch.randint(most, (), generator=g))]
        ids = torch.cat([ids, torch.tensor([token])])
        lists.append(ids[torch.randperm(len(ids), generator=g)])
    return torch.cat(lists), torch.tensor([0, *map(len, lists)]).cumsum(0)


def outside(case: Case, support: Lists) -> Tensor:
    """[N, V]: what is not in a token's list."""
    ids, offsets = support
    found = torch.ones(len(case.tokens), len(case.weight), dtype=torch.bool)
    found[torch.repeat_interleave(torch.arange(len(case.tokens)), offsets.diff()), ids] = False
    return found


def plain(case: Case, support: Lists, grads: tuple[Tensor, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a user would write in `dtype`: all logits, and -inf outside of the lists; features too."""
    masked = outside(case, support)

    def function(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        here = shared.with_leaves(case, leaves)
        z = logits(here, leaves["hidden"], leaves["weight"], leaves.get("bias"))
        z = z.to(torch.promote_types(dtype, torch.float32)).masked_fill(masked, -torch.inf)
        log_p = z.log_softmax(1)
        finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
        return log_p.gather(1, case.tokens[:, None]).squeeze(1), -(log_p.exp() * finite).sum(1)

    tensors = {name: None if t is None else t.to(dtype) for name, t in shared.parameters(case).items()}
    return shared.gradients(function, tensors, grads)


def ours(
    case: Case, support: Lists, grads: tuple[Tensor, Tensor], backend: str = "triton", **options: Any
) -> dict[str, Tensor]:
    case, (support, grads) = case.to(GPU), ([t.to(GPU) for t in two] for two in (support, grads))
    asked: dict[str, Tensor] = {}

    def function(leaves: dict[str, Tensor]) -> Sequence[Tensor]:
        head = {**shared.with_leaves(case, leaves).head, "bias": leaves.get("bias")} | options
        out = g2.linear_logprobs(
            leaves["hidden"], leaves["weight"], case.tokens, support=tuple(support), backend=backend, **head
        )
        asked.update(list(out._asdict().items())[2:])
        return out[:2]

    found = shared.gradients(function, shared.parameters(case), tuple(grads))
    return {name: value.cpu() for name, value in (found | asked).items()}


def features(case: Case, support: Lists, backend: str = "triton", **options: Any) -> dict[str, Tensor]:
    case = case.to(GPU)
    out = g2.head_features(
        case.hidden, case.weight, case.tokens, case.cu_seqlens, token_weights=case.token_weights,
        support=tuple(t.to(GPU) for t in support), backend=backend, **case.head, **options,
    )  # fmt: skip
    return {name: value.cpu() for name, value in out._asdict().items()}


def exact_features(case: Case, support: Lists) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logsumexp and sum p^2 in float64: phi_t = temperature * d log p / d h_t."""
    hidden, double = case.hidden.double().requires_grad_(), case.double
    z = logits(double.replace(lora=None), hidden, case.merged, double.bias)
    z = z.masked_fill(outside(case, support), -torch.inf)
    log_p = z.log_softmax(1)
    (phi,) = torch.autograd.grad(log_p.gather(1, case.tokens[:, None]).sum(), hidden)
    found = torch.zeros(len(case.lengths), hidden.shape[1], dtype=torch.float64)
    found = found.index_add(0, case.segment, case.token_share[:, None] * phi * case.T)
    return found, z.detach().logsumexp(1), log_p.detach().exp().square().sum(1)


def assert_close(name: str, actual: Tensor, exact: Tensor, off: Tensor | float) -> None:
    error = (actual.double() - exact.double()).abs()
    assert (error <= off).all(), (
        f"{name}: off by {error.max():.3g} of {float(torch.as_tensor(off).max()):.3g}"
    )


def case_of(kind: str, dtype: torch.dtype) -> Case:
    V, lengths = 70, [9, 0, 4]
    case = make_case(lengths, V=V, d=40, dtype=dtype)
    if kind == "bias":
        case.bias = torch.randn(V)
        case.bias[::3] = -torch.inf
        case.bias[case.tokens] = 0.5
        case = case.replace(temperature=0.6, logit_scale=1.5, logit_softcap=3.0)
    if kind == "each":
        case = case.replace(temperature=0.5 + torch.rand(13), token_weights=torch.rand(13))
    if kind == "low-rank part":
        case = case.replace(lora=low_rank(case, 5), temperature=0.8)
    return case


kinds = pytest.mark.parametrize("kind", ["plain", "bias", "each", "low-rank part"])


@dtypes
@kinds
def test_logprobs_and_gradients(dtype, kind):
    """Against float64: at most twice what plain torch is off in this dtype, and rounding. And as the backend
    "reference" to rounding of float32 sums and of the results."""
    case = case_of(kind, dtype)
    support, grads = lists_for(case, 25), (torch.randn(13), torch.randn(13))
    actual = ours(case, support, grads, statistics=STATISTICS)
    exact, torchs = plain(case, support, grads, torch.float64), plain(case, support, grads, dtype)
    reference = ours(case, support, grads, "reference", statistics=STATISTICS)
    of_logits = 2.0**-24 * max(30.0, 8 * float(logit_size(case).amax()))
    assert actual.keys() == reference.keys()
    assert {"logprobs", "entropy", "hidden", "weight"} <= actual.keys()
    for name, value in actual.items():
        assert value.dtype == reference[name].dtype
        assert value.shape == reference[name].shape
        if name == "top_token":
            assert torch.equal(value, reference[name])
            continue
        eps = torch.finfo(value.dtype).eps  # two roundings, or the interpreter's truncation
        size = reference[name].abs().double()
        if name in ("hidden", "A") and case.lora is not None:  # sums of what was rounded
            size += size.max()
        assert_close(name, value, reference[name], 1.01 * eps * size + of_logits * (1 + size.max()))
        if name in exact:
            scale = exact[name].abs().max() + (1 if name in ("logprobs", "entropy") else 0)
            off = 2 * (torchs[name].double() - exact[name]).abs().max() + (eps + of_logits) * scale
            assert_close(name, value, exact[name], off)


@dtypes
@kinds
def test_features(dtype, kind):
    case = case_of(kind, dtype)
    support = lists_for(case, 25)
    actual = features(case, support, statistics=STATISTICS)
    reference = features(case, support, "reference", statistics=STATISTICS)
    of_logits = 2.0**-24 * max(30.0, 8 * float(logit_size(case).amax()))
    for name, value in actual.items():
        if name == "top_token":
            assert torch.equal(value, reference[name])
        else:
            assert value.dtype == torch.float32
            assert_close(name, value, reference[name], of_logits * (1 + reference[name].abs().max()))
    assert not actual["features"][1].any(), "an empty response"
    # The low-rank part's factors are rounded to the dtype of hidden.
    off = of_logits + (torch.finfo(dtype).eps if kind == "low-rank part" else 0)
    phi, lse, squares = exact_features(case, support)
    assert_close("features", actual["features"], phi, 2 * off * (1 + phi.abs().max()))
    assert_close("logsumexp", actual["logsumexp"], lse, 8 * off * (1 + lse.abs().max()))
    assert_close("sum_p_squared", actual["sum_p_squared"], squares, 8 * off)
    double = case.double
    z = logits(double, double.hidden, double.weight, double.bias).masked_fill(
        outside(case, support), -torch.inf
    )
    assert torch.equal(actual["top_token"], z.argmax(1))
    assert_close("entropy", actual["entropy"], entropy(z.log_softmax(1)), 8 * off)


def test_a_token_alone_has_the_same_bits():
    """And so has a second run."""
    case = case_of("bias", torch.bfloat16)
    support, grads = lists_for(case, 25), (torch.randn(13), torch.randn(13))
    case = case.replace(cu_seqlens=torch.arange(14))
    whole, phi = ours(case, support, grads), features(case, support)
    again = ours(case, support, grads)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for t in (0, 12):
        row = slice(t, t + 1)
        one = case.replace(hidden=case.hidden[row], tokens=case.tokens[row], cu_seqlens=torch.tensor([0, 1]))
        begin, end = support[1][t : t + 2].tolist()
        list_of_one = support[0][begin:end].clone(), torch.tensor([0, end - begin])
        alone = ours(one, list_of_one, (grads[0][row], grads[1][row]))
        for name in ("logprobs", "entropy", "hidden"):
            assert torch.equal(alone[name], whole[name][row]), name
        for name, value in features(one, list_of_one).items():
            assert torch.equal(value, phi[name][row]), name


def test_lists_of_the_whole_vocabulary_are_the_full_head():
    case = case_of("bias", torch.float32)
    everything = torch.arange(70).repeat(13), 70 * torch.arange(14)
    actual = features(case, everything)
    full = g2.head_features(
        case.hidden, case.weight, case.tokens, case.cu_seqlens, backend="reference", **case.head
    )
    for name, value in full._asdict().items():
        assert_close(name, actual[name], value, 1e-5)


def test_some_tokens_take_the_full_head():
    case = case_of("bias", torch.float32)
    ids, offsets = lists_for(case, 25)
    whole = torch.arange(13) % 4 == 1
    kept = ~torch.repeat_interleave(whole, offsets.diff())
    lengths = offsets.diff().masked_fill(whole, 0)
    some = ids[kept], torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), whole
    grads = torch.randn(13), torch.randn(13)
    for run in (features, lambda *arguments: ours(*arguments[:2], grads, *arguments[2:])):
        found, expected = run(case, some, "triton"), run(case, some, "reference")
        for name, value in found.items():
            assert_close(name, value, expected[name], 1e-5 * (1 + expected[name].abs().max()))


def test_a_token_that_its_list_lacks_has_nan_alone():
    """Where values are not checked. Ids outside of the vocabulary count as not there."""
    case = case_of("plain", torch.float32).to(GPU)
    ids, offsets = (t.to(GPU) for t in lists_for(case.to(torch.device("cpu")), 25))
    lists = kernels.tiled.Support(ids.clone(), offsets)
    own = ids == case.tokens[lists.rows()]
    lists.ids[own & (lists.rows() == 4)] = 70
    found, _ = ops._forward("triton", "", case.hidden, case.tokens, case.spec, lists, False)
    without = torch.arange(13, device=GPU) == 4
    assert torch.equal(found.logprobs.isnan(), without)
    expected, _ = ops._forward(
        "reference", "", case.hidden, case.tokens, case.spec, kernels.tiled.Support(ids, offsets), False
    )
    assert_close("logprobs", found.logprobs[~without], expected.logprobs[~without], 1e-5)


def test_a_realised_token_that_stands_twice_counts_once():
    """Where values are not checked; test_support_unchecked.py holds "reference" to the formula."""
    case = case_of("plain", torch.float32).to(GPU)
    ids, offsets = lists_for(case.to(torch.device("cpu")), 25)
    twice = (
        torch.cat([ids[a:b].repeat(2) for a, b in pairwise(offsets.tolist())]).to(GPU),
        (2 * offsets).to(GPU),
    )
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight)]
        head = case.spec._replace(weight=leaves[1])
        out = ops.support_logprobs(leaves[0], case.tokens, *head, *twice, backend, "", 0, False)
        (out[0] + out[1]).sum().backward()
        results.append([out[0], out[1], *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results):
        assert_close(backend, found, expected, 1e-5 * (1 + expected.abs().max()))


def test_unchecked_ends_beside_whole_tokens():
    """They count as clamped, as with backend "reference"."""
    case = case_of("plain", torch.float32).to(GPU)
    ids, offsets = lists_for(case.to(torch.device("cpu")), 25)
    offsets[[0, 4, 9, 13]] = torch.tensor([-(2**40), 3, 2**40, -7])
    cu_seqlens, whole = torch.tensor([-9, 7, 2**40, 3]), torch.arange(13) % 4 == 1
    support = [t.to(GPU) for t in (ids, offsets, whole)]
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight)]
        head = leaves[0], case.tokens, *case.spec._replace(weight=leaves[1])
        out = torch.ops.g2rl.mixed_logprobs(*head, *support, backend, "", 13, 0, False)
        (out[0].nansum() + out[1].nansum()).backward()
        inputs = case.hidden, case.tokens, *case.spec, *support
        found = torch.ops.g2rl.mixed_features(*inputs, cu_seqlens.to(GPU), None, backend, "", False)
        results.append([*out[:2], *(leaf.grad for leaf in leaves), *found[:4]])
    for found, expected in zip(*results):
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = found.nan_to_num(), expected.nan_to_num()
        assert_close(backend, found, expected, 1e-5 * (1 + expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_tensor_of_tokens_times_vocabulary(monkeypatch, dtype):
    """Forward and backward with 64 ids a token: some numbers an entry, and what the gradients take."""
    if not HAS_GPU:
        no_launches(monkeypatch, "support_dot", "support_sum")
    N, V, d, each = 4096, 151936, 64, 64
    hidden = torch.zeros(1, d, dtype=dtype, device=GPU).expand(N, d)
    weight = torch.zeros(1, d, dtype=dtype, device=GPU).expand(V, d)
    tokens = torch.arange(N, device=GPU)
    ids = (tokens[:, None] + 7 * torch.arange(each, device=GPU)).flatten()
    offsets, grad = each * torch.arange(N + 1, device=GPU), torch.ones(N, device=GPU)

    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        inputs = (hidden, tokens, *HeadSpec(weight), ids, offsets, "triton", "")
        out = ops.support_logprobs._init_fn(*inputs, 0, False)[:4]
        return out, ops._backward_op._init_fn(grad, grad, *inputs, *out, True, True, False, False, False)

    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, gradients = run()
        most = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            out, gradients = run()
        most = live.most
    extra = most - sum(t.nbytes for t in (*out, *gradients))
    assert 8 * len(ids) < extra < 150 * len(ids) + 64 * V, f"{extra / len(ids):.0f} bytes an entry"


def test_the_products_are_the_kernels(monkeypatch):
    for name in ("gather_dot", "gather_sum"):
        monkeypatch.delattr(products, name)
    case = case_of("plain", torch.float32)
    support, grads = lists_for(case, 3), (torch.randn(13), torch.randn(13))
    features(case, support)
    ours(case, support, grads)


def test_widths_of_both_tiles_are_tested():
    assert support_sum.NARROW[1] < 300 < support_sum.WIDE[1] < 1030


@on_gpu
def test_nothing_waits_for_the_device():
    case = case_of("bias", torch.bfloat16)
    support = tuple(t.to(GPU) for t in lists_for(case, 25))
    case = case.to(GPU)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def run() -> None:
        options = {"support": support, "backend": "triton", "statistics": STATISTICS, **case.head}
        g2.head_features(hidden, weight, case.tokens, case.cu_seqlens, **options)
        out = g2.linear_logprobs(hidden, weight, case.tokens, **options)
        torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), (hidden, weight))

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
