"""`statistics` and `sweep` of backend "triton", for linear_logprobs. head/logprobs.py says what is computed.

Forward: head_stats over all tokens, its strips joined (join.py), the realised token's logit beside them.

Backward: for one chunk of tokens and one block of the vocabulary at a time, gradient.py computes dz in the
dtype of hidden, from logits that were kept (kept.py) or anew, and two products of torch (cuBLAS) take it up,
added in float32 and rounded once:

    sum_hidden[chunk] += dz W[block]        grad_weight[block] = sum over chunks of dz^T hidden[chunk]

With torch.use_deterministic_algorithms(True) product.py computes the first, in an order of its own.
head/README.md has the choice of shapes, the estimates and the unit of dz in float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

from ..backend import Incoming, Kept, Sums
from ..spec import HeadSpec
from ..tiled import slices
from .chunk import CHUNK
from .gradient import head_gradient
from .join import head_join
from .kept import KeptLogits
from .product import head_product
from .stats import head_stats
from .target import head_target
from .tile import HeadOperands
from .tuning import Config

GRADIENT = 32 << 20  # bytes of dz
TOKENS = 4096  # of a chunk
ENTRIES = 16384  # of a block of the vocabulary
SUMS = 8 << 20  # bytes of a block's sums, where the gradient itself has no room for them


def statistics(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, kept: Kept | None = None, more: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.statistics`, of one strip, float32. A token outside of [0, V) has the logit -inf."""
    kept_logits = None if kept is None else KeptLogits.of(kept, head, hidden.dtype)
    operands = HeadOperands.of(head)
    config = operands.config("stats", hidden, more)
    tokens = tokens.clamp(-1, head.weight.shape[0])  # fits an int32
    parts, targets = [hidden.new_empty((1, 4 if more else 3, 0), dtype=torch.float32)], []
    tops = [tokens.new_empty(1, 0)]
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        for rows in slices(0, hidden.shape[0], CHUNK):
            h, y, here = hidden[rows], tokens[rows], operands.at(rows)
            kept_rows = None if kept_logits is None else kept_logits.at(rows)
            part, top = head_join(*head_stats(h, here, y, config, kept=kept_rows, more=more))
            parts.append(part)
            tops.append(top)
            targets.append(head_target(h, here, y, here.nats, outside=-torch.inf)[0])
    return torch.cat(parts, dim=2), torch.cat([parts[0][0, 0], *targets]), torch.cat(tops, dim=1)


