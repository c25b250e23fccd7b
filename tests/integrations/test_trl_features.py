"""G2RLTrainer: features equal those of each response on its own; with adapters, tools and samplers too."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from accelerate.utils import is_peft_model
from tiny_trl import Watched, logged, lora, make_model, make_tokenizer, prompts
from trl import GRPOTrainer

import g2rl_kernels as g2
from g2rl_kernels.errors import TrainerError
from g2rl_kernels.integrations import trl as trl_module
from g2rl_kernels.integrations.trl import G2RLTrainer
from g2rl_kernels.integrations.trl_head import pad_like

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers


def rollout(batch: list[str], trainer: Any) -> dict[str, Any]:
    """Responses of 3 to 5 tokens, the second one a tool's; log-probs differ by row and position."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    tokenizer = trainer.processing_class
    lengths = [3 + row % 3 for row in range(len(batch))]
    draw = lambda n: torch.randint(3, 20, (n,), generator=generator).tolist()  # noqa: E731
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in batch],
        "completion_ids": [draw(n) for n in lengths],
        "logprobs": [[-(row + at / 10) for at in range(n)] for row, n in enumerate(lengths)],
        "env_mask": [[1, 0, *[1] * (n - 2)] for n in lengths],
    }


# --- what is measured ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"mask_truncated_completions": True, "max_completion_length": 3},
        {"num_iterations": 2, "beta": 0.1, "max_steps": 4},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 4},
        {"g2rl_fused_logprobs": False, "temperature": 0.6},
        {"pad_to_multiple_of": 8},
        {"cast_lm_head_to_fp32": True},
        {"generation_kwargs": {"num_beams": 2, "early_stopping": True}},
        {"generation_kwargs": {"num_beams": 2}, "mask_truncated_completions": True},
    ],
    ids=lambda s: "-".join(s) or "plain",
)
def test_features_are_those_of_each_response_alone(
    make: Callable[..., Any], settings: dict[str, Any]
) -> None:
    trainer = make(Watched, **settings)
    trainer.train()
    assert len(trainer.seen) == 2
    for seen in trainer.seen:
        assert (seen["expected"].norm(dim=1) > 0.01).any()
        torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)
        assert torch.equal(seen["has_tokens"], seen["expected"].norm(dim=1) > 0)
    if "mask_truncated_completions" in settings:
        assert not all(bool(seen["has_tokens"].all()) for seen in trainer.seen)


