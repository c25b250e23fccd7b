"""Gradient-guided exploration (G2RL) for language models: features without logits, and group geometry."""

__version__ = "0.1.0"

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

import torch  # noqa: F401  (loads the libraries that _C is linked against)

try:
    import g2rl_kernels._C  # noqa: F401  (registers the ops)
except ImportError as error:
    remedy = "pip install --force-reinstall g2rl-kernels"
    checkout = _Path(__file__).resolve().parent.parent
    if (checkout / "setup.py").exists():
        remedy = f"{checkout} hides an installed copy: run from another folder, or there: pip install -e ."
    raise ImportError(f"g2rl_kernels' compiled part does not load ({error}): {remedy}") from error

from .group.geometry import GroupGeometry, group_geometry
from .head.features import (
    CertifiedHeadFeatures,
    HeadFeatures,
    certified_head_features,
    head_features,
    pack_responses,
)
from .head.logprobs import LinearLogprobs, linear_logprobs

if _TYPE_CHECKING:
    from .models.lm_head import find_head

__all__ = [
    "CertifiedHeadFeatures",
    "GroupGeometry",
    "HeadFeatures",
    "LinearLogprobs",
    "__version__",
    "certified_head_features",
    "find_head",
    "group_geometry",
    "head_features",
    "linear_logprobs",
    "pack_responses",
]


def __getattr__(name: str) -> object:
    if name == "find_head":  # imported at its first use: the ops need no models
        from .models.lm_head import find_head

        return find_head
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
