"""Compares features with the float64 reference on two ranks; test_engine.py runs it.

torchrun --nproc_per_node=2 two_ranks.py MODEL
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engines import Rows, feature, infer, make_engine, stacked, start_processes
from transformers import AutoConfig, AutoModelForCausalLM

from g2rl_kernels.integrations.verl.engine import FEATURES, MASKS, REQUEST, SAMPLING

model, rows = Path(sys.argv[1]), Rows()
start_processes()
rank = dist.get_rank()


def check(ours: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((ours - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-3)).max()
    assert error < 1e-5, error
    print("same as the reference", flush=True)


# Data-parallel: each rank has its share of the rows, and of every weight.
tied = AutoConfig.from_pretrained(model).tie_word_embeddings  # else verl's FSDP1 loads on the first rank only
cases = [("fsdp2", True), ("fsdp2", False), *([("fsdp", True)] if tied else [])]
for strategy, packed in cases:
    mine = [4, 1, 3, 0] if rank == 0 else [2, 5, 1, 4]
    engine = make_engine(model, strategy=strategy, packed=packed)
    data = rows.batch(mine, **{REQUEST: True, "use_remove_padding": packed})
    check(stacked(infer(engine, data)[FEATURES]), rows.features(model)[mine])

# Ulysses: both ranks have all rows, and half of the packed tokens each. Without flash attention verl's ranks
# do not attend to each other's half, so the expected hidden states are computed half by half.
engine, both = make_engine(model, sp=2), [1, 4]
features = stacked(infer(engine, rows.batch(both, **{REQUEST: True}))[FEATURES])
ids = torch.cat([rows.ids[row] for row in both])
positions = torch.cat([torch.arange(len(rows.ids[row])) for row in both])
assert len(ids) % 2 == 1, "so that verl pads"
ids, positions = torch.nn.functional.pad(ids, (0, 1)), torch.nn.functional.pad(positions, (0, 1))
plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
with torch.no_grad():
    halves = [
        plain.model(input_ids=i[None], position_ids=p[None]).last_hidden_state[0]
        for i, p in zip(ids.chunk(2), positions.chunk(2))
    ]
hidden, start, expected, truncated = torch.cat(halves), 0, [], []
weight = plain.lm_head.weight.detach()
for row in both:
    stop, mask = start + len(rows.ids[row]), rows.masks[row].bool()
    states = hidden[start:stop][-len(mask) - 1 : -1][mask]
    tokens = rows.ids[row][-len(mask) :][mask]
    expected.append(feature(states, tokens, weight))
    truncated.append(feature(states, tokens, weight, top_k=4))
    start = stop
check(features, torch.stack(expected))

# Over the ids that sampling kept: the numbers of both ranks' tokens are added up.
sampling = {"top_k": 4, "top_p": 1.0, "rules": "vllm", "logits_dtype": None}
found = infer(engine, rows.batch(both, **{REQUEST: True, SAMPLING: sampling}))
check(stacked(found[FEATURES]), torch.stack(truncated))
kept, _, added, tokens = stacked(found[MASKS]).T
assert tokens.tolist() == [int(rows.masks[row].sum()) for row in both]
assert torch.equal(kept, 4 * tokens + added)
dist.destroy_process_group()
