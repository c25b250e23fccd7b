"""The LM head, without ever holding its logits: `head_features` and `pack_responses`.

Each public function checks its arguments, picks a backend and calls one operator. Those in C++ are in csrc/,
those in Triton in kernels/. `linear_logprobs` has a file of its own, logprobs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import (
    DTYPES,
    check_cu_seqlens_values,
    check_head,
    check_shape,
    check_tensor,
    check_token_values,
    choose_backend,
    may_read_values,
    sizes,
)
from . import logprobs, reference, tiled, vocab_parallel
from .spec import HeadSpec, Responses


class HeadFeatures(NamedTuple):
    """What `head_features` returns; all float32, none carries a gradient."""

    features: Tensor  # [S, d]
    logprobs: Tensor  # [N], nats
    logsumexp: Tensor  # [N], nats, of z / temperature
    entropy: Tensor  # [N], nats


class CertifiedHeadFeatures(NamedTuple):
    """What `certified_head_features` returns; float32 but for skipped_tokens (int64), without gradients."""

    features: Tensor  # [S, d]
    logprobs: Tensor  # [N], nats
    logsumexp: Tensor  # [N], nats, of z / temperature
    entropy: Tensor  # [N], nats
    skipped_mass: Tensor  # [S], sum of a_t (1 - p(tokens[t])) over skipped tokens
    skipped_tokens: Tensor  # [S], how many tokens were left out


def head_features(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    token_weights: Tensor | None = None,
    known_logprobs: Tensor | None = None,
    process_group: Any = None,
    backend: str | None = None,
) -> HeadFeatures:
    """Last-layer sensitivity of each response (eqs. 5-8), with log-probabilities, logsumexp and entropy.

    With z = softcap(logit_scale (W h + b)), softcap(x) = c tanh(x / c), and p = softmax(z / temperature):

        phi_t       = temperature * d log p(tokens[t]) / d h_t     (plain head: W^T (onehot(tokens[t]) - p_t))
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
        temperature, logit_scale: positive, from 1e-8 to 1e8.
        logit_softcap: c above, within the same bounds; None for none.
        token_weights: [N] alpha_t >= 0, any float dtype; None for all 1. Weights that sum to 0 give zeros.
        known_logprobs: [N] log p(tokens[t]) as the sampler reported it, any float dtype. On a GPU one pass
            over the logits then does the work of two; other backends ignore it. It need not be exact:
            outputs are computed afresh, and a token whose known probability is off by a factor l within 1 %
            goes into its response's feature with weight l alpha_t, all others with alpha_t.
        process_group: a torch.distributed process group whose ranks share the vocabulary: weight and bias
            are this rank's rows [V_r, d] and [V_r], those of rank r following those of rank r - 1, of any
            number each. Everything else is the same on all ranks, tokens count over all rows, and all ranks
            get the same bits. They exchange 4 numbers a token and [S, d] sums. known_logprobs is ignored.
        backend: "triton" (GPUs), "cpu" (C++), "reference" (PyTorch, any device), or None: "cpu" for CPU
            tensors; for others "triton" where it is installed, else "reference". float32 products on a GPU
            follow torch.set_float32_matmul_precision: "highest" is IEEE, "high" and "medium" are 3xTF32.

    Returns:
        features [S, d], logprobs [N], logsumexp [N] and entropy [N] in nats, the latter three of z /
        temperature; all float32. They carry no gradient: for one, use `linear_logprobs`. NaN or Inf in a row
        of hidden makes that token's outputs and its response's feature NaN, and no other.

    Raises:
        TypeError: a dtype is wrong, or an argument is no tensor.
        ValueError: shapes or devices do not fit, cu_seqlens does not rise from 0 to N, a token lies outside
            [0, V), a token weight is negative or NaN, a scalar is out of range. Values of tensors are
            checked on the CPU only (elsewhere this would wait for the device; G2RL_CHECK=1 in the
            environment asks for it) and not while compiling; unchecked, they make results meaningless (a
            token outside [0, V): NaN) but read nothing out of bounds.
            With a process_group, where values are checked: an error on any rank is raised on all, and so is
            a difference between ranks. Elsewhere a rank that raises, or never calls, leaves the others
            waiting until the group's timeout (NCCL: 10 minutes by default, then its watchdog ends them).
        ImportError: backend="triton" without triton.
    """
    backend, group, args = _head_arguments(
        hidden,
        weight,
        tokens,
        cu_seqlens,
        bias,
        temperature,
        logit_scale,
        logit_softcap,
        token_weights,
        known_logprobs,
        process_group,
        backend,
    )
    return _head_features(backend, group, args)


def certified_head_features(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    *,
    max_skipped: float = 0.01,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    token_weights: Tensor | None = None,
    process_group: Any = None,
    backend: str | None = None,
) -> CertifiedHeadFeatures:
    """`head_features` that leaves confident tokens out of the features, and says how much that is at most.

    A token's feature is bounded by what the policy is unsure of: ||phi_t|| <= m_t diameter, with m_t = 1 -
    p(tokens[t]) and diameter = logit_scale max_v,w ||W[v] - W[w]||, or 2 logit_scale max_v ||W[v]|| behind a
    softcap. A token is left out of its response's feature if the tokens of this response whose alpha m is not
    larger than its own carry together at most the share `max_skipped` of the response's sum of alpha m. Then

        ||features[s] - exact[s]|| <= skipped_mass[s] diameter,    skipped_mass[s] = sum_skipped a_t m_t
                                   <= max_skipped (sum_t a_t m_t) diameter,      a_t = alpha_t / sum alpha.

    On a GPU the second of two passes over the logits is spared for these tokens: most of them for a model
    that is sure of most tokens (0.1 to 0.2 nats), next to none for a flat one. Other backends gain nothing.

    Args:
        max_skipped: the share, in [0, 1).
        The others are those of `head_features`.

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
    backend, _, args = _head_arguments(
        hidden,
        weight,
        tokens,
        cu_seqlens,
        bias,
        temperature,
        logit_scale,
        logit_softcap,
        token_weights,
        None,
        process_group,
        backend,
    )
    if backend == "triton":
        return CertifiedHeadFeatures(*_head_features_triton(*args, float(max_skipped)))
    N = hidden.shape[0]
    alpha = hidden.new_ones(N, dtype=torch.float32) if args.token_weights is None else args.token_weights
    cu = cu_seqlens.to(torch.int64)
    _, logprobs, logsumexp, entropy = _head_features(backend, "", args)
    mass = -alpha * torch.expm1(logprobs)
    keep, skipped_mass, skipped_tokens = reference.skipped_tokens(mass, cu, max_skipped)
    kept_args = args._replace(token_weights=torch.where(keep, alpha, 0.0))
    features = _head_features(backend, "", kept_args).features
    total, kept = (reference.segment_sum(a, cu, 0, N) for a in (alpha, torch.where(keep, alpha, 0.0)))
    features *= ((kept + reference.WEIGHT_EPS) / (total + reference.WEIGHT_EPS))[:, None]
    return CertifiedHeadFeatures(
        features, logprobs, logsumexp, entropy, skipped_mass / (total + reference.WEIGHT_EPS), skipped_tokens
    )


