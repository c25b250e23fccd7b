"""The head's Triton kernels in each mode, against float64. tests/test_head.py holds the two-pass mode to what
it asks of every backend; here is what the others promise, and what only a GPU can show.

Without a GPU the kernels are interpreted (tests/conftest.py), which is slow: shapes are small, and tiles too.
"""

import dataclasses

import pytest
import torch
from examples import assume, given, settings, st
from live_bytes import LiveBytes, no_launches
from oracle import (
    GPU,
    TRITON,
    Case,
    allowed_errors,
    assert_as_exact_as_torch,
    autograd_head,
    environment,
    errors,
    make_case,
    run_head,
)
from strategies import DTYPES, cases

import g2rl_kernels as g2
from g2rl_kernels.head import reference

pytest.importorskip("triton", reason="pip install triton")

from g2rl_kernels.head.triton import driver, tile, tuning
from g2rl_kernels.head.triton import residual as head_residual
from g2rl_kernels.head.triton import stats as head_stats

HAS_GPU = GPU.type == "cuda"
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
examples = settings(max_examples=40 if HAS_GPU else 8)  # most compile a kernel of their own

TINY = tuning.Config(16, 16, 16, 4, 2)


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Many tiles, blocks, strips and programs for a small problem."""
    monkeypatch.setattr(driver, "choose", lambda *_: TINY)


@pytest.fixture
def tiny_budgets(monkeypatch, tiny_tiles):
    """Several chunks of tokens, batches of responses and slabs of the vocabulary."""
    monkeypatch.setattr(driver, "CHUNK", 50)
    monkeypatch.setattr(driver, "SEEDED_CHUNK", 40)
    monkeypatch.setattr(driver, "SLOTS", 16 * 4 * 24)  # 16 responses, d = 24
    monkeypatch.setattr(driver, "WORKSPACE", 4 * 16 * 4 * 20)


def certified(case: Case, max_skipped: float) -> g2.CertifiedHeadFeatures:
    there = case.to(GPU)
    out = g2.certified_head_features(
        there.hidden,
        there.weight,
        there.tokens,
        there.cu_seqlens,
        max_skipped=max_skipped,
        token_weights=there.token_weights,
        backend="triton",
        **there.head,
    )
    return g2.CertifiedHeadFeatures(*(t.cpu() for t in out))


def with_weights(case: Case, factor: torch.Tensor) -> torch.Tensor:
    """Exact features [S, d] in which token t counts factor_t alpha_t, over the sum of alpha."""
    exact = autograd_head(case.replace(token_weights=torch.ones(len(case.tokens), dtype=torch.float64)))
    assert len(exact.features) == len(case.lengths)
    single = case.replace(cu_seqlens=torch.arange(len(case.tokens) + 1), token_weights=None)
    phi = autograd_head(single).features  # [N, d]: every token a response of its own
    weighted = (case.token_share * factor.double())[:, None] * phi
    return torch.zeros_like(exact.features).index_add(0, case.segment, weighted)


def assert_features(actual: torch.Tensor, exact: torch.Tensor, case: Case, slack: float = 1.0) -> None:
    limit = slack * allowed_errors(case, TRITON).features
    error = (actual.double() - exact).abs().amax(1)
    assert (error <= limit).all(), f"at worst {(error / limit).nan_to_num(torch.inf).max():.3g} times allowed"


# --- nothing known ------------------------------------------------------------------------------------------


@examples
@given(cases())
def test_any_case(case):
    assert_as_exact_as_torch(case, run_head(case, TRITON), TRITON)


@dtypes
@pytest.mark.parametrize("n_programs", [1, 4, 7])
def test_any_number_of_programs(monkeypatch, tiny_tiles, dtype, n_programs):
    for module in (driver, head_stats, head_residual):
        monkeypatch.setattr(module, "programs", lambda _: n_programs)
    case = make_case([37, 0, 3, 1, 50], V=130, d=24, dtype=dtype, token_weights=torch.rand(91))
    assert_as_exact_as_torch(case, run_head(case, TRITON), TRITON)


@dtypes
@pytest.mark.parametrize("n_strips", [1, 2, 3])
def test_strips_of_several_blocks(monkeypatch, tiny_tiles, dtype, n_strips):
    """A response's sum goes on over blocks, ends within one, is cut by strips; NaN stays in its own."""
    monkeypatch.setattr(driver, "_slabs", lambda *_: (n_strips, 2))
    case = make_case([37, 0, 3, 1, 80], V=50, d=24, dtype=dtype, token_weights=torch.rand(121))
    exact = autograd_head(case)
    assert_as_exact_as_torch(case, run_head(case, TRITON), TRITON)
    assert_features(known_mode(case, exact.logprobs.float()).features, exact.features, case, slack=2)
    allowed = allowed_errors(case, TRITON)
    case.hidden[50] = torch.nan
    out = run_head(case, TRITON)
    assert torch.isnan(out.features[4]).all()
    assert (errors(out, exact).features[:4] <= allowed.features[:4]).all()
    assert (errors(out, exact).entropy <= allowed.entropy)[torch.arange(121) != 50].all()


