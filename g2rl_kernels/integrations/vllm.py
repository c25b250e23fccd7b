"""What vLLM reports of its samples, as the tensors that `topk_features` takes. Imports nothing of vLLM."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOKEN_ID = "token_id:"  # how a server names a token by its id


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
    """The log-probabilities of responses that vLLM's offline `LLM` sampled.

    For the feature of the distribution that was sampled from, load the model with
    `LLM(logprobs_mode="processed_logprobs")`: vLLM's default reports log-probabilities at temperature 1.

    Args:
        outputs: vLLM's CompletionOutput of each response: those in `.outputs` of what `LLM.generate` returns
            with `SamplingParams(logprobs=k)`. Of each, `token_ids` and `logprobs` are read: for each token
            vLLM's {id: Logprob}, which holds the k likeliest and the sampled one.

    Raises:
        ValueError: a response has no log-probabilities, or not of each of its tokens.
    """
    responses = []
    for number, output in enumerate(outputs):
        if output.logprobs is None:
            raise ValueError(
                f"outputs: response {number} has no log-probabilities; sample with "
                "SamplingParams(logprobs=20)"
            )
        steps = [{token: entry.logprob for token, entry in (step or {}).items()} for step in output.logprobs]
        responses.append((output.token_ids, steps))
    return _packed("outputs", responses)


def served_logprobs(choices: Iterable[Mapping[str, Any]]) -> SampledLogprobs:
    """The same of responses from vLLM's server, whose `--logprobs-mode` has the same default.

    Args:
        choices: those in replies of /v1/completions to requests with `"logprobs": k`, `"return_token_ids":
            true` and `"return_tokens_as_token_ids": true`. (Without the last a server names tokens by their
            text, which several may share.)

    Raises:
        ValueError: a response has no log-probabilities or ids, or not of each of its tokens.
    """
    responses = []
    for number, choice in enumerate(choices):
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
        tops = None if logprobs is None else logprobs.get("top_logprobs")
        if (
            ids is None
            or tops is None
            or any(not name.startswith(TOKEN_ID) for step in tops for name in step or ())
        ):
            raise ValueError(
                f"choices: response {number} has no log-probabilities by id; request logprobs, "
                "return_token_ids and return_tokens_as_token_ids"
            )
        steps = [
            {int(name[len(TOKEN_ID) :]): math.nan if value is None else value for name, value in step.items()}
            for step in ((step or {}) for step in tops)  # a NaN is null in JSON
        ]
        responses.append((ids, steps))
    return _packed("choices", responses)


def _packed(name: str, responses: Sequence[tuple[Sequence[int], list[dict[int, float]]]]) -> SampledLogprobs:
    """Tensors of the tokens of each response, and of {id: log-probability} for each token."""
    tokens: list[int] = []
    own: list[float] = []
    others: list[dict[int, float]] = []
    for number, (ids, steps) in enumerate(responses):
        if len(steps) != len(ids) or any(token not in step for token, step in zip(ids, steps)):
            raise ValueError(f"{name}: response {number} has no log-probability of some of its tokens")
        own += [step.pop(token) for token, step in zip(ids, steps)]
        tokens += ids
        others += steps
    width = max(map(len, others), default=0)
    shape = len(tokens), width
    padded = [([*step], [*step.values()], width - len(step)) for step in others]
    top_ids = [[*ids, *[-1] * fill] for ids, _, fill in padded]
    top_logprobs = [[*values, *[-math.inf] * fill] for _, values, fill in padded]
    return SampledLogprobs(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(top_ids, dtype=torch.int64).view(shape),
        torch.tensor(top_logprobs, dtype=torch.float32).view(shape),
        torch.tensor(own, dtype=torch.float32),
        torch.tensor([0, *(len(ids) for ids, _ in responses)]).cumsum(0),
    )
