"""The methods that are compared: this package in each mode, plain torch, and other packages. METHODS are
those of the head op, TRAINING those of `linear_logprobs`.

A method takes a `Problem` and returns `Outputs`, with None for outputs that it does not compute; in TRAINING,
autograd then takes their gradients. A method that cannot run is listed with its reason, from
`Method.obstacle` or from an exception at the first call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import g2rl_kernels as g2
from g2rl_kernels.head.spec import HeadSpec

from .registry import Problem

MAX_SKIPPED = 0.01  # of a response's residual mass, by the certificate


class Outputs(NamedTuple):
    features: Tensor | None = None  # [S, d]
    logprobs: Tensor | None = None  # [N]
    logsumexp: Tensor | None = None  # [N]
    entropy: Tensor | None = None  # [N]
    skipped_mass: Tensor | None = None  # [S], skipped share of a response's residual mass
    skipped_tokens: Tensor | None = None  # [S]
    total: Tensor | None = None  # sum of the log-probs, where a package differentiates only the sum


class Unavailable(Exception):
    """A method cannot run here; the message says why, in one line."""


@dataclass(frozen=True)
class Method:
    name: str
    call: Callable[[Problem], Outputs]
    leaves_out: str = ""  # outputs that it does not compute
    device: str = ""  # "cpu" or "cuda" where it runs on one of them only
    package: str = ""  # needs this package
    responses: int = 0  # uses this number of responses, not the case's: shows the cost of packing responses
    frozen: bool = False  # TRAINING: the weight gets no gradient
    any_batch: bool = False  # TRAINING: the backward pass with torch.use_deterministic_algorithms
    default: tuple[str, ...] = ("cuda",)  # devices on which it is measured by default

    def obstacle(self, device: str) -> str | None:
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        # Triton's interpreter runs the kernels on a CPU, for tests only.
        interpreted = self.device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"
        if self.device not in ("", device) and not interpreted:
            return f"runs on {self.device} only"
        return None


# --- the head op: ours --------------------------------------------------------------------------------------


def _features(p: Problem, backend: str | None, known: Tensor | None = None) -> Outputs:
    inputs = p.hidden, p.weight, p.tokens, p.cu_seqlens
    options: dict[str, Any] = {"logit_softcap": p.softcap, "known_logprobs": known, "backend": backend}
    return Outputs(*g2.head_features(*inputs, **options))


def _certified(p: Problem) -> Outputs:
    inputs = p.hidden, p.weight, p.tokens, p.cu_seqlens
    return Outputs(
        *g2.certified_head_features(
            *inputs, max_skipped=MAX_SKIPPED, logit_softcap=p.softcap, backend="triton"
        )
    )


def _statistics(p: Problem) -> Outputs:
    try:
        from g2rl_kernels.head.triton import driver
    except ImportError as error:
        raise Unavailable(f"this version has no kernel for it ({error})") from None
    head = HeadSpec(p.weight, logit_softcap=p.softcap or 0.0)
    return Outputs(None, *driver.token_statistics(p.hidden, p.tokens, head))


# --- the head op: plain torch -------------------------------------------------------------------------------


def _softmax(
    hidden: Tensor, weight: Tensor, tokens: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """log p(token), logsumexp, entropy, p [n, V] and the softcap's slope, in float32, from logits in the
    model's dtype."""
    z, slope = (hidden @ weight.T).float(), None
    if softcap is not None:
        z = torch.tanh_(z.div_(softcap))
        slope = 1 - z.square()
        z.mul_(softcap)
    lse = torch.logsumexp(z, -1)
    z = z.sub_(lse[:, None])
    logprobs = z.gather(1, tokens[:, None])[:, 0]
    p = z.exp()
    return logprobs, lse, -torch.linalg.vecdot(p, z), p, slope


def _response_of_tokens(cu_seqlens: Tensor, N: int) -> Tensor:
    """[N]: the number of each token's response."""
    S = cu_seqlens.shape[0] - 1
    number = torch.arange(S, device=cu_seqlens.device)
    return torch.repeat_interleave(number, cu_seqlens.diff(), output_size=N)


