"""What is used of TRL's internals: names, methods, attributes. The other files import them from here.

An installed TRL that lacks one of them is refused, and the error lists what it lacks. One that has them all
but was not tested gets a warning.
"""

# ruff: noqa: E402 (TRL is looked at before its internals are imported)

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator

from .. import versions

NAMES = {
    "trl": ("GRPOConfig", "GRPOTrainer"),
    "trl.data_utils": ("maybe_apply_chat_template",),
    "trl.trainer.utils": (
        "FusedCausalLMOutput",
        "add_fused_lm_head",
        "get_callable_name",
        "get_config_model_id",
        "maybe_gather_lm_head_ctx",
        "nanstd",
    ),
}
# Methods of GRPOTrainer that G2RLTrainer overrides, and parameters that it uses by their names or places.
METHODS = {
    "_generate_and_score_completions": ("inputs",),
    "_generate": ("prompts",),
    "_tokenize_prompts": ("prompts",),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep"),
    "_calculate_rewards": ("inputs", "prompts", "completions"),
    "_compute_loss": ("model", "inputs"),
}
# What GRPOTrainer.__init__ sets.
ATTRIBUTES = (
    "_is_vlm",
    "_logs",
    "_metrics",
    "_tokenizer",
    "aux_loss_enabled",
    "multi_objective_aggregation",
    "num_generations",
    "num_iterations",
    "ref_model",
    "reward_func_names",
    "reward_weights",
    "rollout_func",
    "scale_rewards",
    "temperature",
    "tools",
    "use_transformers_continuous_batching",
    "use_vllm",
    "vllm_importance_sampling_correction",
)
# Fields of GRPOConfig.
SETTINGS = (
    "cast_lm_head_to_fp32",
    "entropy_coef",
    "epsilon_high",
    "generation_batch_size",
    "num_generations",
    "steps_per_generation",
    "use_adaptive_entropy",
)


def missing_seams() -> Iterator[str]:
    """What the installed TRL lacks."""
    for module, names in NAMES.items():
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "trl":
                raise  # TRL is there, and something that it needs is not
            yield module
            continue
        yield from (f"{module}.{name}" for name in names if not hasattr(found, name))
    package = importlib.import_module("trl")
    if not all(hasattr(package, name) for name in NAMES["trl"]):
        return
    trainer, config = package.GRPOTrainer, package.GRPOConfig
    for method, parameters in METHODS.items():
        function = getattr(trainer, method, None)
        taken = () if function is None else tuple(inspect.signature(function).parameters)[1:]
        if taken[: len(parameters)] != parameters:
            yield f"GRPOTrainer.{method}({', '.join(parameters)}, ...)"
    known = {*inspect.unwrap(trainer.__init__).__code__.co_names, *dir(trainer)}
    yield from (f"GRPOTrainer's attribute {name}" for name in ATTRIBUTES if name not in known)
    fields = {field.name for field in dataclasses.fields(config)}
    yield from (f"GRPOConfig.{name}" for name in SETTINGS if name not in fields)


def check_seams() -> None:
    """Raises ImportError for a TRL that is missing or lacks a seam; warns of one that was not tested."""
    found = versions.installed("trl")
    if found is None:
        raise ImportError("g2rl_kernels.integrations.trl needs TRL: pip install 'g2rl-kernels[trl]'")
    lacking = list(missing_seams())
    if lacking:
        oldest, newest = versions.TESTED["trl"]
        tested = oldest if oldest == newest else f"{oldest} to {newest}"
        raise ImportError(
            f"g2rl_kernels.integrations.trl builds on internals that TRL {found} does not have "
            f"({'; '.join(lacking)}): pip install 'trl=={newest}.*' (tested: {tested}), or a g2rl-kernels "
            f"that knows TRL {found}"
        )
    versions.warn_untested("trl", stacklevel=3)


check_seams()

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
