"""Gradient-guided exploration (G2RL) for language models: features without logits, and group geometry."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING as _TYPE_CHECKING

import torch  # loads the libraries that _C is linked against

from . import versions as _versions

if _too_old := _versions.too_old(torch.__version__):
    raise ImportError(_too_old)
try:
    import g2rl_kernels._C  # noqa: F401  (registers the ops)
except ImportError as error:
    raise ImportError(_versions.no_compiled_part(error)) from error

from .group.geometry import GroupGeometry, group_geometry
from .head.features import (
    CertifiedHeadFeatures,
    HeadFeatures,
    HeadFeaturesWithStatistics,
    certified_head_features,
    head_features,
    pack_responses,
)
from .head.logprobs import LinearLogprobs, LinearLogprobsWithStatistics, linear_logprobs
from .head.sampling_support import SamplingSupport, sampling_support
from .head.topk import TopkFeatures, topk_features

if _TYPE_CHECKING:
    from .models.lm_head import find_head

_versions.warn_untested("torch", torch.__version__)
_versions.warn_untested("triton")

__all__ = [
    "CertifiedHeadFeatures",
    "GroupGeometry",
    "HeadFeatures",
    "HeadFeaturesWithStatistics",
    "LinearLogprobs",
    "LinearLogprobsWithStatistics",
    "SamplingSupport",
    "TopkFeatures",
    "__version__",
    "certified_head_features",
    "find_head",
    "group_geometry",
    "head_features",
    "linear_logprobs",
    "pack_responses",
    "sampling_support",
    "topk_features",
]


def __getattr__(name: str) -> object:
    if name == "find_head":  # imported at its first use: the ops need no models
        from .models.lm_head import find_head

        return find_head
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