def sweep(
    hidden: Tensor,
    tokens: Tensor,
    head: HeadSpec,
    incoming: Incoming,
    block: slice,
    sums: Sums,
    kept: Kept | None = None,
) -> None:
    """See `Backend.sweep`. block.start is even; sums.weight[block] is scratch memory until this returns."""
    begin, end = block.start, block.stop
    sum_hidden, grad_weight, grad_bias, sum_low_hidden, sum_low_weight = sums
    N, d = hidden.shape
    if N == 0:
        if grad_weight is not None:
            grad_weight[begin:end] = 0
        return
    operands, invariant = HeadOperands.of(head), torch.are_deterministic_algorithms_enabled()
    config = operands.config("gradient", hidden)
    tokens = tokens.clamp(-1, head.weight.shape[0])
    T = head.temperature if head.temperatures is None else head.temperatures
    terms = incoming.terms * (head.logit_scale / T)
    kept_logits = None if kept is None else KeptLogits.of(kept, head, hidden.dtype)
    unit = _unit(terms) if hidden.dtype == torch.float16 else None
    numbers = torch.cat([incoming.normaliser, terms if unit is None else terms / unit])

    chunk, most = _shape(N, end - begin, hidden.element_size(), config)
    buffer = hidden.new_empty(chunk, most)
    # Whether the weight's gradient is added up apart from where it is stored.
    apart = grad_weight is not None and hidden.element_size() < 4 and (chunk < N or unit is not None)
    low_weight = None if sum_low_weight is None else sum_low_weight[begin:end]
    added = [t for t in (sum_hidden, sum_low_hidden, low_weight) if t is not None]
    if unit is not None:  # what is there already too
        for total in added:
            total /= unit
    with torch.cuda.device_of(hidden), _rounded_once():
        for columns in _blocks(begin, end, most, config.BN, SUMS // (4 * d) if apart else most):
            sum_weight = None if grad_weight is None else grad_weight[columns]
            if grad_weight is not None and apart:
                sum_weight = _sums(grad_weight, columns, end)
            for rows in slices(0, N, chunk):
                dz = buffer[: rows.stop - rows.start, : columns.stop - columns.start]
                for entries, logits in _parts(columns, kept_logits):
                    here = dz[:, entries.start - columns.start : entries.stop - columns.start]
                    head_gradient(hidden, operands, tokens, numbers, rows, entries, here, config, logits)
                for part, out in zip(operands.parts, (sum_hidden, sum_low_hidden)):
                    if out is not None and invariant:
                        head_product(dz, part, columns.start, out[rows], config.BN)
                    elif out is not None:
                        _add_product(out[rows], dz, part.weight[columns])
                if sum_weight is not None:
                    _add_product(sum_weight, dz.T, hidden[rows], beta=min(1, rows.start))
                if sum_low_weight is not None and operands.low_hidden is not None:
                    _add_product(sum_low_weight[columns], dz.T, operands.low_hidden[rows])
                if grad_bias is not None:
                    sum_bias = dz.sum(0, dtype=torch.float32)
                    grad_bias[columns] += sum_bias if unit is None else sum_bias * unit
            if grad_weight is not None and sum_weight is not None and apart:
                grad_weight[columns] = sum_weight if unit is None else sum_weight.mul_(unit)
    if unit is not None:
        for total in added:
            total *= unit


def _unit(terms: Tensor) -> Tensor:
    """Unit of dz in float16: 2^-15 of its largest number. Tokens whose terms are not finite do not count."""
    a, e, at_token = terms.abs().nan_to_num(0.0, 0.0, 0.0)
    return torch.maximum(a + e, at_token).amax().clamp(min=1e-30) / 2**15


def _shape(N: int, V: int, element_size: int, config: Config) -> tuple[int, int]:
    """Tokens of a chunk, all chunks alike, and entries of a block at most."""
    chunk = triton.cdiv(triton.cdiv(N, triton.cdiv(N, TOKENS)), config.BM) * config.BM
    most = min(ENTRIES, GRADIENT // (chunk * element_size), triton.cdiv(V, config.BN) * config.BN)
    return chunk, max(1, most // config.BN) * config.BN


def _blocks(begin: int, end: int, most: int, BN: int, without_room: int) -> Iterator[slice]:
    """Blocks of `without_room` vocabulary entries, or of more if twice as many follow, to hold `_sums`."""
    while begin < end:
        size = min(most, max(without_room, (end - begin) // 3))
        stop = min(end, begin + max(1, size // BN) * BN)
        yield slice(begin, stop)
        begin = stop


def _parts(columns: slice, kept: KeptLogits | None) -> Iterator[tuple[slice, KeptLogits | None]]:
    """The entries of a block whose logits were not kept, and those whose were."""
    first = columns.stop if kept is None else min(max(kept.first, columns.start), columns.stop)
    if columns.start < first:
        yield slice(columns.start, first), None
    if first < columns.stop:
        yield slice(first, columns.stop), kept


def _sums(grad_weight: Tensor, block: slice, end: int) -> Tensor:
    """float32 [entries of the block, d]; in the rows behind the block, which are written later, if these are
    enough."""
    n, d = block.stop - block.start, grad_weight.shape[1]
    behind = grad_weight[block.stop : end].flatten()
    if len(behind) >= 2 * n * d:
        return behind[: 2 * n * d].view(torch.float32).view(n, d)
    return grad_weight.new_empty(n, d, dtype=torch.float32)


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """out = beta out + a b, added up in float32."""
    if a.is_cuda:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:  # with interpreted kernels: on the CPU torch has no products into another dtype
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


@contextmanager
def _rounded_once() -> Iterator[None]:
    """Keeps cuBLAS from adding slots of a bfloat16 product in bfloat16, as torch lets it by default."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    split_k = getattr(flags, "allow_bf16_reduced_precision_reduction_split_k", True)
    flags.allow_bf16_reduced_precision_reduction = False if split_k else (False, False)
    try:
        yield
    finally:
        flags.allow_bf16_reduced_precision_reduction = before if split_k else (before, False)
