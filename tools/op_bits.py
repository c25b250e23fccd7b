"""Prints a hash of the compiled ops' outputs for fixed inputs: equal hashes mean equal to the last bit.

    python tools/op_bits.py          JSON: instruction set -> hash

The inputs are made without a random generator, whose stream may differ between versions.
"""

from __future__ import annotations

import hashlib
import json
import os

import torch
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels import _C

N, V, D = 61, 1009, 96
ENDS = (0, 17, 17, 40, 61)  # an empty response too


def numbers(*shape: int, seed: int) -> Tensor:
    """Integers below 2001 in no order, as multiples of 1/1000 in [-1, 1]."""
    count = torch.Size(shape).numel()
    mixed = (torch.arange(count, dtype=torch.int64) + seed) * 2654435761 % 4294967291 % 2001
    return ((mixed - 1000).double() / 1000).reshape(shape)


def outputs(dtype: torch.dtype) -> list[Tensor]:
    hidden = numbers(N, D, seed=1).to(dtype).requires_grad_()
    weight = numbers(V, D, seed=2).to(dtype).requires_grad_()
    bias = numbers(V, seed=3).float()
    tokens = torch.arange(N) * 37 % V
    ends = torch.tensor(ENDS)
    found: list[Tensor] = []
    for options in ({}, {"temperature": 0.7, "bias": bias, "logit_softcap": 5.0}):
        plain = g2.head_features(hidden.detach(), weight.detach(), tokens, ends, **options)  # type: ignore[call-overload]
        found += [plain.features, plain.logprobs, plain.logsumexp, plain.entropy]
        gradients = g2.linear_logprobs(hidden, weight, tokens, **options)  # type: ignore[call-overload]
        loss = gradients.logprobs.sum() + 0.1 * gradients.entropy.sum()
        found += [gradients.logprobs, gradients.entropy, *torch.autograd.grad(loss, (hidden, weight))]
    features = numbers(24, D, seed=4).to(torch.float32)
    rewards = (torch.arange(24) % 3 == 0).float()
    geometry = g2.group_geometry(features, rewards, group_size=8)
    return [*found, *geometry]


def digest() -> str:
    sha = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tensor in outputs(dtype):
            sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def main() -> None:
    best = _C.isa_names.index(_C.best_isa())
    found = {}
    for name in _C.isa_names[: best + 1]:
        os.environ["G2RL_CPU_ISA"] = name
        found[name] = digest()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
