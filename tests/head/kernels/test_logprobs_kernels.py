"""linear_logprobs in Triton: what tests/head/test_linear_logprobs.py asks of every backend, in chunks, blocks
and tiles small enough to have many of each, and what this backend alone promises.

Without a GPU the kernels are interpreted (tests/conftest.py) and torch multiplies in their stead.
"""

import itertools

import pytest
import test_linear_logprobs as shared
import torch
from marks import dtypes
from oracle import GPU, TRITON, Case, make_case

import g2rl_kernels as g2
from g2rl_kernels.head import logprobs, tiled

pytest.importorskip("triton", reason="pip install triton")

from live_bytes import LiveBytes, no_launches

from g2rl_kernels.head.backend import Incoming, Sums
from g2rl_kernels.head.spec import HeadSpec
from g2rl_kernels.head.triton import gradient as head_gradient
from g2rl_kernels.head.triton import logprobs as kernels
from g2rl_kernels.head.triton import tile, tuning

HAS_GPU = GPU.type == "cuda"
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")

TINY = tuning.Config(16, 32, 32, 4, 2)
BACKEND = ("triton", "")  # as the operators take it, without a process group


@pytest.fixture
def tiny_tiles(monkeypatch):
    monkeypatch.setattr(tile, "choose", lambda *_: TINY)


@pytest.fixture
def tiny_budgets(monkeypatch, tiny_tiles):
    """For d = 24, chunks of 32 tokens and blocks of one tile or two. With 61 tokens and 251 entries, hidden's
    sums lie in the weight's gradient, and so do those of some of its blocks."""
    monkeypatch.setattr(kernels, "CHUNK", 40)
    monkeypatch.setattr(kernels, "TOKENS", 32)
    monkeypatch.setattr(kernels, "GRADIENT", 2 * 32 * 64)
    monkeypatch.setattr(kernels, "SUMS", 4 * 24 * 32)
    monkeypatch.setattr(logprobs, "SUMS", 4 * 24 * 10)


anywhere = shared.ours


def ours(
    case: Case, grads: tuple[torch.Tensor, torch.Tensor], backend: shared.Backend = TRITON
) -> shared.Results:
    """On the GPU, if there is one."""
    found = anywhere(case.to(GPU), tuple(grad.to(GPU) for grad in grads), backend)
    return {name: value.cpu() for name, value in found.items()}


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch):
    monkeypatch.setattr(shared, "ours", ours)


def check(case: Case) -> None:
    shared.check(case, TRITON)


# --- values and gradients -----------------------------------------------------------------------------------


@dtypes
def test_shipped_tiles(dtype):
    """With the tiles of the interpreter, or on a GPU those that are shipped."""
    check(make_case([20, 13], V=150, d=24, dtype=dtype, bias=torch.randn(150).to(dtype)))


@dtypes
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_many_chunks_and_blocks(tiny_budgets, dtype, softcap):
    case = make_case([61], V=251, d=24, dtype=dtype, bias=torch.randn(251), logit_softcap=softcap)
    check(case)
    check(case.replace(bias=None, temperature=0.6, logit_scale=1.5))


@pytest.mark.parametrize("V", [1, 31, 32, 33])
def test_sizes_around_those_of_tiles(tiny_tiles, V):
    for N in (1, 15, 16, 17):
        check(make_case([N], V=V, d=N, dtype=torch.bfloat16))


def test_masked_entries(tiny_budgets):
    """-inf in the bias, for whole tiles and behind a softcap too."""
    for softcap in (None, 3.0):
        case = make_case([40], V=120, d=24, bias=torch.randn(120), logit_softcap=softcap)
        case.bias[24:100] = -torch.inf
        case.tokens[(case.tokens >= 24) & (case.tokens < 100)] = 5
        check(case)
        assert not ours(case, (torch.ones(40), torch.ones(40)))["weight"][24:100].any()
    large = ours(case, (torch.ones(40), torch.full((40,), 1e10)))
    assert all(torch.isfinite(large[name]).all() for name in ("hidden", "weight", "bias"))
    case.bias[:] = -torch.inf
    case.bias[5], case.tokens[:] = 0.0, 5
    check(case)