def _naive(
    hidden: Tensor, weight: Tensor, tokens: Tensor, cu_seqlens: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs, lse, entropy, p, slope = _softmax(hidden, weight, tokens, softcap)
    residual = p.neg_()
    residual.scatter_add_(1, tokens[:, None], torch.ones_like(tokens, dtype=p.dtype)[:, None])
    if slope is not None:
        residual *= slope
    phi = (residual.to(weight.dtype) @ weight).float()
    lengths = cu_seqlens.diff()
    features = phi.new_zeros(lengths.shape[0], phi.shape[1])
    features = features.index_add(0, _response_of_tokens(cu_seqlens, tokens.shape[0]), phi)
    return features / lengths[:, None], logprobs, lse, entropy


def torch_naive(p: Problem) -> Outputs:
    """Equations 5 to 8 as written: all logits at once, a feature for each token, then their means."""
    return Outputs(*_naive(p.hidden, p.weight, p.tokens, p.cu_seqlens, p.softcap))


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_naive, dynamic=True)  # static shapes would compile again for every N and V


def torch_compiled(p: Problem) -> Outputs:
    with torch.no_grad():
        return Outputs(*_compiled()(p.hidden, p.weight, p.tokens, p.cu_seqlens, p.softcap))


def torch_chunked(p: Problem, chunk: int) -> Outputs:
    """Plain torch at its best: a chunk of logits at a time, and residuals summed by response before the
    second product, which then has one row a response."""
    N, S = len(p.tokens), len(p.cuts) - 1
    owner = _response_of_tokens(p.cu_seqlens, N)
    response = [s for s in range(S) for _ in range(p.cuts[s], p.cuts[s + 1])]
    residual = torch.zeros(S, len(p.weight), device=p.hidden.device)
    logprobs, lse, entropy, at_token = torch.ones(4, N, device=p.hidden.device)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        first, last = response[start], response[rows.stop - 1]
        logprobs[rows], lse[rows], entropy[rows], prob, slope = _softmax(
            p.hidden[rows], p.weight, p.tokens[rows], p.softcap
        )
        if slope is not None:
            at_token[rows] = slope.gather(1, p.tokens[rows, None])[:, 0]
            prob *= slope
        here = torch.arange(first, last + 1, device=p.hidden.device)[:, None] == owner[rows]
        residual[first : last + 1] -= here.float() @ prob
    residual.index_put_((owner, p.tokens), at_token, accumulate=True)
    features = (residual.to(p.weight.dtype) @ p.weight).float()
    return Outputs(features / p.cu_seqlens.diff()[:, None], logprobs, lse, entropy)


# --- linear_logprobs ----------------------------------------------------------------------------------------


def _logprobs(p: Problem, entropy: bool = False, **options: Any) -> Outputs:
    out = g2.linear_logprobs(p.hidden, p.weight, p.tokens, logit_softcap=p.softcap, **options)
    return Outputs(logprobs=out.logprobs, entropy=out.entropy if entropy else None)


def _log_softmax(hidden: Tensor, weight: Tensor, tokens: Tensor, softcap: float | None) -> Tensor:
    """[N], the usual way: log-softmax in float32, from logits in the model's dtype."""
    z = (hidden @ weight.T).float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.log_softmax(1).gather(1, tokens[:, None])[:, 0]


def _logprobs_naive(p: Problem) -> Outputs:
    return Outputs(logprobs=_log_softmax(p.hidden, p.weight, p.tokens, p.softcap))


@functools.cache
def _compiled_logprobs() -> Callable[..., Tensor]:
    return torch.compile(_log_softmax, dynamic=True)


def _logprobs_compiled(p: Problem) -> Outputs:
    return Outputs(logprobs=_compiled_logprobs()(p.hidden, p.weight, p.tokens, p.softcap))


