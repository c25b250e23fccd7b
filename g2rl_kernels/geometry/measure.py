"""How the responses to one problem lie to each other in gradient space, and what else tells them apart.

Everything is of *groups*, the responses to one problem, and of *pairs* within them. A response's feature Phi
is the direction in which it would move the LM head's input (`head_features`); S_ij is the cosine of two
(`group_geometry`, equation 9). `STATISTICS` says what is made of that. Overall numbers are means over
problems: each problem counts the same, however many pairs it has. (`g2rl/*` while training averages over all
pairs; with groups of one size the two agree.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import g2rl_kernels as g2

from ..evaluation.results import check_questions
from ..group.geometry import row_groups
from ..head.reference import segment_sum
from ..models.lm_head import LMHead, response_hidden

# Of one problem; None where there is nothing to say it of (no pair, no encoder, no scores).
STATISTICS = {
    "cos_mean": "mean gradient cosine over pairs",
    "negative_pairs": "share of pairs with a negative gradient cosine",
    "effective_rank": "directions in the group: effective rank of its matrix of cosines, from 1 to its size",
    "semantic_cosine": "mean cosine over pairs of the texts' sentence embeddings",
    "distinct_answers": "different final answers",
    "distinct_right": "different right answers",
    "accuracy": "share of right responses",
    "entropy": "nats a token, mean over all tokens",
    "length": "tokens a response",
}

# Of `group_geometry`, where cosines are only described: the default shrinks those of features not far longer
# than it.
EPS = 1e-30


@dataclass
class Measured:
    """What one forward under the model says about S responses; on the CPU."""

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
    """Features and entropies of S responses, given as token ids, each to its own prompt.

    head: of `find_head`, its model in eval mode; batch_size: responses a forward, a matter of memory;
    autocast: products in bf16; advance: called with the number of responses done. A response without tokens
    has the feature zero.
    """
    device, dtype = head.output.weight.device, head.output.weight.dtype
    if autocast:
        dtype = torch.bfloat16
    weight, bias = head.weights(dtype)
    lengths = torch.tensor([len(response) for response in responses], dtype=torch.int64)
    features, entropy = [], []
    for start in range(0, len(lengths), batch_size):
        rows = slice(start, start + batch_size)
        ids, attention, mask = (t.to(device) for t in _padded(prompts[rows], responses[rows]))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            hidden, tokens, cu_seqlens = response_hidden(head, ids, attention, mask)
        out = g2.head_features(
            hidden.to(dtype), weight, tokens, cu_seqlens, bias=bias, **head.options(temperature)
        )
        features.append(out.features.cpu())
        # not index_add, which on a GPU adds in any order
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
    """exp of the entropy of the eigenvalues of a matrix of cosines [k, k], as shares of their sum.

    1 where all k features point the same (or the opposite) way, k where they are orthogonal. Roy and
    Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, with the matrix of
    cosines as their A: it is positive semi-definite, so its singular values are its eigenvalues.
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
    score_gate: float = 0.99,
    texts: Sequence[str] | None = None,
    answers: Sequence[str | None] | None = None,
    embeddings: Tensor | None = None,
    entropy: Tensor | None = None,
    lengths: Tensor | None = None,
) -> list[dict[str, Any]]:
    """`STATISTICS` of every group, with its matrices of cosines and its most telling pairs.

    Args:
        features: [S, d], of `head_features`. A feature that is zero (no tokens) or not finite takes no part
            in what is about pairs, effective rank and semantic cosine.
        group_size, group_ids: exactly one, as in `group_geometry`; ids of any kind of groups.
        scores: [S], right from `score_gate` on.
        texts: [S], so that pairs of equal texts, whose cosine is 1, are not called the most redundant.
        answers: [S], equal texts for equal answers, None for no answer.
        embeddings: [S, e], rows of unit norm (`SentenceEncoder`).
        entropy, lengths: [S], as in `Measured`. Responses whose entropy is not finite do not count.

    Returns:
        A dict a group, in order of first appearance, ready for JSON: `STATISTICS`; responses, how many;
        measured, which of them took part (places in the group, k of them); cosine [k, k] and semantic [k, k];
        redundant and opposed, the pairs of different texts with the largest and the smallest cosine:
        {"samples": two places in the group, "cosine", "semantic"}, None where there is no such pair.

    Raises:
        TypeError, ValueError: as `group_geometry`.
    """
    features = features.detach().float().cpu()
    ids = row_groups(
        len(features), features.device, group_size, None if group_ids is None else group_ids.cpu()
    )
    norms = features.norm(dim=1)
    part = ids.masked_fill(~((norms > 0) & norms.isfinite()), -1)
    geometry = g2.group_geometry(
        features, torch.zeros(len(features)), group_ids=part, shaping="none", eps=EPS
    )
    found = {}
    for members, similarity in zip(geometry.members, geometry.similarity):
        rows = members[members >= 0]
        found[int(ids[rows[0]])] = rows, similarity[: len(rows), : len(rows)].double()

    result = []
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
                **_row_statistics(everyone, scores, score_gate, answers, entropy, lengths),
                "redundant": _telling(max, different, cosine, semantic, places),
                "opposed": _telling(min, different, cosine, semantic, places),
                "cosine": cosine.tolist(),
                "semantic": None if semantic is None else semantic.tolist(),
            }
        )
    return result


