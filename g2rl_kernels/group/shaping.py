"""Shapes a trainer's scores (`shape_scores`), or rewards of +1 and -1 (`shape_rewards`).

The paper's rewards are +1 and -1. A trainer's scores are mostly 0 and 1, sometimes other numbers, and NaN
where a reward function does not apply. `threshold` says which scores are right, and `gap` how far apart the
scores of a right and a wrong response are. A change of 1 in the paper's reward changes the score by gap / 2,
so that shaping has the same strength in all units. Scores that grade answers have neither: `graded_rewards`
compares each with its group's mean instead.

docs/baselines.md describes the systems that the paper compares, docs/methods.md those of later papers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..arguments import check_choice, check_finite, check_positive, check_tensor
from .evol import evol_rewards, majority_labels
from .geometry import GroupGeometry, group_geometry, row_groups
from .methods import METHODS, shape_groups, text_similarity
from .metrics import accuracy, describe
from .options import SCORE_GATE, MethodOptions, ShapingOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

ALGORITHMS = ("grpo", "entropy_bonus", "evol_rl", "g2rl", *METHODS)
REWARDS = ("binary", "graded")  # scores say right or wrong, by a threshold, or how good an answer is
LABELS = ("truth", "majority")  # which responses are right: by their scores, or by a vote
# Defaults of the weight of the mean entropy in the loss, and of the upper clip of the ratio. Both are
# EVOL-RL's; the paper does not give the coefficient of its entropy bonus.
ENTROPY_COEF = {**dict.fromkeys(ALGORITHMS, 0.0), "entropy_bonus": 0.003, "evol_rl": 0.003}
EVOL_CLIP_HIGH = 0.28
NO_OPTIONS = MethodOptions()


class ShapedScores(NamedTuple):
    """What `shape_scores` returns."""

    scores: Tensor  # [S] float32, shaped; unchanged in rows that are left out
    bonus: Tensor  # [S] float32, what shaping added; 0 in rows that are left out
    geometry: GroupGeometry
    metrics: dict[str, float]  # of `describe`
    advantages: Tensor | None = None  # [S], of a method that gives them: they replace the trainer's own


class SystemInputs(TypedDict, total=False):
    """The optional arguments of `shape_rewards` that `shape_scores` passes on."""

    keys: Tensor | None
    algorithm: str
    embeddings: Tensor | None
    answered: Tensor | None
    alignment: Tensor | None
    method_options: MethodOptions


def signed_rewards(scores: Tensor, threshold: float) -> Tensor:
    """[S] float32: +1 for scores [S] (floats) of at least `threshold`, -1 below it, NaN for NaN."""
    signs = torch.where(scores >= threshold, 1.0, -1.0)
    return signs.masked_fill(scores.isnan(), torch.nan)


def graded_rewards(scores: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Graded scores as rewards between -1 and 1, and half the distance between good and bad scores; [S] each.

        d_i = s_i - mean s                                    in the group
        D+, D-                                                the mean |d| of scores above, below the mean
        r_i = d_i / D+, d_i / D- or 0, at most 1 in size      above, below or at the mean
        half = (D+ + D-) / 2

    Adding a number to a group's scores changes neither; multiplying them multiplies `half`. Where a group has
    two scores, as of right and wrong answers, r is +1 and -1, and half is half of their difference. Where all
    its scores are equal, both are 0. A score is at the mean if float32's rounding explains the difference.

    Args:
        scores: [S] float32; NaN only in padding rows. An infinite one makes both NaN in its own group.
        group_ids: [S] int64; negative: padding row, which gets zeros.
    """
    _, inverse = torch.unique(group_ids, return_inverse=True)
    row = torch.arange(len(scores), device=scores.device)
    member = scores.new_zeros(len(scores), int(inverse.max()) + 1 if len(scores) else 0, dtype=torch.float64)
    real = group_ids >= 0
    member[row, inverse] = real.double()
    infinite = real & ~scores.isfinite()  # left out of the products, where 0 times it would reach all groups
    values = scores.double().masked_fill(~real | infinite, 0.0)  # sums of equal float32 numbers are exact

    def mean(x: Tensor, counts: Tensor) -> Tensor:
        """Of x over the rows of a group that count, for each row."""
        weights = member * counts.double()[:, None]
        return ((weights.T @ x) / weights.sum(0).clamp(min=1))[inverse]

    d = (values - mean(values, real)).masked_fill(~real, 0.0)
    if len(scores):  # a score and the mean are each rounded by at most 2^-24 of the largest score
        largest = (member * values.abs()[:, None]).amax(0)[inverse]
        d = d.masked_fill(d.abs() <= 2**-22 * largest, 0.0)
    above, below = mean(d, d > 0), -mean(d, d < 0)
    side = torch.where(d > 0, above, below)
    rewards = torch.where(side > 0, d / side, 0.0).clamp(-1, 1)
    half = ((above + below) / 2).masked_fill(~real, 0.0)
    lost = real & (mean(infinite.double(), real) > 0)
    return rewards.masked_fill(lost, torch.nan).float(), half.masked_fill(lost, torch.nan).float()


