"""The head's Triton kernels with nothing known, against float64; and, in all modes, the operator,
repeatability and memory. tests/head/test_head.py holds the two-pass mode to what it asks of every backend.
"""

import pytest
import torch
from examples import given
from head_modes import (
    HAS_GPU,
    TINY,
    assert_features,
    certified,
    examples,
    known_mode,
    mode_options,
    modes,
    plain_features,
)
from live_bytes import LiveBytes, no_launches
from marks import dtypes
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
from strategies import cases
from test_statistics import ALL, assert_exact, run_features, run_logprobs

import g2rl_kernels as g2
from g2rl_kernels.head.spec import HeadSpec
from g2rl_kernels.head.triton import driver, residual, stats, tile, tuning

# --- nothing known ------------------------------------------------------------------------------------------


@examples
@given(cases())
def test_any_case(case):
    assert_as_exact_as_torch(case, run_head(case, TRITON), TRITON)


@dtypes
@pytest.mark.parametrize("n_programs", [1, 4, 7])
def test_any_number_of_programs(monkeypatch, tiny_tiles, dtype, n_programs):
    for module in (driver, stats, residual):
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


@pytest.mark.parametrize("temperature", [0.7, "each"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_statistics_of_many_tiles(tiny_budgets, temperature, softcap):
    """Chunks of 30 tokens; a strip in which everything is masked."""
    bias = torch.randn(200)
    bias[40:90] = -torch.inf
    case = make_case([3, 0, 70], V=200, d=24, bias=bias, logit_softcap=softcap)
    case.tokens = torch.where(bias[case.tokens] == -torch.inf, 7, case.tokens)
    case.temperature = 0.3 + torch.rand(73) if temperature == "each" else temperature
    known = autograd_head(case).logprobs.float().to(GPU)
    found = run_features(case, TRITON, statistics=ALL), run_logprobs(case, TRITON, statistics=ALL)
    assert_exact(case, *found)
    for a, b in zip(found[0], run_features(case, TRITON, statistics=ALL, known_logprobs=known)):
        assert torch.equal(a, b)  # known log-probabilities are ignored


@dtypes
def test_small_case_through_pointers_and_descriptors(monkeypatch, tiny_tiles, dtype):
    """The same bits, whichever way the operands come. d = 24 suits TMA, in all dtypes."""
    case = make_case([20, 13], V=48, d=24, dtype=dtype)
    assert not HAS_GPU or tile.descriptor(case.to(GPU).weight, (16, 16)) is not None
    with_descriptors = run_head(case, TRITON)
    monkeypatch.setattr(tile, "descriptor", lambda *_: None)
    for a, b in zip(with_descriptors, run_head(case, TRITON)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 1e12])
def test_small_strip_of_masked_entries_counts_nothing(tiny_tiles, temperature):
    """Not even 2^0 each, relative to themselves: a GPU would add the rounding of 1e30 to that 0."""
    bias = torch.zeros(48)
    bias[:16] = bias[32:] = -torch.inf
    case = make_case([5], V=48, d=16, bias=bias)
    case = case.replace(tokens=torch.tensor([16, 17, 20, 31, 16])).to(GPU)
    head = tile.HeadOperands.of(HeadSpec(case.weight, case.bias, temperature))
    partial = stats.head_stats(case.hidden, head, case.tokens, TINY)[0].cpu()
    assert partial.shape == (3, 3, 5)  # a strip a tile
    for strip in (0, 2):
        assert (partial[strip, 1] == 0).all()
        assert (partial[strip, 2] == 0).all()
    assert (partial[1, 1] >= 1).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_statistics_alone(tiny_tiles, softcap):
    case = make_case([33, 8], V=100, d=20, bias=torch.randn(100), temperature=0.7, logit_softcap=softcap)
    there = case.to(GPU)
    out = driver.token_statistics(there.hidden, there.tokens, there.spec)
    whole = run_head(case, TRITON)
    for alone, column in zip(out, whole[1:]):
        assert torch.equal(alone.cpu(), column)
    assert all(len(t) == 0 for t in driver.token_statistics(there.hidden[:0], there.tokens[:0], there.spec))


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
    out = plain_features(case.replace(tokens=tokens).to(GPU))
    assert torch.isnan(out.features[1].cpu()).all()
    assert torch.isnan(out.logprobs[4].cpu())
    assert torch.equal(out.features[[0, 2]].cpu(), clean.features[[0, 2]])


@pytest.mark.parametrize(
    "cu_seqlens", [[0, 9, 4, 12], [-5, 3, 700, 12], [5, 5, 6, 7], [12, 8, 4, 0]], ids=str
)
def test_wrong_cu_seqlens_end_without_harm(tiny_tiles, cu_seqlens):
    case = make_case([4, 4, 4], V=50, d=12).to(GPU).replace(cu_seqlens=torch.tensor(cu_seqlens, device=GPU))
    for known in (None, torch.full((12,), -3.0, device=GPU)):
        out = plain_features(case, known_logprobs=known)
        assert out.features.shape == (3, 12)
        assert torch.isfinite(out.features).all()


# --- the operator -------------------------------------------------------------------------------------------


def operator_arguments(known: bool, max_skipped: float | None) -> tuple:
    case = make_case([8, 0, 5], V=67, d=16, bias=torch.randn(67), token_weights=torch.rand(13)).to(GPU)
    seeds = torch.full((13,), -4.0, device=GPU) if known else None
    spec = case.replace(temperature=0.7, logit_scale=1.3, logit_softcap=4.0).spec
    more = max_skipped is None and not known
    return (case.hidden, case.tokens, *spec, *case.responses, seeds, max_skipped, "triton", "", more)


@modes
def test_opcheck(mode):
    arguments = operator_arguments(mode == "one pass", 0.1 if mode == "certificate" else None)
    torch.library.opcheck(torch.ops.g2rl.features, arguments)


@modes
def test_compiles_in_one_graph_to_the_same_bits(mode):
    hidden, tokens, weight, bias, *_ = arguments = operator_arguments(mode == "one pass", None)
    cu_seqlens, alpha, known = arguments[2 + len(HeadSpec._fields) :][:3]
    inputs = (hidden, weight, tokens, cu_seqlens, bias, alpha, known)

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


@pytest.mark.parametrize("mode", [*modes.args[1], "statistics"])
@pytest.mark.parametrize(("N", "V", "d", "S"), SIZES, ids=str)
def test_extra_memory_stays_below_64_MiB(monkeypatch, N, V, d, S, mode):
    """What the launcher allocates; kernels themselves have no memory. None is launched here, but on a GPU."""
    if not HAS_GPU:
        passes = ("stats", "finish", "residual", "collect", "project", "reduce")
        no_launches(monkeypatch, *passes, "target", "gather", "skip", "total")
        monkeypatch.setattr(tile, "choose", lambda *_: tuning.candidates(9, "plain")[0])
    case = Case(
        hidden=torch.zeros(1, d, dtype=torch.bfloat16, device=GPU).expand(N, d),
        weight=torch.zeros(1, d, dtype=torch.bfloat16, device=GPU).expand(V, d),
        tokens=torch.zeros(N, dtype=torch.int64, device=GPU),
        cu_seqlens=(torch.arange(S + 1, device=GPU) * N) // S,
    )
    options = mode_options(mode, torch.zeros(N, device=GPU))
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = plain_features(case, **options)
        most = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            out = plain_features(case, **options)
        most = live.most
    extra = most - sum(t.nbytes for t in out)
    assert extra <= 64 * 2**20, f"{extra / 2**20:.1f} MiB"
