"""Trainers with GeometryCallback on one process, or as one of several under DDP or FSDP.

The caller sets up FSDP. The model is FOLDER/model. The first process writes the metrics that it logged to
FOLDER/geometry-<trainer>-<way>.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from tiny_trl import config, parity, prompts
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl_ddp_script import RESPONSES, rollout

from g2rl_kernels.integrations.geometry_callback import GeometryCallback

# SGD, because Adam would magnify rounding
OPTIONS: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2}


def run(folder: Path, way: str) -> None:
    processes, model = int(os.environ.get("WORLD_SIZE", 1)), str(folder / "model")
    args = config(folder / "grpo", GRPOConfig, per_device_train_batch_size=RESPONSES // processes, **OPTIONS)
    grpo = GRPOTrainer(model, parity, args, prompts(), rollout_func=rollout)
    grpo.add_callback(GeometryCallback(grpo, every=1, answer=lambda text: text[:1] or None))

    trainers = {"grpo": grpo}
    if way != "fsdp2":  # where the callback refuses to sample
        trainers["sft"] = sft_trainer(folder, model)
    for name, trainer in trainers.items():
        trainer.train()
        if trainer.accelerator.is_main_process:
            found: dict[str, list[float]] = {}
            for entry in trainer.state.log_history:
                for key, value in entry.items():
                    if key.startswith("g2rl/") and key != "g2rl/seconds":
                        found.setdefault(key, []).append(value)
            (folder / f"geometry-{name}-{way}.json").write_text(json.dumps(found))


def sft_trainer(folder: Path, model: str) -> SFTTrainer:
    settings = {"use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    rows = Dataset.from_list([{"text": f"abc+{i % 7}={i % 10}"} for i in range(16)])
    sft = SFTTrainer(model, SFTConfig(str(folder / "sft"), **settings, **OPTIONS), train_dataset=rows)
    asked = ["abc=", "1+1=", "abc+1="]
    sft.add_callback(GeometryCallback(sft, 2, prompts=asked, num_generations=2, max_new_tokens=4))
    return sft
