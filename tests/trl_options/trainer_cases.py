"""Settings that GRPOConfig inherits from TrainingArguments, and that could meet what G2RL overrides."""

from __future__ import annotations

from cases import EVALUATED, SPLIT, STALE, THEIR_HEAD, adapter, evaluated
from three_ways import Case

SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
INHERITED = [
    # precision and memory
    Case("bf16", {"bf16": True}, alike=0, fast=True),  # the heads' products are rounded differently
    Case("bf16-and-kl", {"bf16": True, "beta": 0.05, **STALE}, own=THEIR_HEAD),
    Case(
        "bf16-fp32-head", {"bf16": True, "cast_lm_head_to_fp32": True}, model={"tie_word_embeddings": False}
    ),
    Case("checkpointed", {"gradient_checkpointing": True, **SPLIT}),
    Case(
        "checkpointed-reentrant",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}, **STALE},
    ),
    Case("activations-checkpointed", {"activation_checkpointing": True}),
    Case("cache-emptied", {"torch_empty_cache_steps": 1}),
    Case("noise-in-embeddings", {"neftune_noise_alpha": 5.0}, deterministic=False),
    Case("bf16-evaluation", {**EVALUATED, "bf16_full_eval": True}, evaluated),
    # data
    Case(
        "loader-workers",
        {
            "dataloader_num_workers": 2,
            "dataloader_persistent_workers": True,
            "dataloader_prefetch_factor": 3,
            "dataloader_pin_memory": False,
        },
    ),
    # One worker: with two, the order of the batches is a matter of chance.
    Case("loader-out-of-order", {"dataloader_num_workers": 1, "dataloader_in_order": False}),
    Case("drops-last", {"dataloader_drop_last": True, "max_steps": -1, "num_train_epochs": 0.25}),
    Case("one-epoch", {"max_steps": -1, "num_train_epochs": 1}),
    Case("by-length", {"train_sampling_strategy": "sequential"}),
    # optimisation
    Case(
        "optimizer",
        {
            "optim": "adafactor",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 1,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "max_steps": 3,
        },
    ),
    Case("adam", {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "lr_scheduler_kwargs": {}}),
    Case("seeds", {"seed": 7, "data_seed": 8}),
    Case("tokens-averaged", {"average_tokens_across_devices": False, "label_smoothing_factor": 0.1, **SPLIT}),
    # logs
    Case("logs-seldom", {"logging_steps": 2, "max_steps": 4, "logging_first_step": False}),
    Case("logs-first", {"logging_steps": 3, "logging_first_step": True, "max_steps": 3}),
    Case("tokens-counted", {"include_num_input_tokens_seen": "all", "skip_memory_metrics": False}),
    # checkpoints
    Case("saves", {**SAVES, "save_total_limit": 1}, adapter),
    Case("saves-the-model", {**SAVES, "save_only_model": True}),
    Case(
        "best-model",
        {
            **SAVES,
            **EVALUATED,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_reward",
            "greater_is_better": True,
        },
        evaluated,
    ),
]
