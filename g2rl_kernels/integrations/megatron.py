"""G2RL in Megatron Core: an `output_processor` for `GPTModel` (Core 0.18 or later).

    from g2rl_kernels.integrations.megatron import HeadOptions, head_output

    out = model(
        input_ids, position_ids, attention_mask, labels=labels, loss_mask=loss_mask,
        output_processor=head_output, output_processor_context=HeadOptions(vocab_size=50257),
    )
    out.logprobs, out.entropy  # [b, s], differentiable; no logits are formed

On the last pipeline stage Core calls it in place of output layer and loss. The ops take this rank's rows of
the output layer's weight, and exchange sums with the other ranks of its tensor-parallel group.
docs/megatron.md is for users. slime.py uses the lower half of this file, with older versions of Core too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

import g2rl_kernels as g2

from ..head.logprobs import LOGITS_MEMORY
from ..versions import warn_untested

try:
    import megatron.core
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
except ImportError as error:
    raise ImportError(
        f"g2rl_kernels.integrations.megatron needs Megatron Core ({error}): "
        "pip install 'git+https://github.com/NVIDIA/Megatron-LM@core_v0.18.2', or put its sources on "
        "PYTHONPATH"
    ) from error

warn_untested("megatron-core", megatron.core.__version__)  # its sources alone have no metadata


@dataclass(frozen=True)
class HeadOptions:
    """What `head_output` computes: GPTModel's `output_processor_context`."""

    temperature: float = 1.0
    vocab_size: int | None = (
        None  # tokens of the vocabulary, without Megatron's padding; None: all rows count
    )
    features: bool = False  # also the feature of each sequence
    cp_group: Any = None  # context-parallel group: its ranks hold parts of the same sequences
    logits_memory: int = LOGITS_MEMORY  # bytes of logits that a rank may keep for its backward pass


@dataclass(frozen=True)
class HeadOutput:
    """What `head_output` returns. Not a tuple: Float16Module would make a plain one of it."""

    logprobs: Tensor  # [b, s] float32, of the labels, nats; 0 where loss_mask is 0
    entropy: Tensor  # [b, s] float32, nats; 0 where loss_mask is 0
    features: Tensor | None  # [b, d] float32; [sequences, d] of packed sequences; without gradients


