"""The cases that are measured: heads of real models, and distributions over their vocabulary.

A *case* is a head, a number of tokens, a dtype and a distribution. `problem` makes its tensors. Tokens are
sampled from the distribution, as in reinforcement learning. How peaked it is matters only to methods that
skip confident tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A model's LM head: V rows of d numbers, and its softcap on the logits."""

    name: str
    V: int
    d: int
    softcap: float | None = None


def _family(name: str, V: int, sizes: dict[str, int], softcap: float | None = None) -> dict[str, Shape]:
    """Heads with the same vocabulary; `sizes`: size of the model -> d."""
    return {f"{name}-{size}": Shape(f"{name}-{size}", V, d, softcap) for size, d in sizes.items()}


SHAPES = {
    **_family(
        "qwen3", 151936, {"0.6b": 1024, "1.7b": 2048, "4b": 2560, "8b": 4096, "14b": 5120, "32b": 5120}
    ),
    **_family("llama3", 128256, {"8b": 4096, "70b": 8192}),
    **_family("gemma2", 256000, {"2b": 2304, "9b": 3584, "27b": 4608}, softcap=30.0),
    **_family("gemma3", 262144, {"1b": 1152}),
    **_family("gemma3", 262208, {"4b": 2560, "12b": 3840, "27b": 5376}),
    **_family("smollm2", 49152, {"135m": 576, "360m": 960, "1.7b": 2048}),
    "tiny": Shape("tiny", 2048, 64),
}

# Name -> standard deviation of independent logits, or mean entropy in nats of a peaked distribution. Typical
# entropies in reinforcement learning: 1.2 to 1.6 nats for a small chat model, 0.1 to 0.2 for one tuned on
# mathematics.
SIGMAS = {"flat": 0.1, "2.3 sigma": 2.3}
NATS = {"1.5 nats": 1.5, "0.5 nats": 0.5, "0.15 nats": 0.15}
DISTRIBUTIONS = (*SIGMAS, *NATS)


@dataclass(frozen=True)
class Case:
    shape: Shape
    N: int  # tokens, in equal responses
    dtype: str
    distribution: str
    responses: int

    @property
    def label(self) -> str:
        return f"{self.shape.name} {self.N} {self.dtype} {self.distribution}"


