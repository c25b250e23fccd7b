"""sampled_logprobs and served_logprobs, on stand-ins; tests/vllm_engine has the first read vLLM's own."""

import math
from types import SimpleNamespace

import pytest
import torch

import g2rl_kernels as g2
from g2rl_kernels.integrations.vllm import sampled_logprobs, served_logprobs


def response(tokens, *steps):
    """As CompletionOutput: the sampled token stands first in a step, then the likeliest."""
    logprobs = [
        {token: SimpleNamespace(logprob=math.log(p), rank=1, decoded_token="") for token, p in step.items()}
        for step in steps
    ]
    return SimpleNamespace(token_ids=tokens, logprobs=logprobs)


RESPONSES = [
    response([5, 2], {5: 0.1, 7: 0.6, 2: 0.2}, {2: 0.7, 1: 0.2}),  # 5 is not one of the two likeliest
    response([]),
    response((3,), {3: 0.9, 0: 0.05}),
]


def test_what_is_read():
    found = sampled_logprobs(iter(RESPONSES))
    assert found.tokens.tolist() == [5, 2, 3]
    assert found.cu_seqlens.tolist() == [0, 2, 2, 3]
    assert found.top_ids.tolist() == [[7, 2], [1, -1], [0, -1]]
    torch.testing.assert_close(found.top_logprobs.exp(), torch.tensor([[0.6, 0.2], [0.2, 0], [0.05, 0]]))
    torch.testing.assert_close(found.token_logprobs.exp(), torch.tensor([0.1, 0.7, 0.9]))
    assert all(len(step) > 1 for step in RESPONSES[0].logprobs)  # vLLM's objects are left as they were


def test_the_features_of_it():
    weight = torch.randn(8, 4)
    out = g2.topk_features(weight, *sampled_logprobs(RESPONSES).to("cpu"), renormalise=False)
    first = weight[5] - 0.1 * weight[5] - 0.6 * weight[7] - 0.2 * weight[2]
    second = weight[2] - 0.7 * weight[2] - 0.2 * weight[1]
    torch.testing.assert_close(out.features[0], (first + second) / 2)
    torch.testing.assert_close(out.missing_mass, torch.tensor([0.1, 0.0, 0.05]), rtol=1e-5, atol=1e-7)


def test_no_responses_and_no_list():
    found = sampled_logprobs([])
    assert [list(part.shape) for part in found] == [[0], [0, 0], [0, 0], [0], [1]]
    alone = sampled_logprobs([response([4, 4], {4: 0.5}, {4: 0.25})])  # SamplingParams(logprobs=0)
    assert list(alone.top_ids.shape) == [2, 0]
    torch.testing.assert_close(alone.token_logprobs.exp(), torch.tensor([0.5, 0.25]))


def choice(output):
    """The same response as vLLM's server gives it, in JSON; it says -9999 for -inf."""
    tops = [
        {f"token_id:{token}": max(entry.logprob, -9999.0) for token, entry in step.items()}
        for step in output.logprobs
    ]
    own = [top[f"token_id:{token}"] for token, top in zip(output.token_ids, tops)]
    return {"token_ids": list(output.token_ids), "logprobs": {"token_logprobs": own, "top_logprobs": tops}}


def test_of_a_server():
    found, expected = served_logprobs(map(choice, RESPONSES)), sampled_logprobs(RESPONSES)
    assert all(map(torch.equal, found, expected))
    by_text = choice(RESPONSES[2])
    by_text["logprobs"]["top_logprobs"][0][" 4"] = -3.0
    for wrong in (by_text, {**by_text, "logprobs": None}, {"logprobs": by_text["logprobs"]}):
        with pytest.raises(ValueError, match=r"choices: response 1 has .*return_tokens_as_token_ids"):
            served_logprobs([choice(RESPONSES[0]), wrong])


def test_a_nan_of_a_server_is_one():
    """JSON has no NaN: a server may say null."""
    one = choice(RESPONSES[0])
    first = one["logprobs"]["top_logprobs"][0]
    first[f"token_id:{one['token_ids'][0]}"] = None
    found = served_logprobs([one]).token_logprobs
    assert found[0].isnan()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SimpleNamespace(token_ids=[1], logprobs=None), r"response 1 has no .*SamplingParams\(logprobs=20\)"),
        (response([1, 2], {1: 0.5}), "response 1 has no log-probability of some"),
        (response([1], {2: 0.5}), "response 1 has no log-probability of some"),
        (SimpleNamespace(token_ids=[1], logprobs=[None]), "response 1 has no log-probability of some"),
    ],
)
def test_what_vllm_did_not_report(wrong, message):
    with pytest.raises(ValueError, match=message):
        sampled_logprobs([RESPONSES[0], wrong])


def test_a_step_that_the_server_leaves_out():
    wrong = choice(RESPONSES[0])
    wrong["logprobs"]["top_logprobs"][1] = None
    with pytest.raises(ValueError, match="choices: response 0 has no log-probability of some of its tokens"):
        served_logprobs([wrong])
