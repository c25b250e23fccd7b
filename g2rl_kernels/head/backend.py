"""What a backend of the head provides, and the one table that chooses.

`head_features` and `linear_logprobs` are written against this protocol. hidden is [N, d], tokens [N] int64;
tokens outside [0, V) belong to other ranks, or to no rank. Notation: z the logits over temperature, y the
realised token.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import arguments
from .spec import HeadSpec, Responses

# Name of a backend -> its module in this package, imported when it is first used.
BACKENDS = {
    "reference": "tiled",  # PyTorch, tile by tile; any device, float64 too
    "cpu": "cpu",  # C++, csrc/cpu
    "triton": "triton.driver",  # GPUs
}


class FeatureOutputs(NamedTuple):
    """What a backend's `features` gives; float32 but for skipped_tokens (int64)."""

    features: Tensor  # [S, d], eq. 8
    logprobs: Tensor  # [N], nats
    logsumexp: Tensor  # [N], nats, of z
    entropy: Tensor  # [N], nats
    skipped_mass: Tensor  # [S]: see certified_head_features; 0 without max_skipped
    skipped_tokens: Tensor  # [S]


class Backend(Protocol):
    def statistics(self, hidden: Tensor, tokens: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor]:
        """m = max z_v, s = sum exp(z_v - m), u = sum exp(z_v - m) (z_v - m) over v other than y, for R strips
        of the vocabulary [R, 3, N]; and z_y [N], -inf where y is outside. Nats, float32 or better."""

    def features(
        self,
        hidden: Tensor,
        tokens: Tensor,
        head: HeadSpec,
        responses: Responses,
        known_logprobs: Tensor | None = None,
        max_skipped: float | None = None,
    ) -> FeatureOutputs:
        """Everything `head_features` returns; with `max_skipped` what `certified_head_features` does."""

    def features_of_part(
        self,
        hidden: Tensor,
        tokens: Tensor,
        head: HeadSpec,
        responses: Responses,
        logsumexp: Tensor,
        rest: Tensor,
    ) -> Tensor:
        """[S, d], eq. 8 with the sums of eq. 7 over these rows of a larger vocabulary alone. logsumexp [N]
        float64 and rest = 1 - p_y [N] are those of the whole; rest is added where y lies."""

    def sweep(
        self,
        hidden: Tensor,
        tokens: Tensor,
        head: HeadSpec,
        normaliser: Tensor,
        terms: Tensor,
        begin: int,
        end: int,
        sum_hidden: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
    ) -> None:
        """What the vocabulary entries [begin, end) give to the gradients: see logprobs.py.

        normaliser [2, N]: the logsumexp as a sum of two; terms [3, N]: a, e, and dz at y. sum_hidden [N, d]
        float32 and grad_bias [V] float32 are added to, rows begin:end of grad_weight [V, d] are written.
        """


def backend(name: str) -> Any:
    """The module that implements `Backend` under this name."""
    return importlib.import_module(f"{__package__}.{BACKENDS[name]}")


def choose_backend(name: str | None, device: torch.device) -> str:
    """The backend asked for, if it can run on this device; by device for None.

    Raises:
        ValueError: no backend has this name, or it does not run on this device.
        ImportError: "triton" without triton.
    """
    if name is None:
        if device.type == "cpu":
            return "cpu"
        return "triton" if device.type == "cuda" and arguments.HAS_TRITON else "reference"
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, needs None or one of {', '.join(map(repr, BACKENDS))}")
    if name == "triton":
        if not arguments.HAS_TRITON:
            raise ImportError("backend='triton' needs the package triton (Linux): pip install triton")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend: 'triton' needs CUDA tensors, got {device}; use backend=None (for tests, "
                "TRITON_INTERPRET=1 set before python starts runs the kernels on the CPU, very slowly)"
            )
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' needs CPU tensors, got {device}; use backend=None")
    return name
