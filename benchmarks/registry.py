"""What is measured: shapes of real heads, and the ways to compute the op that are compared on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import g2rl_kernels as g2


@dataclass(frozen=True)
class Shape:
    """N response tokens in `responses` equal responses, a head of V rows of d numbers."""

    name: str
    N: int
    V: int
    d: int
    responses: int


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    cu_seqlens: Tensor


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2-135m", 512, 49152, 576, 4),
        Shape("qwen3-1.7b", 256, 151936, 2048, 4),
        Shape("qwen3-0.6b", 256, 151936, 1024, 4),
        Shape("llama3-8b", 64, 128256, 4096, 1),
        Shape("tiny", 128, 2048, 64, 4),
    )
}
DEFAULT_SHAPES = ("smollm2-135m", "qwen3-1.7b")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def problem(shape: Shape, dtype: torch.dtype, responses: int, seed: int = 0) -> Problem:
    """Logits of about 2.3 nats standard deviation, whatever d: neither flat nor peaked."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape.N, shape.d, generator=generator).to(dtype)
    weight = (torch.randn(shape.V, shape.d, generator=generator) * (2.3 / shape.d**0.5)).to(dtype)
    tokens = torch.randint(shape.V, (shape.N,), generator=generator)
    cu_seqlens = torch.arange(responses + 1) * shape.N // responses
    return Problem(hidden, weight, tokens, cu_seqlens)


def torch_features(p: Problem, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one would write without this package: torch in the model's dtype, `chunk` tokens at a time."""
    N, d = p.hidden.shape
    segment = torch.repeat_interleave(torch.arange(len(p.cu_seqlens) - 1), p.cu_seqlens.diff())
    features = torch.zeros(len(p.cu_seqlens) - 1, d)
    logprobs, lse, entropy = torch.empty(3, N)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        z = p.hidden[rows] @ p.weight.T
        lse[rows] = torch.logsumexp(z.float(), -1)
        logp = z.float() - lse[rows, None]
        prob = logp.exp()
        entropy[rows] = -(prob * logp).sum(-1)
        logprobs[rows] = logp.gather(1, p.tokens[rows, None])[:, 0]
        residual = -prob
        residual[torch.arange(len(prob)), p.tokens[rows]] += 1
        phi = residual.to(p.weight.dtype) @ p.weight
        features.index_add_(0, segment[rows], phi.float())
    return features / p.cu_seqlens.diff()[:, None], logprobs, lse, entropy


def fused(p: Problem) -> tuple[Tensor, ...]:
    return g2.head_features(p.hidden, p.weight, p.tokens, p.cu_seqlens, backend="cpu")


# name -> function; the first is the yardstick, measured apart because it writes into a tensor made before
METHODS: dict[str, Callable[[Problem], tuple[Tensor, ...]]] = {
    "g2rl-kernels": fused,
    "torch, 64 tokens at a time": lambda p: torch_features(p, 64),
    "torch, all logits at once": lambda p: torch_features(p, len(p.tokens)),
}
