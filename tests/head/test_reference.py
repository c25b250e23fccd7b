"""The reference in float64 against autograd, and its numerics in float32."""

import pytest
import torch
from examples import given
from oracle import autograd_head, make_case
from strategies import cases

from g2rl_kernels.group import reference as group_reference
from g2rl_kernels.head import reference
from g2rl_kernels.head.spec import HeadSpec


@given(cases())
def test_head_equals_autograd(case):
    exact = autograd_head(case)
    double = case.double
    phi, *others = reference.head_features(double.hidden, case.tokens, double.spec, case.responses)
    actual = (
        phi
        if case.lora is None
        else phi[:, : case.hidden.shape[1]]
        + phi[:, case.hidden.shape[1] :] @ (double.lora[0] * double.lora[2]),
        *others,
    )
    for ours, theirs in zip(actual, exact):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 100])
def test_chunks_change_nothing(chunk):
    case = make_case([4, 0, 5, 4], V=17, d=6, dtype=torch.float64)
    args = (case.hidden, case.tokens, case.spec, case.responses)
    for whole, chunked in zip(reference.head_features(*args), reference.head_features(*args, chunk=chunk)):
        torch.testing.assert_close(whole, chunked, rtol=1e-14, atol=1e-14)


def test_near_certainty_keeps_its_digits():
    """z = (40, 0) in float32: 1 - p = e^-40 / (1 + e^-40), which 1 - p loses altogether."""
    z = torch.tensor([[40.0, 0.0]])
    logprobs, logsumexp, entropy, residual = reference.token_statistics(z, torch.tensor([0]))
    tail = torch.exp(torch.tensor(-40.0, dtype=torch.float64))
    for value, expected in (
        (-logprobs[0], tail),
        (residual[0, 0], tail),
        (-residual[0, 1], tail),
        (entropy[0], 41 * tail),
    ):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0.0)
    assert logsumexp.item() == 40


def test_softcap_slope_keeps_its_digits():
    x = torch.tensor([0.0, 1.0, 20.0, -20.0])
    exact = 1 / torch.cosh(x.double()) ** 2
    torch.testing.assert_close(reference.softcap_slope(x, 1.0).double(), exact, rtol=1e-6, atol=0.0)
    assert reference.softcap_slope(torch.tensor([-torch.inf]), 1.0).item() == 0


def test_blocks_of_16_bit_weights():
    """bf16 weights are converted block by block; the values are those of the whole."""
    weight = torch.randn(3000, 2048).bfloat16()  # 2**22 / 2048 = 2048 rows a block
    hidden = torch.randn(2, 2048).bfloat16()
    z, slope = reference.logits(hidden, HeadSpec(weight))
    assert slope is None
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, hidden.float() @ weight.float().T)


def test_members_in_order_of_first_appearance():
    ids = torch.tensor([5, 3, -1, 5, 9, 3, 5])
    assert group_reference.group_members(ids).tolist() == [[0, 3, 6], [1, 5, -1], [4, -1, -1]]
    assert group_reference.group_members(torch.tensor([-1, -1])).shape == (0, 0)