def test_small_budgets_change_nothing(tiny_budgets):
    """More than 16 responses, 50 tokens and some tiles of the vocabulary: batches, chunks and slabs."""
    lengths = [3, 0, 7, 1, 1, 1, 2, 1, 0, 9, 1, 1, 4, 1, 1, 1, 1, 40, 1, 1, 1, 30]
    case = make_case(lengths, V=200, d=24, token_weights=torch.rand(sum(lengths)))
    assert_as_exact_as_torch(case, run_head(case, TRITON), TRITON)
    known = autograd_head(case).logprobs.float()
    assert_as_exact_as_torch(case, run_head(case, TRITON, known_logprobs=known), TRITON)
    wrong = known + torch.where(torch.arange(len(known)) % 3 == 0, 0.3, 0.0)
    out = run_head(case, TRITON, known_logprobs=wrong)
    assert_features(out.features, autograd_head(case).features, case)
    assert (certified(case, 0.05).skipped_tokens > 0).any()


@dtypes
def test_small_case_through_pointers_and_descriptors(monkeypatch, tiny_tiles, dtype):
    """The same bits, whichever way the operands come. d = 24 suits TMA, in all dtypes."""
    case = make_case([20, 13], V=48, d=24, dtype=dtype)
    assert not HAS_GPU or tile.descriptor(case.to(GPU).weight, (16, 16)) is not None
    with_descriptors = run_head(case, TRITON)
    for module in (head_stats, head_residual):
        monkeypatch.setattr(module, "descriptor", lambda *_: None)
    for a, b in zip(with_descriptors, run_head(case, TRITON)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 1e12])
def test_small_strip_of_masked_entries_counts_nothing(tiny_tiles, temperature):
    """Not even 2^0 each, relative to themselves: a GPU would add the rounding of 1e30 to that 0."""
    bias = torch.zeros(48)
    bias[:16] = bias[32:] = -torch.inf
    case = make_case([5], V=48, d=16, bias=bias)
    case = case.replace(tokens=torch.tensor([16, 17, 20, 31, 16])).to(GPU)
    head = tile.Head(case.weight, case.bias, temperature, 1.0, None)
    partial = head_stats.head_stats(case.hidden, head, case.tokens, TINY, "ieee").cpu()
    assert partial.shape == (3, 3, 5)  # a strip a tile
    for strip in (0, 2):
        assert (partial[strip, 1] == 0).all()
        assert (partial[strip, 2] == 0).all()
    assert (partial[1, 1] >= 1).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_statistics_alone(tiny_tiles, softcap):
    case = make_case([33, 8], V=100, d=20, bias=torch.randn(100), temperature=0.7, logit_softcap=softcap)
    there = case.to(GPU)
    out = driver.statistics(there.hidden, there.weight, there.tokens, **there.head)
    whole = run_head(case, TRITON)
    for alone, column in zip(out, whole[1:]):
        assert torch.equal(alone.cpu(), column)
    assert all(len(t) == 0 for t in driver.statistics(there.hidden[:0], there.weight, there.tokens[:0]))


def test_float32_products_follow_torchs_setting(tiny_tiles):
    """3xTF32 has about float32's precision; plain TF32, a thousandth, is never used."""
    case = make_case([33, 8], V=100, d=48)
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(setting)
            assert_as_exact_as_torch(case, run_head(case, TRITON), TRITON, multiple=4)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("value", [-1, 50, 2**40])
