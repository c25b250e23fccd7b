"""What is measured: heads of real models, distributions over their vocabulary, and the cases of each run.

A *case* is a head, a number of tokens, a dtype and a distribution. `problem` makes its tensors. How peaked
the distribution is matters to methods that skip confident tokens, and to none else; the tokens are sampled
from it, as reinforcement learning does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

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


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-0.6b", 151936, 1024),
        Shape("qwen3-1.7b", 151936, 2048),
        Shape("qwen3-4b", 151936, 2560),
        Shape("qwen3-8b", 151936, 4096),
        Shape("qwen3-14b", 151936, 5120),
        Shape("qwen3-32b", 151936, 5120),
        Shape("llama3-8b", 128256, 4096),
        Shape("llama3-70b", 128256, 8192),
        Shape("gemma2-2b", 256000, 2304, 30.0),
        Shape("gemma2-9b", 256000, 3584, 30.0),
        Shape("gemma2-27b", 256000, 4608, 30.0),
        Shape("gemma3-1b", 262144, 1152),
        Shape("gemma3-4b", 262208, 2560),
        Shape("gemma3-12b", 262208, 3840),
        Shape("gemma3-27b", 262208, 5376),
        Shape("smollm2-135m", 49152, 576),
        Shape("smollm2-360m", 49152, 960),
        Shape("smollm2-1.7b", 49152, 2048),
        Shape("tiny", 2048, 64),
    )
}

# Name -> standard deviation of independent logits, or mean entropy in nats of a peaked distribution. Language
# models under reinforcement learning are peaked: 1.2 to 1.6 nats for a small chat model, 0.1 to 0.2 for one
# tuned on mathematics.
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
    """N = 0: what one measures in seconds. Responses have 1024 tokens on a GPU; on a CPU there are 4."""
    size = SHAPES[shape].V * SHAPES[shape].d
    small = 16384 if gpu else 128 if shape == "tiny" else 512 if size < 1e8 else 256 if size < 5e8 else 64
    N = N or small
    return Case(SHAPES[shape], N, dtype, distribution, max(1, N // 1024) if gpu else min(4, N))


def default_cases(op: str, gpu: bool, quick: bool) -> list[Case]:
    """What `g2rl bench head` or `logprobs` measures when nothing is asked for: the most telling first,
    because a run that is out of time stops where it is."""
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
    """The op's inputs, on one device; cu_seqlens again as a list of numbers, which costs no wait for it."""

    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    tokens: Tensor  # [N], sampled from the softmax
    cu_seqlens: Tensor  # [S + 1]
    cuts: tuple[int, ...]
    softcap: float | None
    logprobs: Tensor  # [N] of the tokens, from logits in float32
    rounded_logprobs: Tensor  # [N] the same from logits in the model's dtype: what samplers report
    entropy: float  # nats, mean over the tokens

    def cut(self, responses: int) -> Problem:
        """The same tokens in so many responses."""
        cuts = _cuts(len(self.tokens), responses)
        return replace(self, cuts=cuts, cu_seqlens=torch.tensor(cuts, device=self.tokens.device))

    def moved(self) -> Problem:
        """The same numbers elsewhere in memory."""
        copies = {name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **copies)


def _cuts(N: int, responses: int) -> tuple[int, ...]:
    return tuple(N * i // responses for i in range(responses + 1))


def problem(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Problem:
    """The tensors of a case, made without N x V numbers: beside them are held, for a moment, hidden and
    weight in float32 and logits of a few hundred tokens."""
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


# A peaked distribution is made like a language model's: token frequencies follow Zipf's law (a direction that
# all hidden states share carries their logarithms), and each position lifts a few tokens out of that: one by
# a margin that varies from position to position, and eight rivals, which share a mass of 1. The margins'
# mean decides the entropy; their spread of 3 makes most positions certain and some forks, as measured on
# real models. Of the frequencies, e^-3 of the rivals' mass is left.
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
        """[n, 1 + RIVALS, d]: what added to a hidden state lifts one logit by 1."""
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
    """A normal sample without the luck of the draw."""
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
