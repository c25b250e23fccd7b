"""The settings that are compared. What each option of GRPOConfig is tested with is read from here."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from agents import Counter, caller, conversations, double, rollout, slowly_double, tool_tokenizer
from peft import get_peft_model
from three_ways import Case, Place
from tiny_trl import CHAT, length, lora, make_model, make_tokenizer, parity, prompts

MASKED = {"mask_truncated_completions": True, "max_completion_length": 3}
STALE = {"num_iterations": 2, "max_steps": 4}  # every second update is off the policy
SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
THEIR_HEAD = {"g2rl_fused_logprobs": False}
TWO = {"g2rl_correctness_reward": "parity"}


def two_rewards(place: Place) -> dict[str, Any]:
    return {"reward_funcs": [length, parity]}


def untied(**settings: Any) -> dict[str, Any]:
    return {"tie_word_embeddings": False, **settings}


# --- generation ---------------------------------------------------------------------------------------------

SAMPLING = [
    Case("one-token", {"max_completion_length": 1}),
    Case("longer", {"max_completion_length": 12}),
    Case("cold", {"temperature": 0.6}, fast=True),
    Case("hot", {"temperature": 1.4}),
    Case("top-p", {"top_p": 0.8}),
    Case("top-k", {"top_k": 5}),
    Case("min-p", {"min_p": 0.1}),
    Case("all-filters", {"temperature": 0.8, "top_p": 0.9, "top_k": 10, "min_p": 0.02, **STALE}),
    Case("repetition-penalty", {"repetition_penalty": 1.3}),
    Case("pairs", {"num_generations": 2}, shapes=False),
    Case("one-group", {"num_generations": 8}),
    Case("suppressed", {"generation_kwargs": {"suppress_tokens": [5, 6], "min_new_tokens": 3}}),
    Case("overridden", {"generation_kwargs": {"temperature": 0.5, "top_k": 3}}),
    Case("beams", {"generation_kwargs": {"num_beams": 2}}),
    Case("static-cache", {"cache_implementation": "static"}),
    Case("dynamic-cache", {"cache_implementation": "dynamic"}),
    Case("padded", {"pad_to_multiple_of": 8}),
    Case("padded-by-a-word", {"pad_to_multiple_of": "16", "beta": 0.05}),
    Case("not-padded", {"pad_to_multiple_of": "none"}),
    Case("in-order", {"shuffle_dataset": False}),
    Case(
        "continuous",
        {
            "use_transformers_continuous_batching": True,
            "transformers_continuous_batching_config": {
                "num_blocks": 8,
                "block_size": 32,
                "max_batch_tokens": 64,
            },
        },
    ),
]

# --- batches and updates ------------------------------------------------------------------------------------

BATCHES = [
    Case("plain", {}, fast=True),
    Case("accumulated", SPLIT),
    Case("generation-batch", {"generation_batch_size": 16, "max_steps": 4}),
    Case("two-steps", {"steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 4}),
    Case("four-steps", {"steps_per_generation": 4, "per_device_train_batch_size": 2, "max_steps": 6}),
    Case("misaligned", {**SPLIT, "steps_per_generation": 3, "max_steps": 5}),
    Case("accumulates-more", {**SPLIT, "gradient_accumulation_steps": 4, "steps_per_generation": 2}),
    Case("two-iterations", STALE),
    Case("three-iterations", {**SPLIT, "num_iterations": 3, "max_steps": 6}),
    Case("iterations-and-steps", {**SPLIT, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 5}),
]

# --- losses -------------------------------------------------------------------------------------------------

LOSSES = [
    *(
        Case(
            f"loss-{kind}",
            {"loss_type": kind, **STALE, **SPLIT, "beta": 0.05},
            fast=kind in ("dapo", "cispo"),
        )
        for kind in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "vespo")
    ),
    Case("loss-luspo", {"loss_type": "luspo", "importance_sampling_level": "sequence", **STALE, **SPLIT}),
    Case("luspo-by-token", {"loss_type": "luspo", "importance_sampling_level": "token", **STALE}),
    Case("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence", **STALE, "beta": 0.05}),
    Case("sequence-and-dapo", {"importance_sampling_level": "sequence", **STALE}),
    Case("tight-clip", {"epsilon": 0.01, **STALE}),
    Case("clip-higher", {"epsilon": 0.01, "epsilon_high": 0.02, **STALE}),
    Case("cispo-clip", {"loss_type": "cispo", "epsilon_high": 5.0, **STALE}),
    Case("two-sided", {"delta": 1.05, "epsilon": 0.02, **STALE}),
    Case(
        "sapo-temperatures",
        {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.5, **STALE},
    ),
    Case(
        "vespo-weights",
        {
            "loss_type": "vespo",
            "vespo_k_pos": 1.5,
            "vespo_lambda_pos": 2.5,
            "vespo_k_neg": 2.0,
            "vespo_lambda_neg": 1.0,
            **STALE,
        },
    ),
    Case("truncated-masked", MASKED, fast=True),
    Case("truncated-masked-and-kl", {**MASKED, **STALE, "beta": 0.05, "loss_type": "grpo"}),
    # The first tokens of a group have one entropy, so rounding decides which of them are the highest: the
    # runs are compared with log-probs of TRL's head.
    Case("high-entropy", {"top_entropy_quantile": 0.5, **STALE}, own=THEIR_HEAD),
    Case("high-entropy-of-ours", {"top_entropy_quantile": 0.5, **STALE}, alike=0),
    Case("highest-entropy", {"top_entropy_quantile": 0.0}, own=THEIR_HEAD),
    Case("high-entropy-masked", {"top_entropy_quantile": 0.3, **MASKED, "loss_type": "bnpo"}, own=THEIR_HEAD),
    Case("entropy-bonus", {"entropy_coef": 0.05, **SPLIT}),
    Case("entropy-bonus-masked", {"entropy_coef": 0.05, "top_entropy_quantile": 0.5, "loss_type": "dr_grpo"}),
    Case(
        "adaptive-entropy",
        {
            "use_adaptive_entropy": True,
            "entropy_coef": 0.02,
            "entropy_coef_min": 0.01,
            "entropy_coef_max": 0.03,
            "entropy_coef_delta": 0.02,
            "entropy_target": 2.0,
            "max_steps": 3,
        },
    ),
    Case("off-policy-mask", {"off_policy_mask_threshold": 0.001, **STALE}),
    Case("kl", {"beta": 0.1}),
    Case("kl-biased", {"beta": 0.1, "use_bias_correction_kl": False, **STALE}),
    Case(
        "moving-reference",
        {
            "beta": 0.1,
            "sync_ref_model": True,
            "ref_model_mixup_alpha": 0.5,
            "ref_model_sync_steps": 1,
            "max_steps": 3,
        },
    ),
]

# --- rewards ------------------------------------------------------------------------------------------------

REWARDS = [
    *(
        Case(f"scaled-{scale}".lower(), {"scale_rewards": scale}, fast=scale == "batch")
        for scale in ("group", "batch", "none", True, False)
    ),
    *(
        Case(
            f"{how.replace('_', '-')}-{scale}",
            {"multi_objective_aggregation": how, "scale_rewards": scale, "reward_weights": [0.5, 2.0]},
            two_rewards,
            own=TWO,
            fast=how == "normalize_then_sum" and scale == "none",
        )
        for how in ("sum_then_normalize", "normalize_then_sum")
        for scale in ("group", "batch", "none")
    ),
    Case("two-rewards", {}, two_rewards, own=TWO),
]

# --- models -------------------------------------------------------------------------------------------------


def moe(place: Place) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    settings = {
        "vocab_size": 25,
        "head_dim": 16,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts, **settings))
    return {"model": model, "processing_class": make_tokenizer()}


def adapter(place: Place) -> dict[str, Any]:
    torch.manual_seed(1)
    return {"peft_config": lora()}


def trained_adapter(place: Place) -> dict[str, Any]:
    """A model that already has an adapter: TRL takes a copy of it as the reference."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(place.model())
    return {"model": get_peft_model(model, lora())}