def test_a_token_outside_of_the_vocabulary_is_nan_and_reads_nothing(value):
    """On a GPU values are not checked: it would wait for the device."""
    case = make_case([3, 4, 2], V=50, d=12)
    clean = run_head(case, TRITON)
    tokens = case.tokens.clone()
    tokens[4] = value
    there = case.to(GPU)
    out = driver.head_features(there.hidden, there.weight, tokens.to(GPU), there.cu_seqlens)
    assert torch.isnan(out.features[1].cpu()).all()
    assert torch.isnan(out.logprobs[4].cpu())
    assert torch.equal(out.features[[0, 2]].cpu(), clean.features[[0, 2]])


@pytest.mark.parametrize(
    "cu_seqlens", [[0, 9, 4, 12], [-5, 3, 700, 12], [5, 5, 6, 7], [12, 8, 4, 0]], ids=str
)
def test_wrong_cu_seqlens_end_without_harm(tiny_tiles, cu_seqlens):
    case = make_case([4, 4, 4], V=50, d=12).to(GPU)
    cu_seqlens = torch.tensor(cu_seqlens, device=GPU)
    for known in (None, torch.full((12,), -3.0, device=GPU)):
        out = driver.head_features(case.hidden, case.weight, case.tokens, cu_seqlens, known_logprobs=known)
        assert out.features.shape == (3, 12)
        assert torch.isfinite(out.features).all()


# --- known log-probabilities --------------------------------------------------------------------------------


def known_mode(case: Case, known: torch.Tensor) -> g2.HeadFeatures:
    return run_head(case, TRITON, known_logprobs=known)


@dtypes
@pytest.mark.parametrize("error", [0.0, 0.004, 0.3, 4.0], ids=lambda e: f"off by {e}")
def test_known_logprobs_within_the_documented_bound(dtype, error):
    """Tokens off by a factor l within 1 % count l alpha, all others alpha; the rest is computed afresh."""
    case = make_case([40, 0, 9, 1, 20], V=130, d=24, dtype=dtype, token_weights=torch.rand(70))
    exact = autograd_head(case)
    known = (exact.logprobs + error * (2 * torch.rand(70) - 1)).float()
    known[::7] = exact.logprobs[::7].float()
    out = known_mode(case, known)
    allowed = allowed_errors(case, TRITON)
    for name in ("logprobs", "logsumexp", "entropy"):
        assert (getattr(errors(out, exact), name) <= getattr(allowed, name)).all(), name

    # l = exp(known - exact), for known logprobs are at most 0
    factor = (known.double().clamp(max=0) - exact.logprobs).exp()
    factor = torch.where((factor - 1).abs() <= driver.KNOWN_TOLERANCE, factor, 1.0)
    assert_features(out.features, with_weights(case, factor), case, slack=2)
    # and so the documented bound holds
    single = case.replace(cu_seqlens=torch.arange(71), token_weights=None)
    norms = case.token_share * autograd_head(single).features.norm(dim=1)
    bound = torch.zeros(5, dtype=torch.float64).index_add(0, case.segment, norms) * driver.KNOWN_TOLERANCE
    difference = (out.features.double() - exact.features).norm(dim=1)
    assert (difference <= bound + 24**0.5 * allowed.features).all()


@examples
@given(cases(), st.sampled_from((0.0, 0.02, 1.0)))
def test_any_case_with_known_logprobs(case, error):
    exact = autograd_head(case)
    known = (exact.logprobs + error * torch.randn(len(case.tokens))).float()
    out = known_mode(case, known)
    factor = (known.double().clamp(max=0) - exact.logprobs).exp()
    near = (factor - 1).abs()
    assume(not ((near - driver.KNOWN_TOLERANCE).abs() < 1e-4).any())
    factor = torch.where(near <= driver.KNOWN_TOLERANCE, factor, 1.0)
    assert_features(out.features, with_weights(case, factor), case, slack=2)
    assert (errors(out, exact).logprobs <= allowed_errors(case, TRITON).logprobs).all()


