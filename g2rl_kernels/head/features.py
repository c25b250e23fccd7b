"""The LM head, without ever holding its logits: `head_features`, `certified_head_features`, `pack_responses`.

Each public function puts its arguments into a `HeadSpec` and `Responses` (spec.py), checks them, chooses a
backend (backend.py) and calls one operator, which hands them to that backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .._ops import ops, qualified
from ..arguments import check_shape, check_tensor, check_token_values, may_read_values, sizes
from . import cpu, logprobs, vocab_parallel  # noqa: F401 (cpu registers the fakes of the C++ ops)
from .backend import Hints, choose_backend, empty_statistics
from .backend import backend as implementation
from .lora import Lora, folded, with_lora
from .spec import (
    FIELDS,
    HEAD_SCHEMA,
    RESPONSES_SCHEMA,
    STATISTICS_SCHEMA,
    HeadSpec,
    Responses,
    asked_for,
    check_per_token,
    check_statistics,
)
from .support import mixed
from .support.spec import Support, SupportArgument, facts_of, support_of


class HeadFeatures(NamedTuple):
    """What `head_features` returns; all float32, without gradients."""

    features: Tensor  # [S, d]
    logprobs: Tensor  # [N], nats
    logsumexp: Tensor  # [N], nats, of z / temperature
    entropy: Tensor  # [N], nats


class HeadFeaturesWithStatistics(NamedTuple):
    """What `head_features` returns where statistics are asked for; None for those that are not."""

    features: Tensor  # [S, d]
    logprobs: Tensor  # [N], nats
    logsumexp: Tensor  # [N], nats, of z / temperature
    entropy: Tensor  # [N], nats
    sum_p_squared: Tensor | None  # [N]
    top_token: Tensor | None  # [N] int64
    top_logprob: Tensor | None  # [N], nats


class CertifiedHeadFeatures(NamedTuple):
    """What `certified_head_features` returns; float32 but for skipped_tokens (int64), without gradients."""

    features: Tensor  # [S, d]
    logprobs: Tensor  # [N], nats
    logsumexp: Tensor  # [N], nats, of z / temperature
    entropy: Tensor  # [N], nats
    skipped_mass: Tensor  # [S], sum of a_t (1 - p(tokens[t])) over skipped tokens
    skipped_tokens: Tensor  # [S], number of tokens left out


@overload  # () is a sequence of names too
def head_features(  # type: ignore[overload-overlap]
    hidden: Tensor, weight: Tensor, tokens: Tensor, cu_seqlens: Tensor, *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ..., logit_scale: float = ..., logit_softcap: float | None = ...,
    lora: Lora | None = ...,
    support: SupportArgument = ...,
    token_weights: Tensor | None = ..., known_logprobs: Tensor | None = ..., statistics: tuple[()] = ...,
    process_group: Any = ..., backend: str | None = ...,
) -> HeadFeatures: ...  # fmt: skip
@overload
def head_features(
    hidden: Tensor, weight: Tensor, tokens: Tensor, cu_seqlens: Tensor, *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ..., logit_scale: float = ..., logit_softcap: float | None = ...,
    lora: Lora | None = ...,
    support: SupportArgument = ...,
    token_weights: Tensor | None = ..., known_logprobs: Tensor | None = ..., statistics: Sequence[str],
    process_group: Any = ..., backend: str | None = ...,
) -> HeadFeaturesWithStatistics: ...  # fmt: skip
def head_features(
    hidden: Tensor, weight: Tensor, tokens: Tensor, cu_seqlens: Tensor, *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0, logit_scale: float = 1.0, logit_softcap: float | None = None,
    lora: Lora | None = None,
    support: SupportArgument = None,
    token_weights: Tensor | None = None, known_logprobs: Tensor | None = None, statistics: Sequence[str] = (),
    process_group: Any = None, backend: str | None = None,
) -> HeadFeatures | HeadFeaturesWithStatistics:  # fmt: skip
    """The feature of each response (arXiv 2512.15687, eqs. 5-8), log-probabilities, logsumexp and entropy.

    The feature says how the response's log-probability changes with the input of the LM head.

    With z = softcap(logit_scale (W h + b)), softcap(x) = c tanh(x / c), and p = softmax(z / temperature):

        phi_t       = temperature_t * d log p(tokens[t]) / d h_t   (plain head: W^T (onehot(tokens[t]) - p_t))
        features[s] = sum_t alpha_t phi_t / (sum_t alpha_t + 1e-8)     (t over the tokens of response s)

    No tensor of N x V is made; sums are in float32 or better. Results do not depend on the number of threads.

    Args:
        hidden: [N, d] float32, bfloat16 or float16: what the head is applied to (after the final norm), at
            the position that predicts tokens[t]. N tokens of all responses, packed: see `pack_responses`.
        weight: [V, d], dtype of hidden. Neither needs to be contiguous.
        tokens: [N] int64 in [0, V): the realised tokens.
        cu_seqlens: [S + 1] int32 or int64, from 0 up to N: response s owns rows
            cu_seqlens[s]:cu_seqlens[s + 1]. A response may be empty; its feature is zero.
        bias: [V] float32, bfloat16 or float16. -inf takes an entry out of the vocabulary (p = 0), behind a
            softcap too.
        temperature: positive, from 1e-8 to 1e8; or a tensor [N] of one for each token, any float dtype, used
            in float32, without gradients.
        logit_scale: positive, within the same bounds.
        logit_softcap: c above, within the same bounds; None: no softcap. Its quotient with temperature (that
            of logit_scale, without a softcap) has the same bounds.
        lora: (A [r, d], B [V, r], scaling): the head is W + scaling B A in place of W, which is never formed.
            A and B of any dtype that hidden may have; scaling any finite number. For a 16-bit hidden, B and
            scaling A h are rounded to its dtype, as the weight is (beyond 65504 in float16: NaN); A is not.
            Extra memory: 2 bytes for each number of a float32 B.
        support: (ids [K], offsets [N + 1]), int32 or int64: token t is one of ids[offsets[t]:offsets[t + 1]],
            and p is the softmax over those alone (K logits in place of N V). A list holds its realised token
            and no id twice, in any order; it may be as long as V. Or what `sampling_support` gives: tokens
            that it calls `whole` have the full softmax. known_logprobs is ignored. "reference" and a float64
            hidden read the offsets, which on a GPU waits for the device; so does `whole`.
        token_weights: [N] alpha_t >= 0, any float dtype; None for all 1. Weights that sum to 0 give zeros.
        known_logprobs: [N] log p(tokens[t]) at this temperature, as the sampler reported it; any float dtype.
            It saves backend "triton" one of two passes over the logits, and "cpu" a second look at the
            weight; "reference" ignores it. Log-probabilities, logsumexp and entropy stay exact. Let
            l = known p / p. A token whose l is within 0.01 of 1 counts with l alpha_t in its feature's sum;
            every other token counts exactly, which costs time. "triton": a second pass over such tokens, over
            all if one is NaN or l above 1000. "cpu": such a token's response is computed twice, or the 256
            tokens around it and once what follows. On a CPU pass them only if hardly a response has one.
        statistics: any of "sum_p_squared", sum_v p_tv^2, and "top_token", the likeliest token (the first of
            those whose logits, as computed, are equal) with its log-probability. With them "triton" ignores
            known_logprobs; it computes the realised token's logit apart, so that a tie with it may go either
            way.
        process_group: a torch.distributed process group whose ranks share the vocabulary. weight and bias
            are then this rank's rows, [V_r, d] and [V_r], and B of lora too; the rows of rank r follow those
            of rank r - 1, and V_r may differ. All else is the same on all ranks, and tokens are global ids.
            All ranks get the same bits. They exchange 4 numbers a token (7 with statistics) and [S, d + r]
            sums. known_logprobs is ignored.
        backend: "triton" (CUDA), "cpu" (C++) or "reference" (PyTorch, any device). None: "cpu" for CPU
            tensors, "triton" for CUDA tensors where it is installed, else "reference". float32 products of
            "triton" follow torch.set_float32_matmul_precision: "highest" is IEEE, "high" and "medium" are
            3xTF32.

    Returns:
        features [S, d]; logprobs [N], logsumexp [N] and entropy [N] of z / temperature, in nats; all float32,
        without gradients (`linear_logprobs` has them). NaN in a row of hidden, or Inf without a softcap,
        makes that token's outputs and its response's feature NaN; no other response is affected. Where
        statistics are asked for, sum_p_squared [N] float32, top_token [N] int64 and top_logprob [N] float32
        (nats) stand behind, None for what was not asked: HeadFeaturesWithStatistics. A token whose outputs
        are NaN has top_token -1.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit, cu_seqlens does not rise from 0 to N, a token lies outside
            [0, V), a list of support lacks its token or holds an id twice or outside [0, V), a token weight
            is negative or NaN, a scalar or temperature is out of range, a statistic is unknown, or the
            backend does not run on this device.
        ImportError: backend="triton" without the package triton.

    Values of tensors are checked on the CPU. On other devices that would wait for the device: set
    G2RL_CHECK=1 in the environment to ask for it. Unchecked wrong values read nothing out of bounds: "triton"
    gives NaN for a token outside [0, V), "reference" fails at the lookup, and "cpu" checks tokens, cu_seqlens
    and the offsets of support at run time even where it is compiled; the other two clamp these. With support
    all give NaN for a token that is not in its own list; ids outside [0, V) count as not there, ids that
    stand twice count twice, and the realised token counts once.

    With a process_group, where values are checked, all ranks raise if one has an error, or if ranks differ in
    anything but their rows (values of hidden are not compared). Where values are not checked, a rank that
    raises, or never calls, leaves the others waiting until the group's timeout (NCCL: 10 minutes by default,
    then its watchdog ends them). Every rank needs at least one row.
    """
    head = HeadSpec(weight, bias, temperature, logit_scale, logit_softcap)
    responses = Responses(cu_seqlens, token_weights)
    hints = Hints(known_logprobs)
    out = _call(
        "head_features",
        hidden,
        tokens,
        head,
        lora,
        responses,
        hints,
        statistics,
        process_group,
        backend,
        support,
    )
    features, logprobs, logsumexp, entropy, _, _, *found = out
    if not statistics:
        return HeadFeatures(features, logprobs, logsumexp, entropy)
    asked = asked_for(statistics, *found)
    return HeadFeaturesWithStatistics(features, logprobs, logsumexp, entropy, *asked)


def certified_head_features(
    hidden: Tensor, weight: Tensor, tokens: Tensor, cu_seqlens: Tensor, *,
    max_skipped: float = 0.01,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0, logit_scale: float = 1.0, logit_softcap: float | None = None,
    lora: Lora | None = None,
    token_weights: Tensor | None = None,
    process_group: Any = None, backend: str | None = None,
) -> CertifiedHeadFeatures:  # fmt: skip
    """`head_features` without the confident tokens, with a bound on the error this makes.

    A confident token contributes little: ||phi_t|| <= m_t diameter, with m_t = 1 - p(tokens[t]) and diameter
    = logit_scale max_v,w ||W[v] - W[w]||, or 2 logit_scale max_v ||W[v]|| behind a softcap. Sort a response's
    tokens by alpha m: the smallest are left out as long as they carry together at most the share
    `max_skipped` of the response's sum of alpha m (equal ones stay or go together). Then

        ||features[s] - exact[s]|| <= skipped_mass[s] diameter,    skipped_mass[s] = sum_skipped a_t m_t
                                   <= max_skipped (sum_t a_t m_t) diameter,      a_t = alpha_t / sum alpha.

    exact[s] is the feature of `head_features`; the function does not compute the diameter. On a GPU the
    second pass over the logits leaves these tokens out: most tokens for a model with a mean entropy of 0.1 to
    0.2 nats a token, almost no token for a flat one. Other backends take twice the time of `head_features`.
    All arguments but max_skipped are those of `head_features`.

    Args:
        max_skipped: the share, in [0, 1).

    Returns:
        features, logprobs, logsumexp, entropy: see `head_features`; skipped_mass [S]; skipped_tokens [S].

    Raises:
        TypeError, ValueError, ImportError: as `head_features`.
        NotImplementedError: process_group is given.
    """
    if isinstance(max_skipped, bool) or not isinstance(max_skipped, (int, float)):
        raise TypeError(f"max_skipped: got {type(max_skipped).__name__}, needs a number")
    if not 0 <= max_skipped < 1:
        raise ValueError(f"max_skipped: got {max_skipped}, needs a share in [0, 1)")
    if process_group is not None:
        raise NotImplementedError(
            "process_group: certified_head_features needs the whole weight; head_features takes a shard of it"
        )
    head = HeadSpec(weight, bias, temperature, logit_scale, logit_softcap)
    responses = Responses(cu_seqlens, token_weights)
    hints = Hints(max_skipped=float(max_skipped))
    out = _call("", hidden, tokens, head, lora, responses, hints, (), None, backend)
    return CertifiedHeadFeatures(*out[:6])


def _call(
    function: str,
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    lora: Lora | None,
    responses: Responses,
    hints: Hints,
    statistics: Sequence[str],
    process_group: Any,
    backend: str | None,
    given_support: SupportArgument = None,
) -> tuple[Tensor, ...]:
    """Checks everything, on all ranks of a group together, and calls the operator."""
    known, max_skipped = hints
    support = support_of(given_support)
    check = partial(_check, hidden, tokens, head, lora, responses, known, statistics, backend, support)
    facts = {
        "function": function, "backend": backend, "statistics": statistics, "lora": lora,
        **responses._asdict(),
    }  # fmt: skip
    facts |= facts_of(support)
    checked, tokens, group = vocab_parallel.checked(check, process_group, hidden, tokens, head, facts)
    head, responses, backend, support = checked
    known = None if known is None else known.detach()
    if support is not None:
        support = support.local(head.weight.shape[0], group)
        features, *others = mixed.features(
            hidden.detach(), tokens, head.detached(), support, responses, backend, group, bool(statistics)
        )
        none = features.new_zeros(features.shape[0])
        return folded(features, lora), *others[:3], none, none.long(), *others[3:]
    operands = hidden.detach(), tokens, *head.detached(), *responses
    features, *others = ops.features(*operands, known, max_skipped, backend, group, bool(statistics))
    return folded(features, lora), *others


def _check(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    lora: Lora | None,
    responses: Responses,
    known_logprobs: Tensor | None,
    statistics: Sequence[str],
    backend: str | None,
    support: Support | None,
    whole: bool = False,
) -> tuple[HeadSpec, Responses, str, Support | None]:
    """Head, responses and support in the form that backends take, and the backend's name.

    whole: weight holds the whole vocabulary, so that tokens must lie in it.
    """
    head = with_lora(head.checked(hidden, tokens), hidden, lora)
    check_per_token("known_logprobs", known_logprobs, hidden)
    check_statistics(statistics)
    if whole and may_read_values(hidden):
        check_token_values(tokens, head.weight.shape[0])
    if support is not None:
        support = support.checked(hidden, tokens, head.weight.shape[0] if whole else None)
    return head, responses.checked(hidden), choose_backend(backend, hidden.device), support


def pack_responses(hidden: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pack the response tokens of a padded batch.

    Args:
        hidden: [B, L, d]; hidden[b, l] predicts tokens[b, l]: shift the model's output by one first.
        tokens: [B, L] int64.
        mask: [B, L] bool, or 0/1 integers: which tokens count. Padding on either side, and gaps, are fine.

    Returns:
        hidden [N, d] (gradients flow through), tokens [N] and cu_seqlens [B + 1] int64, N = number of tokens
        that count. N depends on values: on a GPU this waits for the device.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit.
    """
    check_tensor("hidden", hidden, None)
    if hidden.dim() != 3:
        raise ValueError(f"hidden: got shape {sizes(hidden)}, needs [B, L, d]")
    check_tensor("tokens", tokens, (torch.int64,), hidden.device)
    check_shape("tokens", tokens, tuple(hidden.shape[:2]), "[B, L] of hidden")
    check_tensor("mask", mask, (torch.bool, torch.int64, torch.int32, torch.uint8), hidden.device)
    check_shape("mask", mask, tuple(hidden.shape[:2]), "[B, L] of hidden")
    mask = mask != 0
    rows = mask.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return hidden.flatten(0, 1)[rows], tokens.flatten()[rows], cu_seqlens


