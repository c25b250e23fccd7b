"""What GRPOTrainer refuses, G2RLTrainer refuses with the same error."""

from __future__ import annotations

from typing import Any

import pytest
from cases import adapter, moe, no_dataset, two_rewards
from three_ways import Case, Ours, Place, Plain, run
from tiny_trl import lora

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


def adapter_on_head(place: Place) -> dict[str, Any]:
    return {"peft_config": lora(target_modules=["lm_head"])}


def no_rewards(place: Place) -> dict[str, Any]:
    return {"reward_funcs": None}


TWO = {"g2rl_correctness_reward": "parity"}
REFUSED = [
    Case("hub-without-a-log", {"log_completions_hub_repo": "a/b"}),
    Case("any-batch-size", {"auto_find_batch_size": True}),
    Case("two-batch-sizes", {"generation_batch_size": 8, "steps_per_generation": 1}),
    Case("indivisible-batch", {"generation_batch_size": 12}),
    Case("indivisible-groups", {"num_generations": 3}),
    Case("one-response", {"num_generations": 1}),
    Case("odd-evaluation", {"eval_strategy": "steps", "per_device_eval_batch_size": 3}),
    Case("no-reference", {"sync_ref_model": True}),
    Case("adapter-as-reference", {"sync_ref_model": True, "beta": 0.1}, adapter),
    Case("no-experts", {"router_aux_loss_coef": 0.1}),
    Case("unknown-loss", {"loss_type": "other"}),
    Case("unknown-scale", {"scale_rewards": "other"}),
    Case("unknown-sum", {"multi_objective_aggregation": "other"}),
    Case("unknown-level", {"importance_sampling_level": "other"}),
    Case("weights-missing", {"reward_weights": [1.0]}, two_rewards, own=TWO),
    Case("no-rewards", {}, no_rewards),
    Case("adapter-on-trls-head", {"cast_lm_head_to_fp32": True}, adapter_on_head),
    Case("endless", {"max_steps": -1}, no_dataset),
    Case(
        "vllm-bounds",
        {"vllm_importance_sampling_clip_min": 2.0, "vllm_importance_sampling_clip_max": 1.0},
    ),
    Case(
        "vllm-no-bounds",
        {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
    ),
    Case("vllm-vespo", {"use_vllm": True, "loss_type": "vespo"}),
    Case(
        "liger-head", {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
    ),
    Case("experts-with-a-wrong-loss", {"loss_type": "other"}, moe),
]


@pytest.mark.parametrize("own", [{"g2rl_lam": 0}, {}], ids=["lam-0", "default"])
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_with_trls_error(place: Any, case: Case, own: dict[str, Any]) -> None:
    here = place(case)
    with pytest.raises(Exception) as theirs:  # noqa: PT011 (whatever TRL raises)
        run(Plain, here, "plain")
    with pytest.raises(type(theirs.value)) as ours:
        run(Ours, here, "ours", **case.own, **own)
    assert str(ours.value).replace("Ours", "Plain") == str(theirs.value)
