"""The head in C++ on the CPU: `Backend` by the operators of csrc/ops/head.cpp, with their fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops import HAS_CPU, ops, qualified
from .backend import (
    KNOWN_TOLERANCE,
    NO_HINTS,
    FeatureOutputs,
    Hints,
    Incoming,
    Kept,
    Sums,
    TokenLogprobs,
    empty_statistics,
)
from .certified import certified_features
from .spec import FIELDS, HeadSpec, Responses

BLOCK, GROUP = 96, 16  # vocabulary entries and tokens of a tile of kept logits: KeptLogits in csrc/cpu/head.h


def kept_bytes(hidden: Tensor, head: HeadSpec, most: int) -> int:
    """See `Backend.kept_bytes`: whole blocks of the vocabulary, from its end."""
    size = head.bytes_of_logit(hidden.dtype)
    maxima = 4 if size == 2 else 0
    block = torch.sym_max(-(-hidden.shape[0] // GROUP), 1) * GROUP * (BLOCK * size + maxima)
    return torch.sym_min(-(-head.weight.shape[0] // BLOCK), most // block) * block


def statistics(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, kept: Kept | None = None, more: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one strip, float64: see `Backend.statistics`."""
    return ops.head_statistics(hidden, tokens, *head, None if kept is None else kept.data, more)


def finish(partial: Tensor, target: Tensor, tokens: Tensor, top: Tensor) -> TokenLogprobs:
    """See `Backend.finish`; float32. In C++, since torch's exponentials depend on a number's place."""
    return TokenLogprobs(*ops.head_finish(partial, target, tokens, top))


def terms(g: Tensor, e: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """See `Backend.terms`."""
    return ops.head_terms(g, e, logprobs, entropy)


def features(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    responses: Responses,
    hints: Hints = NO_HINTS,
    more: bool = False,
) -> FeatureOutputs:
    """See `Backend.features`. A certificate saves no time here."""
    if hints.max_skipped is not None:
        return certified_features(features, hidden, tokens, head, responses, hints.max_skipped)
    arguments = (hidden, tokens, *head, *responses, hints.known_logprobs, more)
    phi, logprobs, logsumexp, entropy, *asked = ops.head_features(*arguments)
    S = responses.cu_seqlens.shape[0] - 1
    mass, count = hidden.new_zeros(S, dtype=torch.float32), hidden.new_zeros(S, dtype=torch.int64)
    return FeatureOutputs(phi, logprobs, logsumexp, entropy, mass, count, *asked)


def share_of_right_responses(
    known: Tensor, logprobs: Tensor, cu_seqlens: Tensor, token_weights: Tensor | None = None
) -> float:
    """Share of the S responses without a token whose known log-prob is past the tolerance, which would cost
    the response a second look at the weight.

    known [N] as the sampler reported them, logprobs [N] of `head_features`; cu_seqlens, token_weights: its.
    """
    right = ((known.clamp(max=0) - logprobs).exp() - 1).abs() <= KNOWN_TOLERANCE  # not: NaN
    if token_weights is not None:
        right |= token_weights == 0
    wrong = torch.nn.functional.pad((~right).cumsum(0), (1, 0))[cu_seqlens].diff()
    return float((wrong == 0).float().mean())


def features_of_part(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, responses: Responses, lse: Tensor, rest: Tensor
) -> Tensor:
    """[S, d + r] float32: see `Backend.features_of_part`."""
    return ops.head_features_of_part(hidden, tokens, *head, *responses, lse, rest)


def sweep(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    incoming: Incoming,
    block: slice,
    sums: Sums,
    kept: Kept | None = None,
) -> None:
    """See `Backend.sweep`."""
    logits = kept or (None, 0, 0)
    ops.head_sweep(hidden, tokens, *head, *incoming, block.start, block.stop, *sums, *logits)


# --- fake implementations, for torch.compile ----------------------------------------------------------------


def _fake(name: str) -> Callable[[Any], Any]:
    """Registers one; a build without C++ lacks the operators."""
    return torch.library.register_fake(qualified(name)) if HAS_CPU else lambda function: function


@_fake("head_statistics")
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    N, more = hidden.shape[0], others[-1]
    partial = hidden.new_empty((1, 4 if more else 3, N), dtype=torch.float64)
    top = hidden.new_empty((1, N if more else 0), dtype=torch.int64)
    return partial, hidden.new_empty(N, dtype=torch.float64), top


@_fake("head_finish")
def _(partial: Tensor, target: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    N = target.shape[0]
    found = (target.new_empty(size, dtype=torch.float32) for size in ((N,), (N,), (2, N), (N,)))
    return *found, *empty_statistics(target, N if partial.shape[1] == 4 else 0)


@_fake("head_terms")
def _(g: Tensor, *others: Tensor) -> Tensor:
    return g.new_empty((3, g.shape[0]), dtype=torch.float32)


def _empty_features(hidden: Tensor, *others: Any) -> Tensor:
    head, cu_seqlens = HeadSpec(*others[1 : 1 + FIELDS]), others[1 + FIELDS]  # after tokens
    columns = hidden.shape[1] + head.rank
    return hidden.new_empty((cu_seqlens.shape[0] - 1, columns), dtype=torch.float32)


@_fake("head_features")
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    N = hidden.shape[0]
    per_token = (hidden.new_empty(N, dtype=torch.float32) for _ in range(3))
    return _empty_features(hidden, *others), *per_token, *empty_statistics(hidden, N if others[-1] else 0)


_fake("head_features_of_part")(_empty_features)


@_fake("head_sweep")
def _(*arguments: Any) -> None:
    pass
