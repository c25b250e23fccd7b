"""Group geometry in plain PyTorch, one function for each equation of the paper (arXiv 2512.15687).

With float64 inputs it computes in float64; the tests compare the kernels with that. It runs on any device;
only `group_members` waits for the device.

Notation: S responses, d hidden size; B groups of at most M responses each. The rows of a group lie along a
dimension of size M; `present` [B, M] is False at empty places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..head.reference import accumulation_dtype
from .options import ShapingOptions

FLAT_SPREAD = 1e-5  # eq. 13: with a smaller spread of nu in a group, every nubar is 0.5
DEFAULTS = ShapingOptions()


def group_members(ids: Tensor) -> Tensor:
    """Row indices [B, M] int64 of each group, -1 at empty places, from ids [S] (negative: padding row).

    Groups are in order of first appearance, the rows of a group in order.
    """
    rows = torch.nonzero(ids >= 0).squeeze(1)
    _, inverse, size = torch.unique(ids[rows], return_inverse=True, return_counts=True)
    B, M = size.shape[0], int(size.max()) if size.shape[0] else 0
    by_group = torch.argsort(inverse, stable=True)
    place = torch.arange(rows.shape[0], device=ids.device) - (size.cumsum(0) - size)[inverse[by_group]]
    members = ids.new_full((B, M), -1)
    members[inverse[by_group], place] = rows[by_group]
    return members[torch.argsort(members[:, 0])] if B else members


def cosine_similarity(features: Tensor, eps: float) -> Tensor:
    """Eq. 9: Phi^ = Phi / (||Phi|| + eps), S_ij = <Phi^_i, Phi^_j>. features [B, M, d] -> [B, M, M]."""
    unit = features / (features.norm(dim=-1, keepdim=True) + eps)
    return unit @ unit.mT


def reference_weights(rewards: Tensor, present: Tensor, eps: float) -> Tensor:
    """Eq. 10: w_ij = exp(r_j) [j != i] / (sum_{k != i} exp(r_k) + eps), [B, M] -> [B, M, M].

    Numerator and denominator are divided by exp(max_{k != i} r_k), so that no exponential overflows.
    """
    M = rewards.shape[1]
    other = present[:, None, :] & ~torch.eye(M, dtype=torch.bool, device=rewards.device)
    r = rewards[:, None, :].expand(-1, M, -1).masked_fill(~other, -torch.inf)
    if M == 0:
        return r
    shift = r.max(dim=-1, keepdim=True).values
    shift = shift.masked_fill(shift == -torch.inf, 0.0)  # a group of one
    exponential = torch.exp(r - shift)
    return exponential / (exponential.sum(dim=-1, keepdim=True) + eps * torch.exp(-shift))


def exploration_score(similarity: Tensor, weights: Tensor, form: str) -> Tensor:
    """Eq. 11: nu_i = max(1 - sum_{j != i} w_ij S_ij^2, 0); its square root for form="sqrt". [B, M]."""
    nu = (1 - (weights * similarity**2).sum(dim=-1)).clamp(min=0)
    return nu.sqrt() if form == "sqrt" else nu


def min_max(nu: Tensor, present: Tensor) -> Tensor:
    """nubar = (nu - min) / (max - min) in each group; 0.5 where max - min <= 1e-5. [B, M]."""
    if nu.shape[1] == 0:
        return nu
    low = nu.masked_fill(~present, torch.inf).amin(dim=1, keepdim=True)
    high = nu.masked_fill(~present, -torch.inf).amax(dim=1, keepdim=True)
    flat = high - low <= FLAT_SPREAD
    return torch.where(flat, 0.5, (nu - low) / torch.where(flat, 1.0, high - low))


def shaped_rewards(rewards: Tensor, nubar: Tensor, lam: float, clip: float, shaping: str) -> Tensor:
    """Eqs. 12-13, then the clip of section 2.5. [B, M].

    "equation"   r (1 + lam r nubar), eq. 12 as printed
    "intent"     r (1 + lam (2 nubar - 1)), as the text below eq. 12 demands: a novel wrong answer loses
    "right"      as "intent" where r > 0, with nubar computed over these rows alone; r elsewhere
    "none"       r, without the clip
    """
    if shaping == "none":
        return rewards
    factor = lam * rewards * nubar if shaping == "equation" else lam * (2 * nubar - 1)
    if shaping == "right":
        factor = factor.masked_fill(~(rewards > 0), 0.0)
    return (rewards * (1 + factor)).clamp(-clip, clip)


def is_uniform(rewards: Tensor, present: Tensor) -> Tensor:
    """Whether all rewards of a group are equal: [B, M] -> [B, 1]."""
    if rewards.shape[1] == 0:
        return present.any(dim=1, keepdim=True)
    low = rewards.masked_fill(~present, torch.inf).amin(dim=1, keepdim=True)
    high = rewards.masked_fill(~present, -torch.inf).amax(dim=1, keepdim=True)
    return low == high


def masked_mean(values: Tensor, present: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The mean of the present values over `dim`, which stays with size 1; 0 if no value is present."""
    count = present.sum(dim=dim, keepdim=True).clamp(min=1)
    return values.masked_fill(~present, 0.0).sum(dim=dim, keepdim=True) / count


def group_advantages(rewards: Tensor, present: Tensor, scale: str, eps: float) -> Tensor:
    """Eq. 2: A_i = (r_i - mean r) / s_r, s_r = sqrt(mean (r_i - mean r)^2 + eps), in each group. [B, M].

    scale="batch" computes s_r over all groups, about their common mean; scale="none" does not divide.
    """
    centred = rewards - masked_mean(rewards, present, 1)
    if scale == "none":
        return centred
    dim: int | tuple[int, ...] = (0, 1) if scale == "batch" else 1
    variance = masked_mean((rewards - masked_mean(rewards, present, dim)) ** 2, present, dim)
    return centred / torch.sqrt(variance + eps)


def group_geometry(
    features: Tensor,
    rewards: Tensor,
    members: Tensor,
    options: ShapingOptions = DEFAULTS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eqs. 9-13 and 2 on each group: features [S, d], rewards [S], members [B, M] (negative: empty place).

    Returns similarity [B, M, M], nu [S], shaped rewards [S] and advantages [S]; rows without a group get 0.
    """
    dtype = accumulation_dtype(features, rewards)
    present = members >= 0
    rows = members.clamp(min=0)
    pair = present[:, :, None] & present[:, None, :]
    group_features = features.to(dtype)[rows].masked_fill(~present[:, :, None], 0.0)
    group_rewards = rewards.to(dtype)[rows].masked_fill(~present, 0.0)

    similarity = cosine_similarity(group_features, options.eps).masked_fill(~pair, 0.0)
    weights = reference_weights(group_rewards, present, options.eps)
    nu = exploration_score(similarity, weights, options.exploration_score)
    compared = present & (group_rewards > 0) if options.shaping == "right" else present
    shaped = shaped_rewards(group_rewards, min_max(nu, compared), options.lam, options.clip, options.shaping)
    if options.uniform_groups == "skip":
        shaped = torch.where(is_uniform(group_rewards, present), group_rewards, shaped)
    advantages = group_advantages(shaped, present, options.scale, options.eps)

    # Empty places are written to an extra last row, which is then dropped.
    target = torch.where(present, members, features.shape[0]).flatten()
    out = features.new_zeros(3, features.shape[0] + 1, dtype=dtype)
    out = out.index_copy(1, target, torch.stack([nu, shaped, advantages]).flatten(1))[:, :-1]
    return similarity, out[0], out[1], out[2]