def case(shape: str, dtype: str, N: int = 0, distribution: str = "2.3 sigma", gpu: bool = False) -> Case:
    """A case by names. N = 0: as many tokens as take seconds. Responses: of 1024 tokens on a GPU, 4 on a
    CPU."""
    size = SHAPES[shape].V * SHAPES[shape].d
    small = 16384 if gpu else 128 if shape == "tiny" else 512 if size < 1e8 else 256 if size < 5e8 else 64
    N = N or small
    return Case(SHAPES[shape], N, dtype, distribution, max(1, N // 1024) if gpu else min(4, N))


def default_cases(op: str, gpu: bool, quick: bool) -> list[Case]:
    """The default cases of `g2rl bench head` or `logprobs`. The most telling come first, because a run that
    is out of time stops where it is."""
    if not gpu:
        if quick:
            return [case("smollm2-135m", "bf16", 128)]
        return [case(shape, dtype) for shape in ("smollm2-135m", "qwen3-1.7b") for dtype in ("fp32", "bf16")]
    if quick:
        return [case("qwen3-1.7b", "bf16", 16384, "0.15 nats", gpu=True)]
    if op == "logprobs":
        shapes = ("qwen3-1.7b", "qwen3-8b", "gemma2-9b")
        return [case(shape, "bf16", N, "0.15 nats", gpu=True) for N in (16384, 4096) for shape in shapes]
    wanted = [
        ("qwen3-1.7b", "bf16", 16384, "0.15 nats"),
        ("qwen3-8b", "bf16", 16384, "0.15 nats"),
        ("qwen3-1.7b", "bf16", 4096, "0.15 nats"),
        ("qwen3-1.7b", "bf16", 65536, "0.15 nats"),
        ("qwen3-1.7b", "bf16", 16384, "1.5 nats"),
        ("gemma2-9b", "bf16", 16384, "0.15 nats"),
        ("qwen3-1.7b", "bf16", 16384, "flat"),
        ("qwen3-1.7b", "bf16", 32768, "0.15 nats"),
        ("qwen3-1.7b", "bf16", 8192, "0.15 nats"),
        ("qwen3-8b", "bf16", 4096, "0.15 nats"),
        ("qwen3-8b", "bf16", 65536, "0.15 nats"),
        ("llama3-8b", "bf16", 16384, "0.5 nats"),
        ("smollm2-135m", "bf16", 16384, "1.5 nats"),
        ("qwen3-1.7b", "fp16", 16384, "0.15 nats"),
        ("qwen3-0.6b", "fp32", 4096, "2.3 sigma"),
    ]
    return [case(*one, gpu=True) for one in wanted]


# --- tensors of a case --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The op's inputs, on one device."""

    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    tokens: Tensor  # [N], sampled from the softmax
    cu_seqlens: Tensor  # [S + 1]
    cuts: tuple[int, ...]  # cu_seqlens, to be read without waiting for the device
    softcap: float | None
    logprobs: Tensor  # [N], from logits in float32
    rounded_logprobs: Tensor  # [N], from logits in the model's dtype: what samplers report
    entropy: float  # nats, mean over the tokens

    def cut(self, responses: int) -> Problem:
        """The same tokens, divided into so many responses."""
        cuts = _cuts(len(self.tokens), responses)
        return replace(self, cuts=cuts, cu_seqlens=torch.tensor(cuts, device=self.tokens.device))

    def moved(self) -> Problem:
        """The same numbers elsewhere in memory."""
        copies: dict[str, Any] = {
            name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **copies)


def _cuts(N: int, responses: int) -> tuple[int, ...]:
    return tuple(N * i // responses for i in range(responses + 1))


def problem(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Problem:
    """The tensors of a case. No tensor of N x V is made: the extra memory is hidden and weight in float32,
    and the logits of a few hundred tokens."""
    g = torch.Generator(device).manual_seed(seed)
    shape, N, dtype = case.shape, case.N, DTYPES[case.dtype]
    if case.distribution in SIGMAS:
        hidden = torch.randn(N, shape.d, generator=g, device=device).to(dtype)
        scale = SIGMAS[case.distribution] / shape.d**0.5
        weight = (torch.randn(shape.V, shape.d, generator=g, device=device) * scale).to(dtype)
    else:
        hidden, weight = _peaked(case, g)
    tokens = torch.empty(N, dtype=torch.int64, device=device)
    logprobs, rounded, entropy = torch.empty(3, N, device=device)
    for rows in _chunks(N, shape.V, hidden.device):
        z = _logits(hidden[rows], weight, shape.softcap)
        log_p = z - z.logsumexp(1, keepdim=True)
        p = log_p.exp()
        chosen = torch.multinomial(p, 1, generator=g)
        tokens[rows] = chosen[:, 0]
        logprobs[rows] = log_p.gather(1, chosen)[:, 0]
        entropy[rows] = -(p * log_p).sum(1)
        z = z.to(dtype).float()
        rounded[rows] = z.gather(1, chosen)[:, 0] - z.logsumexp(1)
    cuts = _cuts(N, case.responses)
    cu_seqlens = torch.tensor(cuts, device=device)
    return Problem(
        hidden, weight, tokens, cu_seqlens, cuts, shape.softcap, logprobs, rounded, float(entropy.mean())
    )


def _step(V: int, device: torch.device) -> int:
    """Tokens whose logits in float32 take 256 MB on a GPU, 64 MB on a CPU."""
    return max(1, (2**26 if device.type == "cuda" else 2**24) // V)


def _chunks(N: int, V: int, device: torch.device) -> Iterator[slice]:
    step = _step(V, device)
    return (slice(start, min(start + step, N)) for start in range(0, N, step))


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """[n, V] float32 of inputs of any dtype."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        h, blocks = hidden.float(), weight.split(max(1, 2**24 // weight.shape[1]))
        z = torch.cat([h @ block.float().T for block in blocks], 1)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


# A peaked distribution resembles a language model's. Token frequencies follow Zipf's law: a direction that
# all hidden states share carries their logarithms. Each position lifts a few tokens above their frequencies:
# one by a margin that varies from position to position, and eight rivals, which share a mass of 1. The mean
# margin sets the entropy. The margins' spread of 3 makes most positions certain and some uncertain, as
# measured on real models. All other tokens together keep e^-3 of the rivals' mass.
SHARED, LIFT, SPREAD, RIVALS = 8.0, 3.0, 3.0, 8


def _peaked(case: Case, g: torch.Generator) -> tuple[Tensor, Tensor]:
    shape, N, dtype, device = case.shape, case.N, DTYPES[case.dtype], g.device
    rank = torch.randperm(shape.V, generator=g, device=device)
    log_q = torch.log_softmax(-torch.log(rank + 10.0), 0)
    weight = torch.randn(shape.V, shape.d, generator=g, device=device) / shape.d**0.5
    weight[:, 0] = log_q / SHARED
    weight = weight.to(dtype)

    lifted = torch.multinomial(log_q.exp(), N * (1 + RIVALS), replacement=True, generator=g).view(N, -1)
    share = 1 / torch.arange(1, RIVALS + 1, device=device)
    heights = torch.cat([share.new_zeros(1), (share / share.sum()).log()]) + LIFT - log_q[lifted]
    margin = SPREAD * _normal_quantiles(N, device)[torch.randperm(N, generator=g, device=device)]

    def directions(rows: slice | Tensor) -> Tensor:
        """[n, 1 + RIVALS, d]: a direction that, added to a hidden state, lifts one logit by 1."""
        w = weight[lifted[rows]].float()
        w[..., 0] = 0
        return w / w.square().sum(-1, keepdim=True)

    few = torch.linspace(0, N - 1, min(N, _step(shape.V, device), 1024), device=device).long()
    at, noise = directions(few), torch.randn(N, shape.d, generator=g, device=device)
    noise[:, 0] = SHARED
    rest = noise[few] + torch.einsum("nk,nkd->nd", heights[few], at)
    spread = SPREAD * _normal_quantiles(len(few), device)
    mean = _mean_margin(NATS[case.distribution], rest, at[:, 0], spread, weight, shape.softcap)

    heights[:, 0] += mean + margin
    hidden = noise.to(dtype)
    for rows in _chunks(N, (1 + RIVALS) * shape.d, device):
        hidden[rows] = (noise[rows] + torch.einsum("nk,nkd->nd", heights[rows], directions(rows))).to(dtype)
    return hidden, weight


def _normal_quantiles(n: int, device: torch.device) -> Tensor:
    """[n], quantiles of the normal distribution: a sample without randomness."""
    return math.sqrt(2) * torch.erfinv((torch.arange(n, device=device) + 0.5) / n * 2 - 1)


def _mean_margin(
    nats: float, rest: Tensor, top: Tensor, spread: Tensor, weight: Tensor, softcap: float | None
) -> float:
    """The mean margin at which the mean entropy is `nats`, by bisection on a few positions."""
    fixed, lift = _logits(rest.to(weight.dtype), weight), _logits(top.to(weight.dtype), weight)
    low, high = -10.0, 40.0
    for _ in range(12):
        middle = (low + high) / 2
        z = fixed + (middle + spread)[:, None] * lift
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        entropy = torch.distributions.Categorical(logits=z, validate_args=False).entropy().mean()
        low, high = (low, middle) if entropy < nats else (middle, high)
    return (low + high) / 2
