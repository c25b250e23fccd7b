"""The LM head of a model in one of TRL's trainers: where it is, and what enters it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

import g2rl_kernels as g2

from ..models.lm_head import LMHead, backbone_of


class HeadInputs(NamedTuple):
    """Arguments of `g2.head_features` and `g2.linear_logprobs`: N scored tokens of B responses, packed."""

    hidden: Tensor  # [N, d], in the dtype that TRL multiplies in
    weight: Tensor  # [V, d], in the same dtype
    bias: Tensor | None  # [V]
    tokens: Tensor  # [N] int64
    cu_seqlens: Tensor  # [B + 1]
    mask: Tensor  # [B, L - 1] bool: where the packed tokens stand


def head_inputs(head: LMHead, hidden: Tensor, labels: Tensor, args: Any) -> HeadInputs:
    """Packs the tokens that are scored, with the hidden states that predict them.

    hidden: [B, L, d], of the backbone; labels: [B, L] int64, -100 where a token is not scored; args: the
    trainer's configuration.
    """
    device, dtype = head.output.weight.device, head.output.weight.dtype
    if torch.is_autocast_enabled(device.type) and not getattr(args, "cast_lm_head_to_fp32", False):
        dtype = torch.get_autocast_dtype(device.type)
    hidden, labels = hidden.to(device)[:, :-1], labels.to(device)[:, 1:]
    mask = labels != -100
    packed, tokens, cu_seqlens = g2.pack_responses(hidden, labels, mask)
    return HeadInputs(packed.to(dtype), *head.weights(dtype), tokens, cu_seqlens, mask)


def innermost(model: Any) -> Any:
    """The transformers model within DDP, FSDP, DeepSpeed and PEFT."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if is_peft_model(model) else model


def has_weights(accelerator: Any) -> bool:
    """Whether this process has the model's weights before training, so that `find_head` can compare logits.

    ZeRO-3 has sharded them by then, and FSDP may load them on one process of a node.
    """
    return accelerator.is_local_main_process and not is_deepspeed_zero3_enabled()


def current_head(head: LMHead, model: Any) -> LMHead:
    """`head` with the modules that the model has now: FSDP and PEFT replace those found before training."""
    return replace(head, backbone=backbone_of(model), output=model.get_output_embeddings())


@contextmanager
def last_hidden_state(backbone: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list; the hidden states [B, L, d] of every call of the backbone are appended to it."""
    seen: list[Tensor] = []
    hook = backbone.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        yield seen
    finally:
        hook.remove()


def pad_like(mask: Tensor, rows: list[list[Any]], columns: int) -> Tensor:
    """Rows of numbers as [B, L - 1] float32, the shape of `mask`.

    Each row starts where the last `columns` columns start. Other places, None and NaN become 0.
    """
    values = torch.zeros(mask.shape)
    first = mask.shape[1] - columns
    for row, found in enumerate(rows):
        numbers = [0.0 if x is None else float(x) for x in found]
        values[row, first : first + len(found)] = torch.tensor(numbers)
    return values.nan_to_num(nan=0.0).to(mask.device)


def completion_text(completion: Any) -> str:
    """The text of a completion; of a conversation, the model's own messages."""
    if isinstance(completion, str):
        return completion
    said = (m.get("content") for m in completion if m.get("role") == "assistant")
    return "\n".join(text for text in said if isinstance(text, str))
