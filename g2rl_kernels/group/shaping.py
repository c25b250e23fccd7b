"""What every trainer needs around `group_geometry`: from its scores to shaped ones, and what to report.

The paper's rewards are +1 and -1. Trainers have scores: 0 and 1 mostly, anything at times, NaN where a
reward function does not apply. A threshold says which are right, and a gap how far apart a right and a wrong
one lie, so that shaping means the same in every unit: it moves a score by gap / 2 for each 1 that it moves
the paper's reward.

The systems that the paper compares differ in what they make of those +1 and -1: see `shape_rewards`, and
docs/baselines.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .evol import evol_rewards, majority_labels
from .geometry import SCORES, SHAPINGS, UNIFORM_GROUPS, GroupGeometry, group_geometry

ALGORITHMS = ("grpo", "entropy_bonus", "evol_rl", "g2rl")
LABELS = ("truth", "majority")
# Weight of the mean entropy in the loss, and the upper clip of the ratio, where they are left unset. Both are
# EVOL-RL's; the paper does not give the coefficient of its entropy bonus.
ENTROPY_COEF = {"grpo": 0.0, "entropy_bonus": 0.003, "evol_rl": 0.003, "g2rl": 0.0}
EVOL_CLIP_HIGH = 0.28


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

    values: lam, clip, shaping, score, uniform_groups and correctness_gap; where the trainer has them,
    algorithm and labels.
    """
    choices = {"shaping": SHAPINGS, "score": SCORES, "uniform_groups": UNIFORM_GROUPS}
    choices |= {"algorithm": ALGORITHMS, "labels": LABELS}
    for name, allowed in choices.items():
        if name in values and values[name] not in allowed:
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


_MULTIPLIER = 6364136223846793005  # odd, of a full-period generator modulo 2^64


def response_keys(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A number for each packed response, [S] int64, that tells whether two are the same tokens.

    tokens [N], cu_seqlens [S + 1]. It is a polynomial modulo 2^64, so that others share it by an accident of
    one in 2^60, and the sum of integers, so that it is the same on every device.
    """
    start, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    owner = torch.arange(len(start), device=tokens.device).repeat_interleave(lengths)
    position = torch.arange(len(owner), device=tokens.device) - start[owner]
    powers = torch.full((int(lengths.max()) if len(start) else 0,), _MULTIPLIER, device=tokens.device)
    terms = (tokens[: len(owner)].long() + 1) * powers.cumprod(0)[position]
    return torch.zeros_like(start, dtype=torch.int64).index_add_(0, owner, terms)


def _one_feature_each(features: Tensor, keys: Tensor, groups: int | Tensor) -> Tensor:
    """Features [S, d] where responses of a group with the same key have that of the first of them."""
    row = torch.arange(len(keys), device=keys.device)
    ids = row // groups if isinstance(groups, int) else groups.to(keys.device)
    _, which = torch.unique(torch.stack([ids, keys], 1), dim=0, return_inverse=True)
    first = torch.full_like(row, len(row)).scatter_reduce_(0, which, row, "amin")
    return features[first[which]]


def shape_rewards(
    features: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    *,
    keys: Tensor | None = None,
    algorithm: str = "g2rl",
    embeddings: Tensor | None = None,
    answered: Tensor | None = None,
    **options: Any,
) -> GroupGeometry:
    """The groups' geometry, with the shaped rewards and advantages of one of the paper's systems.

        "g2rl"                    the rewards shaped by `group_geometry`
        "evol_rl"                 `evol_rewards` of the responses' texts
        "grpo", "entropy_bonus"   the rewards as they are (the bonus is part of the loss)

    Args:
        features: [S, d], of `head_features`; the geometry is measured whatever the algorithm.
        rewards: [S], +1 and -1; NaN only in rows that take no part.
        groups: an int m, where rows are consecutive blocks of m; or int64 [S] ids, negative: takes no part.
        keys: [S], of `response_keys`. The same tokens give other bits in another micro-batch, or with another
            sampler's log-probs, and where all of a group are alike, min-max would make such rounding the
            whole difference between them: with keys they have one feature.
        embeddings: [S, e], rows of unit norm, needed by evol_rl.
        answered: [S] bool, evol_rl: whether a response has an answer at all. None: all have.
        options: those of `group_geometry`. Only g2rl heeds lam, clip, score and uniform_groups.
    """
    if algorithm != "g2rl":
        options["shaping"] = "none"
    if keys is not None:
        features = _one_feature_each(features, keys, groups)
    geometry = group_geometry(features, rewards, groups, **options)
    if algorithm != "evol_rl":
        return geometry
    assert embeddings is not None
    evolved = evol_rewards(embeddings, rewards > 0, groups, answered)
    other = group_geometry(features[:, :1], evolved, groups, **options)  # for its advantages alone
    return geometry._replace(shaped_rewards=other.shaped_rewards, advantages=other.advantages)


def shape_scores(
    features: Tensor,
    scores: Tensor,
    groups: int | Tensor,
    *,
    has_tokens: Tensor | None = None,
    threshold: float = 0.5,
    gap: float = 1.0,
    votes: Sequence[str | None] | None = None,
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
        votes: S answers, None for no answer. With them scores say nothing, nor does NaN among them: right is
            what `majority_labels` says, and scores are put at threshold +- gap / 2 before they are moved.
        options: of `shape_rewards`: keys, algorithm, embeddings, answered; lam, clip, shaping, score,
            uniform_groups.

    Returns:
        scores, bonus, geometry and metrics. Rows that are padding, not scored or without tokens take no part:
        they touch nobody, and keep their scores.

    Raises:
        TypeError, ValueError: as `group_geometry`; gap is not positive.
    """
    if not gap > 0:
        raise ValueError(f"gap: got {gap}, needs the positive distance between right and wrong scores")
    scores = scores.float()
    ids = torch.arange(len(scores), device=scores.device) // groups if isinstance(groups, int) else groups
    truth = rewards = signed_rewards(scores, threshold)
    if has_tokens is not None:
        ids = ids.masked_fill(~has_tokens, -1)
    if votes is None:
        ids = ids.masked_fill(rewards.isnan(), -1)
        plain = scores
    else:
        rewards = torch.where(majority_labels(votes, ids).to(scores.device), 1.0, -1.0)
        plain = torch.where(ids >= 0, threshold + rewards * (gap / 2), scores)
    geometry = shape_rewards(features, rewards, ids, **options)
    bonus = (geometry.shaped_rewards - rewards).masked_fill(ids < 0, 0.0) * (gap / 2)
    metrics = {**describe(geometry, rewards), "accuracy": _accuracy(truth)}
    return ShapedScores(plain + bonus, bonus, geometry, metrics)


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
    shaped = geometry.shaped_rewards[rows]

    def mean(values: Tensor, count: int) -> float:
        return values.sum().item() / max(count, 1)

    return {
        "score_mean": mean(geometry.score[rows], len(rows)),
        "cos_mean": mean(cosines, len(cosines)),
        "negative_pairs": mean(cosines < 0, len(cosines)),
        "accuracy": _accuracy(rewards),
        "shaped_reward_mean": mean(shaped, len(rows)),
        "sign_flips": mean(shaped * rewards[rows] < 0, len(rows)),
    }


def _accuracy(rewards: Tensor) -> float:
    """Share of +1 among those that are not NaN."""
    return (rewards > 0).sum().item() / max(int((~rewards.isnan()).sum()), 1)
