"""Finding the backbone and the LM head of a causal language model.

The ops work on the hidden states that enter the LM head, so a trainer runs the backbone alone and forms no
logits. What a family does between hidden states and logits (a bias, a scale, a softcap) must therefore be
known: `find_head` reads it from the model's configuration, then compares with the model's own logits: nothing
is silently ignored.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..errors import TrainerError
from ..head.features import pack_responses


@dataclass
class LMHead:
    """A causal LM as the ops see it: backbone(ids) gives h [B, L, d]; z = softcap(scale (W h + b))."""

    backbone: nn.Module
    output: nn.Linear
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """weight [V, d] and bias [V] or None, in `dtype`; differentiable in the parameters."""
        weight: Tensor = self.output.weight
        bias: Tensor | None = self.output.bias
        return _whole(weight).to(dtype), None if bias is None else _whole(bias).to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """z [..., V], float32, of a few hidden states [..., d]: no more than to compare with the model's."""
        z = nn.functional.linear(hidden, *self.weights(hidden.dtype)).float() * self.logit_scale
        return z if self.logit_softcap is None else self.logit_softcap * torch.tanh(z / self.logit_softcap)

    def options(self, temperature: float) -> dict[str, Any]:
        return {
            "temperature": temperature,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }


def _whole(parameter: Any) -> Tensor:
    """All of a parameter of which FSDP2 keeps this rank's shard, a DTensor; its gradient is the ranks' mean.

    FSDP2 does that averaging itself, but not for modules that are not run by a call of their own.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    whole: Tensor = parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return whole


def find_head(model: Any, compare: bool = True) -> LMHead:
    """Backbone and head of a transformers causal LM; raises TrainerError where they cannot be told apart.

    compare=False leaves out the comparison with the model's own logits, for where its weights are elsewhere.
    """
    name = type(model).__name__
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # unwraps PEFT
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    backbone = getattr(inner, "base_model", None)
    if output is None or backbone is None or backbone is inner:
        raise TrainerError(
            f"model: {name} is not a transformers causal language model with a backbone and an LM head"
        )
    if hasattr(output, "base_layer"):
        raise TrainerError(
            "model: the LM head carries an unmerged adapter (LoRA), which the feature would ignore: "
            "leave lm_head out of target_modules (modules_to_save trains it), or merge the adapter first"
        )
    # With modules_to_save, PEFT trains a copy of the head; .weight is of whichever is active, at every access
    linear = output.original_module if hasattr(output, "modules_to_save") else output
    if next(kind for kind in type(linear).__mro__ if not issubclass(kind, FSDPModule)) is not nn.Linear:
        raise TrainerError(
            f"model: the LM head is a {type(linear).__name__}; only a plain nn.Linear is supported"
        )
    settings = inner.config.get_text_config()
    scale = float(getattr(settings, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(settings, "logits_scaling", None) or 1.0)  # Granite divides
    softcap = getattr(settings, "final_logit_softcapping", None)  # Gemma 2
    head = LMHead(backbone, output, scale, float(softcap) if softcap else None)
    if compare:
        _compare_logits(inner, head)
    return head


@torch.no_grad()
def _compare_logits(model: Any, head: LMHead) -> None:
    """Some families change logits in ways that no configuration key tells; a few tokens show it."""
    weight = head.output.weight
    ids = torch.arange(1, 9, device=weight.device)[None] % weight.shape[0]
    was_training = model.training
    model.eval()
    theirs = model(input_ids=ids, use_cache=False).logits
    hidden = head.backbone(input_ids=ids, use_cache=False).last_hidden_state
    model.train(was_training)
    check_logits(model, head.logits(hidden.to(weight.dtype)), theirs, weight.dtype)


def check_logits(model: Any, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Raises TrainerError where `LMHead.logits` of a few tokens, in `dtype`, are not the model's."""
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    theirs = theirs.float()
    error = (ours - theirs).abs().max().item()
    if not error <= tolerance * max(theirs.abs().max().item(), 1e-3):
        raise TrainerError(
            f"model: {type(model).__name__} does something unknown between hidden states and logits "
            f"(they differ by {error:.2g}); its LM head is not supported"
        )


def response_hidden(
    head: LMHead, ids: Tensor, attention: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states [N, d] that predict the response tokens [N], and cu_seqlens [B + 1].

    ids, attention: [B, P + L], prompts padded on the left and responses on the right, attention 0 on padding;
    mask: bool [B, L], the response tokens that count.
    """
    positions = (attention.cumsum(1) - 1).clamp(min=0)  # padding on the left must not shift them
    out = head.backbone(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
    length = mask.shape[1]
    return pack_responses(out.last_hidden_state[:, -length - 1 : -1], ids[:, -length:], mask)


def frozen_copy(head: LMHead, autocast: bool) -> LMHead:
    """The reference policy. Under bf16 autocast its linear layers are bf16: same numbers, half the memory."""
    backbone, output = copy.deepcopy((head.backbone, head.output))  # one call, so that a tied head stays tied
    backbone.requires_grad_(False).eval()
    output.requires_grad_(False)
    if autocast:
        tied = {
            parameter.data_ptr()
            for module in backbone.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }
        for module in [*backbone.modules(), output]:
            if type(module) is nn.Linear and module.weight.data_ptr() not in tied:
                module.to(torch.bfloat16)
    return LMHead(backbone, output, head.logit_scale, head.logit_softcap)
