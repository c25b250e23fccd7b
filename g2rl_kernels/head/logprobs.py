"""`linear_logprobs`: log-probabilities and entropy, differentiable, without ever holding the logits.

**Forward.** With z the logits over temperature, a backend's `statistics` gives for each token

    m = max z_v,   s = sum exp(z_v - m),   u = sum exp(z_v - m) (z_v - m)         over v other than y

and z_y of the realised token y. `finish` puts y back: as p_y nears 1, log p_y = -log1p(s exp(m - z_y)) then
keeps its digits, and the backward pass takes 1 - p_y from it (`terms`).

**Backward.** Let g and e be the gradients of the loss by log p_y and by the entropy H. Its gradient by
W h + b is logit_scale / temperature times the softcap's slope times

    dz_v = -p_v (g + e (log p_v + H)),    and at y    g (1 - p_y) - p_y e (log p_y + H).

A backend's `sweep` recomputes z block by block and multiplies: dhidden += dz W, dW = dz^T hidden. With the
forward pass that is four products of N x V x d (three with a frozen weight); `_gradients` orders them so that
they need little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .._ops import qualified
from ..arguments import check_bytes, check_token_values, may_read_values
from . import reference, tiled, vocab_parallel
from .autograd import GRADIENTS_SCHEMA, NEEDED, backward_through, empty_gradients, setup_context
from .backend import Incoming, Kept, Sums, TokenLogprobs, choose_backend, empty_statistics
from .backend import backend as implementation
from .lora import Lora, with_lora
from .spec import DTYPES, FIELDS, HEAD_SCHEMA, STATISTICS_SCHEMA, HeadSpec, asked_for, check_statistics
from .support import mixed
from .support.spec import Support, SupportArgument, facts_of, support_of

# Bytes of float32 sums for the gradient of a 16-bit hidden; larger sums borrow the weight's gradient.
SUMS = 16 << 20
# Sweeps begin at multiples of this: csrc/cpu/logprobs.cpp sums hidden's gradient by slabs that divide it, so
# that sums are the same wherever `_gradients` cuts the vocabulary.
SLAB = 1536
ROWS = 64  # and at multiples of this many tokens, as logits are kept by tiles

LOGITS_MEMORY = 64 << 20  # bytes: default of linear_logprobs


class LinearLogprobs(NamedTuple):
    """What `linear_logprobs` returns; float32 (float64 for float64 inputs), differentiable."""

    logprobs: Tensor  # [N], nats
    entropy: Tensor  # [N], nats


class LinearLogprobsWithStatistics(NamedTuple):
    """What `linear_logprobs` returns where statistics are asked for; None for those that are not."""

    logprobs: Tensor  # [N], nats; differentiable
    entropy: Tensor  # [N], nats; differentiable
    sum_p_squared: Tensor | None  # [N]
    top_token: Tensor | None  # [N] int64
    top_logprob: Tensor | None  # [N], nats


@overload  # () is a sequence of names too
def linear_logprobs(  # type: ignore[overload-overlap]
    hidden: Tensor, weight: Tensor, tokens: Tensor, *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ..., logit_scale: float = ..., logit_softcap: float | None = ...,
    lora: Lora | None = ...,
    support: SupportArgument = ...,
    statistics: tuple[()] = ..., logits_memory: int = ...,
    process_group: Any = ..., backend: str | None = ...,
) -> LinearLogprobs: ...  # fmt: skip
@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ..., logit_scale: float = ..., logit_softcap: float | None = ...,
    lora: Lora | None = ...,
    support: SupportArgument = ...,
    statistics: Sequence[str], logits_memory: int = ...,
    process_group: Any = ..., backend: str | None = ...,
) -> LinearLogprobsWithStatistics: ...  # fmt: skip
def linear_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0, logit_scale: float = 1.0, logit_softcap: float | None = None,
    lora: Lora | None = None,
    support: SupportArgument = None,
    statistics: Sequence[str] = (), logits_memory: int = LOGITS_MEMORY,
    process_group: Any = None, backend: str | None = None,
) -> LinearLogprobs | LinearLogprobsWithStatistics:  # fmt: skip
    """log p(tokens[t]) and the entropy of p_t, differentiable, for the head described at `head_features`.

    Neither forward nor backward makes a tensor of N x V beyond logits_memory; beside that and the gradients
    backends "cpu" and "triton" need less than 64 MiB. Sums are in float32 or better; gradients are rounded
    once, to the dtype of their input. 1 - p does not cancel for near-certain tokens. A frozen weight costs no
    weight gradient.

    Args:
        hidden: [N, d] float32, bfloat16, float16, or float64 (for gradient checks: float64 throughout, in
            PyTorch).
        weight: [V, d], dtype of hidden.
        tokens: [N] int64 in [0, V).
        bias: see `head_features`; float64 with a float64 hidden.
        temperature, logit_scale, logit_softcap, statistics, backend: see `head_features`.
        lora: (A [r, d], B [V, r], scaling), see `head_features`. B's gradient is summed in float32, beside it
            unless B is float32; A's in float64. hidden's is the sum of two, through W and through A, each
            rounded to its dtype.
        support: see `head_features`. The K logits are kept until the backward pass, 4 bytes each, whatever
            logits_memory is. The weight's gradient is zero but for the kept ids' rows.
        logits_memory: bytes of logits that this call may keep until its backward pass (64 MiB). What fits is
            not multiplied again: with all of them, gradients take three products of N x V x d in place of
            four. A logit takes 2 bytes for bfloat16, 4 otherwise. 0: none are kept. "reference" keeps none.
        process_group: see `head_features`. Each rank computes the same loss and calls backward with the same
            incoming gradients. The gradient of hidden is then whole and the same on all ranks: do not sum it
            over them again; so is that of A. The gradients of weight, bias and B are those of this rank's
            rows.

    Returns:
        logprobs [N] and entropy [N] in nats, float32 (float64 for float64). Gradients flow to hidden, weight,
        bias, A and B; they cannot be differentiated again. Where statistics are asked for, these stand
        behind, as in `head_features`; float32 (float64), without gradients.

    Raises:
        TypeError, ValueError, ImportError: as for `head_features`.
    """
    head = HeadSpec(weight, bias, temperature, logit_scale, logit_softcap)
    lists = support_of(support)
    check = partial(_check, hidden, tokens, head, lora, statistics, logits_memory, backend, lists)
    facts = {"function": "linear_logprobs", "statistics": statistics, "logits_memory": logits_memory}
    facts |= {"backend": backend, "lora": lora}
    facts |= facts_of(lists)
    checked, tokens, group = vocab_parallel.checked(check, process_group, hidden, tokens, head, facts)
    head, backend, lists = checked
    trained = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias, head.low_hidden, head.low_weight)
    )
    options = backend, group, logits_memory if trained else 0, bool(statistics)
    if lists is None:
        logprobs, entropy, _, _, *asked = _logprobs_op(hidden, tokens, *head, *options)
    else:
        lists = lists.local(head.weight.shape[0], group)
        logprobs, entropy, *asked = mixed.logprobs(hidden, tokens, head, lists, *options)
    if not statistics:
        return LinearLogprobs(logprobs, entropy)
    return LinearLogprobsWithStatistics(logprobs, entropy, *asked_for(statistics, *asked))


def _check(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    lora: Lora | None,
    statistics: Sequence[str],
    logits_memory: int,
    backend: str | None,
    support: Support | None,
    whole: bool = False,
) -> tuple[HeadSpec, str, Support | None]:
    """Head and support in the form that backends take, and the backend's name; whole: as in features.py."""
    head = with_lora(head.checked(hidden, tokens, (*DTYPES, torch.float64)), hidden, lora)
    check_statistics(statistics)
    check_bytes("logits_memory", logits_memory)
    if whole and may_read_values(hidden):
        check_token_values(tokens, head.weight.shape[0])
    if support is not None:
        support = support.checked(hidden, tokens, head.weight.shape[0] if whole else None)
    if hidden.dtype != torch.float64:
        return head, choose_backend(backend, hidden.device), support
    if backend not in (None, "reference"):
        raise TypeError(f"hidden: got torch.float64, which backend {backend!r} does not take; use None")
    return head, "reference", support