def check_options(values: Mapping[str, Any], prefix: str) -> None:
    """Raises ValueError or TypeError for the first wrong setting of a trainer.

    Args:
        values: the trainer's settings by their names here: options of `ShapingOptions`, correctness_gap,
            algorithm, labels, rewards. Those that are missing are not checked.
        prefix: of the trainer's own names, for messages.
    """
    ShapingOptions.of(values).check(prefix)
    for name, allowed in {"algorithm": ALGORITHMS, "labels": LABELS, "rewards": REWARDS}.items():
        if name in values:
            check_choice(prefix + name, values[name], allowed)
    check_method(values, prefix)
    if "correctness_gap" in values:
        check_positive(f"{prefix}correctness_gap", values["correctness_gap"])
    if "correctness_threshold" in values:
        check_finite(f"{prefix}correctness_threshold", values["correctness_threshold"])


def check_method(values: Mapping[str, Any], prefix: str) -> None:
    """`check_options` for `MethodOptions`, and for graded rewards where right and wrong are needed."""
    options, algorithm = MethodOptions.of(values), values.get("algorithm", "g2rl")
    options.check(prefix)
    method = METHODS.get(algorithm)
    if values.get("rewards") == "graded":
        binary = algorithm == "evol_rl" or (method is not None and method.binary)
        for name, wrong in {"algorithm": binary, "labels": values.get("labels") == "majority"}.items():
            if wrong:
                raise ValueError(
                    f"{prefix}rewards: got 'graded' with {prefix}{name}={values[name]}, which needs right "
                    "and wrong answers: set it to 'binary'"
                )
    if options.similarity == "text" and not (method and method.texts):
        others = ", ".join(name for name, one in METHODS.items() if one.texts)
        raise ValueError(
            f"{prefix}similarity: got 'text' with {prefix}algorithm={algorithm}, which has no choice: leave "
            f"it at 'gradient', or use {others}"
        )


def compares_texts(algorithm: str, similarity: str) -> bool:
    """Whether embeddings of the responses' texts are needed."""
    return algorithm == "evol_rl" or similarity == "text"


_told: set[str] = set()  # warnings that this process has given


def check_group_size(size: int, option: str, values: Mapping[str, Any], prefix: str) -> None:
    """Warns once of groups too small for g2rl: the two responses of a pair get the same exploration score.

    Raises ValueError for passk in groups of at most pass_k: every set of pass_k responses is then the same.

    Args:
        size: responses a prompt.
        option: what the trainer calls their number.
        values, prefix: the trainer's settings, as in `check_options`. With other algorithms, lam=0 or shaping
            "none" nothing is said.
    """
    k = MethodOptions.of(values).pass_k
    if values.get("algorithm") == "passk" and k >= size:
        raise ValueError(
            f"{prefix}pass_k: got {k}, needs fewer than {option}={size}, the responses of a prompt"
        )
    options = ShapingOptions.of(values)
    shapes = values.get("algorithm", "g2rl") == "g2rl" and options.lam > 0 and options.shaping != "none"
    said = (
        f"{option}={size}: with fewer than 3 responses in a group all are equally novel, and g2rl prefers "
        f"none: set it to at least 3 (the paper uses 16), or {prefix}lam to 0"
    )
    if size < 3 and shapes and said not in _told:
        _told.add(said)
        warnings.warn(said, stacklevel=3)


def _scored(scores: Tensor) -> list[float]:
    return [score for score in scores.tolist() if not math.isnan(score)]