def test_the_softcaps_slope_keeps_its_digits():
    """Where the realised logit is 8 c, the slope is 4.5e-7: 1 - tanh^2 has no digit of it in float32."""
    case = make_case([4], V=40, d=16, logit_softcap=2.0)
    case.hidden = 16 * case.weight[case.tokens] / case.weight[case.tokens].square().sum(1, keepdim=True)
    case.weight[:] = torch.where(torch.isin(torch.arange(40), case.tokens)[:, None], case.weight, 0.0)
    case.tokens = case.tokens[:1].expand(4).contiguous()
    case.hidden = case.hidden[:1].expand(4, 16).contiguous()
    grads = (torch.ones(4), torch.zeros(4))
    exact, actual = shared.plain(case, grads, torch.float64), ours(case, grads)
    token = case.tokens[0]
    assert 0 < exact["weight"][token].norm() < 1e-4
    torch.testing.assert_close(actual["weight"][token].double(), exact["weight"][token], rtol=1e-4, atol=0)


def test_small_float16_gradients_do_not_vanish():
    """Of a mean over many tokens on a flat model every g p is below float16's least number: torch's own dz
    is 0 but at the realised token."""
    N, V = 256, 300
    case = make_case([N], V, d=16, dtype=torch.float16)
    case.weight *= 0.1
    case.hidden = 1 + 0.1 * case.hidden  # tokens do not cancel
    case.tokens[:] = 0
    grads = (torch.full((N,), 2.0**-18), torch.zeros(N))
    exact, actual = shared.plain(case, grads, torch.float64), ours(case, grads)
    largest = exact["hidden"].abs().amax()
    assert ((actual["hidden"] - exact["hidden"]).abs() <= 2**-11 * largest + 2.0**-25).all()
    others = exact["weight"][1:]
    assert 1e-6 < others.abs().mean() < 1e-5
    torch.testing.assert_close(actual["weight"][1:].double(), others, rtol=1e-2, atol=2.0**-24)
    torchs = shared.plain(case, grads, torch.float16)["weight"][1:]
    assert (torchs - others).abs().mean() > 0.9 * others.abs().mean()


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e4])
def test_float16_gradients_of_any_size(tiny_budgets, factor):
    """As torch's in float32, rounded; the largest overflow float16."""
    case = make_case([61], V=251, d=24, dtype=torch.float16)
    grads = (factor * torch.randn(61), factor * torch.randn(61))
    exact, actual = shared.plain(case, grads, torch.float64), ours(case, grads)
    for name in ("hidden", "weight"):
        size = min(exact[name].abs().max().item(), 65504.0)
        rounded = exact[name].half().double()
        error = torch.where(rounded.isinf(), 0.0, actual[name].double() - rounded)
        assert error.abs().max() <= 2.0**-9 * size + 2.0**-24
        assert (actual[name].isinf() == rounded.isinf()).float().mean() > 0.99


# --- the vocabulary in shards -------------------------------------------------------------------------------


