"""Two steps of G2RLTrainer on responses that only depend on their place in the whole batch; what came of it.

    torchrun --nproc_per_node 2 trl_ddp_script.py MODEL OUT '{"per_device_train_batch_size": 6}'

Each process writes OUT/rank<i>.json, the first one OUT/weights.safetensors as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_trl import config, logged, parity, prompts

from g2rl_kernels.integrations.trl import G2RLTrainer


def rollout(batch: list[str], trainer: Any) -> dict[str, Any]:
    first = trainer.accelerator.process_index * len(batch)
    completions = []
    for row in range(first, first + len(batch)):
        generator = torch.Generator().manual_seed(100 * trainer.state.global_step + row)
        completions.append(torch.randint(3, 20, (2 + row % 4,), generator=generator).tolist())
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in batch]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def run(model: str, out: Path, **settings: Any) -> Any:
    args = config(out, optim="sgd", learning_rate=0.1, **settings)  # Adam would magnify rounding
    trainer = G2RLTrainer(model, parity, args, prompts(), rollout_func=rollout)
    trainer.train()
    rank = trainer.accelerator.process_index
    logs = {key: list(trainer._logs[key]) for key in ("prompt", "completion", "advantages")}
    logs |= {"bonus": list(trainer._logs["extra"]["g2rl_bonus"]), "loss": logged(trainer, "loss")}
    logs |= {"entropy": logged(trainer, "entropy"), "grad_norm": logged(trainer, "grad_norm")}
    (out / f"rank{rank}.json").write_text(json.dumps(logs))
    state = trainer.accelerator.get_state_dict(trainer.model)
    if rank == 0:
        save_file({name: t.contiguous().clone() for name, t in state.items()}, out / "weights.safetensors")
    trainer.accelerator.end_training()
    return trainer


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), **json.loads(sys.argv[3]))
