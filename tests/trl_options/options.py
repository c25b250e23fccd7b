"""Every option of GRPOConfig: what it is tested with, or why it is not; read by tools/trl_options.py."""

from __future__ import annotations

import dataclasses
from typing import Any

from cases import CASES
from three_ways import Case
from trainer_cases import INHERITED
from transformers import TrainingArguments
from trl import GRPOConfig

ALL = [*CASES, *INHERITED]

# TRL's own options without a case, and why. An option stands here or in a case's settings, never in both.
NOT_RUN = {
    "ds3_gather_for_generation": "not run: for ZeRO-3, and DeepSpeed is not among the tests' packages",
    "use_transformers_paged": "not run: the old name of `use_transformers_continuous_batching`",
    "log_completions_hub_repo": "not run: uploads to the Hub",
}

# What a user of G2RL should know of an option.
WORDS = {
    "num_generations": "With 2 nothing is shaped: both responses get the same exploration score.",
    "temperature": "Features and log-probabilities are of logits / temperature, as in TRL.",
    "top_p": "Filters sampling alone: features and log-probabilities are of the whole vocabulary, as in TRL; "
    "with `g2rl_keep_sampling_mask` of what it keeps.",
    "top_k": "As `top_p`.",
    "min_p": "As `top_p`.",
    "repetition_penalty": "Acts on sampling alone; refused with `g2rl_keep_sampling_mask`.",
    "generation_kwargs": "As `repetition_penalty`. TRL's log-probabilities, and features, know no "
    "temperature set here.",
    "disable_dropout": "With dropout, features carry its noise, as TRL's log-probabilities do.",
    "steps_per_generation": "The forward of TRL's old log-probabilities gives the features; where TRL "
    "would skip it, it is added.",
    "num_iterations": "As `steps_per_generation`. Features are measured once a generation.",
    "mask_truncated_completions": "A masked response keeps its raw reward and touches nobody.",
    "scale_rewards": "TRL's formula, on the shaped rewards.",
    "multi_objective_aggregation": "As `scale_rewards`.",
    "reward_weights": "Weights multiply shaped rewards. `g2rl_correctness_reward` names the one to shape.",
    "top_entropy_quantile": "The first tokens of a group have the same entropy. Where that is the "
    "threshold, rounding chooses among them; `g2rl_fused_logprobs=False` chooses as GRPOTrainer.",
    "router_aux_loss_coef": "Unless it is 0, TRL's head computes the log-probabilities.",
    "cast_lm_head_to_fp32": "Features are computed in float32 too.",
    "entropy_coef": "`g2rl_algorithm` sets it where it is unset.",
    "epsilon_high": "`g2rl_algorithm=evol_rl` sets it where it is unset.",
    "beta": "The reference's forward is not measured.",
    "vllm_importance_sampling_correction": "vLLM's log-probabilities also spare the op one pass. "
    "With `top_p`, `top_k` or `min_p` the ratio is 1 at first with `g2rl_keep_sampling_mask` only.",
    "log_completions": "The table has a column `g2rl_bonus`; its rewards are raw.",
    "log_multimodal": "Tested on text, where it does nothing.",
    "num_generations_eval": "Nothing is shaped in evaluation.",
    "max_tool_calling_iterations": "A tool's tokens do not count in features.",
}

# Inherited options without a case: G2RLTrainer overrides nothing that reads them.
ELSEWHERE = {
    "set in all runs": "output_dir learning_rate disable_tqdm report_to use_cpu",
    "tested: a resumed run gives the same numbers": "resume_from_checkpoint",
    "DDP, FSDP1 and FSDP2, in tests/integrations": "fsdp fsdp_config ddp_find_unused_parameters ddp_backend "
    "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_timeout local_rank accelerator_config",
    "not run: needs DeepSpeed": "deepspeed",
    "not run: needs a GPU": "fp16 fp16_full_eval tf32",
    "not run: needs the package liger-kernel": "use_liger_kernel liger_kernel_config",
    "refused by TRL": "auto_find_batch_size parallelism_config",
    "not run: compilation takes minutes": "torch_compile torch_compile_backend torch_compile_mode",
    "not run: talks to the Hub or to a tracker": "push_to_hub hub_token hub_private_repo hub_model_id "
    "hub_strategy hub_always_push hub_revision run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id",
    "read by transformers alone": "activation_checkpointing_kwargs optim_args optim_target_modules use_cache "
    "logging_strategy log_on_each_node logging_nan_inf_filter log_level log_level_replica eval_delay "
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
    "include_for_metrics batch_eval_metrics save_on_each_node enable_jit_checkpoint ignore_data_skip "
    "restore_callback_states_from_checkpoint full_determinism dataloader_multiprocessing_context label_names "
    "length_column_name debug do_train do_eval do_predict",
}


def names(of: type) -> list[str]:
    return [field.name for field in dataclasses.fields(of)]


def own_names() -> list[str]:
    inherited = {*names(TrainingArguments)}
    return [name for name in names(GRPOConfig) if name not in inherited]


def cases_of(name: str) -> list[Case]:
    return [case for case in ALL if name in case.settings]


def values_of(name: str) -> list[Any]:
    """The different values that an option is tested with."""
    found: list[Any] = []
    for case in cases_of(name):
        if all(repr(case.settings[name]) != repr(value) for value in found):
            found.append(case.settings[name])
    return found