def adapter_with_dropout(place: Place) -> dict[str, Any]:
    return {"peft_config": lora(lora_dropout=0.5)}


def adapter_and_head(place: Place) -> dict[str, Any]:
    return {"peft_config": lora(modules_to_save=["lm_head"])}


MODELS = [
    Case("bf16-weights", {"model_init_kwargs": {"dtype": "bfloat16"}}, alike=1),
    Case("eager-attention", {"model_init_kwargs": {"attn_implementation": "eager"}, "beta": 0.05}),
    Case("remote-code-allowed", {"trust_remote_code": True}),
    Case("experts", {"router_aux_loss_coef": 0.1, **SPLIT}, moe),
    Case("experts-unbalanced", {"router_aux_loss_coef": 0.0}, moe),
    Case("fp32-head", {"cast_lm_head_to_fp32": True, "beta": 0.05}, model=untied()),
    Case(
        "fp32-head-of-bf16",
        {"cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}},
        model=untied(),
    ),
    Case("fp32-head-tied", {"cast_lm_head_to_fp32": True}),
    Case("adapter", {}, adapter),
    Case("adapter-and-kl", {"beta": 0.1, **STALE}, adapter, fast=True),
    Case("adapter-trained-before", {"beta": 0.1, **STALE}, trained_adapter),
    Case("adapter-and-head", {"beta": 0.1}, adapter_and_head, model=untied()),
    Case("dropout-off", {"disable_dropout": True}, adapter_with_dropout),
    Case("dropout", {"disable_dropout": False}, adapter_with_dropout, deterministic=False),
    Case("adapter-checkpointed", {"gradient_checkpointing": True, "beta": 0.05}, adapter),
]

# --- vLLM, by a stand-in ------------------------------------------------------------------------------------

VLLM: dict[str, Any] = {"use_vllm": True, **STALE}
ENGINES = [
    Case("vllm", VLLM, fast=True),
    Case("vllm-server", {**VLLM, "vllm_mode": "server"}),
    Case("vllm-uncorrected", {**VLLM, "vllm_importance_sampling_correction": False}),
    *(
        Case(
            f"vllm-{mode.replace('_', '-')}",
            {
                **VLLM,
                "vllm_importance_sampling_mode": mode,
                "vllm_importance_sampling_clip_max": 1.1,
                "vllm_importance_sampling_clip_min": 0.9,
            },
        )
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
    Case("vllm-cap", {**VLLM, "vllm_importance_sampling_cap": 1.05}),
    Case("vllm-vespo", {**VLLM, "loss_type": "vespo", "vllm_importance_sampling_mode": "token_mask"}),
    Case("vllm-off-policy", {**VLLM, "off_policy_mask_threshold": 0.05, "beta": 0.05}),
    Case(
        "vllm-settings",
        {
            **VLLM,
            "vllm_model_impl": "transformers",
            "vllm_enable_sleep_mode": True,
            "vllm_structured_outputs_regex": "[0-9]+",
            "vllm_gpu_memory_utilization": 0.5,
            "vllm_max_model_length": 64,
            "vllm_tensor_parallel_size": 2,
        },
    ),
    Case(
        "vllm-server-settings",
        {
            **VLLM,
            "vllm_mode": "server",
            "vllm_server_base_url": "http://127.0.0.1:8001",
            "vllm_server_host": "127.0.0.1",
            "vllm_server_port": 8001,
            "vllm_server_timeout": 10.0,
            "vllm_group_port": 51217,
        },
    ),
    Case("vllm-masked", {**VLLM, **MASKED, "temperature": 0.7}),
]

# --- agents -------------------------------------------------------------------------------------------------


def right(completions: list[Any], **_: Any) -> list[float]:
    """Whether the last message has an even number of characters."""
    return [float(len(c[-1].get("content") or "") % 2 == 0) for c in completions]


def agent(tool: Any, times: int = 1) -> Any:
    def arguments(place: Place) -> dict[str, Any]:
        model = caller(tool.__name__, times)
        model.config._name_or_path = place.model()
        return {
            "model": model,
            "processing_class": tool_tokenizer(),
            "train_dataset": conversations(),
            "tools": [tool],
            "reward_funcs": right,
        }

    return arguments


def environment(place: Place) -> dict[str, Any]:
    model = caller("add")
    return {
        "model": model,
        "processing_class": tool_tokenizer(),
        "train_dataset": conversations(),
        "environment_factory": Counter,
        "reward_funcs": None,
    }


def no_dataset(place: Place) -> dict[str, Any]:
    return environment(place) | {"train_dataset": None}


def chatting(place: Place) -> dict[str, Any]:
    """A template that answers to chat_template_kwargs."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT + "{% if thinks %}+-+{% endif %}"
    return {"processing_class": tokenizer, "train_dataset": conversations()}


def rolls_out(place: Place) -> dict[str, Any]:
    return {"rollout_func": rollout}


LONG = {"max_completion_length": 200}
AGENTS = [
    Case("tools", LONG, agent(double)),
    Case("tools-async", LONG, agent(slowly_double)),
    Case(
        "tools-twice",
        {"max_completion_length": 300, "max_tool_calling_iterations": 2, **STALE},
        agent(double, 3),
    ),
    Case("tools-cut", {"max_completion_length": 80, "mask_truncated_completions": True}, agent(double)),
    Case("environment", LONG, environment),
    Case("environment-alone", LONG, no_dataset),
    Case("template-arguments", {"chat_template_kwargs": {"thinks": True}}, chatting),
    Case("rollout-function", {"log_completions": True}, rolls_out),
    Case("rollout-function-stale", {**STALE, "beta": 0.05}, rolls_out),
]

# --- what else a trainer is given ---------------------------------------------------------------------------


async def waits(completions: list[Any], **_: Any) -> list[float]:
    return parity(completions)


def reward_model(place: Place) -> dict[str, Any]:
    torch.manual_seed(0)
    config = make_model().config
    config.num_labels = 1
    path = place.path / "judge"
    if not path.exists():
        transformers.Qwen3ForSequenceClassification(config).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    return {"reward_funcs": [str(path), parity]}


def async_reward(place: Place) -> dict[str, Any]:
    return {"reward_funcs": waits}


def talkative(
    completions: list[Any], log_extra: Any, log_metric: Any, trainer_state: Any, **_: Any
) -> list[float]:
    log_extra("tens", [10 * len(c) for c in completions])
    log_metric("step", float(trainer_state.global_step))
    return parity(completions)


def logs_more(place: Place) -> dict[str, Any]:
    return {"reward_funcs": talkative}


def streamed(place: Place) -> dict[str, Any]:
    return {"train_dataset": prompts().to_iterable_dataset()}


def more_columns(place: Place) -> dict[str, Any]:
    data = prompts()
    return {"train_dataset": data.add_column("extra", list(range(len(data))))}


def evaluated(place: Place) -> dict[str, Any]:
    return {"eval_dataset": prompts(4)}


def evaluated_twice(place: Place) -> dict[str, Any]:
    return {"eval_dataset": {"one": prompts(4), "two": prompts(2)}}


def own_optimizer(place: Place) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(place.model())
    return {"model": model, "optimizers": (torch.optim.SGD(model.parameters(), lr=0.1), None)}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
GIVEN = [
    Case("reward-model", {}, reward_model, own=TWO),
    Case("reward-async", {}, async_reward),
    Case("reward-logs", {"log_completions": True}, logs_more),
    Case("streamed", {}, streamed),
    Case("columns-kept", {"remove_unused_columns": False}, more_columns),
    Case("columns-removed", {"remove_unused_columns": True}, more_columns),
    Case("own-optimizer", {}, own_optimizer),
    Case(
        "completions",
        {
            "log_completions": True,
            "num_completions_to_print": 2,
            "log_unique_prompts": True,
            "log_multimodal": False,
        },
    ),
    Case("evaluation", EVALUATED, evaluated),
    Case("evaluation-pairs", {**EVALUATED, "num_generations_eval": 2, "log_completions": True}, evaluated),
    Case("evaluation-singly", {**EVALUATED, "num_generations_eval": 1, "beta": 0.05}, evaluated),
    Case("evaluation-first", {**EVALUATED, "eval_on_start": True, "loss_type": "grpo"}, evaluated),
    Case("evaluation-of-two", {**EVALUATED, "eval_steps": 2}, evaluated_twice),
]
CASES = [*SAMPLING, *BATCHES, *LOSSES, *REWARDS, *MODELS, *ENGINES, *AGENTS, *GIVEN]
