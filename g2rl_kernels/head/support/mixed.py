"""`support` where some tokens are `whole`: these take the full head, the others their ids.

Values alone tell which tokens are whole, so the split stands within operators: torch.compile sees one with
outputs of known sizes, and uncompiled code runs the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._ops import ops, qualified
from ...arguments import check_cu_seqlens_values
from .. import logprobs as full
from .. import reference
from ..autograd import GRADIENTS_SCHEMA, NEEDED, backward_through, empty_gradients, setup_context
from ..backend import Kept, empty_statistics
from ..backend import backend as full_head
from ..spec import FIELDS, HEAD_SCHEMA, RESPONSES_SCHEMA, STATISTICS_SCHEMA, HeadSpec, Responses
from .ops import support_logprobs
from .spec import SUPPORT_SCHEMA, Support

MIXED_SCHEMA = f"{SUPPORT_SCHEMA}, Tensor whole"
EVERYTHING = 2**62  # bytes of logits: as many as there are
ROWS_OF_TOKENS = (True, False, False, True, False)  # of the gradients in NEEDED: a row a token


def features(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    support: Support,
    responses: Responses,
    backend: str,
    group: str,
    more: bool,
) -> tuple[Tensor, ...]:
    """features [S, d + r], logprobs, logsumexp, entropy and the statistics of `head_features`."""
    ids, offsets, whole = support
    rest = *responses, backend, group, more
    if whole is None or not _most_whole(whole):
        return ops.support_features(hidden, tokens, *head, ids, offsets, *rest)
    return ops.mixed_features(hidden, tokens, *head, ids, offsets, whole, *rest)


def logprobs(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    support: Support,
    backend: str,
    group: str,
    logits_memory: int,
    more: bool,
) -> tuple[Tensor, ...]:
    """logprobs and entropy, differentiable, and the statistics of `linear_logprobs`."""
    ids, offsets, whole = support
    if whole is None or not (most := _most_whole(whole)):
        out = support_logprobs(hidden, tokens, *head, ids, offsets, backend, group, logits_memory, more)
        return *out[:2], *out[4:]
    options = backend, group, most, logits_memory, more
    out = mixed_logprobs(hidden, tokens, *head, ids, offsets, whole, *options)
    return *out[:2], *out[5:]


def _most_whole(whole: Tensor) -> int:
    """How many tokens are whole; where code is compiled, which reads no values, how many may be."""
    return whole.shape[0] if torch.compiler.is_compiling() else int(whole.sum())


def _parts(whole: Tensor) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """First the whole tokens, then the others: whether whole, which [N] bool, and their rows [n] int64."""
    for flag, chosen in ((True, whole), (False, ~whole)):
        if chosen.any():
            yield flag, chosen, chosen.nonzero().squeeze(1)


# --- features -----------------------------------------------------------------------------------------------

torch.library.define(
    qualified("mixed_features"),
    f"(Tensor hidden, Tensor tokens, {HEAD_SCHEMA}, {MIXED_SCHEMA}, {RESPONSES_SCHEMA}, str backend, "
    "str group, bool statistics) -> (Tensor features, Tensor logprobs, Tensor logsumexp, Tensor entropy, "
    f"{STATISTICS_SCHEMA})",
)


@torch.library.impl(qualified("mixed_features"), "CompositeExplicitAutograd")
def _features(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    head, (ids, offsets, whole, *rest) = HeadSpec(*flat[:FIELDS]), flat[FIELDS:]
    if not whole.any():
        return ops.support_features(hidden, tokens, *head, ids, offsets, *rest)
    (cu_seqlens, alpha, *options), N = rest, hidden.shape[0]
    if options[0] == "cpu":
        check_cu_seqlens_values(cu_seqlens, N)
    cu_seqlens = reference.in_bounds(cu_seqlens, N)
    support = Support(ids, offsets).for_backend(options[0])
    alpha = hidden.new_ones(N, dtype=torch.float32) if alpha is None else alpha
    outputs: list[Tensor] = []
    total = hidden.new_zeros(cu_seqlens.shape[0] - 1, dtype=torch.float64)
    sums = hidden.new_zeros(total.shape[0], hidden.shape[1] + head.rank, dtype=torch.float64)
    for all_ids, chosen, rows in _parts(whole):
        ends = pad(chosen.cumsum(0), (1, 0))[cu_seqlens]
        operands = hidden[rows], tokens[rows], *head.at(rows)
        if all_ids:
            out = ops.features(*operands, ends, alpha[rows], None, None, *options)
            found = *out[:4], *out[6:]
        else:
            mine = support.of(rows)
            found = ops.support_features(*operands, mine.ids, mine.offsets, ends, alpha[rows], *options)
        share = reference.segment_sum(torch.where(chosen, alpha, 0.0).double(), cu_seqlens, 0, N)
        sums += found[0].double() * (share + reference.WEIGHT_EPS)[:, None]
        total += share
        outputs = outputs or [t.new_empty(N if len(t) == len(rows) else 0) for t in found[1:]]
        for out, part in zip(outputs, found[1:]):
            if out.numel():
                out[rows] = part
    return (sums / (total + reference.WEIGHT_EPS)[:, None]).float(), *outputs


@torch.library.register_fake(qualified("mixed_features"))
def _(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    (N, d), S = hidden.shape, flat[FIELDS + 3].shape[0] - 1
    columns = d + HeadSpec(*flat[:FIELDS]).rank
    floats = [hidden.new_empty(size, dtype=torch.float32) for size in ((S, columns), (N,), (N,), (N,))]
    return *floats, *empty_statistics(hidden, N if flat[-1] else 0)


# --- log-probabilities --------------------------------------------------------------------------------------


@torch.library.custom_op(
    qualified("mixed_logprobs"),
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor tokens, {HEAD_SCHEMA}, {MIXED_SCHEMA}, str backend, str group, "
    "SymInt most_whole, int logits_memory, bool statistics) -> (Tensor logprobs, Tensor entropy, "
    f"Tensor normaliser, Tensor kept, Tensor x, {STATISTICS_SCHEMA})",
)
def mixed_logprobs(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    """As linear_logprobs' operator and support_logprobs, each for some tokens.

    most_whole: at least as many as there are whole tokens; `kept` has room for their logits.
    """
    head, (ids, offsets, whole, *options) = HeadSpec(*flat[:FIELDS]).rounded(), flat[FIELDS:]
    name, group, most, logits_memory, more = options
    support, outputs = Support(ids, offsets).for_backend(name), _outputs(hidden, more)
    data, x = _empty_kept(name, hidden, head, most, logits_memory), outputs[0].new_zeros(ids.shape[0])
    for all_ids, _, rows in _parts(whole):
        h, y, here = hidden[rows], tokens[rows], head.at(rows)
        if all_ids:
            with torch.autocast(hidden.device.type, enabled=False):
                known = full.forward(name, group, h, y, here, _kept(name, h, here, data), more)
            found = *known[:3], *known[4:]
        else:
            mine = support.of(rows)
            out = ops.support_logprobs(h, y, *here, mine.ids, mine.offsets, name, group, 0, more)
            x[: mine.ids.shape[0]], found = out[3], (*out[:3], *out[4:])
        for all_tokens, part in zip(outputs, found):
            if all_tokens.numel():
                all_tokens[..., rows] = part
    return *outputs[:3], data, x, *outputs[3:]


@mixed_logprobs.register_fake
def _(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    head, (ids, *_, name, _, most, logits_memory, more) = HeadSpec(*flat[:FIELDS]), flat[FIELDS:]
    outputs = _outputs(hidden, more)
    data = _empty_kept(name, hidden, head, most, logits_memory)
    return *outputs[:3], data, outputs[0].new_empty(ids.shape[0]), *outputs[3:]


@torch.library.custom_op(
    qualified("mixed_logprobs_backward"),
    mutates_args=(),
    schema=f"(Tensor grad_logprobs, Tensor grad_entropy, Tensor hidden, Tensor tokens, {HEAD_SCHEMA}, "
    f"{MIXED_SCHEMA}, str backend, str group, SymInt most_whole, Tensor logprobs, Tensor entropy, "
    f"Tensor normaliser, Tensor kept, Tensor x, {GRADIENTS_SCHEMA}",
)
def _backward_op(
    grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, tokens: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Gradients of the inputs in NEEDED; an empty tensor for each that is not needed."""
    head, needs = HeadSpec(*flat[:FIELDS]), flat[-len(NEEDED) :]
    ids, offsets, whole, name, group, _, *outputs = flat[FIELDS : -len(NEEDED)]
    log_p, entropy, normaliser, data, x = outputs
    per_token = grad_logprobs, grad_entropy, hidden, tokens, log_p, entropy
    support = Support(ids, offsets).for_backend(name)
    grads = empty_gradients(hidden, head, needs)
    for out in grads:
        out.zero_()
    for all_ids, _, rows in _parts(whole):
        *operands, log_p, entropy = (t[rows] for t in per_token)
        here, known = head.at(rows), (log_p, entropy, normaliser[:, rows].contiguous())
        if all_ids:
            kept = _kept(name, operands[2], here, data)
            logits = data[:0] if kept is None else kept.data
            found = ops.linear_logprobs_backward(*operands, *here, name, group, *known, logits, *needs)
        else:
            mine = support.of(rows)
            lists, logits = (mine.ids, mine.offsets), x[: mine.ids.shape[0]]
            found = ops.support_logprobs_backward(
                *operands, *here, *lists, name, group, *known, logits, *needs
            )
        for out, part, by_token in zip(grads, found, ROWS_OF_TOKENS):
            if out.numel():
                out[rows if by_token else ...] += part
    return tuple(grads)