@pytest.mark.parametrize(
    "value", [torch.nan, -torch.inf, torch.inf, 5.0, -300.0, 0.0], ids=lambda value: str(value)
)
def test_absurd_known_logprobs_cost_time_only(tiny_tiles, value):
    """One token or all of them: results are those of the two passes."""
    case = make_case([20, 3, 30], V=130, d=24)
    exact = autograd_head(case)
    for where in (slice(4, 5), slice(None)):
        known = exact.logprobs.float()
        known[where] = value
        assert_as_exact_as_torch(case, known_mode(case, known), TRITON)


def test_a_peaked_row_keeps_its_digits_with_known_logprobs():
    """p = 1 - 1e-7: the realised token's part is (1 - p) W[y] with 1 - p a sum of exponentials."""
    case = make_case([5, 0, 3], V=67, d=16)
    case.tokens = torch.arange(8)
    case.hidden = torch.nn.functional.pad(torch.eye(8), (0, 8))
    case.weight[:, :8] = 0.0
    case.weight[torch.arange(8), torch.arange(8)] = 20.375
    exact = autograd_head(case)
    out = known_mode(case, exact.logprobs.float())
    assert (
        (out.features.double() - exact.features).abs().amax(1) <= 1e-5 * exact.features.abs().amax(1)
    ).all()
    assert (errors(out, exact).logprobs <= 1e-5 * exact.logprobs.abs()).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_nonfinite_hidden_stays_in_its_response_with_known_logprobs(tiny_tiles, value):
    case = make_case([20, 3, 5, 30], V=131, d=20)
    known = autograd_head(case).logprobs.float()
    clean = autograd_head(case)
    case.hidden[21, 4] = value
    out = known_mode(case, known)
    assert torch.isnan(out.features[1]).all()
    assert torch.isnan(out.logprobs[21])
    kept = torch.tensor([0, 2, 3])
    assert (out.features[kept].double() - clean.features[kept]).abs().max() < 1e-5
    others = torch.arange(58) != 21
    assert (out.logprobs[others].double() - clean.logprobs[others]).abs().max() < 1e-5


# --- certificates -------------------------------------------------------------------------------------------


def confident_case(dtype: torch.dtype = torch.float32, share: float = 0.8) -> Case:
    """A share of the tokens has 1 - p of about 1e-3 or less, the others are unsure."""
    case = make_case([60, 0, 25, 1, 40], V=90, d=24, dtype=dtype, token_weights=torch.rand(126))
    sure = torch.rand(126) < share
    boost = (11 + 4 * torch.rand(126)) / case.weight[case.tokens].float().square().sum(1)
    case.hidden = torch.where(
        sure[:, None], case.weight[case.tokens].float() * boost[:, None], case.hidden.float()
    ).to(dtype)
    return case


@dtypes
@pytest.mark.parametrize("most", [0.0, 0.01, 0.2])
def test_certificate(tiny_tiles, dtype, most):
    case = confident_case(dtype)
    exact, out = autograd_head(case), certified(case, most)
    mass = case.token_share * -torch.expm1(exact.logprobs)
    keep, left_out, count = reference.skipped_tokens(mass, case.cu_seqlens, most)
    for other in (most * (1 - 1e-4), most * (1 + 1e-4)):  # no token is at the very edge
        assert torch.equal(reference.skipped_tokens(mass, case.cu_seqlens, other)[0], keep)
    assert torch.equal(out.skipped_tokens, count)
    torch.testing.assert_close(out.skipped_mass.double(), left_out, rtol=1e-4, atol=1e-9)
    assert_features(out.features, with_weights(case, keep.double()), case)
    # The bound that it certifies, with the head's true diameter.
    weight = case.weight.double()
    diameter = torch.cdist(weight, weight).max()
    difference = (out.features.double() - exact.features).norm(dim=1)
    allowed = allowed_errors(case, TRITON)
    assert (difference <= left_out * diameter + 24**0.5 * allowed.features).all()
    total = torch.zeros(5, dtype=torch.float64).index_add(0, case.segment, mass)
    assert (left_out <= most * total * (1 + 1e-6)).all()
    for name in ("logprobs", "logsumexp", "entropy"):
        assert (getattr(errors(g2.HeadFeatures(*out[:4]), exact), name) <= getattr(allowed, name)).all()