def test_advantages_are_of_the_shaped_rewards(make: Callable[..., Any]) -> None:
    trainer = make(Watched, g2rl_lam=0.8)
    trainer.train()
    flat = 0
    for seen in trainer.seen:
        raw = seen["rewards"][:, 0]
        geometry = g2.group_geometry(seen["features"], 2 * raw - 1, group_size=4, lam=0.8)
        shaped = (geometry.shaped_rewards + 1) / 2
        groups = shaped.view(-1, 4)
        expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(seen["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)
        flat += int(torch.equal(shaped, raw))
    assert flat < len(trainer.seen)


def test_a_response_without_tokens_keeps_its_reward_and_touches_nobody(make: Callable[..., Any]) -> None:
    trainer = make(Watched, mask_truncated_completions=True, max_completion_length=3, log_completions=True)
    trainer.train()
    seen = trainer.seen[-1]
    ids = (torch.arange(8) // 4).masked_fill(~seen["has_tokens"], -1)
    signs = 2 * seen["rewards"][:, 0] - 1
    geometry = g2.group_geometry(seen["features"], signs, group_ids=ids, lam=0.5)
    bonus = torch.tensor(list(trainer._logs["extra"]["g2rl_bonus"]))
    assert not seen["has_tokens"].all()
    assert (bonus[~seen["has_tokens"]] == 0).all()
    torch.testing.assert_close(
        bonus[seen["has_tokens"]], ((geometry.shaped_rewards - signs) / 2)[seen["has_tokens"]]
    )


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({}, 0),  # TRL skips the old log-probs; the sampler's hidden states serve
        ({"generation_kwargs": {"repetition_penalty": 1.1}}, 1),
        ({"rollout_func": rollout}, 1),
        ({"num_iterations": 2}, 0),
        ({"num_iterations": 2, "beta": 0.1}, 0),
        ({"steps_per_generation": 2, "per_device_train_batch_size": 4}, 0),
    ],
    ids=lambda value: "-".join(value) or "aligned" if isinstance(value, dict) else "",
)
def test_no_forward_is_added_where_trl_has_one(
    make: Callable[..., Any], settings: dict[str, Any], extra: int
) -> None:
    def count(kind: type) -> tuple[int, set[str]]:
        trainer, calls, keys = make(kind, max_steps=1, **settings), [], set()
        score = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs: (keys.update(out := score(inputs)), out)[1]
        causal = trainer.model
        generate = causal.generate
        causal.generate = lambda *a, **k: (generate(*a, **k), calls.clear())[0]  # counts later calls
        causal.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        trainer.train()
        return sum(not gradients for gradients in calls), keys

    (ours, our_keys), (theirs, their_keys) = count(G2RLTrainer), count(GRPOTrainer)
    assert ours == theirs + extra
    assert our_keys == their_keys  # no old log-probs are left: the ratio is 1, to the bit


# --- adapters -----------------------------------------------------------------------------------------------


def test_lora_with_kl_measures_the_policy_and_not_the_reference(make: Callable[..., Any]) -> None:
    trainer = make(Watched, peft_config=lora(), beta=0.1)
    assert is_peft_model(trainer.model)
    trainer.train()
    assert len(trainer.seen) == 2
    for seen in trainer.seen:
        assert seen["features"].shape[0] == 8  # each response once
        torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)
    assert all(kl > 1e-3 for kl in logged(trainer, "kl"))  # the adapters start out at random


def test_a_head_in_modules_to_save_is_measured_as_trained(make: Callable[..., Any]) -> None:
    trainer = make(Watched, peft_config=lora(modules_to_save=["lm_head"]), beta=0.1)
    head = trainer.model.get_base_model().lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(1.5)
    original = head.original_module.weight.detach().clone()
    start = head.modules_to_save["default"].weight.detach().clone()
    trainer.train()
    for seen in trainer.seen:
        torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)
    assert torch.equal(head.original_module.weight, original)
    assert not torch.equal(head.modules_to_save["default"].weight, start)
    assert all(kl > 1e-3 for kl in logged(trainer, "kl"))  # the reference has the head as it was


def test_a_head_that_is_put_in_later_is_the_one_that_counts(make: Callable[..., Any]) -> None:
    """FSDP replaces the head when training starts."""
    trainer = make(Watched, max_steps=1)
    head = torch.nn.Linear(32, trainer.model.config.vocab_size, bias=False)
    trainer.model.lm_head = head
    torch.nn.init.normal_(head.weight)
    trainer.train()
    torch.testing.assert_close(trainer.seen[0]["features"], trainer.seen[0]["expected"], rtol=1e-4, atol=1e-5)


ON_HEAD = {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 3}


def test_an_adapter_on_the_head_is_measured_and_trained(make: Callable[..., Any]) -> None:
    trainer = make(Watched, peft_config=lora(**ON_HEAD), beta=0.1)
    head = trainer.model.get_base_model().lm_head
    adapter = [head.lora_A["default"].weight, head.lora_B["default"].weight]
    base, start = head.weight.detach().clone(), [t.detach().clone() for t in adapter]
    trainer.train()
    for seen in trainer.seen:
        torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)
    assert torch.equal(head.weight, base)
    assert not any(torch.equal(a, b) for a, b in zip(adapter, start))
    assert all(kl > 1e-3 for kl in logged(trainer, "kl"))  # the reference has no adapter


