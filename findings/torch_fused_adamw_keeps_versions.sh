#!/usr/bin/env bash
# PyTorch: a fused AdamW changes weights and leaves their version counters as they were.
#
# Expected: whatever writes to a tensor in place raises its `_version`, so that a backward pass through a value that
#   has been overwritten is an error ("modified by an inplace operation"), and caches can ask whether a weight changed.
# Observed: with AdamW(foreach=True) or neither option that is so. With fused=True the counter does not move. Two
#   losses of which the second runs backward after a step get the gradient at the new weight, without an error.
# Why it matters: updates on several mini-batches of one rollout, or a loss kept from before a step, are where policy
#   gradients do this by mistake; who trains with fused=True is not told, and transformers' Trainer, so TRL too, does
#   by default from torch 2.8 on. A cache of cast weights that goes by the version serves the first step's weights for
#   ever: the run does not learn, and nothing says why.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.4.6

venv/bin/python - <<'PROGRAM'
from importlib.metadata import version

import torch

print("torch", version("torch"))


def step_between(**options):
    """Whether the counter moved, and what a backward pass from before the step gives."""
    weight = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0, **options)
    kept = (weight * weight).sum()  # its gradient is 2 w = 4
    weight.grad = torch.ones(3)
    before = weight._version
    optimizer.step()
    changed = (weight.detach() != 2.0).all().item()
    moved = weight._version > before
    weight.grad = None
    try:
        kept.backward()
        result = f"gradient {weight.grad[0]:.1f}, at the time of the loss it was 4.0"
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        result = "RuntimeError: modified by an inplace operation"
    print(f"AdamW({options or ''}): weight changed {changed}, version moved {moved}; backward: {result}")
    assert changed
    return moved, result


for options in ({}, {"foreach": True}):
    moved, result = step_between(**options)
    assert moved
    assert result.startswith("RuntimeError")
moved, result = step_between(fused=True)
assert not moved
assert result.startswith("gradient 3.0")
PROGRAM
