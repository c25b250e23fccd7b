"""What every trainer needs around `group_geometry`: from its scores to shaped ones, and what to report.

The paper's rewards are +1 and -1. Trainers have scores: 0 and 1 mostly, anything at times, NaN where a
reward function does not apply. A threshold says which are right, and a gap how far apart a right and a wrong
one lie, so that shaping means the same in every unit: it moves a score by gap / 2 for each 1 that it moves
the paper's reward.

The systems that the paper compares differ in what they make of those +1 and -1: see `shape_rewards`, and
docs/baselines.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_choice, check_positive
from .evol import evol_rewards, majority_labels
from .geometry import GroupGeometry, group_geometry, row_groups
from .metrics import accuracy, describe
from .options import ShapingOptions

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
    """Raises ValueError or TypeError for a trainer's first setting that cannot work.

    values: those of `ShapingOptions` and correctness_gap, algorithm and labels, where the trainer has them.
    """
    ShapingOptions.of(values).check(prefix)
    for name, allowed in {"algorithm": ALGORITHMS, "labels": LABELS}.items():
        if name in values:
            check_choice(prefix + name, values[name], allowed)
    if "correctness_gap" in values:
        check_positive(f"{prefix}correctness_gap", values["correctness_gap"])


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


def _one_feature_each(features: Tensor, keys: Tensor, group_ids: Tensor) -> Tensor:
    """Features [S, d] where responses of a group with the same key have that of the first of them."""
    row = torch.arange(len(keys), device=keys.device)
    _, which = torch.unique(torch.stack([group_ids.to(keys.device), keys], 1), dim=0, return_inverse=True)
    first = torch.full_like(row, len(row)).scatter_reduce_(0, which, row, "amin")
    return features[first[which]]


def shape_rewards(
    features: Tensor,
    rewards: Tensor,
    options: ShapingOptions,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    keys: Tensor | None = None,
    algorithm: str = "g2rl",
    embeddings: Tensor | None = None,
    answered: Tensor | None = None,
) -> GroupGeometry:
    """The groups' geometry, with the shaped rewards and advantages of one of the paper's systems.

        "g2rl"                    the rewards shaped by `group_geometry`
        "evol_rl"                 `evol_rewards` of the responses' texts
        "grpo", "entropy_bonus"   the rewards as they are (the bonus is part of the loss)

    Args:
        features: [S, d], of `head_features`; the geometry is measured whatever the algorithm.
        rewards: [S], +1 and -1; NaN only in rows that take no part.
        options: only g2rl heeds lam, clip, exploration_score and uniform_groups.
        group_size, group_ids: exactly one, as in `group_geometry`.
        keys: [S], of `response_keys`. The same tokens give other bits in another micro-batch, or with another
            sampler's log-probs, and where all of a group are alike, min-max would make such rounding the
            whole difference between them: with keys they have one feature.
        embeddings: [S, e], rows of unit norm, needed by evol_rl.
        answered: [S] bool, evol_rl: whether a response has an answer at all. None: all have.
    """
    if algorithm != "g2rl":
        options = replace(options, shaping="none")
    groups: dict[str, Any] = {"group_size": group_size, "group_ids": group_ids}
    ids = row_groups(len(rewards), rewards.device, group_size, group_ids)
    if keys is not None:
        features = _one_feature_each(features, keys, ids)
    geometry = group_geometry(features, rewards, **groups, **vars(options))
    if algorithm != "evol_rl":
        return geometry
    assert embeddings is not None
    evolved = evol_rewards(embeddings, rewards > 0, ids, answered)
    other = group_geometry(features[:, :1], evolved, **groups, **vars(options))  # for its advantages alone
    return geometry._replace(shaped_rewards=other.shaped_rewards, advantages=other.advantages)


def shape_scores(
    features: Tensor,
    scores: Tensor,
    options: ShapingOptions,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    has_tokens: Tensor | None = None,
    threshold: float = 0.5,
    gap: float = 1.0,
    votes: Sequence[str | None] | None = None,
    **system: Any,
) -> ShapedScores:
    """Scores moved by how novel each response is within its group.

    Args:
        features: [S, d], of `head_features`, in the order of scores.
        scores: [S], any float dtype, in the trainer's units; NaN: not scored.
        options: how they are moved.
        group_size, group_ids: exactly one, as in `group_geometry`.
        has_tokens: [S] bool: False for a response without any token that counts (a masked one, say). Its
            feature is zero, which would pass for perfectly novel.
        threshold: scores from here on are right.
        gap: how far apart the scores of a right and a wrong answer are: 1 for 0 and 1, 2 for -1 and +1.
        votes: S answers, None for no answer. With them scores say nothing, nor does NaN among them: right is
            what `majority_labels` says, and scores are put at threshold +- gap / 2 before they are moved.
        system: keys, algorithm, embeddings and answered of `shape_rewards`.

    Returns:
        scores, bonus, geometry and metrics. Rows that are padding, not scored or without tokens take no part:
        they touch nobody, and keep their scores.

    Raises:
        TypeError, ValueError: as `group_geometry`; gap is not positive.
    """
    if not gap > 0:
        raise ValueError(f"gap: got {gap}, needs the positive distance between right and wrong scores")
    scores = scores.float()
    ids = row_groups(len(scores), scores.device, group_size, group_ids)
    truth = rewards = signed_rewards(scores, threshold)
    if has_tokens is not None:
        ids = ids.masked_fill(~has_tokens, -1)
    if votes is None:
        ids = ids.masked_fill(rewards.isnan(), -1)
        plain = scores
    else:
        rewards = torch.where(majority_labels(votes, ids).to(scores.device), 1.0, -1.0)
        plain = torch.where(ids >= 0, threshold + rewards * (gap / 2), scores)
    geometry = shape_rewards(features, rewards, options, group_ids=ids, **system)
    bonus = (geometry.shaped_rewards - rewards).masked_fill(ids < 0, 0.0) * (gap / 2)
    metrics = {**describe(geometry, rewards), "accuracy": accuracy(truth)}
    return ShapedScores(plain + bonus, bonus, geometry, metrics)