def check_gap(scores: Tensor, gap: float, name: str, option: str) -> None:
    """Warns if scores are further apart than `gap`, as if the trainer's gap is not that of its rewards.

    scores: [S], NaN for responses without a score. name, option: what the message calls scores and gap.
    """
    scored = _scored(scores)
    if scored and max(scored) - min(scored) > 1.01 * gap:
        warnings.warn(
            f"{name} lie further apart than {option}={gap:g}, so that shaping is weaker than asked for: set "
            "it to the distance between right and wrong (2 for rewards of -1 and +1)",
            stacklevel=3,
        )


def check_threshold(scores: Tensor, threshold: float, name: str, option: str, remedy: str) -> None:
    """Warns if scores differ but all lie on one side of the threshold, as graded scores do.

    scores: [S], NaN for responses without a score. name, option: what the message calls scores and threshold;
    remedy: the setting for graded scores, as the user writes it.
    """
    scored = _scored(scores)
    if not scored or min(scored) == max(scored) or min(scored) < threshold <= max(scored):
        return
    side, taken = ("below", "wrong") if max(scored) < threshold else ("at or above", "right")
    warnings.warn(
        f"{name} differ in a batch, but all lie {side} {option}={threshold:g}, so that shaping takes every "
        f"answer for {taken}: for graded rewards set {remedy}; else set {option} between wrong and right",
        stacklevel=3,
    )


_MULTIPLIER = 6364136223846793005  # odd, of a full-period generator modulo 2^64


