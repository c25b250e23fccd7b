"""`linear_logprobs`: log-probabilities and entropy, differentiable, without ever holding the logits.

**Forward.** With z the logits over temperature, a backend's `statistics` gives for each token

    m = max z_v,   s = sum exp(z_v - m),   u = sum exp(z_v - m) (z_v - m)         over v other than y

and z_y of the realised token y. `merge` puts y back: as p_y nears 1, log p_y = -log1p(s exp(m - z_y)) then
keeps its digits, and the backward pass takes 1 - p_y from it.

**Backward.** With incoming gradients g of log p_y and e of the entropy H, dz = dL / d(logits before scale,
bias and softcap) is, up to the factor logit_scale / temperature x the softcap's slope,

    dz_v = -p_v (g + e (log p_v + H)),    and at y    g (1 - p_y) - p_y e (log p_y + H).

A backend's `sweep` recomputes z block by block and multiplies: dhidden += dz W, dW = dz^T hidden. With the
forward pass that is four products of N x V x d; `_gradients` says in which order they need least memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import DTYPES, check_head, check_token_values, choose_backend, may_read_values
from . import reference, tiled, vocab_parallel
from .spec import HeadSpec

# Bytes of float32 sums for the gradient of a 16-bit hidden; what is more lies in the weight's gradient.
SUMS = 16 << 20


class LinearLogprobs(NamedTuple):
    """What `linear_logprobs` returns; float32 (float64 for float64 inputs), differentiable."""

    logprobs: Tensor  # [N], nats
    entropy: Tensor  # [N], nats


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    process_group: Any = None,
    backend: str | None = None,
) -> LinearLogprobs:
    """log p(tokens[t]) and the entropy of p_t, differentiable, for the head described at `head_features`.

    Neither forward nor backward makes a tensor of N x V; beside the gradients they need less than 64 MiB.
    Sums are in float32 or better, those of the gradients too, which are rounded to the dtype of their input
    once. 1 - p does not cancel for near-certain tokens. A frozen weight costs no weight gradient.

    Args:
        hidden: [N, d] float32, bfloat16, float16, or float64 (for gradient checks: float64 throughout, in
            PyTorch).
        weight: [V, d], dtype of hidden.
        tokens: [N] int64 in [0, V).
        bias, temperature, logit_scale, logit_softcap, process_group, backend: as for `head_features`. With a
            process_group each rank goes on to the same loss and calls backward, with the same incoming
            gradients: hidden's gradient is then whole, and the same, on all ranks (summing it over them once
            more would be wrong), those of weight and bias are of this rank's rows.

    Returns:
        logprobs [N] and entropy [N] in nats, float32 (float64 for float64). Gradients flow to hidden, weight
        and bias; they cannot be differentiated again.

    Raises:
        TypeError, ValueError, ImportError: as for `head_features`.
    """

    def check() -> str:
        check_head(
            hidden, weight, tokens, bias, temperature, logit_scale, logit_softcap, (*DTYPES, torch.float64)
        )
        if process_group is None and may_read_values(hidden):
            check_token_values(tokens, weight.shape[0])
        if hidden.dtype != torch.float64:
            return choose_backend(backend, hidden.device)
        if backend not in (None, "reference"):
            raise TypeError(f"hidden: got torch.float64, which backend {backend!r} does not take; use None")
        return "reference"

    chosen = vocab_parallel.checked(
        check, process_group, hidden, weight, tokens, function="linear_logprobs", bias=bias,
        temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap, backend=backend,
    )  # fmt: skip
    group = "" if process_group is None else process_group.group_name
    if group:
        tokens = vocab_parallel.local_tokens(tokens, weight.shape[0], group)
    options = float(temperature), float(logit_scale), float(logit_softcap or 0.0)
    logprobs, entropy, _ = _linear_logprobs(hidden, weight, tokens, bias, *options, chosen, group)
    return LinearLogprobs(logprobs, entropy)


def _implementation(backend: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., None]]:
    """A backend's `statistics` and `sweep`."""
    if backend == "cpu":
        return torch.ops.g2rl.head_statistics, torch.ops.g2rl.logprobs_sweep
    if backend != "triton":
        return tiled.statistics, tiled.sweep
    driver = importlib.import_module("g2rl_kernels.head.triton.driver")

    def sweep(hidden, weight, tokens, bias, normaliser, terms, temperature, scale, softcap, *rest):  # type: ignore
        head = HeadSpec(weight, bias, temperature, scale, softcap)
        driver.sweep(hidden, tokens, head, normaliser, terms, *rest)

    def statistics(hidden, weight, tokens, *others):  # type: ignore
        return driver.statistics(hidden, tokens, HeadSpec(weight, *others))

    return statistics, sweep


# --- forward ------------------------------------------------------------------------------------------------


