"""A stand-in for the parts of slime that the integration meets, written from the source of slime's main.

`split` is what the rollout manager sends each data-parallel rank, `forward_only` the log-prob forward of a
training actor, and `compute_advantages` its last step before training, with slime's own GRPO beside it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Rollout = dict[str, Any]


def arguments(**changes: Any) -> Namespace:
    """What slime's parser gives, as far as the integration and this file read it."""
    return Namespace(
        **{
            "advantage_estimator": "grpo",
            "rewards_normalization": True,
            "grpo_std_normalization": True,
            "n_samples_per_prompt": 4,
            "rollout_batch_size": 3,
            "rollout_temperature": 1.0,
            "vocab_size": 300,
            "allgather_cp": False,
            "custom_reward_post_process_path": None,
            "custom_convert_samples_to_train_data_path": None,
            "custom_advantage_function_path": "g2rl_kernels.integrations.slime.shaped_advantages",
            **changes,
        }
    )


def own_rewards(args: Namespace, raw: list[float]) -> list[float]:
    """slime's rewards: those of each prompt less their mean, divided by their deviation."""
    if not args.rewards_normalization:
        return raw
    rewards = torch.tensor(raw, dtype=torch.float).reshape(-1, args.n_samples_per_prompt)
    rewards = rewards - rewards.mean(dim=-1, keepdim=True)
    if args.grpo_std_normalization:
        rewards = rewards / (rewards.std(dim=-1, keepdim=True) + 1e-6)
    return rewards.flatten().tolist()


def split(
    args: Namespace, samples: list[Rollout], schedule: list[list[list[int]]], ascending: bool = False
) -> list[Rollout]:
    """The rollout as each data-parallel rank gets it.

    samples: tokens, response_length, loss_mask and reward of each. schedule: of each rank, the samples of
    each micro-batch; samples that it leaves out are dropped, as slime drops what fills no step. ascending: a
    rank's samples come in the order of the rollout; slime's main has them in that of the micro-batches.
    """
    raw = [sample["reward"] for sample in samples]
    rewards = own_rewards(args, raw)
    parts = []
    for batches in schedule:
        partition = [i for batch in batches for i in batch]
        if ascending:
            partition.sort()
        mine = [samples[i] for i in partition]
        parts.append(
            {
                "partition": partition,
                "tokens": [sample["tokens"] for sample in mine],
                "total_lengths": [len(sample["tokens"]) for sample in mine],
                "response_lengths": [sample["response_length"] for sample in mine],
                "loss_masks": [sample["loss_mask"].int() for sample in mine],
                "rewards": [rewards[i] for i in partition],
                "raw_reward": raw,
                "micro_batch_indices": [[partition.index(i) for i in batch] for batch in batches],
            }
        )
    return parts


def parts_of_rank(values: Tensor, group: Any) -> Tensor:
    """A context-parallel rank's share of a sequence: parts r and 2 R - 1 - r of 2 R, padded with 0."""
    ranks, rank = group.size(), group.rank()
    if ranks == 1:
        return values
    size = -(-len(values) // (2 * ranks))
    parts = nn.functional.pad(values, (0, 2 * ranks * size - len(values))).split(size)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])


def micro_batch(args: Namespace, data: Rollout, which: list[int], mpu: Any, pad: int) -> dict[str, Any]:
    """Keyword arguments of the model for some samples: packed, and padded at the end to a multiple."""
    group = mpu.get_context_parallel_group()
    pad *= mpu.get_tensor_model_parallel_group().size()
    tokens, masks = [], []
    for i in which:
        prompt = data["total_lengths"][i] - data["response_lengths"][i]
        tokens.append(data["tokens"][i])
        masks.append(nn.functional.pad(data["loss_masks"][i], (prompt - 1, 1)))  # at the token before
    if args.allgather_cp:
        lengths, whole = [len(one) for one in tokens], [torch.cat(tokens), torch.cat(masks)]
        missing = -len(whole[0]) % (pad * group.size())
        ids, mask = (nn.functional.pad(one, (0, missing)).chunk(group.size())[group.rank()] for one in whole)
        scale = 1
    else:
        tokens = [parts_of_rank(one, group) for one in tokens]
        lengths = [len(one) for one in tokens]
        missing = -sum(lengths) % pad
        ids = nn.functional.pad(torch.cat(tokens), (0, missing))
        mask = nn.functional.pad(torch.cat([parts_of_rank(one, group) for one in masks]), (0, missing))
        scale = group.size()
    bounds = [0, *torch.tensor([*lengths, *([missing] if missing else [])]).cumsum(0).tolist()]
    bounds = torch.tensor(bounds, dtype=torch.int) * scale
    packed = SimpleNamespace(cu_seqlens_q=bounds, cu_seqlens_q_padded=None, qkv_format="thd")
    return {
        "input_ids": ids[None],
        "position_ids": None,
        "attention_mask": None,
        "labels": None,
        "packed_seq_params": packed,
        "loss_mask": mask[None],
    }


@torch.no_grad()
def forward_only(
    args: Namespace, model: list[nn.Module], data: Rollout, mpu: Any, hook: Callable[..., None] | None,
    store_prefix: str = "", pad: int = 8,
) -> None:  # fmt: skip
    """The hook, then one forward of each micro-batch through the last chunk of the model."""
    for chunk in model:
        chunk.eval()
    if hook is not None:
        hook(args, model, store_prefix)
    for which in data["micro_batch_indices"]:
        model[-1](**micro_batch(args, data, which, mpu, pad))
    for chunk in model:
        chunk.train()


def compute_advantages(args: Namespace, data: Rollout, custom: Callable[..., None] | None) -> None:
    """`advantages` and `returns`: of the custom function, or slime's GRPO."""
    # of this rank's tokens: of all where nothing is cut
    data["kl"] = [torch.zeros(n) for n in data["response_lengths"]]
    if custom is not None:
        custom(args, data)
        return
    rewards = torch.tensor(data["rewards"], dtype=torch.float32)
    data["returns"] = [torch.ones_like(kl) * reward for kl, reward in zip(data["kl"], rewards)]
    data["advantages"] = [*data["returns"]]
