"""The `g2rl/*` metrics of a batch of groups (docs/metrics.md)."""

from __future__ import annotations

import math

from torch import Tensor

from .geometry import GroupGeometry


def describe(geometry: GroupGeometry, rewards: Tensor) -> dict[str, float]:
    """The metrics of a batch of groups.

        accuracy                  share of +1 among all rewards that are not NaN
        exploration_score_mean    mean of nu
        cos_mean                  mean cosine over pairs of responses of a group
        negative_pairs            share of pairs with a negative cosine
        shaped_reward_mean        mean shaped reward, where right is +1 and wrong is -1
        sign_flips                share of rewards whose sign shaping changed

    All but accuracy are over the rows in `geometry.members`. A mean over nothing is 0, but accuracy NaN.

    Args:
        geometry: of `group_geometry`.
        rewards: [S], the +1 and -1 that went into it; NaN in padding rows only.
    """
    real = geometry.members >= 0
    rows = geometry.members[real]
    pairs = (real[:, :, None] & real[:, None, :]).triu(1)
    cosines = geometry.similarity[pairs]
    shaped = geometry.shaped_rewards[rows]

    def mean(values: Tensor, count: int) -> float:
        return values.sum().item() / max(count, 1)

    return {
        "exploration_score_mean": mean(geometry.exploration_score[rows], len(rows)),
        "cos_mean": mean(cosines, len(cosines)),
        "negative_pairs": mean(cosines < 0, len(cosines)),
        "accuracy": accuracy(rewards),
        "shaped_reward_mean": mean(shaped, len(rows)),
        "sign_flips": mean(shaped * rewards[rows] < 0, len(rows)),
    }


def accuracy(rewards: Tensor) -> float:
    """Share of +1 among rewards [S] that are not NaN; NaN if all are."""
    scored = int((~rewards.isnan()).sum())
    return (rewards > 0).sum().item() / scored if scored else math.nan
