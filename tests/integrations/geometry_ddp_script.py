"""Trainers with GeometryCallback on one process or several; what the first one logged.

    torchrun --nproc_per_node 2 geometry_ddp_script.py FOLDER

The model is FOLDER/model; results are FOLDER/<trainer>-<way>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_trl import config, parity, prompts
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl_ddp_script import RESPONSES, rollout

from g2rl_kernels.integrations.geometry_callback import GeometryCallback


def run(folder: Path, kind: str, way: str) -> None:
    out, share = folder / f"{kind}-{way}", int(os.environ.get("WORLD_SIZE", 1))
    options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    if kind == "grpo":
        args = config(out, GRPOConfig, per_device_train_batch_size=RESPONSES // share, **options)
        trainer = GRPOTrainer(str(folder / "model"), parity, args, prompts(), rollout_func=rollout)
        trainer.add_callback(GeometryCallback(trainer, every=1, answer=lambda text: text[:1] or None))
    else:
        rows = Dataset.from_list([{"text": f"abc+{i % 7}={i % 10}"} for i in range(16)])
        more = {"max_completion_length", "num_generations"}
        args = config(
            out, lambda path, **k: SFTConfig(path, **{a: b for a, b in k.items() if a not in more}), **options
        )
        trainer = SFTTrainer(str(folder / "model"), args, train_dataset=rows)
        asked = ["abc=", "1+1=", "abc+1="]
        trainer.add_callback(
            GeometryCallback(trainer, every=2, prompts=asked, num_generations=2, max_new_tokens=4)
        )
    trainer.train()
    if trainer.accelerator.is_main_process:
        found: dict[str, list[float]] = {}
        for entry in trainer.state.log_history:
            for key, value in entry.items():
                if key.startswith("g2rl/") and key != "g2rl/seconds":
                    found.setdefault(key, []).append(value)
        (folder / f"{kind}-{way}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for kind in ("grpo", "sft"):
        run(Path(sys.argv[1]), kind, "together")
    torch.distributed.destroy_process_group()
