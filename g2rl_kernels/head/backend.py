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
from .._ops import HAS_CPU
from .spec import HeadSpec, Responses

# Name of a backend -> its module in this package, imported when it is first used.
BACKENDS = {
    "reference": "tiled",  # PyTorch, tile by tile; any device, float64 too
    "cpu": "cpu",  # C++, csrc/cpu
    "triton": "triton.driver",  # GPUs
}


# Of known_logprobs: how far l, the known over the exact probability, may be from 1 (csrc/cpu/passes.h too).
KNOWN_TOLERANCE = 0.01


class FeatureOutputs(NamedTuple):
    """What a backend's `features` gives; float32 but for skipped_tokens and top_token (int64)."""

    features: Tensor  # [S, d + r], eq. 8 with [W, low_weight] for W
    logprobs: Tensor  # [N], nats
    logsumexp: Tensor  # [N], nats, of z
    entropy: Tensor  # [N], nats
    skipped_mass: Tensor  # [S]: see certified_head_features; 0 without max_skipped
    skipped_tokens: Tensor  # [S]
    sum_p_squared: Tensor  # [N]; [0] like the following where statistics are not asked for
    top_token: Tensor  # [N] int64: the likeliest, the first of equals; -1 where a logit is NaN
    top_logprob: Tensor  # [N], nats


class Hints(NamedTuple):
    """What may spare a backend the second pass over the logits; at most one is given."""

    known_logprobs: Tensor | None = None  # [N]: see head_features
    max_skipped: float | None = None  # see certified_head_features


class TokenLogprobs(NamedTuple):
    """What is known of each token once the whole vocabulary has been summed; float32 or better."""

    logprobs: Tensor  # [N], nats
    entropy: Tensor  # [N], nats
    normaliser: Tensor  # [2, N], the logsumexp of z as a sum of two: one would be rounded to the size of z
    rest: Tensor  # [N], 1 - p_y
    sum_p_squared: Tensor  # [N]; [0] like the following where statistics are not asked for
    top_token: Tensor  # [N] int64: the likeliest, the first of equals; -1 where a logit is NaN
    top_logprob: Tensor  # [N], nats


class Incoming(NamedTuple):
    """What the backward pass knows of each token; float32 or better."""

    normaliser: Tensor  # [2, N], the logsumexp of z as a sum of two
    terms: Tensor  # [3, N]: a, e, and dz at y (logprobs.py)

    def rows(self, rows: slice) -> Incoming:
        return Incoming(self.normaliser[:, rows], self.terms[:, rows])


class Kept(NamedTuple):
    """Logits that `statistics` left to `sweep`, in a form of the backend's own."""

    data: Tensor  # uint8, as many as the backend's `kept_bytes`
    tokens: int  # N of `statistics`
    first: int = 0  # the token that a call of `sweep` begins with, a multiple of 64


class Sums(NamedTuple):
    """Gradients that a sweep adds to or writes; None: not needed."""

    hidden: Tensor | None = None  # [N, d] float32, added to
    weight: Tensor | None = None  # [V, d] contiguous, dtype of weight; rows of the swept block are written
    bias: Tensor | None = None  # [V] float32, added to
    low_hidden: Tensor | None = None  # [N, r] float32, added to
    low_weight: Tensor | None = None  # [V, r] float32, added to


NO_HINTS = Hints()


def empty_statistics(
    like: Tensor, N: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for sum_p_squared, top_token and top_logprob; the last outputs of several operators."""
    return (
        like.new_empty(N, dtype=dtype),
        like.new_empty(N, dtype=torch.int64),
        like.new_empty(N, dtype=dtype),
    )


class Backend(Protocol):
    def kept_bytes(self, hidden: Tensor, head: HeadSpec, most: int) -> int:
        """Size of the logits that `statistics` can keep within `most` bytes."""

    def statistics(
        self, hidden: Tensor, tokens: Tensor, head: HeadSpec, kept: Kept | None = None, more: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """m = max z_v, s = sum exp(z_v - m), u = sum exp(z_v - m) (z_v - m) over v other than y, for R strips
        of the vocabulary [R, 3, N]; z_y [N], -inf where y is outside; and [R, 0]. Nats, float32 or better.
        Fills `kept`. With `more`, for the public functions' statistics, [R, 4, N] with q = sum
        exp(2 (z_v - m)), and [R, N] int64, the first v at m."""

    def finish(self, partial: Tensor, target: Tensor, tokens: Tensor, top: Tensor) -> TokenLogprobs:
        """From `statistics` of R strips, or ranks, added in order; y [N] and v at m counted over all."""

    def terms(self, g: Tensor, e: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """The `terms` of Incoming, [3, N], from the gradients of log-probs and entropies [N]: logprobs.py."""

    def features(
        self,
        hidden: Tensor,
        tokens: Tensor,
        head: HeadSpec,
        responses: Responses,
        hints: Hints = NO_HINTS,
        more: bool = False,
    ) -> FeatureOutputs:
        """Everything `head_features` returns, statistics with `more`; with `max_skipped` what
        `certified_head_features` does."""

    def features_of_part(
        self, hidden: Tensor, tokens: Tensor, head: HeadSpec, responses: Responses, lse: Tensor, rest: Tensor
    ) -> Tensor:
        """[S, d + r], eq. 8 with the sums of eq. 7 over these rows of a larger vocabulary alone. lse [N]
        float64, the logsumexp, and rest = 1 - p_y [N] are those of the whole; rest is added where y lies."""

    def sweep(
        self,
        hidden: Tensor,
        tokens: Tensor,
        head: HeadSpec,
        incoming: Incoming,
        block: slice,
        sums: Sums,
        kept: Kept | None = None,
    ) -> None:
        """Adds the share of a block of the vocabulary to the gradients: see logprobs.py. Logits that were
        kept are not computed again."""


def backend(name: str) -> Any:
    """The module that implements `Backend` under this name."""
    return importlib.import_module(f"{__package__}.{BACKENDS[name]}")


def choose_backend(name: str | None, device: torch.device) -> str:
    """The backend asked for, if it can run on this device; by device for None.

    Raises:
        ValueError: no backend has this name, or it does not run on this device.
        ImportError: "triton" without triton, "cpu" in a build without C++.
    """
    if name is None:
        if device.type == "cpu":
            return "cpu" if HAS_CPU else "reference"
        return "triton" if device.type == "cuda" and arguments.HAS_TRITON else "reference"
    if not isinstance(name, str) or name not in BACKENDS:
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
    if name == "cpu" and not HAS_CPU:
        raise ImportError("backend='cpu' needs the compiled part, which this build lacks; use backend=None")
    return name
