"""What each rank of test_slime.py runs: python slime_ranks.py RANK WORLD FOLDER, one process a rank.

Two ranks share a rollout in each of the ways that slime knows, on stand-ins for Megatron and slime. Each rank
writes what it found, by way, to FOLDER/rank<RANK>.pt.
"""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron_stand_in
import slime_stand_in
import torch
import torch.distributed as dist
import yaml
from torch import nn

D, ROWS = 32, 512
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Way:
    schedule: list[list[list[int]]]  # of each data-parallel rank, the samples of each micro-batch
    tensor_parallel: int = 1
    context_parallel: int = 1
    tied: bool = False
    ascending: bool = False
    args: dict[str, Any] = field(default_factory=dict)


STRADDLING = [[[0, 5, 2], [7, 9, 11]], [[1, 3], [4, 6, 8, 10]]]  # a group's samples on both ranks
ALONE = [[[3, 0], [10, 1, 2, 5, 4], [6, 11], [9, 8, 7]]]
WAYS = {
    "data parallel": Way(STRADDLING, args={"g2rl": {"lam": 0.7}}),
    "tensor and sequence parallel": Way(
        ALONE, tensor_parallel=2, tied=True, args={"rollout_temperature": 0.7}
    ),
    "context parallel": Way(ALONE, context_parallel=2),
    "context parallel, in one piece": Way(ALONE, context_parallel=2, args={"allgather_cp": True}),
    "plain rewards": Way(
        STRADDLING, args={"rewards_normalization": False, "g2rl": {"shaping": "equation", "lam": 1.0}}
    ),
    "without deviation": Way(STRADDLING, tied=True, args={"grpo_std_normalization": False, "g2rl": {}}),
    "graded rewards": Way(STRADDLING, args={"g2rl": {"rewards": "graded"}}),
    "dropped samples": Way([[[0, 5, 2], [9]], [[1, 3], [4, 6, 8]]]),
    "in the rollout's order": Way(STRADDLING, ascending=True),
}


