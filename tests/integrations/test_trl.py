"""G2RLTrainer in TRL: what it measures, what it leaves alone, and TRL's features around it."""

from __future__ import annotations

import importlib.metadata
import math
import runpy
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from accelerate.utils import is_peft_model
from peft import LoraConfig
from tiny_trl import (
    CHAT,
    Letters,
    Watched,
    config,
    length,
    logged,
    make_model,
    make_tokenizer,
    parity,
    prompts,
    save_model,
    weights,
)
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

import g2rl_kernels as g2
from g2rl_kernels.group.evol import evol_rewards, majority_labels
from g2rl_kernels.integrations import trl as integration
from g2rl_kernels.integrations.trl import G2RLConfig, G2RLTrainer
from g2rl_kernels.trainer import TrainerError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(tmp_path: Path, model_dir: str) -> Callable[..., Any]:
    """make(trainer class, settings of its configuration) with the tiny model and the reward `parity`."""

    def make(kind: type = G2RLTrainer, **settings: Any) -> Any:
        names = "model reward_funcs train_dataset eval_dataset peft_config processing_class rollout_func"
        parts = {name: settings.pop(name) for name in names.split() if name in settings}
        args = config(tmp_path / "out", GRPOConfig if kind is GRPOTrainer else G2RLConfig, **settings)
        return kind(
            **{"model": model_dir, "reward_funcs": parity, "train_dataset": prompts(), **parts}, args=args
        )

    return make


def trained(make: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Made and trained at once, for random numbers start where a trainer is made."""
    trainer = make(*args, **settings)
    trainer.train()
    return trainer


def lora(**settings: Any) -> LoraConfig:
    targets = {"target_modules": ["q_proj", "v_proj"], **settings}
    return LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **targets)


def assert_same_run(one: Any, other: Any) -> None:
    for key in ("loss", "grad_norm", "reward", "entropy"):
        assert logged(one, key) == logged(other, key), key
    assert len(logged(one, "loss")) > 0
    assert weights(one).keys() == weights(other).keys()
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(other)[name]), name


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
        ({}, 1),  # TRL would skip the old log-probs
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
        causal.generate = lambda *a, **k: (generate(*a, **k), calls.clear())[0]  # count what comes after
        causal.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        trainer.train()
        return sum(not gradients for gradients in calls), keys

    (ours, our_keys), (theirs, their_keys) = count(G2RLTrainer), count(GRPOTrainer)
    assert ours == theirs + extra
    assert our_keys == their_keys  # so the ratio of an update that needs no old log-probs is 1 to the bit


# --- plain GRPO ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"num_iterations": 2, "beta": 0.1, "max_steps": 4}], ids=["plain", "iterations and KL"]
)
def test_lam_0_is_grpo_to_the_bit(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    ours, theirs = trained(make, g2rl_lam=0, **settings), trained(make, GRPOTrainer, **settings)
    assert_same_run(ours, theirs)
    assert not any(key.startswith("g2rl") for entry in ours.state.log_history for key in entry)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_unshaped_advantages_are_trls_to_the_bit(
    make: Callable[..., Any], scale: str, aggregation: str
) -> None:
    """With shaping="none" all else is as with shaping: the formula of the advantages is held to TRL's."""
    settings = {
        "reward_funcs": [length, parity],
        "reward_weights": [0.5, 2.0],
        "scale_rewards": scale,
        "multi_objective_aggregation": aggregation,
    }
    own = {"g2rl_shaping": "none", "g2rl_fused_logprobs": False, "g2rl_correctness_reward": "parity"}
    ours, theirs = trained(make, **own, **settings), trained(make, GRPOTrainer, **settings)
    assert_same_run(ours, theirs)
    assert len(logged(ours, "g2rl/cos_mean")) == 2


# --- the systems that the paper compares --------------------------------------------------------------------


@pytest.fixture
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "SentenceEncoder", Letters)


def last_letter(text: str) -> str | None:
    """A completion that is empty, or ends with a space or a letter after f, has no answer."""
    return text[-1:] if "!" < text[-1:] <= "f" else None


def completions_of(trainer: Any) -> list[str]:
    return trainer.processing_class.batch_decode(trainer.generated[1], skip_special_tokens=True)


