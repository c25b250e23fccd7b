"""`certified_head_features` by two calls of a backend's features: for backends that gain no time by it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .backend import FeatureOutputs
from .spec import HeadSpec, Responses


def certified_features(
    features: Callable[..., FeatureOutputs],
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    responses: Responses,
    max_skipped: float,
) -> FeatureOutputs:
    """`features` once for the log-probs, which say what is skipped, and once without those tokens."""
    N, cu_seqlens = hidden.shape[0], responses.cu_seqlens.to(torch.int64)
    alpha = responses.token_weights
    if alpha is None:
        alpha = hidden.new_ones(N, dtype=torch.float32)
    out = features(hidden, tokens, head, responses)
    mass = -alpha * torch.expm1(out.logprobs)
    keep, skipped_mass, skipped_tokens = reference.skipped_tokens(mass, cu_seqlens, max_skipped)
    kept_alpha = torch.where(keep, alpha, 0.0)
    kept = features(hidden, tokens, head, responses._replace(token_weights=kept_alpha)).features
    total, kept_total = (
        reference.segment_sum(a, cu_seqlens, 0, N) + reference.WEIGHT_EPS for a in (alpha, kept_alpha)
    )
    return out._replace(
        features=kept * (kept_total / total)[:, None],
        skipped_mass=skipped_mass / total,
        skipped_tokens=skipped_tokens,
    )
