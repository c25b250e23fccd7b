"""The operators of the restricted head, and what `head_features` and `linear_logprobs` call with `support`.

    ids, offsets --> statistics --> x [K], sums --> (over ranks) --> finish --> log-probs, entropy, normaliser
                                     |                                             |
                                     +------------------> terms  dz [K] <----------+   incoming gradients
                                                            |
              gather_sum by token   dz W -> hidden          |      gather_sum by id   dz^T hidden -> weight

Each arrow that touches the weight gathers the kept rows alone. The weight's gradient takes the entries in the
order of their ids, and of their tokens within an id: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._ops import qualified
from .. import reference, vocab_parallel
from ..autograd import GRADIENTS_SCHEMA, NEEDED, backward_through, empty_gradients, setup_context
from ..backend import Incoming, TokenLogprobs, empty_statistics
from ..spec import FIELDS, HEAD_SCHEMA, RESPONSES_SCHEMA, STATISTICS_SCHEMA, HeadSpec, Responses
from ..tiled import slices
from . import tiled
from .backend import backend as implementation
from .spec import SUPPORT_SCHEMA, Support

GRADIENT = 2**22  # numbers of a gradient that are float32 at a time


# --- features -----------------------------------------------------------------------------------------------

torch.library.define(
    qualified("support_features"),
    f"(Tensor hidden, Tensor tokens, {HEAD_SCHEMA}, {SUPPORT_SCHEMA}, {RESPONSES_SCHEMA}, str backend, "
    "str group, bool statistics) -> (Tensor features, Tensor logprobs, Tensor logsumexp, Tensor entropy, "
    f"{STATISTICS_SCHEMA})",
)


@torch.library.impl(qualified("support_features"), "CompositeExplicitAutograd")
def _features(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    head, rest = HeadSpec(*flat[:FIELDS]).rounded(), flat[FIELDS:]
    responses, (name, group, more) = Responses(*rest[2:4]), rest[4:]
    support = Support(*rest[:2]).for_backend(name)
    with torch.autocast(hidden.device.type, enabled=False):
        if not group:
            out = implementation(name).features(hidden, tokens, head, support, responses, more)
            return *out[:4], *out[6:]
        found, x = _forward(name, group, hidden, tokens, head, support, more)
        features = tiled.features_of_part(tokens, head, support, responses, x, found, implementation(name))
        vocab_parallel.all_reduce(features, group)
        lse = found.normaliser.double().sum(0).to(x.dtype)
        return features, found.logprobs, lse, found.entropy, *found[4:]


@torch.library.register_fake(qualified("support_features"))
def _(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    (N, d), S = hidden.shape, flat[FIELDS + 2].shape[0] - 1
    columns = d + HeadSpec(*flat[:FIELDS]).rank
    floats = [hidden.new_empty(size, dtype=torch.float32) for size in ((S, columns), (N,), (N,), (N,))]
    return *floats, *empty_statistics(hidden, N if flat[-1] else 0)


# --- log-probabilities --------------------------------------------------------------------------------------


def _forward(
    name: str, group: str, hidden: Tensor, tokens: Tensor, head: HeadSpec, support: Support, more: bool
) -> tuple[TokenLogprobs, Tensor]:
    """What is known of each token, over the vocabulary of all ranks; and x [K] (backend.py) of this one's."""
    V = head.weight.shape[0]
    by = implementation(name)
    partial, target, top, x = by.statistics(hidden, tokens, head, support, more)
    if not group:
        target = tiled.known_targets(target, tokens, V)
        return by.finish(partial, target, tokens, top, x.dtype), x
    strips = vocab_parallel.over_ranks(partial, target, tokens, top, V, group)
    parts = [by.finish(sums, z, y, v, x.dtype) for sums, z, y, v in strips]
    parts = parts or [by.finish(partial, target, tokens, top, x.dtype)]
    return TokenLogprobs(*(torch.cat(part, dim=-1) for part in zip(*parts))), x