def test_the_certificate_adapts(tiny_tiles):
    """Most tokens of a model that is as sure as one tuned on mathematics, hardly any of a flat one."""
    case = confident_case(share=0.9)
    out = certified(case, 0.05)
    assert 0.1 < out.entropy.mean() < 0.3
    assert 126 / (126 - int(out.skipped_tokens.sum())) > 2
    flat = make_case([60, 0, 25, 1, 40], V=90, d=24)
    flat.hidden *= 0.01
    assert int(certified(flat, 0.01).skipped_tokens.sum()) <= 0.02 * 126


def test_certificate_of_nothing_and_of_nan(tiny_tiles):
    case = confident_case()
    case.token_weights = torch.zeros(126)
    out = certified(case, 0.1)
    assert not out.features.any()
    assert not out.skipped_mass.any()
    case = confident_case()
    case.hidden[3, 0] = torch.nan
    out = certified(case, 0.1)
    assert torch.isnan(out.features[0]).all()
    assert out.skipped_tokens[0] == 0
    assert torch.isfinite(out.features[1:]).all()


@examples
@given(st.lists(st.lists(st.sampled_from((0.0, 1e-9, 0.5, 0.25, 1.0)), max_size=12), max_size=5), st.data())
def test_skipped_tokens_by_definition(masses, data):
    """Of the reference, and of the kernel: for each token, the masses of its response up to its own."""
    from g2rl_kernels.head.triton.skip import head_skip

    most = data.draw(st.sampled_from((0.0, 0.01, 0.3, 0.99)))
    mass = torch.tensor([m for response in masses for m in response])
    cu_seqlens = torch.tensor([0, *map(len, masses)]).cumsum(0)
    expected = [
        sum(m for m in response if m <= own) > most * sum(response) for response in masses for own in response
    ]
    keep, left_out, count = reference.skipped_tokens(mass, cu_seqlens, most)
    assert keep.tolist() == expected
    assert int(count.sum()) == expected.count(False)
    kernel_keep, kernel_mass, kernel_count = (
        t.cpu() for t in head_skip(mass.to(GPU), cu_seqlens.to(GPU), most)
    )
    assert kernel_keep.bool().tolist() == expected
    assert torch.equal(kernel_count, count)
    torch.testing.assert_close(kernel_mass, left_out)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_certificate_on_other_backends(backend):
    case = confident_case()
    ours = certified(case, 0.05)
    out = g2.certified_head_features(
        case.hidden,
        case.weight,
        case.tokens,
        case.cu_seqlens,
        max_skipped=0.05,
        token_weights=case.token_weights,
        backend=backend,
    )
    assert torch.equal(out.skipped_tokens, ours.skipped_tokens)
    for a, b in zip(out[:5], ours[:5]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- the operator -------------------------------------------------------------------------------------------


def operator_arguments(known: bool, max_skipped: float | None) -> tuple:
    case = make_case([8, 0, 5], V=67, d=16, bias=torch.randn(67), token_weights=torch.rand(13)).to(GPU)
    seeds = torch.full((13,), -4.0, device=GPU) if known else None
    inputs = (case.hidden, case.weight, case.tokens, case.cu_seqlens, case.bias, case.token_weights, seeds)
    return (*inputs, 0.7, 1.3, 4.0, max_skipped)


@pytest.mark.parametrize("mode", ["two passes", "one pass", "certificate"])
def test_opcheck(mode):
    arguments = operator_arguments(mode == "one pass", 0.1 if mode == "certificate" else None)
    torch.library.opcheck(torch.ops.g2rl.head_features_triton, arguments)


@pytest.mark.parametrize("mode", ["two passes", "one pass", "certificate"])
def test_compiles_in_one_graph_to_the_same_bits(mode):
    inputs = operator_arguments(mode == "one pass", None)[:7]

    def function(hidden, weight, tokens, cu_seqlens, bias, alpha, known):
        if mode == "certificate":
            return g2.certified_head_features(
                hidden, weight, tokens, cu_seqlens, bias=bias, token_weights=alpha, backend="triton"
            )
        return g2.head_features(
            hidden,
            weight,
            tokens,
            cu_seqlens,
            bias=bias,
            token_weights=alpha,
            known_logprobs=known,
            backend="triton",
        )

    traced = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    for a, b in zip(function(*inputs), traced):
        assert torch.equal(a, b)


def test_triton_needs_a_gpu_or_the_interpreter():
    case = make_case([3], V=20, d=6)
    arguments = (case.hidden, case.weight, case.tokens, case.cu_seqlens)
    with environment("TRITON_INTERPRET", None), pytest.raises(ValueError, match=r"backend.*CUDA tensors"):
        g2.head_features(*arguments, backend="triton")


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "0.1", None], ids=str)
def test_wrong_max_skipped(value):
    case = make_case([3], V=20, d=6)
    with pytest.raises((ValueError, TypeError), match="max_skipped"):
        g2.certified_head_features(
            case.hidden, case.weight, case.tokens, case.cu_seqlens, max_skipped=value, backend="cpu"
        )


