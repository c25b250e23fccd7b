"""Backend "cpu" with known log-probabilities: units, chunks, threads, bits. What is allowed to differ from
exact features is tested for all backends in kernels/test_known_logprobs.py."""

import pytest
import torch
from examples import given, st
from marks import dtypes
from oracle import CPU_BACKENDS, Case, autograd_head, errors, make_case, run_head
from strategies import cases
from torch import Tensor

from g2rl_kernels.head.cpu import share_of_right_responses

backends = pytest.mark.parametrize("backend", CPU_BACKENDS, ids=[isa for _, isa in CPU_BACKENDS])


def own_logprobs(case: Case) -> Tensor:
    """[N], by the fastest instruction set: near to what any other computes."""
    return run_head(case, CPU_BACKENDS[-1]).logprobs


def long_case(dtype: torch.dtype = torch.float32) -> Case:
    """Responses of several units of 256 tokens, empty ones, more than fit a chunk; weights of 0."""
    lengths = [700, 0, 3, 260, *[1] * 70, 0, 240]
    g = torch.Generator().manual_seed(1)
    alpha = torch.rand(sum(lengths), generator=g) * (torch.rand(sum(lengths), generator=g) < 0.8)
    return make_case(lengths, V=307, d=20, dtype=dtype, token_weights=alpha)


@backends
@given(case=cases(), error=st.sampled_from((0.0, 0.5)))
def test_log_probs_logsumexp_and_entropy_have_the_bits_of_two_passes(backend, case, error):
    plain = run_head(case, backend)
    g = torch.Generator().manual_seed(0)
    known = plain.logprobs + error * torch.randn(len(plain.logprobs), generator=g)
    for name, a, b in zip(plain._fields, plain, run_head(case, backend, known_logprobs=known)):
        assert name == "features" or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name


@backends
@dtypes
@pytest.mark.parametrize("offset", [0.0, 0.005, -0.008])
def test_a_common_factor_within_the_tolerance_scales_features(backend, dtype, offset):
    """In long responses, whose units are summed one by one, too: known_logprobs are really used."""
    case = long_case(dtype)
    exact = autograd_head(case)
    found = run_head(case, backend, known_logprobs=(exact.logprobs + offset).double()).features.double()
    scale = torch.exp(torch.tensor(offset, dtype=torch.float64))
    two_passes = errors(run_head(case, backend), exact).features.max()
    assert (found - scale * exact.features).abs().max() <= 2 * two_passes + 2e-6 * exact.features.abs().max()


@backends
def test_tokens_past_the_tolerance_count_exactly_wherever_they_are(backend):
    """In first, middle and last units of a response; units that stay right keep their bits."""
    case = long_case()
    exact = autograd_head(case)
    right = exact.logprobs.float()
    two_passes = run_head(case, backend)
    limit = 4 * errors(two_passes, exact).features.max()
    for wrong, response in (
        ([0], 0),
        ([300, 301], 0),
        ([699], 0),
        ([700, 960], 2),
        ([1000], 41),
        ([1272], 75),
    ):
        for value in (-1e-3, right[wrong] - 0.05, -200.0, torch.nan):
            known = right.clone()
            known[wrong] = value
            case.token_weights[wrong] = 1.0
            found = run_head(case, backend, known_logprobs=known).features
            truth = autograd_head(case)
            assert (found.double() - truth.features).abs().max() <= limit
            other = torch.ones(len(found), dtype=torch.bool)
            other[case.segment[wrong]] = False
            assert not other[response]
            clean = run_head(case, backend, known_logprobs=right).features
            assert torch.equal(found[other], clean[other]), (wrong, value)


@backends
@dtypes
def test_any_number_of_threads_gives_the_same_bits(backend, dtype):
    case = long_case(dtype)
    known = own_logprobs(case)
    known[300:310] -= 0.4
    known[::97] = torch.nan
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run_head(case, backend, known_logprobs=known))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@backends
def test_a_token_of_weight_0_may_have_any_known_log_prob(backend):
    case = long_case()
    known = autograd_head(case).logprobs.float()
    clean = run_head(case, backend, known_logprobs=known)
    for value in (torch.nan, torch.inf, -torch.inf, -300.0):
        spoiled = torch.where(case.token_weights == 0, value, known)
        assert all(map(torch.equal, clean, run_head(case, backend, known_logprobs=spoiled)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@backends
def test_hidden_that_is_not_finite_shows_with_weight_0_too(backend, value):
    case = long_case()
    known = autograd_head(case).logprobs.float()
    clean = run_head(case, backend, known_logprobs=known)
    bad = int((case.token_weights[703:963] == 0).nonzero()[0]) + 703
    case.hidden[bad, 3] = value
    found = run_head(case, backend, known_logprobs=known)
    assert found.features[3].isnan().all()
    kept = torch.arange(len(found.features)) != 3
    assert torch.equal(found.features[kept], clean.features[kept])


@backends
def test_a_masked_token_is_as_in_two_passes(backend):
    """p = 0: its log-prob is -inf, which is what may be known of it."""
    case = make_case([20, 30], V=130, d=24, bias=torch.randn(130))
    case.bias[case.tokens[7]] = -torch.inf
    exact = autograd_head(case)
    two_passes = run_head(case, backend)
    found = run_head(case, backend, known_logprobs=exact.logprobs.float())
    assert found.logprobs[7] == -torch.inf
    for name, a, b in zip(found._fields, found, two_passes):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_a_vocabulary_too_large_for_one_pass_takes_two():
    """Its statistics do not fit the workspace; tokens count as they would in one pass."""
    case = make_case([3, 2], V=1_600_000, d=1)
    features, *others = run_head(case, CPU_BACKENDS[-1])
    found = run_head(case, CPU_BACKENDS[-1], known_logprobs=others[0] + 0.005)
    assert all(map(torch.equal, others, found[1:]))
    torch.testing.assert_close(found.features, features * torch.tensor(0.005).exp(), rtol=1e-5, atol=0)


def test_a_response_is_right_if_all_its_tokens_are_within_the_tolerance():
    cu_seqlens = torch.tensor([0, 2, 2, 3, 5])
    logprobs = torch.tensor([-1.0, -2.0, -1e-3, -3.0, -4.0])
    for known, share in (
        (logprobs, 1.0),
        (logprobs + 0.0099, 1.0),  # above 0 where p is nearly 1: taken as 0
        (logprobs - 0.02, 0.25),
        (logprobs.where(torch.arange(5) != 3, torch.nan), 0.75),
    ):
        assert share_of_right_responses(known, logprobs, cu_seqlens) == share
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    assert share_of_right_responses(logprobs - 0.02, logprobs, cu_seqlens.int(), weights) == 0.5