def head_output(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None = None,
    labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    packed_seq_params: Any = None,
    scale_logits: Callable[[Tensor], Tensor] | None = None,
    config: Any = None,
    context: HeadOptions | None = None,
    **others: Any,
) -> HeadOutput:
    """Log-probabilities, entropy and features from the last hidden states: an `output_processor`.

    The gradient of hidden_states is that of Core's own output layer: whole and the same on all
    tensor-parallel ranks, or that of this rank's part under sequence parallelism. Each rank computes the
    same loss.

    Args:
        hidden_states: [s, b, d], or [s / tp, b, d] under sequence parallelism.
        output_layer: a ColumnParallelLinear: its weight and group.
        output_weight: [V / tp, d], the embedding's weight where it is tied.
        labels: [b, s] int64, the token that each position predicts.
        loss_mask: [b, s], not 0 where a label counts; None: all count. Other positions cost nothing.
        packed_seq_params: of packed sequences (b = 1, "thd"): their bounds, for the features.
        scale_logits: Core's factor for logits (MuP).
        config: Core's configuration of the model.
        context: `HeadOptions`; None: the defaults.
        others: what else Core passes; not used.

    Raises:
        ValueError: labels are missing, or the output layer works in a way that is not supported.
        TypeError, ValueError: as `head_features` and `linear_logprobs`.
    """
    options = context or HeadOptions()
    if labels is None:
        raise ValueError("labels: got None, needs [b, s], the token that each position predicts")
    if getattr(config, "defer_embedding_wgrad_compute", False):
        raise ValueError("defer_embedding_wgrad_compute: got True, head_output needs False")
    head: dict[str, Any] = {
        **head_shard(output_layer, output_weight, options.vocab_size),
        "temperature": options.temperature,
        # Core multiplies by a number: asked for on the CPU, it is read without waiting for the device
        "logit_scale": 1.0 if scale_logits is None else float(scale_logits(torch.ones(()))),
    }
    mask = torch.ones_like(labels, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    whole = whole_sequence(hidden_states, output_layer).transpose(0, 1)
    hidden, tokens, cu_seqlens = g2.pack_responses(whole, labels, mask)
    features = None
    if options.features:
        bounds = None if packed_seq_params is None else packed_bounds(packed_seq_params, options.cp_group)
        if bounds is not None:  # rows behind the last sequence are one more, which is dropped
            counted = torch.nn.functional.pad(mask[0].cumsum(0), (1, 0))
            cu_seqlens = torch.cat([counted[bounds], counted[-1:]])
        measured = g2.head_features(hidden, tokens=tokens, cu_seqlens=cu_seqlens, **head)
        features = mean_over_ranks(measured.features, cu_seqlens.diff(), options.cp_group)
        features = features if bounds is None else features[:-1]
    if features is not None and not torch.is_grad_enabled():
        logprobs, entropy = measured.logprobs, measured.entropy
    else:
        head["logits_memory"] = options.logits_memory
        logprobs, entropy = g2.linear_logprobs(hidden, tokens=tokens, **head)
    return HeadOutput(_spread(logprobs, mask), _spread(entropy, mask), features)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values [N] at the N places of mask [b, s], and 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


# --- parts --------------------------------------------------------------------------------------------------


class HeadShard(TypedDict):
    """This rank's part of the LM head, as keyword arguments of the ops."""

    weight: Tensor  # [V / tp, d]
    bias: Tensor | None  # [V / tp]
    process_group: Any


def head_shard(output_layer: Any, output_weight: Tensor | None, vocab_size: int | None) -> HeadShard:
    """This rank's rows of the head. Rows of padding get a bias of -inf, and so no probability.

    Megatron pads the vocabulary at its end to a multiple of 128 times the tensor-parallel ranks. Its own loss
    counts the logits of this padding, but no sampler draws it.

    Args:
        output_layer: a ColumnParallelLinear.
        output_weight: [V / tp, d]; None: the layer's own.
        vocab_size: number of real tokens; None: all rows.
    """
    group, name = getattr(output_layer, "tp_group", None), type(output_layer).__name__
    if group is None:
        raise ValueError(f"output_layer: got {name} without tp_group, needs Core's ColumnParallelLinear")
    if getattr(output_layer, "gtp_remat_size", 1) > 1:
        raise ValueError(
            f"output_layer: {name} has gtp_remat_size > 1, which spreads its rows further; needs 1"
        )
    weight = output_layer.weight if output_weight is None else output_weight
    bias, rows = output_layer.bias, weight.shape[0]
    if vocab_size is not None:
        if not 0 < vocab_size <= rows * group.size():
            raise ValueError(
                f"vocab_size: got {vocab_size}, needs the number of real tokens, at most "
                f"{rows * group.size()}"
            )
        if vocab_size < rows * group.size():  # the same on all ranks: a bias on one needs one on all
            padding = torch.arange(rows, device=weight.device) + group.rank() * rows >= vocab_size
            bias = (weight.new_zeros(rows) if bias is None else bias).masked_fill(padding, -torch.inf)
    return {"weight": weight, "bias": bias, "process_group": group if group.size() > 1 else None}


def whole_sequence(hidden: Tensor, output_layer: Any) -> Tensor:
    """[s, b, d] from [s / tp, b, d] under sequence parallelism.

    `linear_logprobs` gives all ranks the whole gradient: this rank's part of it is cut out, not summed again.
    """
    if not output_layer.sequence_parallel:
        return hidden
    whole: Tensor = gather_from_sequence_parallel_region(
        hidden, tensor_parallel_output_grad=False, group=output_layer.tp_group
    )
    return whole


def packed_bounds(packed_seq_params: Any, cp_group: Any = None) -> Tensor:
    """[sequences + 1]: where packed sequences begin and end in the rows of this context-parallel rank."""
    padded = packed_seq_params.cu_seqlens_q_padded
    bounds: Tensor = packed_seq_params.cu_seqlens_q if padded is None else padded
    return bounds.long() // (1 if cp_group is None else cp_group.size())


def mean_over_ranks(features: Tensor, counts: Tensor, group: Any) -> Tensor:
    """Features [S, d] over the tokens of all ranks, from the mean over this rank's counts [S] of them."""
    if group is None or group.size() == 1:
        return features
    total = counts.clone()
    features = features * counts[:, None]
    dist.all_reduce(features, group=group)
    dist.all_reduce(total, group=group)
    return features / total.clamp(min=1)[:, None]