# --- repeatability and memory -------------------------------------------------------------------------------


@dtypes
def test_runs_change_no_bit(tiny_tiles, dtype):
    case = make_case([30, 0, 21, 9], V=131, d=40, dtype=dtype)
    known = autograd_head(case).logprobs.float()
    known[::5] += 0.5
    for run in (
        lambda: run_head(case, TRITON),
        lambda: known_mode(case, known),
        lambda: certified(case, 0.05),
    ):
        first = run()
        for _ in range(20 if HAS_GPU else 1):
            assert all(torch.equal(a, b) for a, b in zip(first, run()))


SIZES = [
    (40_000, 151936, 64, 64),
    (600_000, 32_000, 16, 3),
    (20_000, 151936, 4096, 2500),
    (4, 700_000, 64, 1),
]


@pytest.mark.parametrize("mode", ["two passes", "one pass", "certificate"])
@pytest.mark.parametrize(("N", "V", "d", "S"), SIZES, ids=str)
def test_extra_memory_stays_below_64_MiB(monkeypatch, N, V, d, S, mode):
    """What the launcher allocates; kernels themselves have no memory. None is launched here, but on a GPU."""
    if not HAS_GPU:
        no_launches(
            monkeypatch,
            "stats",
            "finish",
            "residual",
            "collect",
            "project",
            "gather",
            "reduce",
            "skip",
            "target",
        )
        monkeypatch.setattr(driver, "choose", lambda *_: tuning.candidates(9, "plain")[0])
    hidden = torch.zeros(1, d, dtype=torch.bfloat16, device=GPU).expand(N, d)
    weight = torch.zeros(1, d, dtype=torch.bfloat16, device=GPU).expand(V, d)
    tokens = torch.zeros(N, dtype=torch.int64, device=GPU)
    cu_seqlens = (torch.arange(S + 1, device=GPU) * N) // S
    options = {
        "one pass": {"known_logprobs": torch.zeros(N, device=GPU)},
        "certificate": {"max_skipped": 0.1},
    }
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = driver.head_features(hidden, weight, tokens, cu_seqlens, **options.get(mode, {}))
        most = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            out = driver.head_features(hidden, weight, tokens, cu_seqlens, **options.get(mode, {}))
        most = live.most
    extra = most - sum(t.nbytes for t in out)
    assert extra <= 64 * 2**20, f"{extra / 2**20:.1f} MiB"


# --- only a GPU can show ------------------------------------------------------------------------------------


@on_gpu
@dtypes
def test_every_candidate_is_right(monkeypatch, dtype):
    case = make_case([700, 0, 33, 1, 290], V=5003, d=192, dtype=dtype, bias=torch.randn(5003))
    exact, form = autograd_head(case), "ieee" if dtype == torch.float32 else "plain"
    twice, four_times = allowed_errors(case, TRITON), allowed_errors(case, TRITON, multiple=4)
    for config in tuning.candidates(torch.cuda.get_device_capability()[0], form):
        monkeypatch.setattr(driver, "choose", lambda *_, config=config: config)
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
@pytest.mark.parametrize("mode", ["two passes", "one pass", "certificate"])
def test_nothing_waits_for_the_device_and_a_graph_captures_it(mode):
    case = make_case([70, 0, 33], V=5003, d=64, dtype=torch.bfloat16).to(GPU)
    options = {
        "one pass": {"known_logprobs": torch.full((103,), -8.0, device=GPU)},
        "certificate": {"max_skipped": 0.1},
    }.get(mode, {})
    arguments = (case.hidden, case.weight, case.tokens, case.cu_seqlens)
    expected = driver.head_features(*arguments, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        driver.head_features(*arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = driver.head_features(*arguments, **options)
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