@dtypes
def test_shards_of_the_vocabulary_add_up_to_the_whole(tiny_tiles, dtype):
    """What ranks do: a token that lies elsewhere has no logit here, and no column in the sweep."""
    N, V, d, cuts = 40, 100, 24, (0, 30, 100)
    case = make_case([N], V, d, dtype, bias=torch.randn(V)).to(GPU)
    case.tokens[7] = 2**40 + 3  # nowhere: reads nothing
    options = (0.7, 1.3, 4.0)
    terms = torch.randn(3, N, device=GPU)

    def part(begin, end):
        local = torch.where((case.tokens >= begin) & (case.tokens < end), case.tokens - begin, -1)
        local[7] = case.tokens[7]
        return case.hidden, local, HeadSpec(case.weight[begin:end], case.bias[begin:end], *options)

    partial, target, top = kernels.statistics(*part(0, V), more=True)
    parts, targets, tops = zip(
        *(kernels.statistics(*part(a, b), more=True) for a, b in itertools.pairwise(cuts))
    )
    assert partial.shape == (1, 4, N)
    assert target[7] == -torch.inf
    assert torch.equal(torch.stack(targets).amax(0), target)
    for found in targets:
        assert (found == -torch.inf).any()
        assert not found.isnan().any()
    whole = tiled.finish(partial, target, case.tokens, top)
    tops = torch.cat([of_part + begin for of_part, begin in zip(tops, cuts)])
    for a, b in zip(whole, tiled.finish(torch.cat(parts), target, case.tokens, tops)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(kernels.statistics(*part(0, V))[:2], (partial[:, :3], target)):
        assert torch.equal(a, b)

    def swept(begin, end):
        sums = torch.zeros(N, d, device=GPU)
        grad_weight = torch.full((end - begin, d), torch.nan, dtype=dtype, device=GPU)
        grad_bias = torch.zeros(end - begin, device=GPU)
        incoming, block = Incoming(whole[2], terms), slice(0, end - begin)
        kernels.sweep(*part(begin, end), incoming, block, Sums(sums, grad_weight, grad_bias))
        return sums, grad_weight, grad_bias

    sums, grad_weight, grad_bias = swept(0, V)
    shards = [swept(a, b) for a, b in itertools.pairwise(cuts)]
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    close = {"rtol": rounding, "atol": rounding}
    torch.testing.assert_close(sum(shard[0] for shard in shards), sums, **close)
    torch.testing.assert_close(torch.cat([shard[1] for shard in shards]), grad_weight, **close)
    torch.testing.assert_close(torch.cat([shard[2] for shard in shards]), grad_bias, **close)


def test_a_shard_that_holds_nothing_says_so_and_keeps_nan(tiny_tiles):
    """Masked entries add nothing. NaN in hidden shows in the sum, though the logit is elsewhere."""
    case = make_case([3], V=40, d=24, bias=torch.full((40,), -torch.inf)).to(GPU)
    case.tokens[:2] = -1
    case.hidden[1] = torch.nan
    head = HeadSpec(case.weight, case.bias)
    partial, target, top = kernels.statistics(case.hidden, case.tokens, head, more=True)
    assert partial[0, :, [0, 2]].T.tolist() == [[-torch.inf, 0.0, 0.0, 0.0]] * 2
    assert partial[0, 1, 1].isnan()
    assert (top == -1).all()
    assert (target == -torch.inf).all()


@pytest.mark.parametrize("value", [-1, 50, 2**40], ids=str)
def test_a_token_outside_of_the_vocabulary_spoils_only_itself(monkeypatch, value):
    """On a GPU values are not checked: it would wait for the device."""
    monkeypatch.setattr(logprobs, "may_read_values", lambda _: False)
    case = make_case([9], V=50, d=12)
    others = torch.arange(9) != 4
    ones = (torch.ones(9), torch.ones(9))
    clean, used = ours(case, (others.float(), others.float())), ours(case, ones)
    case.tokens[4] = value
    out = ours(case, (others.float(), others.float()))  # as of torch.where(mask, logprobs, 0)
    for name in ("logprobs", "entropy"):
        assert out[name][4].isnan()
        assert torch.equal(out[name][others], clean[name][others])
    for name in ("hidden", "weight"):
        assert torch.equal(out[name], clean[name])
    spoilt = ours(case, ones)
    assert torch.equal(spoilt["hidden"][others], used["hidden"][others])
    assert spoilt["hidden"][4].isnan().all()
    assert spoilt["weight"].isnan().any()  # used all the same, it does not go unseen


# --- what is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "trained"),
    [
        (torch.bfloat16, ("hidden",)),
        (torch.bfloat16, ("weight",)),
        (torch.bfloat16, ("bias",)),
        (torch.float16, ("hidden",)),
        (torch.float16, ("weight", "bias")),
        (torch.float32, ("weight",)),
    ],
    ids=str,
)
def test_only_what_is_trained_gets_a_gradient(tiny_budgets, dtype, trained):
    case = make_case([61], V=251, d=24, dtype=dtype, bias=torch.randn(251))
    grads = (torch.randn(61), torch.randn(61))
    full, case = ours(case, grads), case.to(GPU)
    leaves = {
        name: getattr(case, name).clone().requires_grad_(name in trained)
        for name in ("hidden", "weight", "bias")
    }
    out = g2.linear_logprobs(
        leaves["hidden"], leaves["weight"], case.tokens, bias=leaves["bias"], backend="triton"
    )
    torch.autograd.backward([*out], [grad.to(GPU) for grad in grads])
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name not in trained)
        if name in trained:  # chunks are others where the weight is frozen, and units in float16
            eps = torch.finfo(leaf.dtype).eps
            atol = eps if dtype == torch.float16 else 2e-5
            torch.testing.assert_close(leaf.grad.cpu(), full[name], rtol=2 * eps, atol=atol)


def test_no_tokens():
    check(make_case([0], V=5, d=4, bias=torch.randn(5)))
    check(make_case([0], V=50, d=4, dtype=torch.float16))


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, torch.nan), (torch.float16, torch.nan), (torch.bfloat16, torch.inf)]
)
def test_nonfinite_hidden_stays_in_its_token(tiny_budgets, dtype, value):
    case = make_case([61], V=251, d=24, dtype=dtype)
    grads = (torch.ones(61), torch.ones(61))
    clean = ours(case, grads)
    case.hidden[37, 1] = value
    out = ours(case, grads)
    others = torch.arange(61) != 37
    for name in ("logprobs", "entropy", "hidden"):
        assert torch.isnan(out[name][37]).all()
        assert torch.equal(out[name][others], clean[name][others])