def samples() -> list[dict[str, Any]]:
    """Four responses to each of 3 prompts: ragged, with a gap, two the same, removed, aborted, one token."""
    g = torch.Generator().manual_seed(3)
    found = []
    lengths = [5, 9, 2, 14, 1, 7, 7, 0, 11, 4, 6, 8]
    rewards = [1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1]  # of the last prompt all the same
    prompts = [torch.randint(300, (n,), generator=g) for n in (4, 7, 3)]
    for i, length in enumerate(lengths):
        response = torch.randint(300, (length,), generator=g)
        if i == 6:
            response = found[5]["tokens"][len(prompts[1]) :].clone()
        mask = torch.ones(length)
        if i == 3:
            mask[4:9] = 0  # what a tool said
        if i == 9:
            mask[:] = 0  # removed
        tokens = torch.cat([prompts[i // 4], response])
        found.append(
            {"tokens": tokens, "response_length": length, "loss_mask": mask, "reward": float(rewards[i])}
        )
    return found


class Wrapper(nn.Module):
    """As DistributedDataParallel around a chunk."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def chunks(way: Way) -> list[nn.Module]:
    """Two chunks of a virtual pipeline stage: the last has the head."""
    config = megatron_stand_in.config(hidden_size=D, sequence_parallel=way.tensor_parallel > 1)
    return [
        Wrapper(megatron_stand_in.GPTModel(config, ROWS, way.tied, post_process))
        for post_process in (False, True)
    ]


def run(way: Way) -> dict[str, Any]:
    """A rollout with G2RL, with lam=0, and with slime's GRPO."""
    from megatron.core import mpu

    from g2rl_kernels.integrations import slime

    megatron_stand_in.initialize(way.tensor_parallel, way.context_parallel)
    args, model = slime_stand_in.arguments(**way.args), chunks(way)
    last = model[-1].module
    weight = last.embedding if way.tied else last.output_layer.weight
    parameters = {"embedding": last.embedding, "weight": weight}
    parameters |= {f"decoder {name}": value for name, value in last.decoder.named_parameters()}
    found: dict[str, Any] = {name: value.detach() for name, value in parameters.items()}
    mine = mpu.get_data_parallel_group().rank()

    def advantages(args: Namespace, custom: Any) -> dict[str, Any]:
        data = slime_stand_in.split(args, samples(), way.schedule, way.ascending)[mine]
        if custom is not None:
            for prefix in ("ref_", ""):
                slime_stand_in.forward_only(args, model, data, mpu, slime.measure_features, prefix)
            found["features"] = slime._measurement.by_sample(data["micro_batch_indices"])
        slime_stand_in.compute_advantages(args, data, custom)
        assert not last.output_layer._forward_pre_hooks
        assert not model[-1]._forward_hooks
        found["partition"] = data["partition"]
        names = [name for name in data if name.startswith("g2rl/") or name in ("advantages", "returns")]
        return {name: data[name] for name in names}

    found["slime"] = advantages(args, None)
    found["lam 0"] = advantages(
        slime_stand_in.arguments(**{**way.args, "g2rl": {"lam": 0}}), slime.shaped_advantages
    )
    found["g2rl"] = advantages(args, slime.shaped_advantages)
    return found


def errors() -> dict[str, str]:
    """What is said where something is wrong, on all ranks."""
    from megatron.core import mpu

    from g2rl_kernels.integrations import slime

    megatron_stand_in.initialize()
    way, model = WAYS["data parallel"], chunks(WAYS["data parallel"])
    rank = mpu.get_data_parallel_group().rank()

    def attempt(hook: Any = slime.measure_features, prefix: str = "", **changes: Any) -> str:
        data, after = changes.pop("data", {}), changes.pop("after", {})
        args = slime_stand_in.arguments(**changes)
        ours = {**slime_stand_in.split(slime_stand_in.arguments(), samples(), way.schedule)[rank], **data}
        try:
            slime_stand_in.forward_only(args, changes.get("model", model), ours, mpu, hook, prefix)
            slime_stand_in.compute_advantages(args, {**ours, **after}, slime.shaped_advantages)
        except (TypeError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    said = {
        "no forward": attempt(hook=None),
        "only the reference's forward": attempt(prefix="ref_"),
        "unknown setting": attempt(g2rl={"lambda": 1}),
        "not a mapping": attempt(g2rl=0.5),
        "switched off": attempt(g2rl=False),
        "threshold as text": attempt(g2rl={"correctness_threshold": "5e-1"}),
        "setting out of range": attempt(g2rl={"lam": -1}),
        "ppo": attempt(advantage_estimator="ppo"),
        "own post-processing": attempt(custom_reward_post_process_path="a.b"),
        "no advantage function": attempt(custom_advantage_function_path=None),
        "other rewards": attempt(data={"rewards": [0.5] * 6}),
        "other raw rewards": attempt(data={"raw_reward": [0.0, 1.0, 0.0, 1.0] * 3}),
        "several samples of a response": attempt(rollout_batch_size=2),
        "no partition": attempt(data={"partition": None}),
        "a micro-batch less": attempt(after={"micro_batch_indices": [[0, 1, 2]]}),
        "nothing wrong": attempt(),
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        slime.Settings.read(slime_stand_in.arguments(n_samples_per_prompt=4))
        slime.Settings.read(slime_stand_in.arguments(n_samples_per_prompt=2))
    said["groups of two"] = "; ".join(str(one.message) for one in told)
    slime.measure_features(slime_stand_in.arguments(), model[:1], "")
    said["another pipeline stage"] = str(slime._measurement)
    return said


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    megatron_stand_in.install()
    found: dict[str, Any] = {name: run(way) for name, way in WAYS.items()}
    found["errors"] = errors()
    from g2rl_kernels.integrations import slime

    recipe = yaml.safe_load((ROOT / "recipes/slime-g2rl.yaml").read_text(encoding="utf-8"))
    args = slime_stand_in.arguments(**recipe)  # as slime sets what it reads
    found["settings"] = {"default": vars(slime.Settings()), "recipe": vars(slime.Settings.read(args))}
    found["functions"] = sorted(
        name for name in ("measure_features", "shaped_advantages") if hasattr(slime, name)
    )
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
