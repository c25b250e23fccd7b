"""temporary"""

from __future__ import annotations

import torch

from .backend import FeatureOutputs
from .certified import certified_features


def _old(head):
    return (head.temperature, head.logit_scale, head.logit_softcap)


def statistics(hidden, tokens, head):
    return torch.ops.g2rl.head_statistics(hidden, head.weight, tokens, head.bias, *_old(head))


def features(hidden, tokens, head, responses, known_logprobs=None, max_skipped=None):
    if max_skipped is not None:
        return certified_features(features, hidden, tokens, head, responses, max_skipped)
    out = torch.ops.g2rl.head_features(
        hidden,
        head.weight,
        tokens,
        responses.cu_seqlens,
        head.bias,
        responses.token_weights,
        known_logprobs,
        *_old(head),
    )
    z = out[0].new_zeros(len(out[0]))
    return FeatureOutputs(*out, z, z.long())


def features_of_part(hidden, tokens, head, responses, logsumexp, rest):
    return torch.ops.g2rl.head_features_of_part(
        hidden,
        head.weight,
        tokens,
        responses.cu_seqlens,
        head.bias,
        responses.token_weights,
        logsumexp,
        rest,
        *_old(head),
    )


def sweep(hidden, tokens, head, normaliser, terms, begin, end, *sums):
    torch.ops.g2rl.logprobs_sweep(
        hidden, head.weight, tokens, head.bias, normaliser, terms, *_old(head), begin, end, *sums
    )