@dtypes
def test_runs_change_no_bit(tiny_budgets, dtype):
    case = make_case([61], V=251, d=24, dtype=dtype, bias=torch.randn(251))
    grads = (torch.randn(61), torch.randn(61))
    first = ours(case, grads)
    for _ in range(20 if HAS_GPU else 1):
        assert all(torch.equal(value, first[name]) for name, value in ours(case, grads).items())


def test_small_case_through_pointers_and_descriptors(monkeypatch, tiny_tiles):
    """The same bits, whichever way operands come and dz goes."""
    case = make_case([33], V=70, d=24, dtype=torch.bfloat16)
    grads = (torch.randn(33), torch.randn(33))
    with_descriptors = ours(case, grads)
    for module in (tile, head_gradient):
        monkeypatch.setattr(module, "descriptor", lambda *_: None)
    for name, value in ours(case, grads).items():
        assert torch.equal(value, with_descriptors[name])


# --- chunks, blocks and memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("element_size", [2, 4])
def test_chunks_are_alike_and_the_buffer_holds_a_block(element_size):
    config = tuning.candidates(9, "plain")[0]
    for N in (1, 100, 4096, 4097, 16384, 100_000):
        chunk, most = kernels._shape(N, 151936, element_size, config)
        chunks = -(-N // kernels.TOKENS)
        assert chunk * (chunks - 1) < N <= chunk * chunks
        assert chunk < N / chunks + config.BM
        assert element_size * chunk * most <= kernels.GRADIENT
        assert most >= 8192 // element_size
    assert kernels._shape(4096, 10, 2, config) == (4096, config.BN)
    assert kernels._shape(16384, 151936, 2, config) == (4096, 4096)


@pytest.mark.parametrize(("begin", "end"), [(0, 151936), (119168, 151936), (0, 1), (2, 2)])
@pytest.mark.parametrize("d", [64, 2048, 8192])
def test_a_blocks_sums_lie_behind_it_or_are_few(begin, end, d):
    grad_weight = torch.empty(end, d, dtype=torch.bfloat16, device="meta")
    blocks, own = [*kernels._blocks(begin, end, 4096, 256, kernels.SUMS // (4 * d))], 0
    assert [i for block in blocks for i in (block.start, block.stop)][1:-1:2] == [b.start for b in blocks[1:]]
    assert (not blocks and begin == end) or (blocks[0].start, blocks[-1].stop) == (begin, end)
    for block in blocks:
        n = block.stop - block.start
        assert n <= 4096
        sums = kernels._sums(grad_weight, block, end)
        assert (sums.shape, sums.dtype) == ((n, d), torch.float32)
        own = max(own, 0 if sums._is_view() else sums.nbytes)
    assert own <= max(kernels.SUMS, 256 * 4 * d)
    assert len(blocks) < 80


@dtypes
@pytest.mark.parametrize("frozen", [False, True], ids=["weight", "frozen"])
@pytest.mark.parametrize(
    ("N", "V", "d"),
    [(9000, 40_000, 512), (150_000, 500, 16), (2000, 151936, 64), (5000, 6000, 4096)],
    ids=str,
)
def test_extra_memory_stays_below_64_MiB(monkeypatch, N, V, d, dtype, frozen):
    """What the launchers allocate beside results. Nothing is launched or multiplied here, but on a GPU."""
    if not HAS_GPU:
        no_launches(monkeypatch, "stats", "join", "target", "gradient")
        monkeypatch.setattr(kernels, "_add_product", lambda *_, **__: None)
        monkeypatch.setattr(tile, "choose", lambda *_: tuning.candidates(9, "plain")[0])
    made = 0 if HAS_GPU else 1  # one row, of which all others are views: what exists before is not counted
    hidden = torch.zeros(made or N, d, dtype=dtype, device=GPU).expand(N, d)
    weight = torch.zeros(made or V, d, dtype=dtype, device=GPU).expand(V, d)
    tokens, grad = torch.zeros(N, dtype=torch.int64, device=GPU), torch.ones(N, device=GPU)

    def run():
        inputs = (hidden, tokens, *HeadSpec(weight), *BACKEND)
        out = logprobs._logprobs_op._init_fn(*inputs, logprobs.LOGITS_MEMORY, False)[:4]
        needs = (True, not frozen, False, False, False)
        return out, logprobs._backward_op._init_fn(grad, grad, *inputs, *out, *needs)

    if HAS_GPU:
        run()  # cuBLAS' own workspace is in place
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, gradients = run()
        most = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            out, gradients = run()
        most = live.most
    extra = most - sum(t.nbytes for t in (*out, *gradients))
    assert 2**16 < extra < 64 * 2**20, f"{extra / 2**20:.1f} MiB"


def test_products_are_rounded_once_and_torchs_setting_comes_back():
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    try:
        for setting in (True, False):
            flags.allow_bf16_reduced_precision_reduction = setting
            with kernels._rounded_once():
                assert not flags.allow_bf16_reduced_precision_reduction
            assert flags.allow_bf16_reduced_precision_reduction == setting
        if hasattr(flags, "allow_bf16_reduced_precision_reduction_split_k"):
            flags.allow_bf16_reduced_precision_reduction = (False, False)
            with kernels._rounded_once():
                pass
            assert not flags.allow_bf16_reduced_precision_reduction_split_k
    finally:
        flags.allow_bf16_reduced_precision_reduction = before


# --- the operator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [(), (0,), (0, 2, 3)], ids=str)
def test_opcheck(trained):
    case = make_case([8], V=67, d=16).to(GPU)
    head = HeadSpec(case.weight, torch.randn(67, device=GPU), 0.7, 1.3, 4.0)
    args = [case.hidden, case.tokens, *head, *BACKEND, 0]
    for i in trained:
        args[i].requires_grad_()
    for statistics in (False, True):
        torch.library.opcheck(torch.ops.g2rl.linear_logprobs, (*args, statistics))


def test_compiles_in_one_graph_to_the_same_bits():
    torch._dynamo.reset()
    case = make_case([9], V=67, d=16, dtype=torch.bfloat16).to(GPU)

    def step(hidden, weight):
        logprobs, entropy = g2.linear_logprobs(hidden, weight, case.tokens, temperature=0.7, backend="triton")
        return (logprobs * torch.arange(9, device=GPU) + entropy).sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
        loss = function(*leaves)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for eager, traced in zip(*found):
        assert torch.equal(eager, traced)


# --- only a GPU can show ------------------------------------------------------------------------------------


@on_gpu
@dtypes
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_candidate_is_right(monkeypatch, dtype, softcap):
    case = make_case([700], V=5003, d=192, dtype=dtype, bias=torch.randn(5003), logit_softcap=softcap)
    form = "ieee" if dtype == torch.float32 else "softcap" if softcap else "plain"
    for config in tuning.candidates_on(torch.device("cuda", 0), form):
        monkeypatch.setattr(tile, "choose", lambda *_, config=config: config)
        check(case)


@on_gpu
@dtypes
def test_shipped_chunks(monkeypatch, dtype):
    """Three chunks and several blocks of the true sizes, and hidden's sums in the weight's gradient."""
    plain = shared.plain

    def plain_there(case, grads, dtype):  # on a CPU float16 products of this size take minutes
        with torch.device(GPU):
            found = plain(case.to(GPU), tuple(grad.to(GPU) for grad in grads), dtype)
        return {name: value.cpu() for name, value in found.items()}

    monkeypatch.setattr(shared, "plain", plain_there)
    check(make_case([9000], V=20_003, d=512, dtype=dtype))


@on_gpu
def test_nothing_waits_for_the_device_and_a_graph_captures_it():
    case = make_case([5000], V=10_000, d=512, dtype=torch.bfloat16).to(GPU)
    grad = torch.randn(5000, device=GPU)

    def run():
        inputs = (case.hidden, case.tokens, *HeadSpec(case.weight), *BACKEND)
        out = torch.ops.g2rl.linear_logprobs(*inputs, 0, False)[:4]
        needs = (True, True, False, False, False)
        return torch.ops.g2rl.linear_logprobs_backward(grad, grad, *inputs, *out, *needs)

    expected = run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    graph.replay()
    for a, b in zip(expected, out):
        assert torch.equal(a, b)


@on_gpu
def test_beyond_two_to_the_31_logits():
    N, V, last = 15_000, 151936, 40
    case = make_case([N], V=V, d=64, dtype=torch.bfloat16)
    tail = case.replace(hidden=case.hidden[-last:], tokens=case.tokens[-last:])
    grads = (torch.ones(N), torch.ones(N))
    whole, end = ours(case, grads), ours(tail, (torch.ones(last), torch.ones(last)))
    for name in ("logprobs", "entropy", "hidden"):
        torch.testing.assert_close(whole[name][-last:], end[name], rtol=1e-2, atol=1e-4)