@torch.library.custom_op("g2rl::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs [N], entropy [N] and the normaliser [2, N]: top and log_total, the logsumexp in two parts, as
    their sum would be rounded to the size of the logits. With a group (vocab_parallel.py), of all ranks."""
    head = hidden, weight, tokens, bias, temperature, logit_scale, logit_softcap
    with torch.autocast(hidden.device.type, enabled=False):
        partial, target = _implementation(backend)[0](*head)
        if group:
            partial, target = vocab_parallel.over_ranks(partial, target, tokens, group)
        logprobs, entropy, normaliser = merge(partial, target, reference.accumulation_dtype(hidden))
        if not group:  # over_ranks has seen to it
            outside = (tokens < 0) | (tokens >= weight.shape[0])
            for values in (logprobs, entropy):
                values.masked_fill_(outside, torch.nan)
        return logprobs, entropy, normaliser


@_linear_logprobs.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    N, dtype = hidden.shape[0], reference.accumulation_dtype(hidden)
    return tuple(hidden.new_empty(size, dtype=dtype) for size in ((N,), (N,), (2, N)))  # type: ignore


def merge(partial: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """From m, s, u of each part of the vocabulary [R, 3, N] and the realised logits [N]: log-probs [N],
    entropy [N] and normaliser [2, N]."""
    m, s, u = tiled.joined(partial)
    top = torch.maximum(m, target)
    s, u = tiled.shifted(m, s, u, top)
    e_y = torch.exp(target - top)
    log_total = torch.where(target >= m, torch.log1p(s), torch.log(s + e_y))
    logprobs = target - top - log_total
    u = u + torch.where(e_y == 0, 0, e_y * (target - top))
    entropy = log_total - u / (s + e_y)
    rounded = top.to(dtype)
    normaliser = torch.stack([rounded, (log_total + (top - rounded)).to(dtype)])
    return logprobs.to(dtype), entropy.to(dtype), normaliser


# --- backward -----------------------------------------------------------------------------------------------


@torch.library.custom_op("g2rl::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor,
    normaliser: Tensor,
    temperature: float,
    logit_scale: float,
    logit_softcap: float,
    backend: str,
    group: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that is not needed."""
    g, e, p_y = grad_logprobs.to(logprobs), grad_entropy.to(logprobs), logprobs.exp()
    own = torch.where(p_y == 0, 0.0, p_y * (logprobs + entropy))
    terms = torch.stack([g + e * entropy, e, -g * torch.expm1(logprobs) - e * own])
    # A token that is none, where values are not checked, does no harm if nothing is made of its NaN.
    terms.masked_fill_((g == 0) & (e == 0), 0.0)

    _, add = _implementation(backend)

    def sweep(rows: slice, begin: int, end: int, *sums: Tensor | None) -> None:
        add(
            hidden[rows], weight, tokens[rows], bias, normaliser[:, rows], terms[:, rows],
            temperature, logit_scale, logit_softcap, begin, end, *sums,
        )  # fmt: skip

    with torch.autocast(hidden.device.type, enabled=False):
        return _gradients(sweep, hidden, weight, bias, group, need_hidden, need_weight, need_bias)


def _gradients(
    sweep: Callable[..., None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls sweep(rows, begin, end, sum_hidden, grad_weight, grad_bias), with None for what is not wanted.

    A sweep adds to float32 sums of hidden's gradient, and finishes rows begin:end of the weight's; so the
    one needs float32 for all tokens at once, the other all tokens at once for a block of the vocabulary.
    Where the former takes more than SUMS bytes, it borrows the weight's gradient: its last 2 N rows, which
    are then written last, by a sweep that computes the logits there once more (2 N / V of a product).

    With a group, hidden's gradient is summed over ranks before it is rounded, piece by piece. All ranks must
    cut the same pieces, whatever the size of their shards: none borrows, and where there are several pieces
    the weight's gradient is a sweep of its own, a fifth product.
    """
    (N, d), V = hidden.shape, weight.shape[0]
    everything = slice(0, N)
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    # contiguous, whatever weight is
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    sum_bias = weight.new_zeros(V, dtype=reference.accumulation_dtype(weight)) if need_bias else None
    gw = grad_weight if need_weight else None
    if not need_hidden or N == 0:
        if need_weight or need_bias:
            sweep(everything, 0, V, None, gw, sum_bias)
    elif grad_hidden.element_size() >= 4:
        sweep(everything, 0, V, grad_hidden, gw, sum_bias)
        vocab_parallel.all_reduce(grad_hidden, group)
    elif group or not need_weight or 4 * N * d <= SUMS:
        step = max(1, SUMS // (4 * d))
        one_piece = 0 < N <= step
        for rows in tiled.slices(0, N, step):
            sums = hidden.new_zeros(rows.stop - rows.start, d, dtype=torch.float32)
            sweep(rows, 0, V, sums, gw if one_piece else None, sum_bias)
            vocab_parallel.all_reduce(sums, group)
            grad_hidden[rows] = sums
        if need_weight and not one_piece:
            sweep(everything, 0, V, None, gw, None)
    else:
        start = max(0, (V - 2 * N) // 2 * 2)  # even: on a whole float32
        memory = (grad_weight[start:] if V > 1 else hidden.new_empty(2, d)).flatten()
        for rows in tiled.slices(0, N, (V - start) // 2):
            n = rows.stop - rows.start
            sums = memory[: 2 * n * d].view(torch.float32).view(n, d).zero_()
            sweep(rows, 0, start, sums, gw, sum_bias)
            sweep(rows, start, V, sums, None, sum_bias)
            grad_hidden[rows] = sums
        sweep(everything, start, V, None, gw, None)
    grad_bias = hidden.new_zeros(0) if bias is None or sum_bias is None else sum_bias.to(bias.dtype)
    return grad_hidden, grad_weight, grad_bias


@_linear_logprobs_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = args[2], args[3], args[5]
    need_hidden, need_weight, need_bias = args[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        bias.new_empty(bias.shape) if need_bias else hidden.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, tokens, bias, *options = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(hidden, weight, tokens, bias, *output)
    ctx.options = options


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, tokens, bias, *outputs = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    incoming = [
        torch.zeros_like(outputs[0]) if grad is None else grad for grad in (grad_logprobs, grad_entropy)
    ]
    grad_hidden, grad_weight, grad_bias = (
        grad if need else None
        for grad, need in zip(
            _linear_logprobs_backward(
                *incoming, hidden, weight, tokens, bias, *outputs, *ctx.options, *needed
            ),
            needed,
        )
    )
    return grad_hidden, grad_weight, None, grad_bias, *[None] * len(ctx.options)


_linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
