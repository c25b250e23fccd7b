"""Gradient checkpointing that leaves the policy as it sampled: no dropout, and a cache while generating."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


def enable_checkpointing(model: Any) -> None:
    """Activations are recomputed in the backward pass, within `checkpointing(model)`; nothing else changes.

    transformers recomputes a layer in training mode only. That mode must not reach what is in the layer: the
    policy that is updated must be the one that sampled, without dropout.
    """
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for layer in _checkpointed(model):
        layer._gradient_checkpointing_func = partial(_recomputed, layer, layer._gradient_checkpointing_func)


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """The modules that `enable_checkpointing` found are in training mode, and none else. Generation must stay
    outside: in that mode layers take no cache."""
    layers = _checkpointed(model)
    model.eval()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        model.eval()


def _checkpointed(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def _recomputed(
    layer: Any, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """checkpoint(function, ...), with the layer itself in evaluation mode while it computes."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        layer.training = False
        try:
            return function(*args, **kwargs)
        finally:
            layer.training = True

    return checkpoint(inside, *args, **kwargs)