# --- forward ------------------------------------------------------------------------------------------------


def forward(
    name: str,
    group: str,
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    kept: Kept | None = None,
    more: bool = False,
) -> TokenLogprobs:
    """Everything about each token that does not need a second product; with a group (vocab_parallel.py),
    over the vocabulary of all ranks. A token in no row of the weight has NaN, and -1 for top_token."""
    chosen = implementation(name)
    V = head.weight.shape[0]
    partial_sums, target, top = chosen.statistics(hidden, tokens, head, kept, more)
    if group:
        strips = vocab_parallel.over_ranks(partial_sums, target, tokens, top, V, group)
        parts = [chosen.finish(*strip) for strip in strips]
        parts = parts or [chosen.finish(partial_sums, target, tokens, top)]
        return TokenLogprobs(*(torch.cat(part, dim=-1) for part in zip(*parts)))
    found = chosen.finish(partial_sums, target, tokens, top)
    outside = (tokens < 0) | (tokens >= V)
    for values in (
        found.logprobs,
        found.entropy,
        *((found.sum_p_squared, found.top_logprob) if more else ()),
    ):
        values.masked_fill_(outside, torch.nan)
    if more:
        found.top_token.masked_fill_(outside, -1)
    return found


@torch.library.custom_op(
    qualified("linear_logprobs"),
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor tokens, {HEAD_SCHEMA}, str backend, str group, int logits_memory, "
    "bool statistics) -> (Tensor logprobs, Tensor entropy, Tensor normaliser, Tensor kept, "
    f"{STATISTICS_SCHEMA})",
)
def _logprobs_op(
    hidden: Tensor, tokens: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head, (name, group, most, more) = HeadSpec(*flat[:FIELDS]).rounded(), flat[FIELDS:]
    data = _empty_kept(name, hidden, head, most)
    kept = Kept(data, hidden.shape[0]) if data.numel() else None
    with torch.autocast(hidden.device.type, enabled=False):
        found = forward(name, group, hidden, tokens, head, kept, more)
        asked = found.sum_p_squared, found.top_token, found.top_logprob
        return found.logprobs, found.entropy, found.normaliser, data, *asked


@_logprobs_op.register_fake
def _(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    N, dtype = hidden.shape[0], reference.accumulation_dtype(hidden)
    found = (hidden.new_empty(size, dtype=dtype) for size in ((N,), (N,), (2, N)))
    kept = _empty_kept(flat[FIELDS], hidden, HeadSpec(*flat[:FIELDS]), flat[-2])
    return *found, kept, *empty_statistics(hidden, N if flat[-1] else 0, dtype)


def _empty_kept(name: str, hidden: Tensor, head: HeadSpec, most: int) -> Tensor:
    """Room for the logits that are kept, uint8."""
    return hidden.new_empty(implementation(name).kept_bytes(hidden, head, most), dtype=torch.uint8)


# --- backward -----------------------------------------------------------------------------------------------


@torch.library.custom_op(
    qualified("linear_logprobs_backward"),
    mutates_args=(),
    schema=f"(Tensor grad_logprobs, Tensor grad_entropy, Tensor hidden, Tensor tokens, {HEAD_SCHEMA}, "
    "str backend, str group, Tensor logprobs, Tensor entropy, Tensor normaliser, Tensor kept, "
    f"{GRADIENTS_SCHEMA}",
)
def _backward_op(
    grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, tokens: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Gradients of the inputs in NEEDED; an empty tensor for each that is not needed."""
    given, (name, group, *outputs) = HeadSpec(*flat[:FIELDS]), flat[FIELDS : -len(NEEDED)]
    head = given.rounded()
    logprobs, entropy, normaliser, data = outputs
    needs = flat[-len(NEEDED) :]
    chosen = implementation(name)
    grads = grad_logprobs.to(logprobs), grad_entropy.to(logprobs)
    incoming = Incoming(normaliser, chosen.terms(*grads, logprobs, entropy))

    def sweep(rows: slice, block: slice, sums: Sums) -> None:
        kept = Kept(data, len(hidden), rows.start) if data.numel() else None
        chosen.sweep(hidden[rows], tokens[rows], head.at(rows), incoming.rows(rows), block, sums, kept)

    dtype = reference.accumulation_dtype(hidden)
    parts = given.low_hidden, given.low_weight
    low = [
        hidden.new_zeros(t.shape, dtype=dtype) if need and t is not None else None
        for t, need in zip(parts, needs[3:])
    ]
    with torch.autocast(hidden.device.type, enabled=False):
        found = _gradients(sweep, hidden, head, group, needs[:3], low)
        if low[0] is not None:
            vocab_parallel.all_reduce(low[0], group)
    return *found, *(
        hidden.new_empty(0) if s is None or t is None else s.to(t.dtype) for s, t in zip(low, parts)
    )


@_backward_op.register_fake
def _(grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    return tuple(empty_gradients(hidden, HeadSpec(*flat[1 : 1 + FIELDS]), flat[-len(NEEDED) :]))


def _gradients(
    sweep: Callable[..., None],
    hidden: Tensor,
    head: HeadSpec,
    group: str,
    needs: tuple[bool, ...],
    low: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls sweep(rows, block, Sums(...)) such that all gradients needed are whole.

    A sweep adds to float32 sums of hidden's gradient and completes a block of rows of the weight's gradient.
    So the sums are needed for all tokens of a sweep at once. Sums of more than SUMS bytes borrow the last 2 N
    rows of the weight's gradient; those rows are written last, by a sweep that computes the logits there
    once more (2 N / V of a product). Sums of the low-rank part, `low`, have their own memory: each sweep
    that is given some adds to them.

    With a group, hidden's gradient is summed over ranks before it is rounded, chunk by chunk. All ranks must
    cut the same chunks whatever the size of their shards, so no rank borrows; with several chunks the
    weight's gradient takes a sweep of its own, a fifth product.
    """
    weight, bias = head.weight, head.bias
    need_hidden, need_weight, need_bias = needs
    (N, d), V = hidden.shape, weight.shape[0]
    everything, vocabulary = slice(0, N), slice(0, V)
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    # contiguous, even if weight is not
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    sum_bias = weight.new_zeros(V, dtype=reference.accumulation_dtype(weight)) if need_bias else None
    gw = grad_weight if need_weight else None

    def low_sums(rows: slice) -> tuple[Tensor | None, Tensor | None]:
        return None if low[0] is None else low[0][rows], low[1]

    if not need_hidden or N == 0:
        if need_weight or need_bias or low != [None, None]:
            sweep(everything, vocabulary, Sums(None, gw, sum_bias, *low_sums(everything)))
    elif grad_hidden.element_size() >= 4:
        sweep(everything, vocabulary, Sums(grad_hidden, gw, sum_bias, *low_sums(everything)))
        vocab_parallel.all_reduce(grad_hidden, group)
    elif group or not need_weight or 4 * N * d <= SUMS:
        step = max(1, SUMS // (4 * d) // ROWS) * ROWS
        one_chunk = 0 < N <= step
        for rows in tiled.slices(0, N, step):
            sums = hidden.new_zeros(rows.stop - rows.start, d, dtype=torch.float32)
            sweep(rows, vocabulary, Sums(sums, gw if one_chunk else None, sum_bias, *low_sums(rows)))
            vocab_parallel.all_reduce(sums, group)
            grad_hidden[rows] = sums
        if need_weight and not one_chunk:
            sweep(everything, vocabulary, Sums(None, gw))
    else:
        start = max(0, (V - 2 * N) // SLAB * SLAB)
        room = V - start
        if room < 2 * min(N, ROWS):
            room = 2 * min(N, ROWS)
            memory = hidden.new_empty(room * d)
        else:
            memory = grad_weight[start:].flatten()
        for rows in tiled.slices(0, N, max(ROWS, room // 2 // ROWS * ROWS)):
            n = rows.stop - rows.start
            sums = memory[: 2 * n * d].view(torch.float32).view(n, d).zero_()
            sweep(rows, slice(0, start), Sums(sums, gw, sum_bias, *low_sums(rows)))
            sweep(rows, slice(start, V), Sums(sums, None, sum_bias, *low_sums(rows)))
            grad_hidden[rows] = sums
        sweep(everything, slice(start, V), Sums(None, gw))
    grad_bias = hidden.new_zeros(0) if bias is None or sum_bias is None else sum_bias.to(bias.dtype)
    return grad_hidden, grad_weight, grad_bias


_logprobs_op.register_autograd(backward_through(_backward_op), setup_context=setup_context)