@torch.library.custom_op(
    qualified("support_logprobs"),
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor tokens, {HEAD_SCHEMA}, {SUPPORT_SCHEMA}, str backend, str group, "
    "int logits_memory, bool statistics) -> (Tensor logprobs, Tensor entropy, Tensor normaliser, Tensor x, "
    f"{STATISTICS_SCHEMA})",
)
def support_logprobs(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    """As linear_logprobs' operator; logits_memory is not read, as x is kept in any case."""
    head, (ids, offsets, name, group, _, more) = HeadSpec(*flat[:FIELDS]).rounded(), flat[FIELDS:]
    with torch.autocast(hidden.device.type, enabled=False):
        support = Support(ids, offsets).for_backend(name)
        found, x = _forward(name, group, hidden, tokens, head, support, more)
    return found.logprobs, found.entropy, found.normaliser, x, *found[4:]


@support_logprobs.register_fake
def _(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    N, K, dtype = hidden.shape[0], flat[FIELDS].shape[0], reference.accumulation_dtype(hidden)
    found = (hidden.new_empty(size, dtype=dtype) for size in ((N,), (N,), (2, N), (K,)))
    return *found, *empty_statistics(hidden, N if flat[-1] else 0, dtype)


@torch.library.custom_op(
    qualified("support_logprobs_backward"),
    mutates_args=(),
    schema=f"(Tensor grad_logprobs, Tensor grad_entropy, Tensor hidden, Tensor tokens, {HEAD_SCHEMA}, "
    f"{SUPPORT_SCHEMA}, str backend, str group, Tensor logprobs, Tensor entropy, Tensor normaliser, "
    f"Tensor x, {GRADIENTS_SCHEMA}",
)
def _backward_op(
    grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, tokens: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Gradients of the inputs in NEEDED; an empty tensor for each that is not needed."""
    given, (ids, offsets, name, group, *outputs) = HeadSpec(*flat[:FIELDS]), flat[FIELDS : -len(NEEDED)]
    head, by = given.rounded(), implementation(name)
    support = Support(ids, offsets).for_backend(name)
    logprobs, entropy, normaliser, x = outputs
    incoming = Incoming(
        normaliser, by.token_terms(grad_logprobs.to(x.dtype), grad_entropy.to(x.dtype), logprobs, entropy)
    )
    dz = by.terms(tokens, head, support, x, incoming)
    found = empty_gradients(hidden, given, flat[-len(NEEDED) :])
    of_hidden, of_weight, of_bias, of_low_hidden, of_low_weight = found
    with torch.autocast(hidden.device.type, enabled=False):
        for out, matrix in ((of_hidden, head.weight), (of_low_hidden, head.low_weight)):
            if out.numel() and matrix is not None:
                _of_tokens(by, dz, support, matrix, out, group)
        if not (of_weight.numel() or of_bias.numel() or of_low_weight.numel()):
            return tuple(found)
        order, ends = _by_id(ids, head.weight.shape[0])
        dz, rows = dz[order], support.rows()[order]
        for out, matrix in ((of_weight, hidden), (of_low_weight, head.low_hidden)):
            if out.numel() and matrix is not None:
                by.gather_sum(dz, rows, ends, matrix, out)
        if of_bias.numel():
            of_bias.copy_(_sums_of_ids(dz, ends))
    return tuple(found)


@_backward_op.register_fake
def _(grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    return tuple(empty_gradients(hidden, HeadSpec(*flat[1 : 1 + FIELDS]), flat[-len(NEEDED) :]))


def _of_tokens(by: Any, dz: Tensor, support: Support, matrix: Tensor, out: Tensor, group: str) -> None:
    """out[t] = sum of dz[k] matrix[ids[k]] over token t's list and over ranks, rounded once."""
    if not group:
        by.gather_sum(dz, support.ids, support.offsets, matrix, out)
        return
    for rows in slices(0, out.shape[0], GRADIENT // out.shape[1]):
        lists = support.offsets[rows.start : rows.stop + 1]
        sums = dz.new_empty(lists.shape[0] - 1, out.shape[1])
        by.gather_sum(dz, support.ids, lists, matrix, sums)
        vocab_parallel.all_reduce(sums, group)
        out[rows] = sums


def _by_id(ids: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """The entries in the order of their ids, and where each of V ids begins there, [V + 1]."""
    order = torch.argsort(ids, stable=True)
    return order, torch.searchsorted(ids[order], torch.arange(V + 1, device=ids.device))


def _sums_of_ids(dz: Tensor, ends: Tensor) -> Tensor:
    """Sums of dz [K], in the order of the ids, over each id, [V] float64."""
    lengths = torch.nn.functional.pad(ends, (1, 1), value=dz.shape[0])
    lengths[0] = 0
    return torch.segment_reduce(dz.double(), "sum", lengths=lengths.diff(), initial=0.0, unsafe=True)[1:-1]


support_logprobs.register_autograd(backward_through(_backward_op), setup_context=setup_context)
