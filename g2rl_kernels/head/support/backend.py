"""What a backend of the restricted head provides, and the table of those there are."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backend import FeatureOutputs, Incoming, TokenLogprobs
from ..spec import HeadSpec, Responses
from .spec import Support

# Name of a backend -> its module in this package.
BACKENDS = {
    "reference": "tiled",
    "cpu": "cpu",  # C++, csrc/cpu/support.cpp
    "triton": "triton",
}


class SupportBackend(Protocol):
    """Ids and tokens outside the weight's rows belong to other ranks.

    x [K]: logits before softcap and temperature, float32 (float64 for float64); -inf where the bias is, or
    where the id lies outside.
    """

    def statistics(
        self, hidden: Tensor, tokens: Tensor, head: HeadSpec, support: Support, more: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """partial [1, 3 or 4, N], target [N] and top [1, N or 0] of `Backend.statistics` over the kept ids;
        and x. A token within the weight's rows that is not in its own list has NaN for its target."""

    def finish(
        self, partial: Tensor, target: Tensor, tokens: Tensor, top: Tensor, dtype: torch.dtype
    ) -> TokenLogprobs:
        """`Backend.finish`; outputs of x's dtype."""

    def token_terms(self, g: Tensor, e: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """`Backend.terms`."""

    def features(
        self,
        hidden: Tensor,
        tokens: Tensor,
        head: HeadSpec,
        support: Support,
        responses: Responses,
        more: bool,
    ) -> FeatureOutputs:
        """Everything `head_features` returns; the weight holds the whole vocabulary."""

    def terms(
        self, tokens: Tensor, head: HeadSpec, support: Support, x: Tensor, incoming: Incoming
    ) -> Tensor:
        """The loss's gradient by W h + b, [K] in x's dtype: dz of logprobs.py times slope and logit_scale /
        temperature. Of a realised token that stands twice, unchecked, the later entries have 0."""

    def gather_sum(
        self, coefficients: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, out: Tensor
    ) -> None:
        """See products.gather_sum. out's rows may be strided."""


def backend(name: str) -> Any:
    """The module that implements `SupportBackend` under this name."""
    return importlib.import_module(f"{__package__}.{BACKENDS[name]}")
