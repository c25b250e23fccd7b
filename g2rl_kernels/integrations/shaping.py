"""What every trainer needs around `group_geometry`: from its scores to shaped ones, and what to report.

The paper's rewards are +1 and -1. Trainers have scores: 0 and 1 mostly, anything at times, NaN where a
reward function does not apply. A threshold says which are right, and a gap how far apart a right and a wrong
one lie, so that shaping means the same in every unit: it moves a score by gap / 2 for each 1 that it moves
the paper's reward.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..group import SCORES, SHAPINGS, UNIFORM_GROUPS, GroupGeometry, group_geometry


class ShapedScores(NamedTuple):
    """What `shape_scores` returns."""

    scores: Tensor  # [S] float32, shaped; as they were in rows that take no part
    bonus: Tensor  # [S] float32, what shaping added; 0 in rows that take no part
    geometry: GroupGeometry
    metrics: dict[str, float]  # see `describe`


def signed_rewards(scores: Tensor, threshold: float) -> Tensor:
    """[S] float32: +1 where a score reaches `threshold`, -1 below it, NaN where it is NaN."""
    signs = torch.where(scores >= threshold, 1.0, -1.0)
    return signs.masked_fill(scores.isnan(), torch.nan)


def check_options(values: Mapping[str, Any], prefix: str) -> None:
    """Raises ValueError for the first of a trainer's settings that cannot work, as `prefix` + its name.

    values: lam, clip, shaping, score, uniform_groups and correctness_gap.
    """
    choices = {"shaping": SHAPINGS, "score": SCORES, "uniform_groups": UNIFORM_GROUPS}
    for name, allowed in choices.items():
        if values[name] not in allowed:
            raise ValueError(f"{prefix}{name}: got {values[name]!r}, needs one of {', '.join(allowed)}")
    if not 0 <= values["lam"] < math.inf:
        raise ValueError(f"{prefix}lam: got {values['lam']}, needs a finite number, 0 or more")
    for name in ("clip", "correctness_gap"):
        if not 0 < values[name] < math.inf:
            raise ValueError(f"{prefix}{name}: got {values[name]}, needs a positive finite number")


def check_gap(scores: Tensor, gap: float, name: str, option: str) -> None:
    """Warns where scores (NaN: not scored) lie further apart than the gap of `shape_scores` allows for."""
    scored = scores[~scores.isnan()]
    if len(scored) and scored.max() - scored.min() > 1.01 * gap:
        warnings.warn(
            f"{name} lie further apart than {option}={gap:g}, so that shaping is weaker than lam says: set "
            "it to the distance between right and wrong (2 for rewards of -1 and +1)",
            stacklevel=3,
        )


def shape_scores(
    features: Tensor,
    scores: Tensor,
    groups: int | Tensor,
    *,
    has_tokens: Tensor | None = None,
    threshold: float = 0.5,
    gap: float = 1.0,
    **options: Any,
) -> ShapedScores:
    """Scores moved by how novel each response is within its group.

    Args:
        features: [S, d], of `head_features`, in the order of scores.
        scores: [S], any float dtype, in the trainer's units; NaN: not scored.
        groups: an int m, where rows are consecutive blocks of m; or int64 [S] ids, negative for padding.
        has_tokens: [S] bool: False for a response without any token that counts (a masked one, say). Its
            feature is zero, which would pass for perfectly novel.
        threshold: scores from here on are right.
        gap: how far apart the scores of a right and a wrong answer are: 1 for 0 and 1, 2 for -1 and +1.
        options: lam, clip, shaping, score, uniform_groups of `group_geometry`.

    Returns:
        scores, bonus, geometry and metrics. Rows that are padding, not scored or without tokens take no part:
        they touch nobody, and keep their scores.

    Raises:
        TypeError, ValueError: as `group_geometry`; gap is not positive.
    """
    if not gap > 0:
        raise ValueError(f"gap: got {gap}, needs the positive distance between right and wrong scores")
    scores = scores.float()
    rewards = signed_rewards(scores, threshold)
    takes_part = ~rewards.isnan()
    if has_tokens is not None:
        takes_part &= has_tokens
    ids = torch.arange(len(scores), device=scores.device) // groups if isinstance(groups, int) else groups
    ids = ids.masked_fill(~takes_part, -1)
    geometry = group_geometry(features, rewards, ids, **options)
    bonus = (geometry.shaped_rewards - rewards).masked_fill(ids < 0, 0.0) * (gap / 2)
    return ShapedScores(scores + bonus, bonus, geometry, describe(geometry, rewards))


def describe(geometry: GroupGeometry, rewards: Tensor) -> dict[str, float]:
    """The metrics of a batch of groups; rewards [S] are the +1, -1 (or NaN) that went into `geometry`.

    accuracy: share of right ones among all scored responses. The others are of the responses that took part:
    score_mean, the mean exploration score nu; cos_mean, the mean cosine over pairs in a group, and
    negative_pairs, the share of pairs where it is negative; shaped_reward_mean, in the paper's units, +1 and
    -1; sign_flips, the share of rewards whose sign shaping turned. 0 where there is nothing to average.
    """
    real = geometry.members >= 0
    rows = geometry.members[real]
    pairs = (real[:, :, None] & real[:, None, :]).triu(1)
    cosines = geometry.similarity[pairs]
    shaped, scored = geometry.shaped_rewards[rows], ~rewards.isnan()

    def mean(values: Tensor, count: int) -> float:
        return values.sum().item() / max(count, 1)

    return {
        "score_mean": mean(geometry.score[rows], len(rows)),
        "cos_mean": mean(cosines, len(cosines)),
        "negative_pairs": mean(cosines < 0, len(cosines)),
        "accuracy": mean(rewards > 0, int(scored.sum())),
        "shaped_reward_mean": mean(shaped, len(rows)),
        "sign_flips": mean(shaped * rewards[rows] < 0, len(rows)),
    }