def _logprobs_chunked(p: Problem, chunk: int) -> Outputs:
    """A chunk of logits at a time; the backward pass computes it again (checkpointing)."""
    chunks = zip(p.hidden.split(chunk), p.tokens.split(chunk))
    logprobs = [
        checkpoint(_log_softmax, hidden, p.weight, tokens, p.softcap, use_reentrant=False)
        for hidden, tokens in chunks
    ]
    return Outputs(logprobs=torch.cat(logprobs))


def _linear_cross_entropy(p: Problem, **options: Any) -> Outputs:
    """torch's own, from 2.13 on: some tokens at a time, computed again in the backward pass."""
    if p.softcap is not None:
        raise Unavailable("torch's linear_cross_entropy has no softcap")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable("needs torch 2.13 or later")
    chunking = torch.nn.LinearCrossEntropyOptions(**options)
    found = torch.nn.functional.linear_cross_entropy(
        p.hidden, p.weight, p.tokens, reduction="none", options=chunking
    )
    return Outputs(logprobs=-found)


def _trl(p: Problem, float32: bool = False, entropy: bool = False) -> Outputs:
    """TRL's, 32768 entries at a time, with tensors as they are or cast to float32 (cast_lm_head_to_fp32)."""
    try:
        from trl.kernels import ChunkedLogProbFunction as chunked
    except ImportError:
        raise Unavailable("needs trl 1.16 or later") from None
    hidden, weight = (p.hidden.float(), p.weight.float()) if float32 else (p.hidden, p.weight)
    wanted = ("entropy",) if entropy else ()
    logprobs, mean, *_ = chunked.apply(hidden, weight, None, p.tokens, 1.0, 32768, p.softcap, 1.0, wanted)
    return Outputs(logprobs=logprobs, entropy=mean)


# --- other packages: losses only ----------------------------------------------------------------------------


def _cce(p: Problem, impl: str = "cce") -> Outputs:
    from cut_cross_entropy import linear_cross_entropy

    options = {"softcap": p.softcap, "reduction": "none", "impl": impl}
    return Outputs(logprobs=-linear_cross_entropy(p.hidden, p.weight, p.tokens, **options))


def _liger(p: Problem, reduction: str = "none") -> Outputs:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as fused

    options = (None, None, -100, 0.0, 0.0, reduction, p.softcap)  # bias ... reduction, softcap
    out = fused.apply(p.hidden, p.weight, p.tokens, *options)
    loss = out[0] if isinstance(out, tuple) else out
    return Outputs(total=-loss) if reduction == "sum" else Outputs(logprobs=-loss)


def _quack(p: Problem) -> Outputs:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if p.softcap is not None:
        raise Unavailable("quack has no softcap")
    return Outputs(total=-chunked_linear_cross_entropy(p.hidden, p.weight, p.tokens, reduction="sum"))


OURS = "g2rl-kernels"
NO_LOSS = "features, logsumexp, entropy"
NO_ENTROPY = "entropy"
SUM_ONLY = f"{NO_ENTROPY}, gradients but for those of the log-probs' sum"
METHODS = {
    method.name: method
    for method in (
        # C++ on a CPU
        Method(
            f"{OURS}, 1 response", lambda p: _features(p, "cpu"), "", "cpu", responses=1, default=("cpu",)
        ),
        Method(
            f"{OURS}, 8 responses", lambda p: _features(p, "cpu"), "", "cpu", responses=8, default=("cpu",)
        ),
        Method(OURS, lambda p: _features(p, "cpu"), "", "cpu", default=("cpu",)),
        # either
        Method(f"{OURS}, known_logprobs", lambda p: _features(p, None, p.logprobs), default=("cpu",)),
        # as samplers with 16-bit logits report them
        Method(f"{OURS}, known_logprobs rounded", lambda p: _features(p, None, p.rounded_logprobs)),
        # Triton on a GPU
        Method(f"{OURS}, statistics", _statistics, "features", "cuda"),
        Method(f"{OURS}, nothing known", lambda p: _features(p, "triton"), "", "cuda"),
        Method(
            f"{OURS}, certificate",
            _certified,
            f"tokens with at most {MAX_SKIPPED:.0%} of a response's residual mass",
            "cuda",
        ),
        # plain torch
        Method("torch, 64 tokens at a time", lambda p: torch_chunked(p, 64), default=("cpu",)),
        Method("torch, 2048 tokens at a time", lambda p: torch_chunked(p, 2048)),
        Method("torch, all logits at once", torch_naive, default=("cpu", "cuda")),
        Method("torch.compile, all logits at once", torch_compiled),
        # other packages
        Method("CCE", _cce, NO_LOSS, "cuda", "cut_cross_entropy"),
        Method("Liger", _liger, NO_LOSS, "cuda", "liger_kernel"),
        Method("quack", _quack, f"{NO_LOSS}, log-probs but for their sum", "cuda", "quack"),
    )
}

