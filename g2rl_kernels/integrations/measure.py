"""Features from a forward pass that a trainer makes anyway: the worker's side of verl and SkyRL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .._clock import clock
from ..errors import TrainerError
from ..models.lm_head import LMHead, check_logits, find_head

if TYPE_CHECKING:
    from typing_extensions import Self

COMPARED = 8  # tokens whose logits are compared with the model's own, once


class Measurement:
    """A context in which a forward pass of `model` also computes features of responses.

    Features are computed inside the forward, because FSDP gathers the head's weight for it and shards the
    weight again right after. Subclasses say which hidden states belong to which response: `_features`.

    Args:
        model: a causal language model of transformers, also under FSDP2 or PEFT.
        compare: some logits are compared with the model's own; raises TrainerError where they differ.
    """

    features: Tensor | None  # [B, d] after a forward
    seconds: float  # that they took
    compared = slice(0, COMPARED)  # positions in the first row of hidden states that are not padding

    def __init__(self, model: Any, compare: bool) -> None:
        self.module, self.compare = model, compare
        self.head: LMHead = find_head(model, compare=False)

    def __enter__(self) -> Self:
        self.features, self.seconds = None, 0.0
        self.hooks = [self.head.backbone.register_forward_hook(self._after_backbone)]
        if self.compare:
            self.hooks.append(self.module.register_forward_hook(self._after_model))
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        if isinstance(self.head.output, FSDPModule):
            self.head.output.reshard()  # the head's own forward would, but fused kernels never run it

    def found(self) -> Tensor:
        """The features; raises RuntimeError if the forward did not run the backbone."""
        if self.features is None:
            raise RuntimeError(
                f"G2RL: {type(self.module).__name__}'s forward did not run its backbone "
                f"({type(self.head.backbone).__name__}), so there are no features"
            )
        return self.features

    def _features(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Features [B, d] from the backbone's output, in its own layout, and the whole head."""
        raise NotImplementedError

    def _clock(self) -> float:
        return clock(self.head.output.weight.device)

    @torch.no_grad()
    def _after_backbone(self, _module: Any, _args: Any, output: Any) -> None:
        start = self._clock()
        if isinstance(self.head.output, FSDPModule):  # under FSDP2 an untied head is a unit of its own
            self.head.output.unshard()  # the head runs next, and is then gathered already
        weight, bias = self.head.weights(self.head.output.weight.dtype)
        hidden = output[0].to(weight.dtype)
        if self.compare:
            self.logits, self.dtype = self.head.logits(hidden[:1, self.compared]), weight.dtype
        self.features = self._features(hidden, weight, bias)
        self.seconds = self._clock() - start

    def _after_model(self, _module: Any, _args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is None and self.head.lora is not None:
            raise TrainerError(
                "model: its fused kernels leave out the adapter on the LM head, which would not be trained: "
                "turn them off, or leave lm_head out of the adapter's target modules"
            )
        if logits is not None:  # fused kernels return no logits; they support plain heads only
            check_logits(self.module, self.logits, logits[:1, self.compared], self.dtype)