def test_gradients_of_an_adapter_on_the_head_are_those_of_the_models_logits(make: Callable[..., Any]) -> None:
    trainer = make(peft_config=lora(**ON_HEAD), temperature=0.7)
    model = trainer.model
    ids = torch.randint(5, 25, (3, 12), generator=torch.Generator().manual_seed(0))
    mask, keep = torch.ones_like(ids), 7
    g, e = torch.randn(2, 3, keep, generator=torch.Generator().manual_seed(1))
    logprobs, entropy, *_ = trainer._get_per_token_logps_and_entropies(
        model, ids, mask, keep, compute_entropy=True
    )
    ((logprobs * g).sum() + (entropy * e).sum()).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    log_p = (model(input_ids=ids).logits[:, -keep - 1 : -1] / 0.7).log_softmax(-1)
    theirs = log_p.gather(2, ids[:, -keep:, None])[..., 0]
    torch.testing.assert_close(logprobs, theirs, rtol=1e-4, atol=1e-5)
    ((theirs * g).sum() - ((log_p.exp() * log_p).sum(-1) * e).sum()).backward()
    assert len(ours) == 6  # A and B of two layers' q_proj and of the head
    for name, parameter in model.named_parameters():
        assert (name in ours) == (parameter.grad is not None), name
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)
            assert parameter.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "adapter", "message"),
    [
        ({"g2rl_fused_logprobs": False}, {}, "adapter to `lm_head` is not supported"),  # as TRL says
        ({"g2rl_lam": 0}, {}, "adapter to `lm_head` is not supported"),
        ({"cast_lm_head_to_fp32": True}, {}, "adapter to `lm_head` is not supported"),
        ({}, {"lora_dropout": 0.1}, r"lora_dropout = 0\.1"),
        ({}, {"use_dora": True}, "use_dora"),
    ],
    ids=["TRL's head", "plain GRPO", "float32 head", "dropout", "DoRA"],
)
def test_an_adapter_on_the_head_that_would_be_left_out_is_refused(
    make: Callable[..., Any], settings: dict[str, Any], adapter: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TrainerError), match=message):
        make(peft_config=lora(**ON_HEAD, **adapter), **settings)


def test_dropout_that_trl_turns_off_is_no_reason(make: Callable[..., Any]) -> None:
    trainer = make(Watched, peft_config=lora(**ON_HEAD, lora_dropout=0.1), disable_dropout=True, max_steps=1)
    trainer.train()
    torch.testing.assert_close(trainer.seen[0]["features"], trainer.seen[0]["expected"], rtol=1e-4, atol=1e-5)


def test_a_model_with_an_unknown_head_is_refused(make: Callable[..., Any], model_dir: str) -> None:
    model = make_model()
    model.config._name_or_path = model_dir
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(TrainerError, match="unknown between hidden states and logits"):
        make(model=model, processing_class=make_tokenizer())


# --- rollouts: tools and samplers ---------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler's log-probs are always handed on."""
    monkeypatch.setattr(G2RLTrainer, "_known_logprobs_pay", lambda *_: True)


@pytest.mark.parametrize("right", [True, False])
def test_on_a_cpu_the_samplers_log_probs_are_used_once_they_were_seen_to_be_right(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    """The first responses of a generation batch tell."""
    given, theirs = [], g2.head_features

    def spy(*args: Any, **options: Any) -> Any:
        given.append(options.get("known_logprobs"))
        return theirs(*args, **options)

    monkeypatch.setattr(g2, "head_features", spy)
    found = {"share": 0.0}
    share = trl_module.share_of_right_responses

    def judged(known: Any, logprobs: Any, *others: Any) -> float:
        found["share"] = share(logprobs if right else known, logprobs, *others)
        return found["share"]

    monkeypatch.setattr(trl_module, "share_of_right_responses", judged)
    make(
        Watched, rollout_func=rollout, max_steps=1, steps_per_generation=2, per_device_train_batch_size=4
    ).train()
    assert len(given) == 2  # chunks of 4 of the 8 responses
    assert found["share"] == float(right)
    assert given[0] is None
    assert (given[1] is not None) == right


@pytest.mark.parametrize("fused", [True, False])
def test_tool_tokens_do_not_count_and_the_samplers_log_probs_are_used(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None, fused: bool
) -> None:
    calls, theirs = [], g2.head_features

    def spy(*args: Any, **options: Any) -> Any:
        calls.append((args[2:4], options))
        return theirs(*args, **options)

    monkeypatch.setattr(g2, "head_features", spy)
    trainer = make(
        Watched,
        rollout_func=rollout,
        g2rl_fused_logprobs=fused,
        max_steps=1,
        steps_per_generation=2,
        per_device_train_batch_size=4,
    )
    trainer.train()
    seen = trainer.seen[0]
    torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)
    assert len(calls) == 2  # chunks of 4 of the 8 responses
    generated = rollout(prompts(8)["prompt"], trainer)
    known = torch.cat([options["known_logprobs"] for _, options in calls])
    counts = torch.cat([options["token_weights"] for _, options in calls])
    torch.testing.assert_close(known, torch.tensor([*chain(*generated["logprobs"])]))
    assert counts.tolist() == [*chain(*generated["env_mask"])]


