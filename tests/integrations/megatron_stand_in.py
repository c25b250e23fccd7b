"""A stand-in for the parts of Megatron Core that the integrations meet, written from the source of Core 0.18.

It has Core's layouts, signatures and gradients: hidden states [s, b, h], or [s / tp, b, h] under sequence
parallelism; a vocabulary spread over tensor-parallel ranks, padded at its end; an output layer that sums the
gradient of its input over them. There is no attention: each token passes through one layer.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

GROUPS: dict[str, Any] = {}  # of `initialize`


def initialize(tensor_parallel: int = 1, context_parallel: int = 1) -> None:
    """Groups as Core numbers ranks: tensor-parallel ones are neighbours, then context-parallel ones."""
    world, rank = dist.get_world_size(), dist.get_rank()
    grid = torch.arange(world).view(-1, context_parallel, tensor_parallel)
    for name, axis in (("dp", 0), ("cp", 1), ("tp", 2)):
        for members in grid.movedim(axis, -1).reshape(-1, grid.shape[axis]).tolist():
            group = dist.new_group(members)
            if rank in members:
                GROUPS[name] = group


class _Gather(torch.autograd.Function):
    """All ranks' parts, joined along the first dimension; backward: this rank's part of the gradient.

    partial: each rank has a share of the gradient, which is summed over ranks first.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any, partial: bool) -> Tensor:
        ctx.group, ctx.partial = group, partial
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.clone()
        if ctx.partial:
            dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None, None


class _Copy(torch.autograd.Function):
    """The same on all ranks; backward: the gradient summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def gather_from_sequence_parallel_region(
    input_: Tensor, tensor_parallel_output_grad: bool = True, group: Any = None
) -> Tensor:
    return _Gather.apply(input_, group or GROUPS["tp"], tensor_parallel_output_grad)


class ColumnParallelLinear(nn.Module):
    def __init__(self, d: int, V: int, *, config: Any, skip_weight_param_allocation: bool) -> None:
        super().__init__()
        self.tp_group, self.bias = GROUPS["tp"], None
        self.sequence_parallel = config.sequence_parallel
        if skip_weight_param_allocation:
            self.weight = None
        else:
            self.weight = nn.Parameter(rows_of_rank(torch.randn(V, d).to(config.params_dtype), self.tp_group))

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(input_, True, self.tp_group)
        else:
            x = _Copy.apply(input_, self.tp_group)
        logits = nn.functional.linear(x, self.weight if weight is None else weight)
        if runtime_gather_output:
            logits = _Gather.apply(logits.movedim(-1, 0), self.tp_group, False).movedim(0, -1)
        return logits, None


def rows_of_rank(whole: Tensor, group: Any) -> Tensor:
    return whole.chunk(group.size())[group.rank()].clone()


class GPTModel(nn.Module):
    def __init__(
        self,
        config: Any,
        vocab_size: int,
        share_embeddings_and_output_weights: bool,
        post_process: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.group = config, GROUPS["tp"]
        self.post_process, self.share = post_process, share_embeddings_and_output_weights
        d = config.hidden_size
        torch.manual_seed(0)  # the same on all ranks
        self.embedding = nn.Parameter(
            rows_of_rank(torch.randn(vocab_size, d).to(config.params_dtype), self.group)
        )
        self.decoder = nn.Linear(d, d, dtype=config.params_dtype)
        if post_process:
            self.output_layer = ColumnParallelLinear(
                d, vocab_size, config=config, skip_weight_param_allocation=self.share
            )

    def _hidden(self, ids: Tensor) -> Tensor:
        rows, rank = len(self.embedding), self.group.rank()
        local = ids - rank * rows
        here = (local >= 0) & (local < rows)
        embedded = self.embedding[local.clamp(0, rows - 1)] * here[..., None]
        embedded = _Reduce.apply(embedded, self.group).transpose(0, 1)
        if self.config.sequence_parallel:
            embedded = embedded.chunk(self.group.size())[self.group.rank()]
        return embedded + torch.tanh(self.decoder(embedded))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        packed_seq_params: Any = None,
        runtime_gather_output: bool | None = None,
        *,
        loss_mask: Tensor | None = None,
        output_processor: Any = None,
        output_processor_context: Any = None,
    ) -> Any:
        hidden_states = self._hidden(input_ids)
        if not self.post_process:
            return hidden_states
        output_weight = self.embedding if self.share else None
        if output_processor is not None:
            return output_processor(
                hidden_states=hidden_states,
                output_layer=self.output_layer,
                output_weight=output_weight,
                labels=labels,
                loss_mask=loss_mask,
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                decoder_input=None,
                inference_context=None,
                packed_seq_params=packed_seq_params,
                runtime_gather_output=runtime_gather_output,
                context=output_processor_context,
                compute_language_model_loss=None,
                scale_logits=self._scale_logits,
                config=self.config,
            )
        logits, _ = self.output_layer(
            hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        return self._scale_logits(logits).transpose(0, 1).contiguous()

    def _scale_logits(self, logits: Tensor) -> Tensor:
        return logits * self.config.mup_output_mult if self.config.use_mup else logits


class _Reduce(torch.autograd.Function):
    """The sum over ranks; backward: the gradient, which is the same on all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def install() -> None:
    """Makes `megatron.core` importable."""
    core = ModuleType("megatron.core")
    core.__version__ = "0.18.0"
    core.mpu = ModuleType("megatron.core.mpu")
    core.mpu.get_tensor_model_parallel_group = lambda: GROUPS["tp"]
    core.mpu.get_context_parallel_group = lambda: GROUPS["cp"]
    core.mpu.get_data_parallel_group = lambda: GROUPS["dp"]
    core.tensor_parallel = ModuleType("megatron.core.tensor_parallel")
    core.tensor_parallel.gather_from_sequence_parallel_region = gather_from_sequence_parallel_region
    megatron = ModuleType("megatron")
    megatron.core = core
    for module in (megatron, core, core.mpu, core.tensor_parallel):
        sys.modules[module.__name__] = module


def config(**changes: Any) -> SimpleNamespace:
    """What the stand-in and the integrations read of TransformerConfig."""
    return SimpleNamespace(
        **{
            "hidden_size": 32,
            "params_dtype": torch.float32,
            "sequence_parallel": False,
            "use_mup": False,
            "mup_output_mult": 1.0,
            "defer_embedding_wgrad_compute": False,
            **changes,
        }
    )
