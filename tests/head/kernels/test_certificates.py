"""certified_head_features: which tokens are left out, and the bound that it certifies."""

import pytest
import torch
from examples import given, st
from head_modes import (
    assert_features,
    certified,
    examples,
    with_weights,
)
from marks import dtypes
from oracle import GPU, TRITON, Case, allowed_errors, autograd_head, errors, make_case

import g2rl_kernels as g2
from g2rl_kernels.head import reference
from g2rl_kernels.head.triton.skip import head_skip


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
    """The reference and the kernel: for each token, the masses of its response up to its own."""
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


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "0.1", None], ids=str)
def test_wrong_max_skipped(value):
    case = make_case([3], V=20, d=6)
    with pytest.raises((ValueError, TypeError), match="max_skipped"):
        g2.certified_head_features(
            case.hidden, case.weight, case.tokens, case.cu_seqlens, max_skipped=value, backend="cpu"
        )