@pytest.mark.parametrize("nest", [lambda x: [x], lambda x: (x,), torch.tensor, lambda x: torch.tensor([x])])
def test_the_samplers_log_probs_may_be_nested(
    make: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    as_on_a_gpu: None,
    nest: Callable[[float], Any],
) -> None:
    known, theirs = [], g2.head_features

    def nested(batch: list[str], trainer: Any) -> dict[str, Any]:
        found = rollout(batch, trainer)
        return {**found, "logprobs": [[nest(x) for x in row] for row in found["logprobs"]]}

    monkeypatch.setattr(
        g2, "head_features", lambda *a, **k: (known.append(k["known_logprobs"]), theirs(*a, **k))[1]
    )
    trainer = make(Watched, rollout_func=nested, max_steps=1)
    trainer.train()
    torch.testing.assert_close(trainer.seen[0]["features"], trainer.seen[0]["expected"], rtol=1e-4, atol=1e-5)
    expected = rollout(prompts(8)["prompt"], trainer)["logprobs"]
    torch.testing.assert_close(torch.cat(known), torch.tensor([*chain(*expected)]))


def test_log_probs_of_several_tokens_a_place_are_left_out() -> None:
    rows = [[[-1.0], [-2.0, -3.0], None, [None], (-4.0,)]]
    assert pad_like(torch.ones(1, 6), rows, 5).tolist() == [[0, -1, 0, 0, 0, -4]]


class FakeVLLM:
    """Stands in for vLLM, colocated or a server."""

    made: list[FakeVLLM] = []  # noqa: RUF012

    def __init__(self, **settings: Any):
        self.settings, self.syncs = settings, 0
        self.vllm_client = self
        FakeVLLM.made.append(self)

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def sync_weights(self) -> None:
        self.syncs += 1

    def generate(self, prompts: list, images: Any, num_generations: int, profiler: Any) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(self.syncs)
        ids = [torch.randint(3, 20, (4,), generator=generator).tolist() for _ in prompts]
        logprobs = [
            [[-2.0 - row / 10]] * 3 + [[None]] for row in range(len(prompts))
        ]  # the last: NaN in vLLM
        return prompts, ids, logprobs, None


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("corrects", [True, False])
def test_log_probs_of_vllm_reach_the_op(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None, mode: str, corrects: bool
) -> None:
    import trl.trainer.grpo_trainer as module

    known, theirs = [], g2.head_features
    monkeypatch.setattr(module, "VLLMGeneration", FakeVLLM)
    monkeypatch.setattr(
        g2, "head_features", lambda *a, **k: (known.append(k["known_logprobs"]), theirs(*a, **k))[1]
    )
    trainer = make(
        Watched, use_vllm=True, vllm_mode=mode, vllm_importance_sampling_correction=corrects, max_steps=1
    )
    trainer.train()
    torch.testing.assert_close(trainer.seen[0]["features"], trainer.seen[0]["expected"], rtol=1e-4, atol=1e-5)
    # a token without a log-prob gets 0, so far from any log-prob here that the op finds it wrong
    expected = [[-2.0 - row / 10] * 3 + [0.0] for row in range(8)]
    torch.testing.assert_close(torch.cat(known), torch.tensor(expected).flatten())
    assert math.isfinite(logged(trainer, "loss")[0])
