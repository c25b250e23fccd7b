"""EVOL-RL's rewards (arXiv 2509.15194), a baseline for G2RL: novelty is measured by a sentence encoder.

A response is rewarded for being right (without labels: for agreeing with the majority), and for a text unlike
the others of its group. A right response always earns more than a wrong one; novelty u decides within each
label, right or wrong:

    s_ij = max(cos(e_i, e_j), 0)                        e: the embedding of the text
    u_i  = 1 - (mean_j s_ij + max_k s_ik) / 2           j: same label, k: whole group, both not i
    u~_i = u_i scaled to [0, 1] between the extremes of its label in its group
    r_i  = 0.5 + 0.5 u~_i if right,  -1 + 0.5 u~_i if wrong,  -1 without an answer

Where the paper is silent, the rules are those of its authors' code
(github.com/YujunZhou/EVOL-RL):

- The only response of its label has u~ = 1, and its mean is over the whole group.
- Where all u of a label are equal, u~ = 1/2.
- A response without an answer does not change the rewards of others.
- The text up to </think> is left out; a text too long for the encoder loses its beginning.

Two rules differ from that code. A label whose u differ by 1e-5 or less counts as all equal, as in G2RL's
scores, so that rounding makes no difference between equal texts. The only response of a group that has an
answer gets the reward above with u~ = 1; the code gives it -1 even if it is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import FLAT_SPREAD


def compared_text(completion: str) -> str:
    """The text of a response that EVOL-RL compares: what follows </think>, or all of it without that tag."""
    _, thought, rest = completion.partition("</think>")
    return rest.strip() if thought else completion


def evol_rewards(embeddings: Tensor, right: Tensor, group_ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """EVOL-RL's rewards r, by the equations on top of this file.

    Args:
        embeddings: [S, e] of a float dtype, finite rows of unit norm.
        right: [S] bool, from the verifier or from `majority_labels`.
        group_ids: [S] int64, the group of each row; negative for a padding row.
        valid: [S] bool, False for a response without an answer; None: all have one.

    Returns:
        [S] float32, from -1 to 1; 0 in padding rows.
    """
    S = len(right)
    if S == 0:
        return embeddings.new_zeros(0, dtype=torch.float32)
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
    """Labels by a vote: [S] bool on the CPU, True where the answer is the most frequent one of its group.

    Among equally frequent answers the one that came first wins.

    Args:
        answers: S texts; None for no answer, which does not vote and is never right.
        group_ids: [S] int64, as in `evol_rewards`; padding rows do not vote.
    """
    ids = group_ids.tolist()
    votes: dict[int, Counter[str]] = {}
    for group, answer in zip(ids, answers):
        if group >= 0 and answer is not None:
            votes.setdefault(group, Counter())[answer] += 1
    winners = {group: count.most_common(1)[0][0] for group, count in votes.items()}  # the first of ties
    return torch.tensor(
        [answer is not None and winners.get(group) == answer for group, answer in zip(ids, answers)],
        dtype=torch.bool,
    )
