"""What G2RL is compared with: novelty in a sentence encoder's eyes, and EVOL-RL's rewards (arXiv 2509.15194).

EVOL-RL rewards a response by two things: whether it is right (or, without labels, whether it agrees with the
majority), and how unlike the group's other responses its text is. Right answers always earn more than wrong
ones; novelty decides within each:

    s_ij = cos(e_i, e_j), at least 0
    u_i  = 1 - (a mean_j s_ij + (1 - a) max_k s_ik)     j: same label, k: whole group, both not i; a = 1/2
    u~   = u scaled to [0, 1] between the extremes of its group's right, or wrong, responses
    r_i  = 0.5 + 0.5 u~_i where right,  -1 + 0.5 u~_i where wrong,  -1 where there is no answer at all

What the paper leaves open is as in its authors' code (github.com/YujunZhou/EVOL-RL): negative cosines count
as 0; the only response of its label has u~ = 1, and its mean is over the whole group; where all u of a label
are alike, u~ is 1/2; a response without an answer touches nobody; what comes before </think> is not looked
at; a text too long for the encoder loses its beginning. Two things differ. The code takes any difference of u
for one; here u are alike up to 1e-5, as in G2RL's scores: equal texts must not differ by rounding. And the
code gives a group's only answer -1, be it right; here the rule above holds for it too, with u~ = 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import FLAT_SPREAD


def compared_text(completion: str) -> str:
    """The part of a response that EVOL-RL compares: what follows </think>, all of it without one."""
    _, thought, rest = completion.partition("</think>")
    return rest.strip() if thought else completion


def evol_rewards(embeddings: Tensor, right: Tensor, group_ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """EVOL-RL's rewards, the equations on top of this file.

    Args:
        embeddings: [S, e], rows of unit norm.
        right: [S] bool, by the verifier or by `majority_labels`.
        group_ids: [S] int64, negative: takes no part.
        valid: [S] bool, False for a response without an answer.

    Returns:
        [S] float32; 0 for rows that take no part.
    """
    S = len(right)
    ids = group_ids
    here = ids >= 0
    counts = here if valid is None else here & valid
    cosine = (embeddings.float() @ embeddings.float().mT).clamp(min=0)
    not_itself = ~torch.eye(S, dtype=torch.bool, device=ids.device)
    others = (ids[:, None] == ids) & counts[:, None] & counts & not_itself
    alike = others & (right[:, None] == right)
    alike = torch.where(alike.any(1, keepdim=True), alike, others)
    mean = cosine.masked_fill(~alike, 0.0).sum(1) / alike.sum(1).clamp(min=1)
    u = 1 - (mean + cosine.masked_fill(~others, 0.0).amax(1)) / 2
    label = torch.where(counts, 2 * ids + right, -1)
    scaled = torch.ones_like(u)
    for value in label[counts].unique():
        rows = label == value
        low, high = u[rows].min(), u[rows].max()
        if high - low > FLAT_SPREAD:
            scaled[rows] = (u[rows] - low) / (high - low)
        elif rows.sum() > 1:
            scaled[rows] = 0.5
    rewards = torch.where(right, 0.5 + 0.5 * scaled, -1 + 0.5 * scaled)
    return rewards.masked_fill(~counts, -1.0).masked_fill(~here, 0.0)


def majority_labels(answers: Sequence[str | None], group_ids: Tensor) -> Tensor:
    """[S] bool: whose answer is the most frequent of its group; of equally frequent ones, the first given.

    None, no answer, does not vote and is never right. group_ids [S]: as in `evol_rewards`; rows that take no
    part do not vote either.
    """
    ids = group_ids.tolist()
    votes: dict[int, Counter[str]] = {}
    for group, answer in zip(ids, answers):
        if group >= 0 and answer is not None:
            votes.setdefault(group, Counter())[answer] += 1
    winners = {group: count.most_common(1)[0][0] for group, count in votes.items()}  # the first of ties
    return torch.tensor(
        [answer is not None and winners.get(group) == answer for group, answer in zip(ids, answers)]
    )
