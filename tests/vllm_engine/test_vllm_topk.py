"""vLLM's top log-probabilities through `topk_features`, beside features of the same tokens' hidden states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from serve import PROMPTS, SEEDS, TEMPERATURE, hidden_states

import g2rl_kernels as g2
from g2rl_kernels.integrations.vllm import SampledLogprobs, sampled_logprobs, served_logprobs


class Rollout(NamedTuple):
    sampled: SampledLogprobs
    hidden: torch.Tensor
    weight: torch.Tensor

    def exact(self) -> torch.Tensor:
        head = self.hidden, self.weight, self.sampled.tokens, self.sampled.cu_seqlens
        return g2.head_features(*head, temperature=TEMPERATURE).features


def rollout(engine: Any, path: str, **options: Any) -> Rollout:
    """What vLLM samples and reports for PROMPTS, and the hidden states of transformers."""
    prompts = [engine.tokenizer(text)["input_ids"] for text in PROMPTS]
    params = [engine.make_params(seed=seed, **{**engine.params, **options}) for seed in SEEDS]
    requests = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    outputs = [out for request in requests for out in request.outputs]
    asked = [prompt for prompt in prompts for _ in range(engine.params["n"])]
    states = hidden_states(path, asked, [list(out.token_ids) for out in outputs])
    return Rollout(sampled_logprobs(outputs), *states)


@pytest.fixture(scope="module")
def twenty(engine, model):
    return rollout(engine, model, logprobs=20)


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_features_are_near_the_exact_ones(twenty, renormalise):
    """20 of the tiny model's 25 tokens; the bound holds with the weight's true constants."""
    weight, exact = twenty.weight, twenty.exact()
    assert len(twenty.sampled.tokens) > 60
    assert twenty.sampled.top_ids.shape[1] in (19, 20)  # 20 where a sampled token is not one of them
    out = g2.topk_features(weight, *twenty.sampled, renormalise=renormalise)
    assert 1e-4 < out.missing_mass.mean() < 0.05
    assert torch.cosine_similarity(out.features, exact).min() > 0.99
    constant = torch.cdist(weight, weight).max() if renormalise else weight.norm(dim=1).max()
    error = (out.features - exact).norm(dim=1)
    assert (error <= out.missing_mass * constant + 1e-4).all()
    assert error.max() > 1e-3


def test_fewer_tokens_miss_more(twenty, engine, model):
    """The five likeliest and the sampled one: responses are the same, as the seeds are."""
    five = rollout(engine, model, logprobs=5)
    assert torch.equal(five.sampled.tokens, twenty.sampled.tokens)
    assert five.sampled.top_ids.shape[1] == 5
    few, many = (g2.topk_features(r.weight, *r.sampled) for r in (five, twenty))
    assert (few.missing_mass > many.missing_mass).all()
    far, near = ((out.features - twenty.exact()).norm(dim=1).mean() for out in (few, many))
    assert far > 3 * near


def test_of_a_nucleus_everything_is_reported(engine, model):
    """With top_p vLLM's log-probs, and so the feature, are of the tokens that are left."""
    case = rollout(engine, model, logprobs=20, top_p=0.8)
    assert (case.sampled.top_logprobs == -torch.inf).any()
    out = g2.topk_features(case.weight, *case.sampled)
    assert out.missing_mass.max() < 1e-5
    z = case.hidden @ case.weight.T / TEMPERATURE
    kept = torch.full_like(z, -torch.inf)
    ids = torch.cat([case.sampled.top_ids, case.sampled.tokens[:, None]], dim=1)
    listed = torch.cat([case.sampled.top_logprobs, case.sampled.token_logprobs[:, None]], dim=1) > -torch.inf
    for t in range(len(z)):
        there = ids[t][listed[t]]
        kept[t, there] = z[t, there]
    phi = case.weight[case.sampled.tokens] - kept.softmax(1) @ case.weight
    lengths = case.sampled.cu_seqlens.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    expected = torch.zeros_like(out.features).index_add(0, rows, phi) / lengths[:, None]
    torch.testing.assert_close(out.features, expected, rtol=1e-3, atol=1e-4)
    assert (out.features - case.exact()).norm(dim=1).max() > 0.1


def test_what_its_server_replies_reads_the_same(engine, twenty):
    """vLLM's own code for /v1/completions, given what the engine sampled; -inf is -9999 in its JSON."""
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion as Serving

    params = engine.make_params(seed=SEEDS[0], **{**engine.params, "logprobs": 20, "top_p": 0.8})
    prompt = engine.tokenizer(PROMPTS[0])["input_ids"]
    (request,) = engine.llm.generate([{"prompt_token_ids": prompt}], [params], use_tqdm=False)
    server = SimpleNamespace(return_tokens_as_token_ids=False, _get_decoded_token=Serving._get_decoded_token)
    choices = []
    for out in request.outputs:
        logprobs = Serving._create_completion_logprobs(
            server, out.token_ids, out.logprobs, 20, None, return_as_token_id=True
        )
        choices.append({"token_ids": list(out.token_ids), "logprobs": logprobs.model_dump()})
    served, sampled = served_logprobs(choices), sampled_logprobs(request.outputs)
    assert served.top_logprobs.min() == -9999
    assert torch.equal(served.top_logprobs.exp(), sampled.top_logprobs.exp())
    assert all(torch.equal(getattr(served, name), getattr(sampled, name)) for name in ("tokens", "top_ids"))
    features = [g2.topk_features(twenty.weight, *one).features for one in (served, sampled)]
    assert torch.equal(*features)
