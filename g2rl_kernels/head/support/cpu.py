"""Backend "cpu" of the restricted head: csrc/cpu/support.cpp. backend.py says what each function returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._ops import HAS_CPU, ops, qualified
from .. import cpu
from ..backend import FeatureOutputs, Incoming, TokenLogprobs, empty_statistics
from ..spec import FIELDS, HeadSpec, Responses
from .spec import Support

token_terms = cpu.terms


def statistics(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, support: Support, more: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `SupportBackend.statistics`."""
    return ops.support_sums(hidden, tokens, *head, *support[:2], more)


def finish(partial: Tensor, target: Tensor, tokens: Tensor, top: Tensor, dtype: torch.dtype) -> TokenLogprobs:
    """See `SupportBackend.finish`."""
    return cpu.finish(partial, target, tokens, top)


def features(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, support: Support, responses: Responses, more: bool
) -> FeatureOutputs:
    """See `SupportBackend.features`. Each token's rows are gathered once, for both products."""
    phi, logprobs, logsumexp, entropy, *asked = ops.support_head_features(
        hidden, tokens, *head, *support[:2], *responses, more
    )
    skipped = phi.new_zeros(phi.shape[0])
    return FeatureOutputs(phi, logprobs, logsumexp, entropy, skipped, skipped.long(), *asked)


def terms(tokens: Tensor, head: HeadSpec, support: Support, x: Tensor, incoming: Incoming) -> Tensor:
    """See `SupportBackend.terms`."""
    hidden = head.weight[:1].expand(tokens.shape[0], -1)  # for its shape alone
    return ops.support_terms(hidden, tokens, *head, *support[:2], x, *incoming)


def gather_sum(coefficients: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, out: Tensor) -> None:
    """See products.gather_sum."""
    ops.gather_sum(coefficients, index, offsets, matrix, out)


# --- fake implementations, for torch.compile ----------------------------------------------------------------

if HAS_CPU:

    @torch.library.register_fake(qualified("support_sums"))
    def _(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
        N, K, more = hidden.shape[0], others[1 + FIELDS].shape[0], others[-1]
        return (
            hidden.new_empty((1, 4 if more else 3, N), dtype=torch.float64),
            hidden.new_empty(N, dtype=torch.float64),
            hidden.new_empty((1, N if more else 0), dtype=torch.int64),
            hidden.new_empty(K, dtype=torch.float32),
        )

    @torch.library.register_fake(qualified("support_head_features"))
    def _(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
        (N, d), S = hidden.shape, others[3 + FIELDS].shape[0] - 1
        columns = d + HeadSpec(*others[1 : 1 + FIELDS]).rank
        floats = [hidden.new_empty(size, dtype=torch.float32) for size in ((S, columns), (N,), (N,), (N,))]
        return *floats, *empty_statistics(hidden, N if others[-1] else 0)

    @torch.library.register_fake(qualified("support_terms"))
    def _(hidden: Tensor, *others: Any) -> Tensor:
        return torch.empty_like(others[3 + FIELDS])

    @torch.library.register_fake(qualified("gather_sum"))
    def _(*arguments: Tensor) -> None:
        pass
