"""bfloat16 products on a CPU that has none, several times faster than torch emulates them.

Operands are rounded to bfloat16 and multiplied in float32, and the product is rounded: what a CPU with such
products computes, but for the order of sums. Attention's probabilities are not rounded.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

from g2rl_kernels.trainer.config import fast_autocast

if TYPE_CHECKING:
    from g2rl_kernels.trainer import TrainerConfig


def products_of(config: TrainerConfig) -> contextlib.AbstractContextManager[Any]:
    """In it, a run that multiplies in bfloat16 does so by `RoundedProducts` where the CPU has no such
    products."""
    emulated = config.autocast == "bfloat16" and fast_autocast("cpu") == "none"
    return RoundedProducts() if emulated else contextlib.nullcontext()


class RoundedProducts(TorchFunctionMode):
    """Computes linear layers and attention under autocast to bfloat16, on the CPU and without its kernels.

    Weights are rounded once until an optimizer steps; nothing else may change them meanwhile.
    """

    def __enter__(self) -> RoundedProducts:
        super().__enter__()
        # Not by a weight's _version: a fused optimizer leaves it as it is.
        self.hook = register_optimizer_step_post_hook(lambda *_: _ROUNDED.clear())
        return self

    def __exit__(self, *error: Any) -> None:
        self.hook.remove()
        _ROUNDED.clear()
        super().__exit__(*error)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        ours: Callable[..., Tensor] | None = OURS.get(function)
        if ours and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            with torch.autocast("cpu", enabled=False):
                return ours(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., d], weight [out, d], bias [out], of any dtype; returns bfloat16 [..., out]."""
    product: Tensor = Linear.apply(x, weight, bias)
    return product


class Linear(torch.autograd.Function):
    """Its gradients are rounded products too, in the dtypes of the operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rounded = x.bfloat16()
        ctx.save_for_backward(rounded, weight)
        ctx.dtype = x.dtype
        shift = None if bias is None else bias.bfloat16().float()
        return F.linear(rounded.float(), round_weight(weight), shift).bfloat16()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, of_x, of_weight, of_bias = grad.bfloat16().float(), None, None, None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ round_weight(weight)).bfloat16().to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            product = grad.flatten(0, -2).T @ x.float().flatten(0, -2)
            of_weight = product.bfloat16().to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = grad.flatten(0, -2).sum(0).bfloat16().to(weight.dtype)
        return of_x, of_weight, of_bias


_ROUNDED: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}  # of a weight's id: it, and it rounded


def round_weight(weight: Tensor) -> Tensor:
    """weight as float32 of bfloat16's values; kept until an optimizer steps."""
    known, rounded = _ROUNDED.get(id(weight), (None, weight))
    if known is None or known() is not weight:
        rounded = weight.detach().bfloat16().float()
        _ROUNDED[id(weight)] = weakref.ref(weight), rounded
    return rounded


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
) -> Tensor:
    """As torch's, of operands rounded to bfloat16, in float32; returns bfloat16."""
    query, key, value = (t.bfloat16().float() for t in (query, key, value))
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.bfloat16().float()
    return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **options).bfloat16()


OURS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: linear,
    F.scaled_dot_product_attention: attention,
}
