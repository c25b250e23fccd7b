"""The LM head, without ever holding its logits: `head_features`, `linear_logprobs` and `pack_responses`.

Each public function checks its arguments, picks a backend and calls one operator. Those in C++ are in csrc/,
those in Triton in kernels/; that of `linear_logprobs` is in PyTorch, below.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch.compile sees a constant


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


class LinearLogprobs(NamedTuple):
    """What `linear_logprobs` returns; float32 (float64 for float64 inputs), differentiable."""

    logprobs: Tensor  # [N], nats
    entropy: Tensor  # [N], nats


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
        temperature, logit_scale: positive and finite.
        logit_softcap: c above, positive and finite; None for none.
        token_weights: [N] alpha_t >= 0, any float dtype; None for all 1. Weights that sum to 0 give zeros.
        known_logprobs: [N] log p(tokens[t]) as the sampler reported it, any float dtype. On a GPU one pass
            over the logits then does the work of two; other backends ignore it. It need not be exact:
            outputs are computed afresh, and a token whose known probability is off by a factor l within 1 %
            goes into its response's feature with weight l alpha_t, all others with alpha_t.
        process_group: vocabulary-parallel weights; not available yet.
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
        ImportError: backend="triton" without triton.
        NotImplementedError: process_group is asked for.
    """
    backend, args = _head_arguments(
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
    return _head_features(backend, args)


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
        TypeError, ValueError, ImportError, NotImplementedError: as `head_features`.
    """
    if isinstance(max_skipped, bool) or not isinstance(max_skipped, (int, float)):
        raise TypeError(f"max_skipped: got {type(max_skipped).__name__}, needs a number")
    if not 0 <= max_skipped < 1:
        raise ValueError(f"max_skipped: got {max_skipped}, needs a share in [0, 1)")
    backend, args = _head_arguments(
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
    _, logprobs, logsumexp, entropy = _head_features(backend, args)
    mass = -alpha * torch.expm1(logprobs)
    keep, skipped_mass, skipped_tokens = reference.skipped_tokens(mass, cu, max_skipped)
    features = _head_features(backend, args._replace(token_weights=torch.where(keep, alpha, 0.0)))[0]
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
) -> tuple[str, _HeadArguments]:
    _check_head(hidden, weight, tokens, bias, temperature, logit_scale, logit_softcap, DTYPES)
    N = hidden.shape[0]
    _check_tensor("cu_seqlens", cu_seqlens, (torch.int64, torch.int32), hidden.device)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: got shape {_shape(cu_seqlens)}, needs [S + 1], starting with 0")
    for name, values in (("token_weights", token_weights), ("known_logprobs", known_logprobs)):
        if values is not None:
            _check_tensor(name, values, None, hidden.device)
            _check_shape(name, values, (N,), "[N], one for each row of hidden")
    if _may_read_values(hidden):
        _check_token_values(tokens, weight.shape[0])
        _check_cu_seqlens_values(cu_seqlens, N)
        if token_weights is not None and not bool((token_weights >= 0).all()):
            at = int((~(token_weights >= 0)).nonzero()[0])
            raise ValueError(
                f"token_weights: entry {at} is {float(token_weights[at])}, needs to be 0 or more"
            )
    if process_group is not None:
        raise NotImplementedError(
            "process_group: vocabulary-parallel heads are not supported yet; gather the weight"
        )
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
    return _choose_backend(backend, hidden.device), args


def _head_features(backend: str, args: _HeadArguments) -> HeadFeatures:
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
                chunk=max(1, _tile_elements(args.hidden) // args.weight.shape[0]),
            )
        )


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

    Forward and backward work on tiles of tokens and vocabulary, of bounded size, in float32: no tensor of N
    x V is made, bf16 weights are never copied whole, and gradients are summed in float32 before they are
    rounded to the dtype of their input (16-bit inputs: hidden's gradient in float32, [N, d], exists for a
    moment if the weight or bias needs one too). 1 - p does not cancel for near-certain tokens. A frozen
    weight costs no weight gradient.

    Args:
        hidden: [N, d] float32, bfloat16, float16, or float64 (for gradient checks: float64 throughout).
        weight: [V, d], dtype of hidden.
        tokens: [N] int64 in [0, V).
        bias, temperature, logit_scale, logit_softcap, process_group: as for `head_features`.
        backend: None or "reference": tiled PyTorch, on any device, the one implementation so far.

    Returns:
        logprobs [N] and entropy [N] in nats, float32 (float64 for float64). Gradients flow to hidden, weight
        and bias; they cannot be differentiated again.

    Raises:
        TypeError, ValueError: as for `head_features`.
        NotImplementedError: process_group or a backend that does not exist yet is asked for.
    """
    _check_head(
        hidden, weight, tokens, bias, temperature, logit_scale, logit_softcap, (*DTYPES, torch.float64)
    )
    if _may_read_values(hidden):
        _check_token_values(tokens, weight.shape[0])
    if process_group is not None:
        raise NotImplementedError(
            "process_group: vocabulary-parallel heads are not supported yet; gather the weight"
        )
    if backend not in (None, "reference"):
        if backend not in BACKENDS:
            raise ValueError(f"backend: got {backend!r}, needs None or 'reference'")
        raise NotImplementedError(
            f"backend={backend!r}: linear_logprobs has no such kernel yet; use backend=None"
        )
    logprobs, entropy, _ = _linear_logprobs(
        hidden, weight, tokens, bias, float(temperature), float(logit_scale), float(logit_softcap or 0.0)
    )
    return LinearLogprobs(logprobs, entropy)


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
    _check_tensor("hidden", hidden, None)
    if hidden.dim() != 3:
        raise ValueError(f"hidden: got shape {_shape(hidden)}, needs [B, L, d]")
    _check_tensor("tokens", tokens, (torch.int64,), hidden.device)
    _check_shape("tokens", tokens, tuple(hidden.shape[:2]), "[B, L] of hidden")
    _check_tensor("mask", mask, (torch.bool, torch.int64, torch.int32, torch.uint8), hidden.device)
    _check_shape("mask", mask, tuple(hidden.shape[:2]), "[B, L] of hidden")
    mask = mask != 0
    rows = mask.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return hidden.flatten(0, 1)[rows], tokens.flatten()[rows], cu_seqlens


# --- checks -------------------------------------------------------------------------------------------------


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_tensor(
    name: str, value: Any, dtypes: tuple[torch.dtype, ...] | None, device: torch.device | None = None
) -> None:
    """A plain tensor of one of `dtypes` (any float dtype if None), on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a torch.Tensor")
    if hasattr(value, "full_tensor"):  # a DTensor holds this rank's shard under the shape of the whole
        raise TypeError(f"{name}: got a DTensor, needs a plain tensor; pass {name}.full_tensor()")
    if dtypes is None and not value.dtype.is_floating_point:
        raise TypeError(f"{name}: got {value.dtype}, needs a floating-point dtype")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name}: got {value.dtype}, needs {' or '.join(map(str, dtypes))}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got device {value.device}, needs {device} like the first argument")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {_shape(tensor)}, needs {list(shape)}: {meaning}")


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    _check_tensor("hidden", hidden, dtypes)
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(f"hidden: got shape {_shape(hidden)}, needs [N, d] with d > 0; see pack_responses")
    _check_tensor("weight", weight, dtypes, hidden.device)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: got {weight.dtype}, needs the dtype of hidden, {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {_shape(weight)}, needs [V, {hidden.shape[1]}] with V > 0")
    _check_tensor("tokens", tokens, (torch.int64,), hidden.device)
    _check_shape("tokens", tokens, (hidden.shape[0],), "[N], one for each row of hidden")
    if bias is not None:
        _check_tensor("bias", bias, dtypes, hidden.device)
        _check_shape("bias", bias, (weight.shape[0],), "[V], one for each row of weight")
    check_positive("temperature", temperature)
    check_positive("logit_scale", logit_scale)
    if logit_softcap is not None:
        check_positive("logit_softcap", logit_softcap, "; None for no softcap")


def check_positive(name: str, value: float, remedy: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a number")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, needs a positive finite number{remedy}")


def _may_read_values(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("G2RL_CHECK") == "1"


def _check_token_values(tokens: Tensor, V: int) -> None:
    if tokens.numel():
        low, high = (int(t) for t in torch.aminmax(tokens))
        if low < 0 or high >= V:
            raise ValueError(f"tokens: got values from {low} to {high}, needs 0 to V - 1 = {V - 1}")


def _check_cu_seqlens_values(cu_seqlens: Tensor, N: int) -> None:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != N:
        raise ValueError(f"cu_seqlens: runs from {first} to {last}, needs 0 to N = {N} (rows of hidden)")
    falls = (cu_seqlens.diff() < 0).nonzero()
    if falls.numel():
        at = int(falls[0]) + 1
        raise ValueError(
            f"cu_seqlens: falls from {int(cu_seqlens[at - 1])} to {int(cu_seqlens[at])} at entry {at}"
        )


def _choose_backend(backend: str | None, device: torch.device) -> str:
    if backend is None:
        if device.type == "cpu":
            return "cpu"
        return "triton" if device.type == "cuda" and HAS_TRITON else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, needs None or one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        if not HAS_TRITON:
            raise ImportError("backend='triton' needs the package triton (Linux): pip install triton")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend: 'triton' needs CUDA tensors, got {device}; use backend=None (for tests, "
                "TRITON_INTERPRET=1 set before python starts runs the kernels on the CPU, very slowly)"
            )
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' needs CPU tensors, got {device}; use backend=None")
    return backend


# --- operators ----------------------------------------------------------------------------------------------


@torch.library.register_fake("g2rl::head_features")
def _(
    hidden: Tensor, weight: Tensor, tokens: Tensor, cu_seqlens: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    N, S = hidden.shape[0], cu_seqlens.shape[0] - 1
    features = hidden.new_empty((S, hidden.shape[1]), dtype=torch.float32)
    return features, *(hidden.new_empty(N, dtype=torch.float32) for _ in range(3))


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
    from .kernels import head

    return head.head_features(
        hidden,
        weight,
        tokens,
        cu_seqlens,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap or None,
        token_weights=token_weights,
        known_logprobs=known_logprobs,
        max_skipped=max_skipped,
    )


@_head_features_triton.register_fake
def _(
    hidden: Tensor, weight: Tensor, tokens: Tensor, cu_seqlens: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    N, S, d = hidden.shape[0], cu_seqlens.shape[0] - 1, hidden.shape[1]
    floats = [hidden.new_empty(size, dtype=torch.float32) for size in ((S, d), (N,), (N,), (N,), (S,))]
    return *floats, hidden.new_empty((S,), dtype=torch.int64)


# linear_logprobs keeps, for each token, a running maximum and two sums over the vocabulary seen so far:
#
#     m = max z_v,   s = sum exp(z_v - m),   t = sum exp(z_v - m) (z_v - m)         v other than y
#
# and adds y at the end. As p_y nears 1, log p_y = -log1p(s exp(m - z_y)) then keeps its digits, and the
# backward pass takes 1 - p_y from it. That pass recomputes z tile by tile and has log p = (z - top) -
# log_total, the two parts of the logsumexp kept apart: their sum would be rounded to the size of the logits.
#
#     d log p_y / d z_v = [v = y] - p_v,   d H / d z_v = -p_v (log p_v + H)

TOKEN_CHUNK = 512


def _tile_elements(tensor: Tensor) -> int:
    """Size of a tile: small on the CPU, for its memory; large elsewhere, for full matrix products."""
    return 2**20 if tensor.device.type == "cpu" else 2**25


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, max(1, step)):
        yield slice(start, min(start + step, size))


def _vocabulary_slices(hidden: Tensor, weight: Tensor) -> list[slice]:
    return list(_slices(weight.shape[0], max(1, _tile_elements(hidden) // max(TOKEN_CHUNK, weight.shape[1]))))


def _tile_index(tokens: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Column [n, 1] of each token in the block, any if it is elsewhere; and whether it lies in the block."""
    inside = (tokens >= block.start) & (tokens < block.stop)
    return (tokens - block.start).clamp(0, block.stop - block.start - 1)[:, None], inside[:, None]


@torch.library.custom_op("g2rl::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs [N], entropy [N] and the parts of the logsumexp [2, N]."""
    dtype = reference.accumulation_dtype(hidden)
    logprobs, entropy, normaliser = _outputs(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _slices(hidden.shape[0], TOKEN_CHUNK):
            h, y = hidden[rows].to(dtype), tokens[rows]
            m = h.new_full((h.shape[0], 1), -torch.inf)
            s, t, z_y = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
            for block in _vocabulary_slices(hidden, weight):
                z, _ = reference.logits(
                    h,
                    weight[block],
                    None if bias is None else bias[block],
                    temperature,
                    logit_scale,
                    logit_softcap or None,
                )
                index, inside = _tile_index(y, block)
                z_index = z.gather(1, index)
                z_y = torch.where(inside, z_index, z_y)
                z.scatter_(1, index, torch.where(inside, -torch.inf, z_index))

                new_m = torch.maximum(m, z.amax(1, keepdim=True))
                s, t = _shifted(m, s, t, new_m)
                z.sub_(new_m.masked_fill(new_m == -torch.inf, 0.0))
                e = z.exp()
                s += e.sum(1, keepdim=True)
                t += e.mul_(z.masked_fill_(e == 0, 0.0)).sum(1, keepdim=True)
                m = new_m
            top = torch.maximum(m, z_y)
            s, t = _shifted(m, s, t, top)
            e_y = torch.exp(z_y - top)
            log_total = torch.where(z_y >= m, torch.log1p(s), torch.log(s + e_y))
            logprobs[rows] = (z_y - top - log_total).squeeze(1)
            normaliser[:, rows] = torch.cat([top, log_total], dim=1).T
            t = t + torch.where(e_y == 0, 0, e_y * (z_y - top))
            entropy[rows] = (log_total - t / (s + e_y)).squeeze(1)
    return logprobs, entropy, normaliser


def _outputs(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, dtype = hidden.shape[0], reference.accumulation_dtype(hidden)
    return (
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty((2, N), dtype=dtype),
    )


def _shifted(m: Tensor, s: Tensor, t: Tensor, new_m: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums relative to new_m >= m instead of m."""
    delta = (m - new_m).masked_fill(m == -torch.inf, 0.0)  # nothing seen yet: s = t = 0
    factor = delta.exp()
    return s * factor, factor * (t + s * delta)


@_linear_logprobs.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(hidden)


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
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that is not needed."""
    dtype, N = logprobs.dtype, hidden.shape[0]
    grad_hidden, grad_weight, grad_bias = _gradients(
        hidden, weight, bias, need_hidden, need_weight, need_bias
    )
    # Vocabulary blocks are the outer loop where the weight's gradient is summed over all tokens, so that
    # only one block of it is in float32 at a time; token chunks are where only hidden's is.
    with torch.autocast(hidden.device.type, enabled=False):
        for outer in _slices(N, N if need_weight or need_bias else TOKEN_CHUNK):
            sum_hidden = hidden.new_zeros(
                outer.stop - outer.start, hidden.shape[1] if need_hidden else 0, dtype=dtype
            )
            for block in _vocabulary_slices(hidden, weight):
                w = weight[block].to(dtype)
                b = None if bias is None else bias[block]
                sum_weight = torch.zeros_like(w) if need_weight else None
                sum_bias = w.new_zeros(w.shape[0]) if need_bias else None
                for inner in _slices(outer.stop - outer.start, TOKEN_CHUNK):
                    rows = slice(outer.start + inner.start, outer.start + inner.stop)
                    h = hidden[rows].to(dtype)
                    z, slope = reference.logits(h, w, b, temperature, logit_scale, logit_softcap or None)
                    log_p = z.sub_(normaliser[0, rows, None]).sub_(normaliser[1, rows, None])
                    p = log_p.exp()
                    index, inside = _tile_index(tokens[rows], block)
                    g, g_entropy = grad_logprobs[rows, None].to(dtype), grad_entropy[rows, None].to(dtype)
                    H = entropy[rows, None]
                    # -p (g + g_entropy (log p + H)), plus g at the realised token, by way of 1 - p_y
                    log_p.masked_fill_(p == 0, 0.0)
                    grad_z = -p * (g + g_entropy * (log_p + H))
                    one_minus_p = -torch.expm1(logprobs[rows, None])
                    p_y = p.gather(1, index)
                    at_token = g * one_minus_p - p_y * g_entropy * (log_p.gather(1, index) + H)
                    grad_z.scatter_(1, index, torch.where(inside, at_token, grad_z.gather(1, index)))
                    if slope is not None:
                        grad_z *= slope
                    grad_z *= logit_scale / temperature
                    if need_hidden:
                        sum_hidden[inner] += grad_z @ w
                    if sum_weight is not None:
                        sum_weight += grad_z.T @ h
                    if sum_bias is not None:
                        sum_bias += grad_z.sum(0)
                if sum_weight is not None:
                    grad_weight[block] = sum_weight
                if sum_bias is not None:
                    grad_bias[block] = sum_bias
            if need_hidden:
                grad_hidden[outer] = sum_hidden
    return grad_hidden, grad_weight, grad_bias


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_zeros(hidden.shape if need_hidden else (0,)),
        weight.new_zeros(weight.shape if need_weight else (0,)),
        hidden.new_zeros(0) if bias is None else bias.new_zeros(bias.shape if need_bias else (0,)),
    )


@_linear_logprobs_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = args[2], args[3], args[5]
    return _gradients(hidden, weight, bias, *args[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, tokens, bias, *options = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(hidden, weight, tokens, bias, *output)
    ctx.options = options


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, tokens, bias, *outputs = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    grads = [torch.zeros_like(outputs[0]) if grad is None else grad for grad in (grad_logprobs, grad_entropy)]
    grad_hidden, grad_weight, grad_bias = _linear_logprobs_backward(
        *grads, hidden, weight, tokens, bias, *outputs, *ctx.options, need_hidden, need_weight, need_bias
    )
    return (
        grad_hidden if need_hidden else None,
        grad_weight if need_weight else None,
        None,
        grad_bias if need_bias else None,
        None,
        None,
        None,
    )


_linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
