"""What is used of TRL's internals: names, methods, attributes. The other files import them from here.

An installed TRL that lacks one of them is refused, and the error lists what it lacks. One that has them all
but was not tested gets a warning.
"""

# ruff: noqa: E402 (TRL is looked at before its internals are imported)

from __future__ import annotations

from .. import versions
from .seams import check_seams

SEAMS = {
    "trl.data_utils": {"maybe_apply_chat_template": ""},
    "trl.trainer.utils": {
        "FusedCausalLMOutput": "",
        "add_fused_lm_head": "",
        "get_callable_name": "",
        "get_config_model_id": "",
        "maybe_gather_lm_head_ctx": "",
        "nanstd": "",
    },
    "trl:GRPOTrainer": {
        # methods that G2RLTrainer overrides or builds on
        "_generate_and_score_completions": "inputs /",
        "_generate": "prompts /",
        "_tokenize_prompts": "prompts /",
        "_get_per_token_logps_and_entropies": "model input_ids attention_mask logits_to_keep /",
        "_calculate_rewards": "inputs prompts completions /",
        "_compute_loss": "model inputs /",
        # what its __init__ sets
        "_is_vlm": "",
        "_logs": "",
        "_metrics": "",
        "_tokenizer": "",
        "aux_loss_enabled": "",
        "multi_objective_aggregation": "",
        "num_generations": "",
        "num_iterations": "",
        "ref_model": "",
        "reward_func_names": "",
        "reward_weights": "",
        "rollout_func": "",
        "scale_rewards": "",
        "temperature": "",
        "tools": "",
        "use_transformers_continuous_batching": "",
        "use_vllm": "",
        "vllm_importance_sampling_correction": "",
    },
    "trl:GRPOConfig": {
        "cast_lm_head_to_fp32": "",
        "entropy_coef": "",
        "epsilon_high": "",
        "generation_batch_size": "",
        "generation_kwargs": "",
        "min_p": "",
        "num_generations": "",
        "steps_per_generation": "",
        "top_k": "",
        "top_p": "",
        "use_adaptive_entropy": "",
    },
}

check_seams("trl", SEAMS)
versions.warn_untested("trl")

from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import maybe_apply_chat_template
from trl.trainer.utils import (
    FusedCausalLMOutput,
    get_callable_name,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
    nanstd,
)

__all__ = [
    "FusedCausalLMOutput",
    "GRPOConfig",
    "GRPOTrainer",
    "get_callable_name",
    "get_config_model_id",
    "maybe_apply_chat_template",
    "maybe_gather_lm_head_ctx",
    "nanstd",
]
