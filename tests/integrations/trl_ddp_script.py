"""Two steps of G2RLTrainer on responses that depend only on their place in the whole batch.

    torchrun --nproc_per_node 2 trl_ddp_script.py FOLDER ddp ddp-evol geometry-ddp fsdp2 geometry-fsdp2 ...

...-evol trains by EVOL-RL on majority labels, ...-setpo, ...-dirl and ...-gar by these methods, ...-mask over
the ids that top_p keeps; geometry-... runs geometry_ddp.py. The model is FOLDER/model.
For ...-head it is FOLDER/model-head: its head is not tied to the embedding, and FSDP shards it on its own.
Each process writes FOLDER/<way>/rank<i>.json, the first one the weights too.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from tiny_trl import Letters, config, logged, parity, prompts
from torch.distributed.fsdp import FullyShardedDataParallel, _init_utils

from g2rl_kernels.integrations import systems, trl_methods
from g2rl_kernels.integrations.trl import G2RLTrainer

EVOL = {
    "g2rl_algorithm": "evol_rl",
    "g2rl_labels": "majority",
    "g2rl_answer_func": "trl_ddp_script.parity_of_length",
    "entropy_coef": 0.0,  # TRL averages over each process's tokens, not over all
}
OWN = {
    "evol": EVOL,
    "setpo": {"g2rl_algorithm": "setpo", "g2rl_strength": 3.0},
    "dirl": {"g2rl_algorithm": "dirl"},
    "gar": {"g2rl_algorithm": "gar", "g2rl_strength": 3.0},
    "mask": {"top_p": 0.6, "g2rl_keep_sampling_mask": True, "num_iterations": 2, "max_steps": 4},
}
LOGGED = ("loss", "entropy", "grad_norm", "g2rl/cos_mean", "g2rl/kept_ids", "g2rl/added_tokens")
RESPONSES = 12  # a batch: 3 groups of 4, so that with two processes the second group lies on both


def parity_of_length(text: str) -> str:
    return "even" if len(text) % 2 == 0 else "odd"


def direction(*_: Any) -> torch.Tensor:
    """In place of dirl's own: a random model has all responses on one side of that."""
    k = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(k, dim=0)


def rollout(batch: list[str], trainer: Any) -> dict[str, Any]:
    first = trainer.accelerator.process_index * len(batch)
    completions = []
    for row in range(first, first + len(batch)):
        generator = torch.Generator().manual_seed(100 * trainer.state.global_step + row)
        completions.append(torch.randint(3, 20, (2 + row % 4,), generator=generator).tolist())
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in batch]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def ask_for_fsdp(version: int, head: bool) -> None:
    """accelerate turns FSDP on for several GPUs only, but all the rest works on several CPUs too."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _init_utils._get_compute_device = lambda *_: torch.device("cpu")  # FSDP1 wants it numbered
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": str(version),
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer" + ",Linear" * head,
        "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_USE_ORIG_PARAMS": "true",
        # the first process alone loads the weights; under FSDP1 that needs a GPU
        "FSDP_CPU_RAM_EFFICIENT_LOADING": str(version == 2),
    }


def run(folder: Path, way: str) -> None:
    out, head = folder / way, way.endswith("-head")
    share = RESPONSES // int(os.environ.get("WORLD_SIZE", 1))
    own = OWN.get(way.split("-")[-1], {})
    systems.SentenceEncoder = Letters
    trl_methods.reasoning_direction = direction
    # SGD, because Adam would magnify rounding
    args = config(out, optim="sgd", learning_rate=0.1, per_device_train_batch_size=share, **own)
    if way.startswith("fsdp"):
        ask_for_fsdp(int(way[4]), head)
    model = folder / ("model-head" if head else "model")
    rows = prompts()
    rows = rows.add_column("solution", [f"{i % 3}+1=a" for i in range(len(rows))])
    trainer = G2RLTrainer(str(model), parity, args, rows, rollout_func=rollout)
    trainer.train()
    rank = trainer.accelerator.process_index
    whole = FullyShardedDataParallel.summon_full_params if way == "fsdp1" else nullcontext
    with whole(trainer.model):
        state = {
            name.replace("_fsdp_wrapped_module.", ""): t.full_tensor()
            if way.startswith("fsdp2")
            else t.clone()
            for name, t in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        }
    seen = {
        "wrapped": type(trainer.model_wrapped).__name__,
        "parameter": type(next(trainer.model.parameters())).__name__,
        "completion": list(trainer._logs["completion"]),
        "advantages": list(trainer._logs["advantages"]),
        "bonus": list(trainer._logs["extra"]["g2rl_bonus"]),
        **{key: logged(trainer, key) for key in LOGGED},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rank{rank}.json").write_text(json.dumps(seen))
    if rank == 0:
        save_file(state, out / "weights.safetensors")


if __name__ == "__main__":
    for way in sys.argv[2:]:
        if way.startswith("geometry-"):
            import geometry_ddp

            kind = way.removeprefix("geometry-")
            if kind == "fsdp2":
                ask_for_fsdp(2, False)
            geometry_ddp.run(Path(sys.argv[1]), kind)
        else:
            run(Path(sys.argv[1]), way)
    torch.distributed.destroy_process_group()