class _HeadArguments(NamedTuple):
    """Checked, in the order of the operators."""

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    cu_seqlens: Tensor
    bias: Tensor | None
    token_weights: Tensor | None
    known_logprobs: Tensor | None
    temperature: float
    logit_scale: float
    logit_softcap: float  # 0: none


def _head_arguments(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    token_weights: Tensor | None,
    known_logprobs: Tensor | None,
    process_group: Any,
    backend: str | None,
) -> tuple[str, str, _HeadArguments]:
    """Backend, name of the group ("" for none), and arguments for them."""

    def check() -> str:
        check_head(hidden, weight, tokens, bias, temperature, logit_scale, logit_softcap, DTYPES)
        N = hidden.shape[0]
        check_tensor("cu_seqlens", cu_seqlens, (torch.int64, torch.int32), hidden.device)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens: got shape {sizes(cu_seqlens)}, needs [S + 1], starting with 0")
        for name, values in (("token_weights", token_weights), ("known_logprobs", known_logprobs)):
            if values is not None:
                check_tensor(name, values, None, hidden.device)
                check_shape(name, values, (N,), "[N], one for each row of hidden")
        if may_read_values(hidden):
            if process_group is None:
                check_token_values(tokens, weight.shape[0])
            check_cu_seqlens_values(cu_seqlens, N)
            if token_weights is not None and not bool((token_weights >= 0).all()):
                at = int((~(token_weights >= 0)).nonzero()[0])
                raise ValueError(
                    f"token_weights: entry {at} is {float(token_weights[at])}, needs to be 0 or more"
                )
        return choose_backend(backend, hidden.device)

    chosen = vocab_parallel.checked(
        check, process_group, hidden, weight, tokens, function="head_features", cu_seqlens=cu_seqlens,
        bias=bias, temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap,
        token_weights=token_weights, backend=backend,
    )  # fmt: skip
    group = "" if process_group is None else process_group.group_name
    if group:
        tokens = vocab_parallel.local_tokens(tokens, weight.shape[0], group)
    bias, alpha, known = (t if t is None else t.detach() for t in (bias, token_weights, known_logprobs))
    args = _HeadArguments(
        hidden.detach(),
        weight.detach(),
        tokens,
        cu_seqlens,
        bias,
        None if alpha is None else alpha.float(),
        known,
        float(temperature),
        float(logit_scale),
        float(logit_softcap or 0.0),
    )
    return chosen, group, args


