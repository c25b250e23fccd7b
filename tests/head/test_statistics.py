"""`statistics` of both ops: sum p^2, and the likeliest token with its log-probability, on every backend."""

import pytest
import torch
from examples import given
from marks import backends, dtypes, isas
from oracle import (
    BACKEND_IDS,
    BACKENDS,
    CPU_BACKENDS,
    GPU,
    TRITON,
    Case,
    environment,
    logits,
    low_rounding,
    make_case,
    run_head,
)
from strategies import cases
from test_head import KINDS, hostile

import g2rl_kernels as g2

ALL = ("sum_p_squared", "top_token")
compiled = {"fullgraph": True, "backend": "aot_eager"}


def run_logprobs(case: Case, backend: tuple[str, str | None], **options) -> g2.LinearLogprobsWithStatistics:
    if backend == TRITON:
        case = case.to(GPU)
    with environment("G2RL_CPU_ISA", backend[1]):
        out = g2.linear_logprobs(
            case.hidden, case.weight, case.tokens, backend=backend[0], **case.head, **options
        )
    return type(out)(*(t if t is None else t.detach().cpu() for t in out))


def run_features(case: Case, backend: tuple[str, str | None], **options) -> g2.HeadFeaturesWithStatistics:
    there = case.to(GPU) if backend == TRITON else case
    with environment("G2RL_CPU_ISA", backend[1]):
        out = g2.head_features(
            there.hidden, there.weight, there.tokens, there.cu_seqlens, token_weights=there.token_weights,
            backend=backend[0], **there.head, **options,
        )  # fmt: skip
    return type(out)(*(t if t is None else t.cpu() for t in out))


def assert_exact(case: Case, *found: g2.HeadFeaturesWithStatistics | g2.LinearLogprobsWithStatistics) -> None:
    """Against float64: errors within twice torch's own in this dtype and rounding; a token as good as the
    likeliest to rounding of its logit, and the very one where it leads by more."""
    if not len(case.tokens):
        assert all(len(values) == 0 for out in found for values in out[-3:])
        return
    h, w, bias = case.hidden, case.weight, case.bias
    exact = logits(case, h.double(), w.double(), None if bias is None else bias.double())
    bias = None if bias is None else bias.to(h.dtype)
    plain = logits(case, h, w, bias).float()
    log_p, theirs = exact.log_softmax(1), plain.log_softmax(1)
    squares, their_squares = log_p.exp().square().sum(1), theirs.exp().square().sum(1)
    # A logit is off by float32 rounding of its products and of itself; p^2 by twice that.
    square = (h.double() ** 2 @ (w.double() ** 2).T).amax(1, keepdim=True)
    size = torch.maximum(
        (square.sqrt() * case.logit_scale / case.T).squeeze(1),
        exact.masked_fill(exact == -torch.inf, 0.0).abs().amax(1),
    )
    u = 2.0**-23 * (3 * size + 4) + low_rounding(case)
    of_squares = 2 * ((their_squares - squares) / squares).abs().nan_to_num(0.0).max() + 2 * u
    of_top = 2 * (theirs.amax(1) - log_p.amax(1)).abs().nan_to_num(0.0).max() + u
    for out in found:
        assert out.sum_p_squared.dtype == out.top_logprob.dtype == torch.float32
        assert out.top_token.dtype == torch.int64
        error = ((out.sum_p_squared - squares) / squares).abs()
        assert (error <= of_squares).all(), f"{error.max():.3g} of {of_squares.min():.3g}"
        error = (out.top_logprob - log_p.amax(1)).abs()
        assert (error <= of_top).all(), f"{error.max():.3g} of {of_top.min():.3g}"
        behind = exact.amax(1) - exact.gather(1, out.top_token[:, None]).squeeze(1)
        assert (behind <= 2 * u).all()
        assert (out.top_token >= 0).all()


def check(case: Case, backend: tuple[str, str | None]) -> None:
    features, logprobs = (
        run_features(case, backend, statistics=ALL),
        run_logprobs(case, backend, statistics=ALL),
    )
    assert_exact(case, features, logprobs)
    for with_them, without in ((features, run_head(case, backend)), (logprobs, run_logprobs(case, backend))):
        for a, b in zip(with_them, without):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS[:-1], ids=BACKEND_IDS[:-1])
