"""One pass from known log-probabilities: backend "triton", and "cpu" on every instruction set."""

import pytest
import torch
from examples import assume, given, st
from head_modes import (
    assert_features,
    examples,
    with_weights,
)
from marks import dtypes
from oracle import (
    CPU_BACKENDS,
    TRITON,
    allowed_errors,
    assert_as_exact_as_torch,
    autograd_head,
    errors,
    make_case,
    run_head,
)
from strategies import cases

from g2rl_kernels.head.triton import driver

SEEDED = [TRITON, *CPU_BACKENDS]
backends = pytest.mark.parametrize("backend", SEEDED, ids=[isa or name for name, isa in SEEDED])


@backends
@dtypes
@pytest.mark.parametrize("error", [0.0, 0.004, 0.3, 4.0], ids=lambda e: f"off by {e}")
def test_known_logprobs_within_the_documented_bound(backend, dtype, error):
    """Tokens off by a factor l within 1 % count l alpha, all others alpha; the rest is computed afresh."""
    case = make_case([40, 0, 9, 1, 20], V=130, d=24, dtype=dtype, token_weights=torch.rand(70))
    exact = autograd_head(case)
    known = (exact.logprobs + error * (2 * torch.rand(70) - 1)).float()
    known[::7] = exact.logprobs[::7].float()
    out = run_head(case, backend, known_logprobs=known)
    allowed = allowed_errors(case, backend)
    for name in ("logprobs", "logsumexp", "entropy"):
        assert (getattr(errors(out, exact), name) <= getattr(allowed, name)).all(), name

    # l = exp(known - exact), for known logprobs are at most 0
    factor = (known.double().clamp(max=0) - exact.logprobs).exp()
    factor = torch.where((factor - 1).abs() <= driver.KNOWN_TOLERANCE, factor, 1.0)
    assert_features(out.features, with_weights(case, factor), case, slack=2, backend=backend)
    # and so the documented bound holds
    single = case.replace(cu_seqlens=torch.arange(71), token_weights=None)
    norms = case.token_share * autograd_head(single).features.norm(dim=1)
    bound = torch.zeros(5, dtype=torch.float64).index_add(0, case.segment, norms) * driver.KNOWN_TOLERANCE
    difference = (out.features.double() - exact.features).norm(dim=1)
    assert (difference <= bound + 24**0.5 * allowed.features).all()


@backends
@examples
@given(case=cases(), error=st.sampled_from((0.0, 0.02, 1.0)))
def test_any_case_with_known_logprobs(backend, case, error):
    exact = autograd_head(case)
    known = (exact.logprobs + error * torch.randn(len(case.tokens))).float()
    out = run_head(case, backend, known_logprobs=known)
    factor = (known.double().clamp(max=0) - exact.logprobs).exp()
    near = (factor - 1).abs()
    assume(not ((near - driver.KNOWN_TOLERANCE).abs() < 1e-4).any())
    factor = torch.where(near <= driver.KNOWN_TOLERANCE, factor, 1.0)
    assert_features(out.features, with_weights(case, factor), case, slack=2, backend=backend)
    assert (errors(out, exact).logprobs <= allowed_errors(case, backend).logprobs).all()


@backends
@pytest.mark.parametrize(
    "value", [torch.nan, -torch.inf, torch.inf, 5.0, -300.0, 0.0], ids=lambda value: str(value)
)
def test_absurd_known_logprobs_cost_time_only(backend, tiny_tiles, value):
    """One token or all of them: results are those of the two passes."""
    case = make_case([20, 3, 30], V=130, d=24)
    exact = autograd_head(case)
    for where in (slice(4, 5), slice(None)):
        known = exact.logprobs.float()
        known[where] = value
        assert_as_exact_as_torch(case, run_head(case, backend, known_logprobs=known), backend)


@backends
def test_a_peaked_row_keeps_its_digits_with_known_logprobs(backend):
    """p = 1 - 1e-7: the realised token's term is (1 - p) W[y], with 1 - p a sum of exponentials."""
    case = make_case([5, 0, 3], V=67, d=16)
    case.tokens = torch.arange(8)
    case.hidden = torch.nn.functional.pad(torch.eye(8), (0, 8))
    case.weight[:, :8] = 0.0
    case.weight[torch.arange(8), torch.arange(8)] = 20.375
    exact = autograd_head(case)
    out = run_head(case, backend, known_logprobs=exact.logprobs.float())
    assert (
        (out.features.double() - exact.features).abs().amax(1) <= 1e-5 * exact.features.abs().amax(1)
    ).all()
    assert (errors(out, exact).logprobs <= 1e-5 * exact.logprobs.abs()).all()


@backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_nonfinite_hidden_stays_in_its_response_with_known_logprobs(backend, tiny_tiles, value):
    case = make_case([20, 3, 5, 30], V=131, d=20)
    known = autograd_head(case).logprobs.float()
    clean = autograd_head(case)
    case.hidden[21, 4] = value
    out = run_head(case, backend, known_logprobs=known)
    assert torch.isnan(out.features[1]).all()
    assert torch.isnan(out.logprobs[21])
    kept = torch.tensor([0, 2, 3])
    assert (out.features[kept].double() - clean.features[kept]).abs().max() < 1e-5
    others = torch.arange(58) != 21
    assert (out.logprobs[others].double() - clean.logprobs[others]).abs().max() < 1e-5
