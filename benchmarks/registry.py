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


def _softmax(p: Problem, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(token), logsumexp, entropy, p [n, V] of some tokens: float32, of logits in the model's dtype."""
    z = (p.hidden[rows] @ p.weight.T).float()
    lse = torch.logsumexp(z, -1)
    z.sub_(lse[:, None])
    logprobs = z.gather(1, p.tokens[rows, None])[:, 0]
    prob = z.exp()
    return logprobs, lse, -torch.linalg.vecdot(prob, z), prob


def torch_naive(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equations 5 to 8 as they stand: all logits at once, a feature for each token, then their means."""
    rows = slice(0, len(p.tokens))
    logprobs, lse, entropy, prob = _softmax(p, rows)
    residual = prob.neg_()
    residual[torch.arange(len(prob)), p.tokens] += 1
    phi = (residual.to(p.weight.dtype) @ p.weight).float()
    lengths = p.cu_seqlens.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    features = torch.zeros(len(lengths), phi.shape[1]).index_add_(0, segment, phi)
    return features / lengths[:, None], logprobs, lse, entropy


def torch_chunked(p: Problem, chunk: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best that plain torch does here: a chunk of logits at a time, residuals summed by response before
    the second product, which then has as many rows as there are responses."""
    N, lengths = len(p.tokens), p.cu_seqlens.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    residual = torch.zeros(len(lengths), len(p.weight))
    logprobs, lse, entropy = torch.empty(3, N)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        logprobs[rows], lse[rows], entropy[rows], prob = _softmax(p, rows)
        here = torch.nn.functional.one_hot(segment[rows] - segment[start]).float()
        residual[segment[start] : segment[rows.stop - 1] + 1] -= here.T @ prob
    residual.index_put_((segment, p.tokens), torch.ones(N), accumulate=True)
    features = residual.to(p.weight.dtype) @ p.weight
    return features.float() / lengths[:, None], logprobs, lse, entropy


def fused(p: Problem) -> tuple[Tensor, ...]:
    return g2.head_features(p.hidden, p.weight, p.tokens, p.cu_seqlens, backend="cpu")


# name -> function; the first is the yardstick, measured apart because it writes into a tensor made before
METHODS: dict[str, Callable[[Problem], tuple[Tensor, ...]]] = {
    "g2rl-kernels": fused,
    "torch, 64 tokens at a time": torch_chunked,
    "torch, all logits at once": torch_naive,
}