EVERYWHERE = ("cpu", "cuda")
TRAINING = {
    method.name: method
    for method in (
        # C++ on a CPU, Triton on a GPU
        Method(OURS, _logprobs, default=EVERYWHERE),
        Method(f"{OURS}, no logits kept", lambda p: _logprobs(p, logits_memory=0), default=EVERYWHERE),
        Method(
            f"{OURS}, 256 MiB of logits", lambda p: _logprobs(p, logits_memory=256 << 20), default=("cpu",)
        ),
        Method(f"{OURS}, 1 GiB of logits", lambda p: _logprobs(p, logits_memory=1 << 30), "", "cuda"),
        Method(f"{OURS}, all logits kept", lambda p: _logprobs(p, logits_memory=1 << 40), "", "cuda"),
        Method(f"{OURS}, the same bits in any batch", _logprobs, device="cuda", any_batch=True),
        Method(f"{OURS}, entropy bonus", lambda p: _logprobs(p, entropy=True), default=EVERYWHERE),
        Method(f"{OURS}, frozen weight", _logprobs, frozen=True, default=EVERYWHERE),
        Method(f"{OURS}, tiles in PyTorch", lambda p: _logprobs(p, backend="reference"), default=EVERYWHERE),
        # plain torch
        Method(
            "torch, 64 tokens at a time", lambda p: _logprobs_chunked(p, 64), NO_ENTROPY, default=("cpu",)
        ),
        Method("torch, 2048 tokens at a time", lambda p: _logprobs_chunked(p, 2048), NO_ENTROPY),
        Method("torch, all logits at once", _logprobs_naive, NO_ENTROPY, default=EVERYWHERE),
        Method("torch.compile, all logits at once", _logprobs_compiled, NO_ENTROPY),
        Method("torch linear_cross_entropy", _linear_cross_entropy, NO_ENTROPY, default=EVERYWHERE),
        Method(
            "torch linear_cross_entropy, 64 tokens at a time",
            lambda p: _linear_cross_entropy(
                p, chunking_method=None, batch_chunk_size=64, acc_policy="accurate"
            ),
            NO_ENTROPY,
            default=("cpu",),
        ),
        # other packages
        Method("TRL", _trl, NO_ENTROPY, "", "trl", default=EVERYWHERE),
        Method("TRL, entropy bonus", lambda p: _trl(p, entropy=True), "", "", "trl", default=EVERYWHERE),
        Method("TRL, float32 head", lambda p: _trl(p, True), NO_ENTROPY, "", "trl", default=EVERYWHERE),
        Method("CCE", _cce, f"{NO_ENTROPY}, gradients where p < 2^-12", "cuda", "cut_cross_entropy"),
        Method("CCE, exact", lambda p: _cce(p, "cce_exact"), NO_ENTROPY, "cuda", "cut_cross_entropy"),
        Method("Liger", lambda p: _liger(p, "sum"), SUM_ONLY, "cuda", "liger_kernel"),
        Method("quack", _quack, SUM_ONLY, "cuda", "quack"),
    )
}


def default_methods(methods: dict[str, Method], device: str) -> list[str]:
    return [name for name, method in methods.items() if device in method.default]
