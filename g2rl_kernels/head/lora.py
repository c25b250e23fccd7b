"""A low-rank part of the head: W + scaling B A, never merged.

B (scaling A h) is added to W h. Operators and backends see low_hidden = scaling A h [N, r], made here, beside
hidden, and low_weight = B [V, r] beside the weight. They give features of [W, B], [S, d + r], which `folded`
takes back to [S, d], and gradients of low_hidden and B; those of A and, through A, of hidden are this file's.

All products here are torch's, in float64 and rounded once: they cost r / V of the head's. The order of their
sums follows the batch and the threads. Rounding to float32 hides that, but not where the terms of A h cancel
to six digits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops import qualified
from ..arguments import check_finite, check_tensor, sizes
from .spec import DTYPES, HeadSpec
from .tiled import elements, slices

Lora = tuple[Tensor, Tensor, float]  # A [r, d], B [V, r], scaling


def with_lora(head: HeadSpec, hidden: Tensor, lora: Lora | None) -> HeadSpec:
    """The head (`HeadSpec.checked`) with its low-rank part, differentiable in hidden, A and B.

    Raises TypeError or ValueError naming lora.
    """
    if lora is None:
        return head
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        got = f"{len(lora)} values" if isinstance(lora, (tuple, list)) else type(lora).__name__
        raise TypeError(f"lora: got {got}, needs a tuple of three, (A, B, scaling)")
    A, B, scaling = lora
    for name, matrix in (("A", A), ("B", B)):
        dtypes = (*DTYPES, torch.float64) if hidden.dtype == torch.float64 else DTYPES
        check_tensor(f"lora: {name}", matrix, dtypes, hidden.device)
    (V, d) = head.weight.shape
    if A.dim() != 2 or A.shape[1] != d or A.shape[0] == 0:
        raise ValueError(f"lora: A: got shape {sizes(A)}, needs [r, {d}] with r > 0")
    if tuple(B.shape) != (V, A.shape[0]):
        raise ValueError(
            f"lora: B: got shape {sizes(B)}, needs {[V, A.shape[0]]}: [V, r], a row for each row of weight"
        )
    check_finite("lora: scaling", scaling)
    return head._replace(low_hidden=_low_hidden(hidden, A, float(scaling)), low_weight=B)


def folded(features: Tensor, lora: Lora | None) -> Tensor:
    """From features of [W, B], [S, d + r] float32, to those of W + scaling B A, [S, d]."""
    if lora is None:
        return features
    A, _, scaling = lora
    d = A.shape[1]
    with torch.autocast(features.device.type, enabled=False):
        return (features[:, :d] + (features[:, d:].double() @ A.detach().double()) * scaling).float()


def _dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunk(hidden: Tensor) -> int:
    """Tokens whose hidden states are float64 at a time."""
    return max(1, min(2**22, elements(hidden)) // hidden.shape[1])


@torch.library.custom_op(qualified("low_hidden"), mutates_args=())
def _low_hidden(hidden: Tensor, A: Tensor, scaling: float) -> Tensor:
    """scaling A h of each token, [N, r] float32 (float64 for float64)."""
    low = hidden.new_empty((hidden.shape[0], A.shape[0]), dtype=_dtype(hidden))
    transposed = A.double().T
    for rows in slices(0, hidden.shape[0], _chunk(hidden)):
        low[rows] = (hidden[rows].double() @ transposed) * scaling
    return low


@_low_hidden.register_fake
def _(hidden: Tensor, A: Tensor, scaling: float) -> Tensor:
    return hidden.new_empty((hidden.shape[0], A.shape[0]), dtype=_dtype(hidden))


@torch.library.custom_op(qualified("low_hidden_backward"), mutates_args=())
def _low_hidden_backward(
    grad: Tensor, hidden: Tensor, A: Tensor, scaling: float, need_hidden: bool, need_A: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and A; an empty tensor for each that is not needed."""
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    matrix = A.double()
    sum_A = torch.zeros_like(matrix)
    for rows in slices(0, hidden.shape[0], _chunk(hidden)):
        g = grad[rows].double() * scaling
        if need_hidden:
            grad_hidden[rows] = (g @ matrix).to(hidden.dtype)
        if need_A:
            sum_A += g.T @ hidden[rows].double()
    return grad_hidden, A.new_empty(A.shape).copy_(sum_A) if need_A else A.new_empty(0)


@_low_hidden_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, A: Tensor, scaling: float, need_hidden: bool, need_A: bool
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        A.new_empty(A.shape if need_A else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    hidden, A, ctx.scaling = inputs
    ctx.save_for_backward(hidden, A)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    needs = ctx.needs_input_grad[:2]
    grads = _low_hidden_backward(grad, *ctx.saved_tensors, ctx.scaling, *needs)
    grad_hidden, grad_A = (g if need else None for g, need in zip(grads, needs))
    return grad_hidden, grad_A, None


_low_hidden.register_autograd(_backward, setup_context=_setup_context)