def _pair_statistics(
    cosine: Tensor, semantic: Tensor | None, pairs: list[tuple[int, int]]
) -> dict[str, float | None]:
    upper = tuple(torch.triu_indices(len(cosine), len(cosine), 1))
    values = cosine[upper]
    return {
        "cos_mean": values.mean().item() if pairs else None,
        "negative_pairs": (values < 0).double().mean().item() if pairs else None,
        "effective_rank": effective_rank(cosine) if len(cosine) else None,
        "semantic_cosine": semantic[upper].mean().item() if semantic is not None and pairs else None,
    }


def _row_statistics(
    rows: list[int],
    scores: Sequence[float] | None,
    gate: float,
    answers: Sequence[str | None] | None,
    entropy: Tensor | None,
    lengths: Tensor | None,
) -> dict[str, float | None]:
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


def _telling(
    choose: Callable[..., tuple[int, int]],
    pairs: list[tuple[int, int]],
    cosine: Tensor,
    semantic: Tensor | None,
    places: list[int],
) -> dict[str, Any] | None:
    if not pairs:
        return None
    i, j = choose(pairs, key=lambda pair: cosine[pair].item())
    return {
        "samples": [places[i], places[j]],
        "cosine": cosine[i, j].item(),
        "semantic": None if semantic is None else semantic[i, j].item(),
    }


def overall(problems: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of `STATISTICS` over problems, with 95 % bootstrap intervals over problems, ready for JSON.

    {statistic: {"mean", "low", "high", "problems": how many have it}}; None where none has it, and no
    interval (low, high None) for a single problem.
    """
    from ..evaluation.metrics import bootstrap_interval

    result: dict[str, Any] = {}
    for name in STATISTICS:
        values = [problem[name] for problem in problems if problem[name] is not None]
        low, high = bootstrap_interval(values) if values else (None, None)
        mean = sum(values) / len(values) if values else None
        result[name] = mean is not None and {"mean": mean, "low": low, "high": high, "problems": len(values)}
        result[name] = result[name] or None
    return result


def difference(problems: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`overall` of the differences, problem by problem, of a model to a first one on the same problems.

    Problems ("problem", their id) that only one of them has are left out. Paired, an interval is narrower
    than those of the two means: what makes a problem unlike others mostly makes it so for both models.
    ConfigError where a problem of the same name is another one.
    """
    check_questions(problems, first, "the model", "the first one")
    known = {problem["problem"]: problem for problem in first}
    both = [(problem, known[problem["problem"]]) for problem in problems if problem["problem"] in known]
    return overall(
        [
            {
                name: None if None in (mine[name], theirs[name]) else mine[name] - theirs[name]
                for name in STATISTICS
            }
            for mine, theirs in both
        ]
    )


def most(which: str, problems: Sequence[dict[str, Any]]) -> int | None:
    """The place of the problem with the most "redundant" or most "opposed" pair of all."""
    sign = {"redundant": 1, "opposed": -1}[which]
    having = [place for place, problem in enumerate(problems) if problem[which] is not None]
    return max(having, key=lambda place: sign * problems[place][which]["cosine"], default=None)