# --- the operator -------------------------------------------------------------------------------------------


torch.library.define(
    qualified("features"),
    f"(Tensor hidden, Tensor tokens, {HEAD_SCHEMA}, {RESPONSES_SCHEMA}, Tensor? known_logprobs, "
    "float? max_skipped, str backend, str group, bool statistics) -> (Tensor features, Tensor logprobs, "
    f"Tensor logsumexp, Tensor entropy, Tensor skipped_mass, Tensor skipped_tokens, {STATISTICS_SCHEMA})",
)


@torch.library.impl(qualified("features"), "CompositeExplicitAutograd")
def _features(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    """Features of [W, B] by a backend, [S, d + r] with a low-rank part; certified with max_skipped; group: ""
    for a whole vocabulary."""
    head, rest = HeadSpec(*flat[:FIELDS]).rounded(), flat[FIELDS:]
    responses, hints, (name, group, more) = Responses(*rest[:2]), Hints(*rest[2:4]), rest[4:]
    with torch.autocast(hidden.device.type, enabled=False):
        if group:
            return _over_ranks(name, group, hidden, tokens, head, responses, more)
        return implementation(name).features(hidden, tokens, head, responses, hints, more)


@torch.library.register_fake(qualified("features"))
def _(hidden: Tensor, tokens: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    (N, d), S = hidden.shape, flat[FIELDS].shape[0] - 1
    columns = d + HeadSpec(*flat[:FIELDS]).rank
    floats = [hidden.new_empty(size, dtype=torch.float32) for size in ((S, columns), (N,), (N,), (N,), (S,))]
    skipped_tokens = hidden.new_empty(S, dtype=torch.int64)
    return *floats, skipped_tokens, *empty_statistics(hidden, N if flat[-1] else 0)


def _over_ranks(
    name: str, group: str, hidden: Tensor, tokens: Tensor, head: HeadSpec, responses: Responses, more: bool
) -> tuple[Tensor, ...]:
    """Features of a head whose vocabulary is spread over ranks (vocab_parallel.py): the normaliser over all
    ranks first, then the share of this rank's vocabulary in the features, summed over all ranks."""
    found = logprobs.forward(name, group, hidden, tokens, head, more=more)
    lse = found.normaliser.double().sum(0)
    features = implementation(name).features_of_part(hidden, tokens, head, responses, lse, found.rest)
    vocab_parallel.all_reduce(features, group)
    skipped = features.new_zeros(len(features))
    asked = found.sum_p_squared, found.top_token, found.top_logprob
    return features, found.logprobs, lse.float(), found.entropy, skipped, skipped.long(), *asked
