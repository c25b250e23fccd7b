"""Finds the backbone and the LM head of a causal language model of transformers: `find_head`.

The ops take the hidden states that enter the LM head, so a trainer runs the backbone alone and forms no
logits. `find_head` reads from the model's configuration what its family does between hidden states and logits
(bias, scale, softcap), and checks the result against the model's own logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..errors import TrainerError
from ..head.features import pack_responses


class HeadArguments(TypedDict):
    """The keyword arguments of `head_features` and `linear_logprobs` that describe a model's LM head."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    temperature: float
    logit_scale: float
    logit_softcap: float | None


@dataclass
class LMHead:
    """What the ops need of a causal language model: the backbone, which gives h, and the head's arithmetic.

    The logits are z = softcap(logit_scale (W h + b)), with softcap(x) = c tanh(x / c), or x for c = None.
    """

    backbone: nn.Module  # backbone(input_ids=...).last_hidden_state: [B, L, d], after the final norm
    output: nn.Linear  # W [V, d] and b [V] or None
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # c

    def arguments(self, temperature: float = 1.0, dtype: torch.dtype | None = None) -> HeadArguments:
        """What both ops need of the head, as keyword arguments:

            g2.head_features(hidden, tokens=tokens, cu_seqlens=cu_seqlens, **head.arguments())
            g2.linear_logprobs(hidden, tokens=tokens, **head.arguments())

        temperature: of sampling. dtype: of weight and bias, which must be that of `hidden`; None: that of the
        parameters. Weight and bias are differentiable in the parameters.
        """
        weight, bias = self.weights(self.output.weight.dtype if dtype is None else dtype)
        return {
            "weight": weight,
            "bias": bias,
            "temperature": temperature,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """weight [V, d] and bias [V] or None, in `dtype`; differentiable in the parameters."""
        weight: Tensor = self.output.weight
        bias: Tensor | None = self.output.bias
        return _whole(weight).to(dtype), None if bias is None else _whole(bias).to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """z [..., V] in float32 from a few hidden states [..., d], to compare with the model's own."""
        z = nn.functional.linear(hidden, *self.weights(hidden.dtype)).float() * self.logit_scale
        return z if self.logit_softcap is None else self.logit_softcap * torch.tanh(z / self.logit_softcap)

    def options(self, temperature: float) -> dict[str, Any]:
        """`arguments` without weight and bias."""
        return {
            "temperature": temperature,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }


def _whole(parameter: Any) -> Tensor:
    """The whole parameter where FSDP2 keeps a shard (a DTensor) on each rank; otherwise the parameter itself.

    Its gradient is averaged over the ranks here: FSDP2 does that only for modules whose forward is called.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    whole: Tensor = parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return whole


def find_head(model: Any, compare: bool = True) -> LMHead:
    """The backbone and the LM head of a causal language model of transformers.

        head = g2.find_head(model)
        hidden = head.backbone(input_ids=ids, attention_mask=mask).last_hidden_state        # [B, L, d]
        g2.linear_logprobs(hidden[:, :-1].flatten(0, 1), tokens=ids[:, 1:].flatten(), **head.arguments())

    Supports families whose head is a plain nn.Linear [V, d], tied to the embeddings or not, with an optional
    bias, scale (Cohere's `logit_scale`, Granite's `logits_scaling`) and softcap (Gemma's
    `final_logit_softcapping`) as `model.config` names them. A head trained through PEFT's `modules_to_save`
    is used; a head with an unmerged adapter is refused.

    Args:
        model: a transformers model, also within PEFT or under FSDP2; unwrap DDP first (`model.module`).
        compare: run the model on eight tokens and compare its logits with `LMHead.logits`; under FSDP2 all
            ranks must call. Pass False where this rank has no weights (ZeRO-3, meta device).

    Returns:
        `LMHead`. It refers to the model's modules, so it follows their updates.

    Raises:
        TrainerError: the model has no backbone or LM head, its head is not a plain nn.Linear or carries an
            adapter, or its logits differ from those that the configuration implies.
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
    # With modules_to_save, PEFT trains a copy of the head; output.weight is that of the active one
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


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode; afterwards each has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _compare_logits(model: Any, head: LMHead) -> None:
    """Runs the model on a few tokens: some families change logits in ways that no configuration key names."""
    weight = head.output.weight
    ids = torch.arange(1, 9, device=weight.device)[None] % weight.shape[0]
    with evaluation_mode(model):
        theirs = model(input_ids=ids, use_cache=False).logits
        hidden = head.backbone(input_ids=ids, use_cache=False).last_hidden_state
    check_logits(model, head.logits(hidden.to(weight.dtype)), theirs, weight.dtype)


def check_logits(model: Any, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Raises TrainerError if `ours`, from `LMHead.logits`, differs from the model's logits `theirs`.

    dtype: of the model's computation, which sets the tolerance.
    """
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
    """Runs the backbone; returns hidden [N, d] that predict the response tokens [N], and cu_seqlens [B + 1].

    Args:
        head: of `find_head`.
        ids: [B, P + L] int64, prompts padded on the left and responses padded on the right.
        attention: [B, P + L], 0 on padding.
        mask: [B, L] bool, True for the N response tokens that count.
    """
    positions = (attention.cumsum(1) - 1).clamp(min=0)  # counted from the first token that is not padding
    out = head.backbone(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
    length = mask.shape[1]
    return pack_responses(out.last_hidden_state[:, -length - 1 : -1], ids[:, -length:], mask)


def frozen_copy(head: LMHead, autocast: bool) -> LMHead:
    """A copy without gradients, for the reference policy.

    With autocast (bf16) its linear layers are stored in bf16: the same numbers, half the memory.
    """
    backbone, output = copy.deepcopy((head.backbone, head.output))  # in one call: a tied head stays tied
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
