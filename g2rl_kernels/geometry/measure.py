"""Measures how similar the responses to a problem are in gradient space.

A *group* is the responses to one problem; a *pair* is two of them. A response's feature Phi is the direction
in which it would move the LM head's input (`head_features`), and S_ij is the cosine of two features
(`group_geometry`, equation 9). `rows.STATISTICS` lists the numbers of a group.

Overall numbers are means over problems: each problem counts the same, however many pairs it has. (`g2rl/*` in
training averages over all pairs; with groups of one size the two agree.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import g2rl_kernels as g2

from ..arguments import check_tensor
from ..evaluation.metrics import bootstrap_interval
from ..evaluation.results import check_questions
from ..group.geometry import row_groups
from ..group.options import SCORE_GATE
from ..head.reference import segment_sum
from ..models.lm_head import LMHead
from ..models.responses import response_hidden
from .rows import (
    STATISTICS,
    Extreme,
    GroupStatistics,
    MeasuredProblem,
    Overall,
    Pair,
    PairStatistics,
    ResponseStatistics,
    Statistic,
)

EPS = 1e-30  # for `group_geometry`: its default would shrink the cosines of features about as short as it


@dataclass
class Measured:
    """The measurements of S responses under a model, on the CPU: what `measure` returns."""

    features: Tensor  # [S, d] float32
    entropy: Tensor  # [S] float32, nats, summed over the response's tokens
    lengths: Tensor  # [S] int64, tokens


@torch.no_grad()
def measure(
    head: LMHead,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    batch_size: int = 8,
    autocast: bool = False,
    advance: Callable[[int], Any] | None = None,
) -> Measured:
    """Features and entropies of S responses, by one forward of the backbone for each batch.

    Args:
        head: of `find_head`, its model in evaluation mode.
        prompts: S lists of token ids.
        responses: S lists of token ids, each the answer to the prompt in its place. A response without tokens
            gets the feature zero.
        temperature: of sampling.
        batch_size: responses in a forward; bounds the memory.
        autocast: run the backbone and the head in bf16.
        advance: called after each batch with the number of its responses.
    """
    device, dtype = head.output.weight.device, head.output.weight.dtype
    if autocast:
        dtype = torch.bfloat16
    arguments = head.arguments(temperature, dtype)
    lengths = torch.tensor([len(response) for response in responses], dtype=torch.int64)
    features, entropy = [], []
    for start in range(0, len(lengths), batch_size):
        rows = slice(start, start + batch_size)
        ids, attention, mask = (t.to(device) for t in _padded(prompts[rows], responses[rows]))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            hidden, tokens, cu_seqlens = response_hidden(head, ids, attention, mask)
        out = g2.head_features(hidden.to(dtype), tokens=tokens, cu_seqlens=cu_seqlens, **arguments)
        features.append(out.features.cpu())
        # not index_add: on a GPU it adds in an order that changes from run to run
        entropy.append(segment_sum(out.entropy, cu_seqlens, 0, len(out.entropy)).cpu())
        if advance is not None:
            advance(len(mask))
    return Measured(torch.cat(features), torch.cat(entropy), lengths)


def _padded(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """ids and attention [B, P + L], prompts padded on the left, and the responses' mask [B, L]."""
    width, length = max(map(len, prompts)), max(1, *map(len, responses))
    ids = torch.zeros(len(prompts), width + length, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        columns = slice(width - len(prompt), width + len(response))
        ids[row, columns] = torch.tensor([*prompt, *response])
        attention[row, columns] = 1
    return ids, attention, attention[:, width:].bool()


def effective_rank(similarity: Tensor) -> float:
    """exp of the entropy of the eigenvalues, as shares of their sum, of a matrix of cosines [k, k].

    It is 1 where all k features are parallel or antiparallel, and k where they are orthogonal. From Roy and
    Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. They take singular
    values; those of a matrix of cosines, which is positive semi-definite, are its eigenvalues.
    """
    values = torch.linalg.eigvalsh(similarity.double()).clamp(min=0)
    shares = values / values.sum()
    return math.exp(torch.special.entr(shares).sum().item())


def group_statistics(
    features: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scores: Sequence[float] | None = None,
    score_gate: float = SCORE_GATE,
    texts: Sequence[str] | None = None,
    answers: Sequence[str | None] | None = None,
    embeddings: Tensor | None = None,
    entropy: Tensor | None = None,
    lengths: Tensor | None = None,
) -> list[GroupStatistics]:
    """The statistics of every group, in order of first appearance.

    A statistic is None where its input is not given. Pair statistics are None without a pair, effective_rank
    without a usable feature.

    Args:
        features: [S, d], of `head_features`. A response whose feature is zero (no tokens) or not finite is
            left out of pairs, effective rank and semantic cosine.
        group_size, group_ids: exactly one, as in `group_geometry`.
        scores: [S]; a response is right if its score is at least score_gate.
        score_gate: see scores.
        texts: [S]. `redundant` and `opposed` are then pairs of different texts: equal texts have cosine 1.
        answers: [S], equal texts for equal answers; None for no answer.
        embeddings: [S, e], rows of unit norm (`SentenceEncoder`).
        entropy: [S], nats, summed over tokens; needs lengths. A value that is not finite is left out of the
            mean.
        lengths: [S], tokens.

    Raises:
        TypeError, ValueError: as `group_geometry`.
    """
    check_tensor("features", features, None)
    if group_ids is not None:
        check_tensor("group_ids", group_ids, (torch.int64,))
    features = features.detach().float().cpu()
    ids = row_groups(
        len(features), features.device, group_size, None if group_ids is None else group_ids.cpu()
    )
    norms = features.norm(dim=1)
    usable = ids.masked_fill(~((norms > 0) & norms.isfinite()), -1)
    geometry = g2.group_geometry(
        features, torch.zeros(len(features)), group_ids=usable, shaping="none", eps=EPS
    )
    found = {}
    for members, similarity in zip(geometry.members, geometry.similarity):
        rows = members[members >= 0]
        found[int(ids[rows[0]])] = rows, similarity[: len(rows), : len(rows)].double()

    result: list[GroupStatistics] = []
    for group in dict.fromkeys(ids[ids >= 0].tolist()):
        everyone = (ids == group).nonzero()[:, 0].tolist()
        rows, cosine = found.get(group, (torch.empty(0, dtype=torch.int64), torch.empty(0, 0).double()))
        semantic = None
        if embeddings is not None:
            vectors = embeddings.cpu().double()[rows]
            semantic = vectors @ vectors.T
        places = [everyone.index(row) for row in rows.tolist()]
        pairs = [(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))]
        different = pairs
        if texts is not None:
            kept = [texts[row] for row in rows]
            different = [(i, j) for i, j in pairs if kept[i] != kept[j]]
        result.append(
            {
                "responses": len(everyone),
                "measured": places,
                **_pair_statistics(cosine, semantic, pairs),
                **_response_statistics(everyone, scores, score_gate, answers, entropy, lengths),
                "redundant": _extreme(max, different, cosine, semantic, places),
                "opposed": _extreme(min, different, cosine, semantic, places),
                "cosine": cosine.tolist(),
                "semantic": None if semantic is None else semantic.tolist(),
            }
        )
    return result