@given(cases())
def test_any_case(backend, case):
    check(case, backend)


@backends
@dtypes
def test_a_model_sized_case(backend, dtype):
    check(make_case([30, 0, 13, 1], V=4999, d=48, dtype=dtype), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=lambda backend: backend[1])
def test_a_vocabulary_in_spans(backend):
    check(make_case([3, 2], V=1_700_001, d=4), backend)


@backends
@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_rows(backend, dtype, kind):
    check(hostile(kind, dtype), backend)


@backends
def test_of_equal_logits_the_first(backend):
    """Whole numbers, the same on all backends; the realised token before, among and behind the others."""
    V = 401
    weight = torch.zeros(V, 3)
    ties = [70, 71, 190, 388]
    weight[ties, 0] = 2.0
    for top in (0, 1):  # a column in which all entries are equal; one in which nothing is
        weight[:, 1 + top] = torch.arange(V) // 200 * -top
    tokens = torch.tensor([0, 70, 71, 190, 388, 400, 0, 5, 400, 0, 0, 399])
    hidden = torch.zeros(12, 3)
    hidden[:6, 0], hidden[6:9, 1], hidden[9:, 2] = 1.0, 1.0, 1.0
    case = Case(hidden, weight, tokens, torch.tensor([0, 5, 12]))
    expected = torch.tensor([70] * 6 + [0] * 6)
    for out in (run_features(case, backend, statistics=ALL), run_logprobs(case, backend, statistics=ALL)):
        assert torch.equal(out.top_token, expected)
        assert_exact(case, out)


@backends
def test_nan_has_no_likeliest_token(backend):
    case = make_case([3, 2], V=131, d=20)
    case.hidden[1, 4], case.hidden[4, 0] = torch.nan, torch.inf
    clean = [
        run(make_case([3, 2], V=131, d=20), backend, statistics=ALL) for run in (run_features, run_logprobs)
    ]
    good = torch.tensor([True, False, True, True, False])
    for run, expected in zip((run_features, run_logprobs), clean):
        out = run(case, backend, statistics=ALL)
        assert torch.equal(out.top_token, torch.where(good, expected.top_token, -1))
        for name in ("sum_p_squared", "top_logprob"):
            assert getattr(out, name)[~good].isnan().all()
            assert torch.equal(getattr(out, name)[good], getattr(expected, name)[good])
    case = make_case([2], V=9, d=4, bias=torch.full((9,), -torch.inf))
    for run in (run_features, run_logprobs):
        out = run(case, backend, statistics=ALL)
        assert (out.top_token == -1).all()
        assert out.sum_p_squared.isnan().all()


@backends
def test_one_possible_entry(backend):
    bias = torch.full((300,), -torch.inf)
    bias[250] = 1.0
    case = make_case([3], V=300, d=4, bias=bias)
    case.tokens = torch.tensor([250, 7, 250])
    for run in (run_features, run_logprobs):
        out = run(case, backend, statistics=ALL)
        assert out.top_token.tolist() == [250] * 3
        assert torch.equal(out.sum_p_squared, torch.ones(3))
        assert torch.equal(out.top_logprob, torch.zeros(3))


@isas
@dtypes
def test_near_certain_tokens_keep_their_digits(isa, dtype):
    """log p = -1e-7 and sum p^2 = 1 - 2e-7 of the realised token, which is the likeliest."""
    case = hostile("peaked", dtype)
    out = run_logprobs(case, ("cpu", isa), statistics=ALL)
    assert torch.equal(out.top_token, case.tokens)
    assert torch.equal(out.top_logprob, out.logprobs)
    assert (out.top_logprob < 0).all()


@isas
@dtypes
def test_both_ops_give_the_same_bits(isa, dtype):
    bias = torch.randn(603)
    case = make_case([20, 33], V=603, d=24, dtype=dtype, bias=bias, temperature=0.7, logit_softcap=5.0)
    features = run_features(case, ("cpu", isa), statistics=ALL)
    logprobs = run_logprobs(case, ("cpu", isa), statistics=ALL)
    for name in logprobs._fields:
        assert torch.equal(getattr(features, name), getattr(logprobs, name)), name


