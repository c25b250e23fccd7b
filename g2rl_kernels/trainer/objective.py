"""The clipped objective with KL, on padded [B, L] tensors of log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 60.0  # nats; exp of 89 is no float32, and what follows multiplies it


def token_weights(mask: Tensor, mean: str) -> Tensor:
    """Each token's share of a mini-batch's loss, [B, L] float32 for mask [B, L]; the shares sum to 1.

    mean="response": equal weight for every response with tokens, shared among its tokens (GRPO);
    mean="token": equal weight for every token. Micro-batches use their rows of the result, so their gradients
    add up to that of the mini-batch.
    """
    lengths = mask.sum(1, keepdim=True)
    if mean == "token":
        return mask / lengths.sum().clamp(min=1)
    return mask / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    ratio: str = "token",
    clip: tuple[float, float] = (0.2, 0.2),
    reference: Tensor | None = None,
    beta: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """-(mean min(rho A, clip(rho, 1 - e, 1 + e) A) - beta KL(pi || pi_ref) + c H(pi)), equations 3 and 4.

    logprobs, old_logprobs, reference, entropy: [B, L] float32, 0 where mask [B, L] (bool) is False.
    advantages: A, [B]. weights: [B, L] from `token_weights`; every mean is taken with them.
    ratio: rho is pi / pi_old of the token ("token"), of the response ("sequence", as in the paper), or the
    length-th root of the latter ("sequence_mean"), which stays near 1 for long responses. A ratio above e^60
    counts as e^60, without a gradient: its exponential would overflow.
    clip: e below and above 1. beta: weight of the KL, estimated by exp(d) - d - 1 with
    d = log pi_ref - log pi (unbiased, never negative). entropy_coef: c, 0 in the paper; H in nats a token.

    Returns the loss (differentiable) and `clip_fraction`, with a reference also `kl`.
    """
    log_ratio = logprobs - old_logprobs
    if ratio != "token":
        log_ratio = log_ratio.sum(1, keepdim=True)
        if ratio == "sequence_mean":
            log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = log_ratio.expand_as(logprobs)
    rho = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    advantage = advantages[:, None]
    free, clipped = rho * advantage, rho.clamp(1 - clip[0], 1 + clip[1]) * advantage
    loss = -(weights * torch.minimum(free, clipped)).sum()
    stats = {"clip_fraction": (weights * (clipped < free)).sum().item()}
    if reference is not None:
        d = reference - logprobs
        kl = (weights * (torch.expm1(d) - d)).sum()
        loss = loss + beta * kl
        stats["kl"] = kl.item()
    if entropy is not None:
        loss = loss - entropy_coef * (weights * entropy).sum()
    return loss, stats
