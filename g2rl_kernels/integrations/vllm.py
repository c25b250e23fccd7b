"""What vLLM reports of its samples, as the tensors that `topk_features` takes. Imports nothing of vLLM."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SampledLogprobs(NamedTuple):
    """Tokens of all responses, packed, and their log-probabilities: `topk_features(weight, *sampled)`."""

    tokens: Tensor  # [N] int64
    top_ids: Tensor  # [N, k] int64: the ids beside the sampled token; -1 where there are fewer
    top_logprobs: Tensor  # [N, k] float32, nats
    token_logprobs: Tensor  # [N] float32, nats
    cu_seqlens: Tensor  # [S + 1] int64

    def to(self, device: torch.device | str) -> SampledLogprobs:
        return SampledLogprobs(*(part.to(device) for part in self))


def sampled_logprobs(outputs: Iterable[Any]) -> SampledLogprobs:
    """The log-probabilities of vLLM's responses.

    For the feature of the distribution that was sampled from, load the model with
    `LLM(logprobs_mode="processed_logprobs")`: vLLM's default reports log-probabilities at temperature 1.

    Args:
        outputs: vLLM's CompletionOutput of each response: those in `.outputs` of what `LLM.generate` returns
            with `SamplingParams(logprobs=k)`. Of each, `token_ids` and `logprobs` are read: for each token
            vLLM's {id: Logprob}, which holds the k likeliest and the sampled one.

    Raises:
        ValueError: a response has no log-probabilities, or not of each of its tokens.
    """
    tokens: list[int] = []
    own: list[float] = []
    others: list[dict[int, Any]] = []
    lengths = []
    for number, output in enumerate(outputs):
        ids = list(output.token_ids)
        if output.logprobs is None:
            raise ValueError(
                f"outputs: response {number} has no log-probabilities; sample with SamplingParams(logprobs=20)"
            )
        steps = [dict(step) for step in output.logprobs]
        if len(steps) != len(ids) or any(token not in step for token, step in zip(ids, steps)):
            raise ValueError(f"outputs: response {number} has no log-probability of some of its tokens")
        own += [step.pop(token).logprob for token, step in zip(ids, steps)]
        tokens += ids
        others += steps
        lengths.append(len(ids))
    width = max(map(len, others), default=0)
    shape = len(tokens), width
    rows = [([*step], [entry.logprob for entry in step.values()], width - len(step)) for step in others]
    return SampledLogprobs(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor([[*ids, *[-1] * fill] for ids, _, fill in rows], dtype=torch.int64).view(shape),
        torch.tensor([[*values, *[-math.inf] * fill] for _, values, fill in rows]).float().view(shape),
        torch.tensor(own, dtype=torch.float32),
        torch.tensor([0, *lengths]).cumsum(0),
    )
