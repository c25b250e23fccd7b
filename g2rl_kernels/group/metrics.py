"""What to report of a batch of groups: the `g2rl/*` metrics of docs/metrics.md."""

from __future__ import annotations

from torch import Tensor

from .geometry import GroupGeometry


def describe(geometry: GroupGeometry, rewards: Tensor) -> dict[str, float]:
    """The metrics of a batch of groups; rewards [S] are the +1, -1 (or NaN) that went into `geometry`.

    accuracy: share of right ones among all scored responses. The others are of the responses that took part:
    exploration_score_mean, the mean of nu; cos_mean, the mean cosine over pairs in a group, and
    negative_pairs, the share of pairs where it is negative; shaped_reward_mean, in the paper's units, +1 and
    -1; sign_flips, the share of rewards whose sign shaping turned. 0 where there is nothing to average.
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
    """Share of +1 among those that are not NaN."""
    return (rewards > 0).sum().item() / max(int((~rewards.isnan()).sum()), 1)
