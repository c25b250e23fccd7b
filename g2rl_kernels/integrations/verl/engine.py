"""Features in verl's FSDP engine, from the forward pass that computes the old log-probabilities."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_torch_device
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from ... import head_features
from ...group.shaping import response_keys
from ...models.lm_head import LMHead, check_logits, find_head
from ..seams import check_seams

check_seams(
    "verl",
    {
        FSDPEngineWithLMHead: {"forward_step": "micro_batch loss_function forward_only"},
        tu: {"get_non_tensor_data": "data key default"},
    },
)

REQUEST = "g2rl_measure"  # true in a batch's non-tensor data: its forward returns the next three too
FEATURES = "g2rl_features"  # [B, d] float32
KEYS = "g2rl_keys"  # [B, 1] int64, response_keys of prompt and response: turns may differ in the prompt
SECONDS = "g2rl_seconds"  # [B, 1] float32, the time for a micro-batch's features divided by its rows

COMPARED = 8  # tokens whose logits are compared with the model's own, once


def patch() -> None:
    """Wraps `FSDPEngineWithLMHead.forward_step`. Batches without `REQUEST` pay one dictionary look-up."""
    original = FSDPEngineWithLMHead.forward_step

    @functools.wraps(original)
    def forward_step(self: Any, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        if not tu.get_non_tensor_data(micro_batch, REQUEST, default=False):
            return original(self, micro_batch, loss_function, forward_only)
        measurement = Measurement(self, micro_batch)
        with measurement:
            loss, output = original(self, micro_batch, loss_function, forward_only)
        output["model_output"] |= measurement.outputs()
        return loss, output

    FSDPEngineWithLMHead.forward_step = forward_step


def is_patched() -> bool:
    """Whether this process's engine computes features. The trainer calls it on every worker."""
    return hasattr(FSDPEngineWithLMHead.forward_step, "__wrapped__")


class ResponseTokens:
    """The N response tokens of a micro-batch that its response mask keeps.

    rows [N]: the position that predicts a token, in the packed sequences (prompt and response of every row);
    tokens [N]; owner [N]: the token's row of the batch, ascending; starts [N]: where that row's packed
    sequence starts. count: rows of the batch.
    """

    def __init__(self, micro_batch: TensorDict, device: torch.device) -> None:
        ids, mask = micro_batch["input_ids"], micro_batch["response_mask"]
        ids_offsets, mask_offsets = ids.offsets(), mask.offsets()
        self.count = len(mask_offsets) - 1
        lengths = mask_offsets.diff()
        owner = torch.arange(self.count, device=lengths.device).repeat_interleave(lengths)
        first = ids_offsets[1:] - lengths - 1  # predicts the first token of the response
        rows = first[owner] + torch.arange(len(owner), device=owner.device) - mask_offsets[owner]
        kept = mask.values().bool()
        self.rows, self.owner = rows[kept].to(device), owner[kept].to(device)
        self.tokens = ids.values().to(device)[self.rows + 1]
        self.starts = ids_offsets.to(device)[self.owner]


class Measurement:
    """A context in which a forward pass of the engine's model also computes the micro-batch's features.

    Features are computed inside the forward, because FSDP gathers the head's weight for it and shards the
    weight again right after.
    """

    def __init__(self, engine: Any, micro_batch: TensorDict) -> None:
        module = engine.module
        self.engine, self.micro_batch = engine, micro_batch
        self.module = module.module if isinstance(module, FullyShardedDataParallel) else module
        self.head: LMHead = find_head(self.module, compare=False)
        self.packed: bool = tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True)
        self.temperature = float(micro_batch["temperature"])
        self.compared = getattr(engine, "g2rl_head_compared", False)

    def __enter__(self) -> None:
        self.features: Tensor | None = None
        self.hooks = [self.head.backbone.register_forward_hook(self._after_backbone)]
        if not self.compared:
            self.hooks.append(self.module.register_forward_hook(self._after_model))

    def __exit__(self, *exception: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        if isinstance(self.head.output, FSDPModule):
            self.head.output.reshard()  # the head's own forward would, but verl's fused kernels never run it

    def outputs(self) -> dict[str, Tensor]:
        if self.features is None:
            raise RuntimeError(
                f"G2RL: {type(self.module).__name__}'s forward did not run its backbone "
                f"({type(self.head.backbone).__name__}), so there are no features"
            )
        seconds = torch.full_like(self.features[:, :1], self.seconds / len(self.features))
        ids = self.micro_batch["input_ids"]
        keys = response_keys(ids.values(), ids.offsets())[:, None].to(seconds.device)
        return {FEATURES: self.features, KEYS: keys, SECONDS: seconds}

    @torch.no_grad()
    def _after_backbone(self, _module: Any, _args: Any, output: Any) -> None:
        device = get_torch_device()
        device.synchronize()
        start = time.perf_counter()
        if isinstance(self.head.output, FSDPModule):  # under FSDP2 an untied head is a unit of its own
            self.head.output.unshard()  # the head runs next, and is then gathered already
        weight, bias = self.head.weights(self.head.output.weight.dtype)
        hidden = output[0].to(weight.dtype)
        if not self.compared:
            self.logits, self.dtype = self.head.logits(hidden[:1, :COMPARED]), weight.dtype
        self.features = self._features(hidden, weight, bias)
        device.synchronize()
        self.seconds = time.perf_counter() - start

    def _features(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Features [B, d] of the micro-batch's B rows.

        hidden: [1, n, d], all sequences packed, or this sequence-parallel rank's slice of them; or [B, L, d],
        padded on the right.
        """
        at = ResponseTokens(self.micro_batch, hidden.device)
        tokens, owner = at.tokens, at.owner
        group = self.engine.ulysses_parallel_group
        if not self.packed:
            hidden = hidden[owner, at.rows - at.starts]
        else:
            rows, hidden = at.rows, hidden[0]
            if group is not None:
                rows = rows - dist.get_rank(group) * len(hidden)
                here = (rows >= 0) & (rows < len(hidden))
                rows, tokens, owner = rows[here], tokens[here], owner[here]
            hidden = hidden[rows]
        counts = owner.bincount(minlength=at.count)
        cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        options = self.head.options(self.temperature)
        features = head_features(hidden, weight, tokens, cu_seqlens, bias=bias, **options).features
        if group is None:
            return features
        # A rank's feature is the mean over its own tokens: add sums, divide by the tokens of all ranks.
        total = at.owner.bincount(minlength=at.count)
        features = features * counts[:, None]
        dist.all_reduce(features, group=group)
        return features / total.clamp(min=1)[:, None]

    def _after_model(self, _module: Any, _args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None:  # verl's fused kernels return no logits; they support plain heads only
            check_logits(self.module, self.logits, logits[:1, :COMPARED], self.dtype)
        self.engine.g2rl_head_compared = True
