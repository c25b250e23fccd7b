"""What each rank of test_sharded.py runs: torchrun --nproc-per-node 2 sharded.py FOLDER.

A tiny policy with tied embeddings under DDP, FSDP1 and FSDP2, the ops inside its forward. Each rank has its
own responses; one group of them straddles the ranks. Writes FOLDER/rank<RANK>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import g2rl_kernels as g2

V, D = 211, 16
LENGTHS = [5, 9, 2, 7, 1, 6, 3, 4, 8, 5]  # of the responses: five on each rank
REWARDS = [1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]
GROUPS = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]  # group 1: two responses on each rank


class Policy(nn.Module):
    """Log-probabilities and entropy [N], and features [S, d] of the responses to come, from inputs [N]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        # Whole and a plain tensor here, and only here, under FSDP too.
        weight = self.head.weight
        features = g2.head_features(hidden, weight, tokens, cu_seqlens).features
        logprobs, entropy = g2.linear_logprobs(hidden, weight, tokens, temperature=0.8)
        return logprobs, entropy, features


def batch(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's inputs, tokens and cu_seqlens."""
    share = len(LENGTHS) // world
    mine = slice(rank * share, (rank + 1) * share)
    both = torch.randint(V, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    ids, tokens = torch.cat(both.split(LENGTHS, dim=1)[mine], dim=1)
    return ids, tokens, torch.tensor([0, *LENGTHS[mine]]).cumsum(0)


def loss(logprobs: Tensor, entropy: Tensor, world: int) -> Tensor:
    """Such that the mean over ranks is the mean over all tokens."""
    return -world * (logprobs + 0.1 * entropy).sum() / sum(LENGTHS)


def shaped(features: Tensor) -> Tensor:
    """From the features of all ranks, in rank order."""
    return g2.group_geometry(features, torch.tensor(REWARDS), group_ids=torch.tensor(GROUPS)).shaped_rewards


def step(model: nn.Module, rank: int, world: int) -> dict[str, Tensor]:
    logprobs, entropy, features = model(*batch(rank, world))
    loss(logprobs, entropy, world).backward()
    if world > 1:
        everyone = [torch.empty_like(features) for _ in range(world)]
        dist.all_gather(everyone, features)
        features = torch.cat(everyone)
    return {"logprobs": logprobs.detach(), "features": features, "shaped": shaped(features)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole, by names that no wrapper changes."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")] = (
            grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
        )
    return found


def main(folder: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}

    ddp = DistributedDataParallel(Policy())
    found["DDP"] = step(ddp, rank, world) | gradients(ddp)

    fsdp1 = FullyShardedDataParallel(Policy(), device_id=torch.device("cpu"), use_orig_params=True)
    found["FSDP1"] = step(fsdp1, rank, world)
    with FullyShardedDataParallel.summon_full_params(fsdp1, with_grads=True):
        found["FSDP1"] |= gradients(fsdp1)

    fsdp2 = Policy()
    mesh = dist.init_device_mesh("cpu", (world,))
    for layer in fsdp2.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(fsdp2, mesh=mesh)
    found["FSDP2"] = step(fsdp2, rank, world) | gradients(fsdp2)
    hidden, tokens, cu_seqlens = torch.zeros(2, D), torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2])
    try:
        g2.head_features(hidden, fsdp2.head.weight, tokens, cu_seqlens)
    except TypeError as error:
        found["FSDP2, outside of forward"] = str(error)
    weight = fsdp2.head.weight.full_tensor()
    found["FSDP2, gathered"] = g2.head_features(hidden, weight, tokens, cu_seqlens)._asdict()

    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
