"""`certified_head_features` by two calls of a backend's `features`, for backends "reference" and "cpu"."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .backend import FeatureOutputs
from .spec import HeadSpec, Responses

FeaturesFunction = Callable[[Tensor, Tensor, HeadSpec, Responses], FeatureOutputs]


def certified_features(
    backend_features: FeaturesFunction,
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    responses: Responses,
    max_skipped: float,
) -> FeatureOutputs:
    """`Backend.features` with `max_skipped`, from a `backend_features` without it.

    The first call gives each token's 1 - p; the second leaves out the tokens that may be skipped, by weights
    of 0. Its features are divided by the weights that are kept, hence the factor to those of all tokens.
    """
    N = hidden.shape[0]
    alpha = responses.token_weights
    if alpha is None:
        alpha = hidden.new_ones(N, dtype=torch.float32)
    cu_seqlens = responses.cu_seqlens.to(torch.int64)
    outputs = backend_features(hidden, tokens, head, responses)
    mass = -alpha * torch.expm1(outputs.logprobs)
    keep, skipped_mass, skipped_tokens = reference.skipped_tokens(mass, cu_seqlens, max_skipped)
    kept_alpha = torch.where(keep, alpha, 0.0)
    kept_responses = responses._replace(token_weights=kept_alpha)
    features = backend_features(hidden, tokens, head, kept_responses).features
    total, kept = (reference.segment_sum(a, cu_seqlens, 0, N) for a in (alpha, kept_alpha))
    total, kept = total + reference.WEIGHT_EPS, kept + reference.WEIGHT_EPS
    return outputs._replace(
        features=features * (kept / total)[:, None],
        skipped_mass=skipped_mass / total,
        skipped_tokens=skipped_tokens,
    )