def _pair_statistics(cosine: Tensor, semantic: Tensor | None, pairs: list[tuple[int, int]]) -> PairStatistics:
    upper = tuple(torch.triu_indices(len(cosine), len(cosine), 1))
    values = cosine[upper]
    return {
        "cos_mean": values.mean().item() if pairs else None,
        "negative_pairs": (values < 0).double().mean().item() if pairs else None,
        "effective_rank": effective_rank(cosine) if len(cosine) else None,
        "semantic_cosine": semantic[upper].mean().item() if semantic is not None and pairs else None,
    }


def _response_statistics(
    rows: list[int],
    scores: Sequence[float] | None,
    gate: float,
    answers: Sequence[str | None] | None,
    entropy: Tensor | None,
    lengths: Tensor | None,
) -> ResponseStatistics:
    right = None if scores is None else [scores[row] >= gate for row in rows]
    given = None if answers is None else [answers[row] for row in rows]
    tokens = None if lengths is None else int(lengths[rows].sum())
    mean_entropy = None
    if entropy is not None and lengths is not None:
        finite = [row for row in rows if entropy[row].isfinite()]
        counted = int(lengths[finite].sum())
        mean_entropy = entropy[finite].double().sum().item() / counted if counted else None
    return {
        "distinct_answers": None if given is None else len({*given} - {None}),
        "distinct_right": None
        if given is None or right is None
        else len({answer for answer, yes in zip(given, right) if yes} - {None}),
        "accuracy": None if right is None else sum(right) / len(right),
        "entropy": mean_entropy,
        "length": None if tokens is None else tokens / len(rows),
    }


def _extreme(
    choose: Callable[..., tuple[int, int]],
    pairs: list[tuple[int, int]],
    cosine: Tensor,
    semantic: Tensor | None,
    places: list[int],
) -> Pair | None:
    """The pair whose cosine `choose` (max or min) prefers; None without pairs."""
    if not pairs:
        return None
    i, j = choose(pairs, key=lambda pair: cosine[pair].item())
    return {
        "samples": [places[i], places[j]],
        "cosine": cosine[i, j].item(),
        "semantic": None if semantic is None else semantic[i, j].item(),
    }


def overall(problems: Sequence[GroupStatistics]) -> Overall:
    """{statistic: its mean over problems}, with 95 % bootstrap intervals over problems; ready for JSON.

    Problems that lack a statistic do not count in its mean.
    """
    return _means(
        {name: [value for problem in problems if (value := problem[name]) is not None] for name in STATISTICS}
    )


def difference(problems: Sequence[MeasuredProblem], first: Sequence[MeasuredProblem]) -> Overall:
    """`overall` of the differences between a model and a first one, problem by problem.

    Problems that only one model has are left out. Paired intervals are narrower than those of the two means,
    because a problem that is unusual for one model mostly is unusual for the other too. Raises ConfigError
    where problems of the same name have different questions.
    """
    check_questions(problems, first, "the model", "the first one")
    known = {problem["problem"]: problem for problem in first}
    both = [(problem, known[problem["problem"]]) for problem in problems if problem["problem"] in known]
    return _means(
        {
            name: [
                ours - theirs
                for mine, others in both
                if (ours := mine[name]) is not None and (theirs := others[name]) is not None
            ]
            for name in STATISTICS
        }
    )


def _means(values: Mapping[Statistic, Sequence[float]]) -> Overall:
    """Means of each statistic's values over problems, with their intervals; None for one without values."""
    found: Overall = {}
    for name, known in values.items():
        found[name] = None
        if known:
            low, high = bootstrap_interval(known)
            mean = sum(known) / len(known)
            found[name] = {"mean": mean, "low": low, "high": high, "problems": len(known)}
    return found


def most(which: Extreme, problems: Sequence[GroupStatistics]) -> int | None:
    """The place of the problem whose pair is the most "redundant" or "opposed" of all; None without pairs."""
    sign = {"redundant": 1, "opposed": -1}[which]
    cosines = {
        place: sign * pair["cosine"]
        for place, problem in enumerate(problems)
        if (pair := problem[which]) is not None
    }
    return max(cosines, key=lambda place: cosines[place], default=None)
