from __future__ import annotations

import math

import pytest
import torch

from g2rl_kernels.trainer.objective import policy_loss, token_weights

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)  # the last response was dropped


def test_token_weights() -> None:
    by_response = torch.tensor([[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(token_weights(MASK, "response"), by_response)
    torch.testing.assert_close(token_weights(MASK, "token"), MASK / 4)
    assert token_weights(torch.zeros(2, 3, dtype=torch.bool), "token").sum() == 0


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("mean", ["token", "response"])
def test_against_loops(ratio: str, mean: str) -> None:
    """The objective again, token by token."""
    generator = torch.Generator().manual_seed(6)
    new, old, ref = (
        torch.randn(3, 3, generator=generator, dtype=torch.float64) * 0.3 * MASK for _ in range(3)
    )
    advantages, beta, clip = torch.tensor([1.3, -0.7, 9.0], dtype=torch.float64), 0.1, (0.1, 0.3)
    weights = token_weights(MASK, mean)
    loss, stats = policy_loss(
        new, old, advantages, MASK, weights, ratio=ratio, clip=clip, reference=ref, beta=beta
    )  # fmt: skip
    expected = kl = cut = 0.0
    for i, length in enumerate((3, 1, 0)):
        for t in range(length):
            log_ratio = float(new[i, t] - old[i, t])
            if ratio != "token":
                log_ratio = float((new[i] - old[i]).sum()) / (length if ratio == "sequence_mean" else 1)
            rho, a, w = math.exp(log_ratio), float(advantages[i]), float(weights[i, t])
            clipped = min(max(rho, 1 - clip[0]), 1 + clip[1])
            d = float(ref[i, t] - new[i, t])
            expected -= w * min(rho * a, clipped * a)
            kl += w * (math.exp(d) - d - 1)
            cut += w * (clipped * a < rho * a)
    assert float(loss) == pytest.approx(expected + beta * kl, rel=1e-6)
    assert stats["kl"] == pytest.approx(kl, rel=1e-6)
    assert stats["clip_fraction"] == pytest.approx(cut)
    assert cut > 0  # the example clips


def test_gradient_at_the_start_is_reinforce() -> None:
    """At pi = pi_old every ratio is 1, nothing is clipped, and the gradient is -A times the weight."""
    old = torch.randn(3, 3) * MASK
    new, advantages, weights = (
        old.clone().requires_grad_(),
        torch.tensor([1.0, -2.0, 5.0]),
        token_weights(MASK, "response"),
    )
    loss, stats = policy_loss(new, old, advantages, MASK, weights)
    loss.backward()
    torch.testing.assert_close(new.grad, -weights * advantages[:, None])
    assert stats["clip_fraction"] == 0
    assert "kl" not in stats


def test_clipping_stops_the_gradient() -> None:
    """No gradient for good tokens already too likely, or bad ones already too unlikely."""
    old, mask = torch.zeros(4, 1), torch.ones(4, 1, dtype=torch.bool)
    new = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], requires_grad=True)
    loss, stats = policy_loss(
        new, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), mask, token_weights(mask, "token")
    )
    loss.backward()
    assert (new.grad != 0).flatten().tolist() == [False, True, True, False]
    assert stats["clip_fraction"] == 0.5


def test_ratios_of_long_responses_stay_finite() -> None:
    """exp of 100 nats is no float32; a row of its own neither spoils others nor clips their gradient away."""
    mask = torch.ones(4, 200, dtype=torch.bool)
    new = torch.full((4, 200), 0.5)
    new[3] = 0.0
    new.requires_grad_(True)
    advantages = torch.tensor([0.0, 1.0, -1.0, 1.0])
    weights = token_weights(mask, "response")
    loss, _ = policy_loss(new, torch.zeros(4, 200), advantages, mask, weights, ratio="sequence")
    loss.backward()
    assert loss.isfinite()
    assert new.grad is not None
    assert new.grad[:3].eq(0).all()
    torch.testing.assert_close(new.grad[3], -200 * weights[3])  # each token moves the whole response's ratio


@pytest.mark.parametrize("mean", ["token", "response"])
def test_entropy_bonus_against_autograd(mean: str) -> None:
    """The gradient equals that of -c sum w H through log_softmax of logits; it is 0 without c."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = token_weights(MASK, mean)
    tokens = torch.randint(7, (3, 3, 1), generator=generator)

    def entropies(log_p: torch.Tensor) -> torch.Tensor:
        return -(log_p.exp() * log_p).sum(-1)

    def loss(**bonus: float) -> torch.Tensor:
        log_p = logits.log_softmax(-1)
        chosen = log_p.gather(2, tokens)[..., 0] * MASK
        advantages = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
        entropy = entropies(log_p) * MASK
        return policy_loss(chosen, chosen.detach(), advantages, MASK, weights, entropy=entropy, **bonus)[0]

    with_bonus, without = loss(entropy_coef=0.3), loss()
    expected = -0.3 * sum(
        weights[i, t] * torch.distributions.Categorical(logits=logits[i, t]).entropy()
        for i, length in enumerate((3, 1, 0))
        for t in range(length)
    )
    assert expected < -0.1
    torch.testing.assert_close(with_bonus - without, expected)
    (difference,) = torch.autograd.grad(with_bonus - without, logits)
    (gradient,) = torch.autograd.grad(expected, logits)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(difference, gradient)


def test_kl_pulls_towards_the_reference() -> None:
    new = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    reference, mask = torch.tensor([[-1.5, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    loss, _ = policy_loss(
        new, new.detach(), torch.zeros(1), mask, token_weights(mask, "token"), reference=reference, beta=2.0
    )  # fmt: skip
    loss.backward()
    expected = 2.0 * 0.5 * (1 - math.exp(-0.5))  # beta * weight * (1 - exp(d))
    torch.testing.assert_close(new.grad, torch.tensor([[expected, 0.0]]))