@_backward_op.register_fake
def _(grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    return tuple(empty_gradients(hidden, HeadSpec(*flat[1 : 1 + FIELDS]), flat[-len(NEEDED) :]))


def _outputs(hidden: Tensor, more: bool) -> list[Tensor]:
    """Room for logprobs, entropy, normaliser and the statistics."""
    N, dtype = hidden.shape[0], reference.accumulation_dtype(hidden)
    found = (hidden.new_empty(size, dtype=dtype) for size in ((N,), (N,), (2, N)))
    return [*found, *empty_statistics(hidden, N if more else 0, dtype)]


def _empty_kept(name: str, hidden: Tensor, head: HeadSpec, most: int, logits_memory: int) -> Tensor:
    """Room for the logits that are kept of `most` tokens or fewer, uint8."""
    every = full_head(name).kept_bytes(hidden[:most], head, EVERYTHING)
    return hidden.new_empty(torch.sym_min(every, logits_memory), dtype=torch.uint8)


def _kept(name: str, hidden: Tensor, head: HeadSpec, data: Tensor) -> Kept | None:
    """The part of `_empty_kept` that the whole tokens use: as much as they would of logits_memory."""
    size = full_head(name).kept_bytes(hidden, head, data.numel())
    return Kept(data[:size], hidden.shape[0]) if size else None


mixed_logprobs.register_autograd(backward_through(_backward_op), setup_context=setup_context)