@backends
def test_only_what_is_asked_for(backend):
    case = make_case([3], V=50, d=12)
    for run in (run_features, run_logprobs):
        everything = run(case, backend, statistics=ALL)
        out = run(case, backend, statistics=["sum_p_squared"])
        assert torch.equal(out.sum_p_squared, everything.sum_p_squared)
        assert out.top_token is out.top_logprob is None
        out = run(case, backend, statistics=("top_token",))
        assert torch.equal(out.top_token, everything.top_token)
        assert out.sum_p_squared is None
    assert isinstance(run_features(case, backend), g2.HeadFeatures)
    assert isinstance(run_logprobs(case, backend), g2.LinearLogprobs)


@pytest.mark.parametrize("backend", [("reference", None), *CPU_BACKENDS[-1:]], ids=str)
def test_gradients_are_those_without(backend):
    case = make_case([30], V=401, d=16, bias=torch.randn(401), temperature=0.3 + torch.rand(30))
    g = torch.randn(2, 30)
    results = []
    for statistics in ((), ALL):
        leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
        head = {**case.head, "bias": leaves[2], "statistics": statistics, "backend": backend[0]}
        out = g2.linear_logprobs(*leaves[:2], case.tokens, **head)
        assert not any(t.requires_grad for t in out[2:])
        results.append(torch.autograd.grad((torch.stack(out[:2]) * g).sum(), leaves))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_exact_in_float64():
    case = make_case([30], V=201, d=8, dtype=torch.float64, bias=torch.randn(201, dtype=torch.float64))
    out = g2.linear_logprobs(case.hidden, case.weight, case.tokens, **case.head, statistics=ALL)
    log_p = logits(case, case.hidden, case.weight, case.bias).log_softmax(1)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out.sum_p_squared, log_p.exp().square().sum(1), **close)
    torch.testing.assert_close(out.top_logprob, log_p.amax(1), **close)
    assert torch.equal(out.top_token, log_p.argmax(1))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiled_to_the_same_bits(backend):
    torch._dynamo.reset()
    case = make_case([9, 4], V=67, d=16)

    def function(hidden, weight):
        options = {"statistics": ALL, "backend": backend}
        features = g2.head_features(hidden, weight, case.tokens, case.cu_seqlens, **options)
        return *features, *g2.linear_logprobs(hidden, weight, case.tokens, **options)

    for eager, traced in zip(
        function(case.hidden, case.weight),
        torch.compile(function, **compiled)(case.hidden, case.weight),
        strict=True,
    ):
        assert torch.equal(eager, traced)


def test_a_token_that_is_none_has_none():
    """Where values are not looked at."""
    torch._dynamo.reset()
    case = make_case([4], V=11, d=8)
    tokens = torch.tensor([1, -100, 2, 11])
    function = torch.compile(g2.linear_logprobs, **compiled)
    out = function(case.hidden, case.weight, tokens, statistics=ALL)
    good = torch.tensor([True, False, True, False])
    assert torch.equal(out.top_token >= 0, good)
    assert torch.equal(out.sum_p_squared.isfinite(), good)
    assert torch.equal(out.top_logprob.isfinite(), good)


@isas
@pytest.mark.parametrize("off", [0.004, 0.3], ids=["one look", "computed again"])
def test_known_logprobs_change_no_statistic(isa, off):
    case = make_case([20, 0, 70], V=403, d=24, temperature=0.3 + torch.rand(90), logit_softcap=5.0)
    plain = run_features(case, ("cpu", isa), statistics=ALL)
    known = plain.logprobs - off
    hinted = run_features(case, ("cpu", isa), statistics=ALL, known_logprobs=known)
    for a, b in zip(plain[1:], hinted[1:]):
        assert torch.equal(a, b)
    without = run_features(case, ("cpu", isa), known_logprobs=known)
    assert torch.equal(without.features, hinted.features)