def _head_features(backend: str, group: str, args: _HeadArguments) -> HeadFeatures:
    if group:
        return HeadFeatures(*_head_features_over_ranks(*args, backend, group))
    if backend == "cpu":
        return HeadFeatures(*torch.ops.g2rl.head_features(*args))
    if backend == "triton":
        return HeadFeatures(*_head_features_triton(*args, None)[:4])
    with torch.no_grad(), torch.autocast(args.hidden.device.type, enabled=False):
        return HeadFeatures(
            *reference.head_features(
                args.hidden,
                args.weight,
                args.tokens,
                args.cu_seqlens,
                bias=args.bias,
                temperature=args.temperature,
                logit_scale=args.logit_scale,
                logit_softcap=args.logit_softcap or None,
                token_weights=args.token_weights,
                chunk=max(1, tiled.elements(args.hidden) // args.weight.shape[0]),
            )
        )


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


# --- operators ----------------------------------------------------------------------------------------------


@torch.library.register_fake("g2rl::head_features")
def _fake_head_features(
    hidden: Tensor, weight: Tensor, tokens: Tensor, cu_seqlens: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    N, S = hidden.shape[0], cu_seqlens.shape[0] - 1
    features = hidden.new_empty((S, hidden.shape[1]), dtype=torch.float32)
    return features, *(hidden.new_empty(N, dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("g2rl::head_features_over_ranks", mutates_args=())
def _head_features_over_ranks(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    known_logprobs: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """head_features of a vocabulary shard, with local tokens (vocab_parallel.py): the normaliser over all
    ranks first, then this rank's part of the features, summed over all ranks."""
    options = temperature, logit_scale, logit_softcap
    found, entropy, normaliser = logprobs._linear_logprobs(
        hidden, weight, tokens, bias, *options, backend, group
    )
    logsumexp, rest = normaliser.double().sum(0), -torch.expm1(found)
    responses = cu_seqlens, bias, token_weights
    with torch.autocast(hidden.device.type, enabled=False):
        features = _features_of_part(backend)(hidden, weight, tokens, *responses, logsumexp, rest, *options)
        vocab_parallel.all_reduce(features, group)
    return features, found, logsumexp.float(), entropy


def _features_of_part(backend: str) -> Callable[..., Tensor]:
    if backend == "cpu":
        return torch.ops.g2rl.head_features_of_part
    if backend == "triton":
        from .triton import driver

        def of_part(hidden, weight, tokens, cu_seqlens, bias, token_weights, logsumexp, rest, *options):  # type: ignore
            head, responses = HeadSpec(weight, bias, *options), Responses(cu_seqlens, token_weights)
            return driver.features_of_part(hidden, tokens, head, responses, logsumexp, rest)

        return of_part
    return tiled.features_of_part


torch.library.register_fake("g2rl::head_features_over_ranks", _fake_head_features)


@torch.library.custom_op("g2rl::head_features_triton", mutates_args=())
def _head_features_triton(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    known_logprobs: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float,
    max_skipped: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """head_features and certified_head_features (with max_skipped) by the Triton kernels."""
    from .triton import driver

    head = HeadSpec(weight, bias, temperature, logit_scale, logit_softcap)
    responses = Responses(cu_seqlens, token_weights)
    return driver.features(hidden, tokens, head, responses, known_logprobs, max_skipped)


@_head_features_triton.register_fake
def _(
    hidden: Tensor, weight: Tensor, tokens: Tensor, cu_seqlens: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    N, S, d = hidden.shape[0], cu_seqlens.shape[0] - 1, hidden.shape[1]
    floats = [hidden.new_empty(size, dtype=torch.float32) for size in ((S, d), (N,), (N,), (N,), (S,))]
    return *floats, hidden.new_empty((S,), dtype=torch.int64)
