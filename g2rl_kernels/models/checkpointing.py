"""Gradient checkpointing without training mode: no dropout in updates, and a cache while generating."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


def enable_checkpointing(model: Any) -> None:
    """Recomputes activations in the backward pass within `checkpointing(model)`; changes nothing else.

    transformers recomputes a layer only where its `training` is True. The layer still computes in evaluation
    mode (`_recomputed`): dropout would make the updated policy another one than that which sampled.
    """
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for layer in _checkpointed(model):
        layer._gradient_checkpointing_func = partial(_recomputed, layer, layer._gradient_checkpointing_func)


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """Puts the modules that `enable_checkpointing` found in training mode, all others in evaluation mode.

    Generate outside of it: within, layers take no cache.
    """
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
    """checkpoint(function, ...), with the layer in evaluation mode while `function` runs."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        layer.training = False
        try:
            return function(*args, **kwargs)
        finally:
            layer.training = True

    return checkpoint(inside, *args, **kwargs)
