"""Log-probabilities of sampled tokens: vLLM's against ours, and vLLM's as `known_logprobs`."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from serve import OPTIONS, PROMPTS, SEEDS, TEMPERATURE, hidden_states

import g2rl_kernels as g2
from g2rl_kernels.head.triton import driver


class Sampled(NamedTuple):
    """All sampled tokens, packed, with vLLM's log-probabilities and the hidden states of transformers."""

    hidden: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    theirs: torch.Tensor

    def ours(self, **options: Any) -> g2.HeadFeatures:
        head = self.hidden, self.weight, self.tokens, self.cu_seqlens
        return g2.head_features(*head, temperature=TEMPERATURE, **options)


def logprobs_of(engine: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """Sampled tokens, and what vLLM reports as their log-probabilities, of all responses in turn."""
    params = [engine.make_params(seed=seed, logprobs=0, **engine.params) for seed in SEEDS]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outs = [out for o in engine.llm.generate(asked, params, use_tqdm=False) for out in o.outputs]
    tokens = [list(out.token_ids) for out in outs]
    return tokens, [[step[token].logprob for token, step in zip(out.token_ids, out.logprobs)] for out in outs]


def sampled(engine: Any, path: str, dtype: str) -> Sampled:
    prompts = [engine.tokenizer(text)["input_ids"] for text in PROMPTS]
    responses, theirs = logprobs_of(engine, prompts)
    asked = [prompt for prompt in prompts for _ in range(engine.params["n"])]
    hidden, weight = hidden_states(path, asked, responses, dtype=dtype)
    lengths = torch.tensor([0, *map(len, responses)])
    return Sampled(
        hidden,
        weight,
        torch.tensor([token for tokens in responses for token in tokens]),
        lengths.cumsum(0),
        torch.tensor([value for values in theirs for value in values]),
    )


@pytest.fixture(scope="module")
def float32(engine, model):
    return sampled(engine, model, "float32")


@pytest.fixture(scope="module")
def bfloat16(bfloat16_engine, model):
    return sampled(bfloat16_engine, model, "bfloat16")


def test_in_float32_they_are_ours(float32):
    difference = (float32.theirs - float32.ours().logprobs).abs()
    assert len(difference) > 60
    assert difference.max() < 1e-4


def test_in_bfloat16_they_differ_by_rounding(bfloat16, float32):
    difference = (bfloat16.theirs - bfloat16.ours().logprobs).abs()
    assert difference.median() < 0.02
    assert difference.max() < 0.2
    assert difference.median() > 10 * (float32.theirs - float32.ours().logprobs).abs().median()


def test_without_the_option_they_are_those_at_temperature_1(engine, model, float32):
    """vLLM's default is "raw"; known_logprobs at another temperature need "processed_logprobs"."""
    assert OPTIONS["logprobs_mode"] == "processed_logprobs"
    from vllm.config import ModelConfig

    assert ModelConfig(model).logprobs_mode == "raw_logprobs"
    head = float32.hidden, float32.weight, float32.tokens
    raw, _ = g2.linear_logprobs(*head)
    assert (float32.theirs - raw).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_known_logprobs_they_give_features_within_the_documented_bound(request, dtype):
    """A token within 1 % counts with p / known p of its part; every other token counts exactly."""
    case: Sampled = request.getfixturevalue(dtype)
    exact, known = case.ours(backend="triton"), case.ours(backend="triton", known_logprobs=case.theirs)
    each = case._replace(cu_seqlens=torch.arange(len(case.tokens) + 1)).ours()
    lengths = case.cu_seqlens.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    size = each.features.norm(dim=1) / lengths[rows]
    bound = torch.zeros(len(lengths)).index_add(0, rows, size) * driver.KNOWN_TOLERANCE
    rounding = 1e-5 * exact.features.norm(dim=1).max()
    assert ((known.features - exact.features).norm(dim=1) <= bound + rounding).all()
    assert (known.logprobs - exact.logprobs).abs().max() < 1e-5  # these stay exact
    near = ((case.theirs - exact.logprobs).exp() - 1).abs() <= driver.KNOWN_TOLERANCE
    assert near.float().mean() > 0.3  # else nothing was tried
    if dtype == "bfloat16":
        assert not torch.equal(known.features, exact.features)  # they were used