def response_keys(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A hash of each response's tokens, [S] int64: equal for the same tokens, on every device.

    It is a polynomial in the tokens modulo 2^64: different responses share a key with a chance of about one
    in 2^60. A sum of integers does not depend on the order in which a device adds.

    Args:
        tokens: [N] int64, packed.
        cu_seqlens: [S + 1] int32 or int64, response s is tokens[cu_seqlens[s]:cu_seqlens[s + 1]].
    """
    start, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    owner = torch.arange(len(start), device=tokens.device).repeat_interleave(lengths)
    position = torch.arange(len(owner), device=tokens.device) - start[owner]
    powers = torch.full((int(lengths.max()) if len(start) else 0,), _MULTIPLIER, device=tokens.device)
    terms = (tokens[: len(owner)].long() + 1) * powers.cumprod(0)[position]
    return torch.zeros_like(start, dtype=torch.int64).index_add_(0, owner, terms)


def _one_feature_each(features: Tensor, keys: Tensor, group_ids: Tensor) -> Tensor:
    """Features [S, d] where responses of a group with the same key have the feature of the first of them."""
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
    alignment: Tensor | None = None,
    method_options: MethodOptions = NO_OPTIONS,
    scores: Tensor | None = None,
) -> GroupGeometry:
    """Measures every group, and computes shaped rewards and advantages as an algorithm does.

        "g2rl"                    the rewards shaped by `group_geometry`
        "evol_rl"                 the rewards of `evol_rewards`
        "grpo", "entropy_bonus"   the rewards as they are; the entropy bonus is part of the loss
        one of METHODS            the rewards or the advantages that its function gives

    Args:
        features: [S, d], of `head_features`. Every algorithm measures their geometry.
        rewards: [S], +1 and -1; NaN only in padding rows.
        options: g2rl uses all; other algorithms use exploration_score, scale and eps alone, and those of
            METHODS also uniform_groups, and what they name.
        group_size, group_ids: exactly one, as in `group_geometry`.
        keys: [S], of `response_keys`. With them, responses of a group with the same tokens have one feature.
            Otherwise their features differ by rounding (micro-batches, the sampler's log-probs), and where
            all responses of a group are the same, nubar would stretch that rounding to [0, 1].
        algorithm: one of ALGORITHMS.
        embeddings: [S, e], rows of unit norm; needed by evol_rl, and with method_options.similarity="text".
        answered: [S] bool, for evol_rl: False for a response without an answer. None: all have one.
        alignment: [S], for dirl and gar, as their functions define it.
        method_options: of METHODS.
        scores: [S], whose advantages a method adds to, where it adds to any; None: those of rewards.

    Returns:
        `GroupGeometry` of the features, with this system's shaped_rewards and advantages.

    Raises:
        TypeError, ValueError: as `group_geometry`; no such algorithm; embeddings or alignment missing.
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    if compares_texts(algorithm, method_options.similarity) and embeddings is None:
        what = "evol_rl" if algorithm == "evol_rl" else "similarity='text'"
        raise ValueError(f"embeddings: got None, {what} needs [S, e], rows of unit norm")
    if algorithm != "g2rl":
        options = replace(options, shaping="none")
    groups: dict[str, Any] = {"group_size": group_size, "group_ids": group_ids}
    ids = row_groups(len(rewards), rewards.device, group_size, group_ids)
    if keys is not None:
        features = _one_feature_each(features, keys, ids)
        if alignment is not None:
            alignment = _one_feature_each(alignment[:, None], keys, ids)[:, 0]
    geometry = group_geometry(features, rewards, **groups, **vars(options))
    if algorithm == "evol_rl":
        assert embeddings is not None
        shaped = evol_rewards(embeddings, rewards > 0, ids, answered)
    elif algorithm in METHODS:
        similarity = geometry.similarity
        if method_options.similarity == "text" and METHODS[algorithm].texts:
            assert embeddings is not None
            similarity = text_similarity(embeddings, geometry.members)
        plain = geometry.advantages
        if scores is not None and "advantages" in METHODS[algorithm].needs:
            plain = group_geometry(features[:, :1], scores, **groups, **vars(options)).advantages
        shaped = shape_groups(
            algorithm,
            rewards,
            geometry.members,
            similarity=similarity,
            advantages=plain,
            alignment=alignment,
            options=options,
            method_options=method_options,
        )
        if METHODS[algorithm].gives == "advantages":
            return geometry._replace(advantages=shaped)
    else:
        return geometry
    other = group_geometry(features[:, :1], shaped, **groups, **vars(options))  # only for the advantages
    return geometry._replace(shaped_rewards=other.shaped_rewards, advantages=other.advantages)


def shape_scores(
    features: Tensor,
    scores: Tensor,
    options: ShapingOptions,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    has_tokens: Tensor | None = None,
    threshold: float = SCORE_GATE,
    gap: float = 1.0,
    votes: Sequence[str | None] | None = None,
    graded: bool = False,
    **system: Unpack[SystemInputs],
) -> ShapedScores:
    """A trainer's scores, shaped by how novel each response is within its group.

    Rows that are padding, without a score (NaN) or without tokens are left out: they keep their scores, and
    change nothing for other rows.

    Args:
        features: [S, d], of `head_features`, in the order of scores.
        scores: [S], any float dtype, in the trainer's units; NaN: no score.
        options: how rewards are shaped.
        group_size, group_ids: exactly one, as in `group_geometry`.
        has_tokens: [S] bool, False for a response without tokens that count, e.g. a truncated one that the
            trainer masks. Its feature is zero, which would make it look perfectly novel.
        threshold: a score of at least this is right.
        gap: how far apart the scores of a right and a wrong response are: 1 for 0 and 1, 2 for -1 and +1.
        votes: S answers, None for no answer. With them `majority_labels` decides which responses are right. A
            NaN score then leaves no row out. Before shaping, the scores of right responses are replaced by 1,
            or threshold if that is higher, and those of wrong ones by that less gap.
        graded: rewards are those of `graded_rewards`, and gap is twice its half; threshold then counts in the
            metric `accuracy` alone.
        system: keys, algorithm, embeddings, answered, alignment and method_options, as in `shape_rewards`.

    Returns:
        `ShapedScores`: scores and bonus [S] float32 (what shaping added, in units of scores), geometry,
        metrics by name, of `describe`, and advantages: None where a trainer computes its own from the scores.

    Raises:
        TypeError, ValueError: as `group_geometry`; gap is not positive; threshold is not a finite number;
            graded with votes or evol_rl.
    """
    if graded and (votes is not None or system.get("algorithm") == "evol_rl"):
        raise ValueError("graded: got True with votes or algorithm='evol_rl', which need right and wrong")
    if not gap > 0:
        raise ValueError(f"gap: got {gap}, needs the positive distance between right and wrong scores")
    check_finite("threshold", threshold)
    check_tensor("scores", scores, None)
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
        plain = torch.where(ids >= 0, max(threshold, 1.0) + (rewards - 1) * (gap / 2), scores)
    half: Tensor | float = gap / 2
    if graded:
        rewards, half = graded_rewards(scores, ids)
    geometry = shape_rewards(features, rewards, options, group_ids=ids, scores=plain, **system)
    bonus = (geometry.shaped_rewards - rewards).masked_fill(ids < 0, 0.0) * half
    metrics = {**describe(geometry, rewards), "accuracy": accuracy(truth)}
    method = METHODS.get(system.get("algorithm", "g2rl"))
    advantages = geometry.advantages if method is not None and method.gives == "advantages" else None
    return ShapedScores(plain + bonus, bonus, geometry, metrics, advantages)