@pytest.mark.parametrize("algorithm", ["grpo", "entropy_bonus"])
def test_unshaped_systems_are_trls_to_the_bit_and_measured(make: Callable[..., Any], algorithm: str) -> None:
    coef = {"grpo": 0.0, "entropy_bonus": 0.003}[algorithm]
    ours = trained(make, g2rl_algorithm=algorithm, g2rl_fused_logprobs=False)
    theirs = trained(make, GRPOTrainer, entropy_coef=coef)
    assert_same_run(ours, theirs)
    assert len(logged(ours, "g2rl/cos_mean")) == 2
    assert ours.args.epsilon_high is None


@pytest.mark.usefixtures("_letters")
@pytest.mark.parametrize("labels", ["truth", "majority"])
def test_evol_rl_trains_on_its_rewards(make: Callable[..., Any], labels: str) -> None:
    trainer = make(
        Watched,
        g2rl_algorithm="evol_rl",
        g2rl_labels=labels,
        g2rl_answer_func="test_trl.last_letter",
        g2rl_encoder="org/letters",
        log_completions=True,
        max_steps=1,
    )
    assert (trainer.args.entropy_coef, trainer.epsilon_high) == (0.003, 0.28)
    trainer.train()
    (seen,) = trainer.seen
    texts = completions_of(trainer)
    answers = [last_letter(text) for text in texts]
    assert None in answers
    right = seen["rewards"][:, 0] > 0.5
    if labels == "majority":
        assert not torch.equal(right, majority_labels(answers, torch.arange(len(answers)) // 4))
        right = majority_labels(answers, torch.arange(len(answers)) // 4)
    valid = torch.tensor([answer is not None for answer in answers])
    evolved = evol_rewards(trainer._encoder(texts), right, torch.arange(len(right)) // 4, valid)
    groups = ((evolved + 1) / 2).view(-1, 4)  # the correctness reward is 0 or 1
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(seen["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)
    bonus = torch.tensor(list(trainer._logs["extra"]["g2rl_bonus"]))
    torch.testing.assert_close(bonus, (evolved - torch.where(right, 1.0, -1.0)) / 2)
    assert logged(trainer, "g2rl/shaped_reward_mean")[0] == pytest.approx(evolved.mean().item())
    assert logged(trainer, "g2rl/accuracy")[0] == logged(trainer, "reward")[0]  # by the truth, whoever labels
    torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)


def nothing_known(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def test_majority_labels_need_no_truth(make: Callable[..., Any]) -> None:
    settings = {"g2rl_answer_func": "test_trl.last_letter", "g2rl_labels": "majority", "max_steps": 1}
    trainer = trained(make, Watched, g2rl_algorithm="grpo", reward_funcs=nothing_known, **settings)
    answers = [last_letter(text) for text in completions_of(trainer)]
    labels = majority_labels(answers, torch.arange(len(answers)) // 4).float()
    groups = labels.view(-1, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(trainer.seen[0]["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)
    assert logged(trainer, "g2rl/accuracy") == [0.0]


@pytest.mark.usefixtures("_letters")
def test_a_batch_without_answers_is_told(make: Callable[..., Any]) -> None:
    trainer = make(g2rl_algorithm="evol_rl", g2rl_answer_func="builtins.min", max_steps=1)
    trainer._answer = lambda text: " "
    with pytest.warns(UserWarning, match="no completion of the batch has an answer: g2rl_answer_func"):
        trainer.train()


def test_answers_are_math_verifys_unless_a_function_is_named(make: Callable[..., Any]) -> None:
    pytest.importorskip("math_verify")
    trainer = make(g2rl_labels="majority")
    conversation = [{"role": "assistant", "content": r"so \boxed{0.5}"}, {"role": "tool", "content": "7"}]
    assert integration._text(conversation) == r"so \boxed{0.5}"
    assert integration._text("text") == "text"
    texts = [integration._text(conversation), r"\boxed{\frac{1}{2}}", "who knows", ""]
    assert trainer._read(texts) == {"votes": ["1/2", "1/2", None, None]}


# --- the log-probs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1, "num_iterations": 2, "max_steps": 4},
        {"entropy_coef": 0.05, "temperature": 0.7},
        {"top_entropy_quantile": 0.5},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2, "max_steps": 4},
        {"mask_truncated_completions": True, "max_completion_length": 2},
        {"gradient_checkpointing": True},
    ],
    ids=lambda s: "-".join(s),
)
def test_our_log_probs_train_as_trls(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    ours, theirs = trained(make, **settings), trained(make, g2rl_fused_logprobs=False, **settings)
    for key in ("loss", "grad_norm", "entropy", "g2rl/cos_mean", "g2rl/shaped_reward_mean"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=2e-3, abs=2e-5), key
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, weights(theirs)[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("fused", [None, True, False])
def test_whose_head_computes_the_log_probs(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fused: bool | None
) -> None:
    import trl.trainer.utils as utils

    calls, theirs = [], utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", lambda *a: (calls.append(1), theirs(*a))[1])
    make(g2rl_fused_logprobs=fused, beta=0.1).train()
    assert bool(calls) == (fused is False)
    calls.clear()
    make(g2rl_lam=0, g2rl_fused_logprobs=fused, beta=0.1).train()
    assert bool(calls) == (fused is not True)


def gemma() -> Any:
    """Its logits are capped."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = {"vocab_size": 40, "num_hidden_layers": 1, "head_dim": 16, "initializer_range": 0.5}
    return Gemma2ForCausalLM(Gemma2Config(**text, **small, final_logit_softcapping=2.0))


def llava() -> Any:
    """It sees: its backbone takes pixels."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = Qwen3Config(**sizes, vocab_size=40, num_key_value_heads=1, head_dim=16, initializer_range=0.3)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, image_seq_length=4)
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("family", [gemma, llava])
def test_families_have_the_log_probs_that_trl_gives_them(
    make: Callable[..., Any], family: Callable[[], Any]
) -> None:
    trainer, model = make(temperature=0.7), family()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, 38, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "fused_lm_head": True}
    inputs["labels"] = ids.clone().index_fill(1, torch.arange(8), -100)
    if family is llava:
        ids[:, 1:5] = 39
        inputs["pixel_values"] = torch.randn(2, 3, 8, 8)
    theirs = model(**inputs)
    trainer._add_ops(model, fused=True, compare=True)
    ours = model(**inputs)
    assert (ours.log_probs[:, -4:] < -0.1).all()
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_a_mixture_of_experts_keeps_trls_head_and_is_measured(
    make: Callable[..., Any], model_dir: str
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    moe = Qwen3MoeConfig(
        **sizes, **experts, vocab_size=25, head_dim=16, initializer_range=0.3, pad_token_id=0
    )
    parts = {"model": Qwen3MoeForCausalLM(moe), "processing_class": make_tokenizer()}
    trainer = trained(make, Watched, max_steps=1, router_aux_loss_coef=0.1, **parts)
    assert logged(trainer, "aux_loss")[0] > 0
    torch.testing.assert_close(trainer.seen[0]["features"], trainer.seen[0]["expected"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="g2rl_fused_logprobs=True: the load-balancing loss"):
        make(g2rl_fused_logprobs=True, router_aux_loss_coef=0.1, **parts)


def test_bf16_autocast_computes_in_the_dtype_of_trls_products(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes, theirs = set(), g2.linear_logprobs
    monkeypatch.setattr(
        g2,
        "linear_logprobs",
        lambda h, w, *a, **k: (dtypes.add((h.dtype, w.dtype)), theirs(h, w, *a, **k))[1],
    )
    ours = trained(make, bf16=True, max_steps=1)
    other = trained(make, bf16=True, max_steps=1, g2rl_fused_logprobs=False)
    assert dtypes == {(torch.bfloat16, torch.bfloat16)}
    assert logged(ours, "entropy") == pytest.approx(logged(other, "entropy"), rel=2e-2)
    dtypes.clear()
    make(bf16=True, max_steps=1, cast_lm_head_to_fp32=True).train()
    assert dtypes == {(torch.float32, torch.float32)}


def test_a_batch_of_masked_responses_has_a_gradient_of_zeros(make: Callable[..., Any]) -> None:
    trainer = make(mask_truncated_completions=True, max_completion_length=1, max_steps=1)
    trainer.eos_token_ids = []  # nothing ends: all are truncated
    before = weights(trainer)
    trainer.train()
    assert logged(trainer, "loss") == [0.0]
    assert logged(trainer, "grad_norm") == [0.0]
    assert logged(trainer, "g2rl/cos_mean") == [0.0]
    assert all(torch.equal(before[name], weight) for name, weight in weights(trainer).items())


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
    """As FSDP does when training starts."""
    trainer = make(Watched, max_steps=1)
    head = torch.nn.Linear(32, trainer.model.config.vocab_size, bias=False)
    trainer.model.lm_head = head
    torch.nn.init.normal_(head.weight)
    trainer.train()
    torch.testing.assert_close(trainer.seen[0]["features"], trainer.seen[0]["expected"], rtol=1e-4, atol=1e-5)


def test_an_adapter_on_the_head_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make(peft_config=lora(target_modules=["q_proj", "lm_head"]))


def test_a_model_with_an_unknown_head_is_refused(make: Callable[..., Any], model_dir: str) -> None:
    model = make_model()
    model.config._name_or_path = model_dir
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(TrainerError, match="unknown between hidden states and logits"):
        make(model=model, processing_class=make_tokenizer())


# --- rollouts: tools and samplers ---------------------------------------------------------------------------


def rollout(batch: list[str], trainer: Any) -> dict[str, Any]:
    """Responses of 3 to 5 tokens, the second one a tool's; log-probs that tell rows and positions apart."""
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


@pytest.mark.parametrize("fused", [True, False])
def test_tool_tokens_do_not_count_and_the_samplers_log_probs_are_used(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fused: bool
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


class FakeVLLM:
    """Where TRL talks to vLLM, colocated or a server."""

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
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, mode: str, corrects: bool
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
    # what the sampler could not score counts as unknown: 0 is far from any log-prob here, so seen to be wrong
    expected = [[-2.0 - row / 10] * 3 + [0.0] for row in range(8)]
    torch.testing.assert_close(torch.cat(known), torch.tensor(expected).flatten())
    assert math.isfinite(logged(trainer, "loss")[0])


# --- rewards and metrics ------------------------------------------------------------------------------------


def some_without(completions: list[str], **_: Any) -> list[float | None]:
    return [None if i % 4 == 1 else float(i % 2 == 0) for i in range(len(completions))]


def test_a_response_that_is_not_scored_takes_no_part(make: Callable[..., Any]) -> None:
    trainer = make(Watched, reward_funcs=some_without)
    trainer.train()
    seen = trainer.seen[0]
    assert (seen["advantages"][1::4] == 0).all()
    assert seen["advantages"].isfinite().all()
    assert logged(trainer, "g2rl/accuracy")[0] == pytest.approx(4 / 6)
    assert logged(trainer, "reward")[0] == pytest.approx(4 / 6)
    scored = torch.tensor([0, 2, 3, 4, 6, 7])
    alone = g2.group_geometry(
        seen["features"][scored], 2 * seen["rewards"][scored, 0] - 1, group_size=3, lam=0.5
    )
    assert logged(trainer, "g2rl/shaped_reward_mean")[0] == pytest.approx(alone.shaped_rewards.mean().item())


def signs(completions: list[str], **_: Any) -> list[float]:
    return [2 * reward - 1 for reward in parity(completions)]


def test_rewards_of_another_unit_shape_as_much(make: Callable[..., Any]) -> None:
    zero_one = trained(make, Watched)
    units = {"g2rl_correctness_threshold": 0.0, "g2rl_correctness_gap": 2.0, "log_completions": True}
    plus_minus = trained(make, Watched, reward_funcs=signs, **units)
    for one, other in zip(zero_one.seen, plus_minus.seen):
        torch.testing.assert_close(one["advantages"], other["advantages"], rtol=1e-3, atol=1e-3)
    with pytest.warns(UserWarning, match="rewards of signs lie further apart than g2rl_correctness_gap=1"):
        trained(make, reward_funcs=signs)


def test_metrics_and_tables_keep_the_raw_rewards(make: Callable[..., Any], tmp_path: Path) -> None:
    import pandas

    trainer = make(
        Watched, reward_funcs=[length, parity], g2rl_correctness_reward="parity", log_completions=True
    )
    trainer.train()
    for step, seen in enumerate(trainer.seen):
        table = pandas.read_parquet(tmp_path / f"out/completions/completions_{step + 1:05d}.parquet")
        raw, bonus = seen["rewards"], torch.tensor(table["g2rl_bonus"], dtype=torch.float32)
        assert torch.equal(torch.tensor(table["parity"], dtype=torch.float32), raw[:, 1])
        torch.testing.assert_close(torch.tensor(table["advantage"], dtype=torch.float32), seen["advantages"])
        assert logged(trainer, "rewards/parity/mean")[step] == pytest.approx(raw[:, 1].mean().item())
        assert logged(trainer, "reward")[step] == pytest.approx(raw.nansum(1).mean().item())
        signs = 2 * raw[:, 1] - 1
        shaped = g2.group_geometry(seen["features"], signs, group_size=4, lam=0.5)
        torch.testing.assert_close(bonus, (shaped.shaped_rewards - signs) / 2)
        groups = (raw.nansum(1) + bonus).view(-1, 4)
        expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(seen["advantages"], expected.flatten(), rtol=1e-3, atol=1e-4)
        assert logged(trainer, "g2rl/exploration_score_mean")[step] == pytest.approx(
            shaped.exploration_score.mean().item()
        )
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    names = (
        "exploration_score_mean "
        "cos_mean negative_pairs accuracy shaped_reward_mean sign_flips feature_seconds"
    )
    assert {key for key in entry if key.startswith("g2rl")} == {f"g2rl/{name}" for name in names.split()}
    assert entry["g2rl/feature_seconds"] > 0


# --- TRL's features around it -------------------------------------------------------------------------------


def test_evaluation_is_of_the_rewards_as_they_are(make: Callable[..., Any], tmp_path: Path) -> None:
    import pandas

    trainer = make(
        Watched,
        eval_dataset=prompts(3),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        log_completions=True,
    )
    trainer.train()
    assert len(logged(trainer, "eval_reward")) == 2
    assert len(trainer.seen) == 2  # nothing is shaped in evaluation
    assert not any(key.startswith("eval_g2rl") for entry in trainer.state.log_history for key in entry)
    table = pandas.read_parquet(tmp_path / "out/completions/completions_00002.parquet")
    assert len(table) == 8


def test_a_resumed_run_goes_on_with_the_same_numbers(make: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2}
    whole = make(**settings)
    whole.train()
    again = make(**settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert logged(again, "g2rl/cos_mean") == logged(whole, "g2rl/cos_mean")
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(again)[name]), name


def test_conversations_go_through_the_chat_template(make: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    data = prompts().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = make(Watched, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert tokenizer.decode(trainer.generated[0][0]).startswith("<unk><unk>abc")  # u and : are no tokens
    for seen in trainer.seen:
        torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"g2rl_lam": -0.1}, "g2rl_lam: got -0.1"),
        ({"g2rl_lam": math.inf}, "g2rl_lam: got inf"),
        ({"g2rl_clip": 0.0}, "g2rl_clip: got 0.0"),
        ({"g2rl_shaping": "other"}, "g2rl_shaping: got 'other', needs one of none, intent, equation"),
        ({"g2rl_correctness_gap": -1.0}, "g2rl_correctness_gap: got -1.0"),
        (
            {"g2rl_algorithm": "ppo"},
            "g2rl_algorithm: got 'ppo', needs one of grpo, entropy_bonus, evol_rl, g2rl",
        ),
        ({"g2rl_labels": "gold"}, "g2rl_labels: got 'gold', needs one of truth, majority"),
        ({"g2rl_algorithm": "grpo", "entropy_coef": 0.1}, "entropy_coef: got 0.1 with g2rl_algorithm=grpo"),
        (
            {"g2rl_algorithm": "entropy_bonus", "entropy_coef": 0.0},
            "entropy_coef: got 0.0 .*entropy_bonus has one",
        ),
        (
            {"g2rl_labels": "majority", "g2rl_answer_func": "os.nothing"},
            "g2rl_answer_func: cannot import 'os.no",
        ),
        ({"g2rl_labels": "majority", "g2rl_answer_func": "f"}, "g2rl_answer_func: cannot import 'f'"),
        (
            {"train_dataset": prompts(1)},
            r"train_dataset: 1 prompts, but a generation batch takes 2 .*8 / num_gen",
        ),
        ({"reward_funcs": [parity, length]}, "g2rl_correctness_reward: got None.*: parity, length"),
        ({"g2rl_correctness_reward": "accuracy"}, "g2rl_correctness_reward: got 'accuracy'.*: parity"),
    ],
)
def test_wrong_settings_are_named(make: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_grpo_config_is_refused(tmp_path: Path, model_dir: str) -> None:
    with pytest.raises(TypeError, match="args: got GRPOConfig, needs a G2RLConfig"):
        G2RLTrainer(model_dir, parity, config(tmp_path, GRPOConfig), prompts())


def test_trl_versions_that_were_not_tested_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.17.0")
    with pytest.raises(ImportError, match=r"tested with TRL 1.16, found 1.17.0.*pip install 'trl==1.16"):
        runpy.run_path(integration.__file__)
