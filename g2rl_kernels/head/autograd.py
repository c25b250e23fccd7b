"""Gradients of the log-probability operators: a second operator each, which torch.compile can keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .spec import HeadSpec

_PLACES = ("hidden", "tokens", *HeadSpec._fields)
# Where the inputs that can have gradients stand among the operator's.
NEEDED = [_PLACES.index(name) for name in ("hidden", "weight", "bias", "low_hidden", "low_weight")]

# How the schema of such a second operator ends.
GRADIENTS_SCHEMA = (
    "bool need_hidden, bool need_weight, bool need_bias, bool need_low_hidden, bool need_low_weight) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_low_hidden, "
    "Tensor grad_low_weight)"
)


def empty_gradients(hidden: Tensor, head: HeadSpec, needs: tuple[bool, ...]) -> list[Tensor]:
    """Room for the gradients of the inputs in NEEDED; an empty tensor for each that is not needed."""
    inputs = (hidden, head.weight, head.bias, head.low_hidden, head.low_weight)
    return [
        (hidden if t is None else t).new_empty(t.shape if need and t is not None else (0,))
        for t, need in zip(inputs, needs)
    ]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, _, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # zeros as large as the kept logits, otherwise
    tensors = [value if isinstance(value, Tensor) else None for value in arguments]
    ctx.save_for_backward(*tensors, *output[:-3])  # the last are the statistics
    ctx.options = [None if isinstance(value, Tensor) else value for value in arguments]


def backward_through(operator: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward pass, by `operator`, of an operator that ends with (int logits_memory, bool statistics).

    `operator` takes the incoming gradients, the arguments but these two, the outputs but the statistics, and
    the flags of NEEDED.
    """

    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: checkpointing allows no more
        tensors, outputs = saved[: len(ctx.options)], saved[len(ctx.options) :]
        arguments = [option if tensor is None else tensor for tensor, option in zip(tensors, ctx.options)]
        incoming = [torch.zeros_like(outputs[0]) if g is None else g for g in (grad_logprobs, grad_entropy)]
        needs = [ctx.needs_input_grad[i] for i in NEEDED]
        grads = operator(*incoming, *arguments, *outputs, *needs)
        found = dict(zip(NEEDED, (grad if need else None for grad, need in zip(grads, needs))))
        return tuple(found.get(i) for i in range(len(ctx.options) + 2))

    return backward
