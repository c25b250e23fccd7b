"""Features in verl's FSDP engine, from the forward pass that computes the old log-probabilities."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_torch_device
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from ... import head_features, sampling_support
from ...group.shaping import response_keys
from ..measure import Measurement
from ..seams import check_seams

check_seams(
    "verl",
    {
        FSDPEngineWithLMHead: {"forward_step": "micro_batch loss_function forward_only"},
        tu: {"get_non_tensor_data": "data key default"},
    },
)

REQUEST = (
    "g2rl_measure"  # true in a batch's non-tensor data: its forward returns features, keys and seconds too
)
FEATURES = "g2rl_features"  # [B, d] float32
KEYS = "g2rl_keys"  # [B, 1] int64, response_keys of prompt and response: turns may differ in the prompt
SAMPLING = "g2rl_sampling"  # in a batch's non-tensor data: `G2RLSettings.sampling`, or None
MASKS = "g2rl_masks"  # with it, [B, 4] float32: a row's kept ids, whole and added tokens, tokens
SECONDS = "g2rl_seconds"  # [B, 1] float32, the time for a micro-batch's features divided by its rows


def patch() -> None:
    """Wraps `FSDPEngineWithLMHead.forward_step`. Batches without `REQUEST` pay one dictionary look-up."""
    original = FSDPEngineWithLMHead.forward_step

    @functools.wraps(original)
    def forward_step(self: Any, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        if not tu.get_non_tensor_data(micro_batch, REQUEST, default=False):
            return original(self, micro_batch, loss_function, forward_only)
        measurement = EngineMeasurement(self, micro_batch)
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


class EngineMeasurement(Measurement):
    """Features of a micro-batch of verl's engine, as outputs of its forward."""

    def __init__(self, engine: Any, micro_batch: TensorDict) -> None:
        module = engine.module
        self.engine, self.micro_batch = engine, micro_batch
        self.packed: bool = tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True)
        self.temperature = float(micro_batch["temperature"])
        self.sampling: dict[str, Any] | None = tu.get_non_tensor_data(micro_batch, SAMPLING, default=None)
        super().__init__(
            module.module if isinstance(module, FullyShardedDataParallel) else module,
            compare=not getattr(engine, "g2rl_head_compared", False),
        )

    def outputs(self) -> dict[str, Tensor]:
        features = self.found()
        self.engine.g2rl_head_compared = True
        seconds = torch.full_like(features[:, :1], self.seconds / len(features))
        ids = self.micro_batch["input_ids"]
        keys = response_keys(ids.values(), ids.offsets())[:, None].to(seconds.device)
        masks = {} if self.sampling is None else {MASKS: self.masks}
        return {FEATURES: features, KEYS: keys, SECONDS: seconds, **masks}

    def _clock(self) -> float:
        get_torch_device().synchronize()
        return time.perf_counter()

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
        if self.sampling is not None:
            dtype = self.sampling["logits_dtype"]
            rules = {**self.sampling, "logits_dtype": None if dtype is None else getattr(torch, dtype)}
            found = sampling_support(hidden, weight, tokens, bias=bias, **rules, **options)
            options["support"] = found
            parts = [found.offsets.diff(), found.whole, found.added, torch.ones_like(tokens)]
            sums = torch.stack([part.float() for part in parts], 1)
            self.masks = sums.new_zeros(at.count, len(parts)).index_add_(0, owner, sums)
            if group is not None:
                dist.all_reduce(self.masks, group=group)
        features = head_features(hidden, weight, tokens, cu_seqlens, bias=bias, **options).features
        if group is None:
            return features
        # A rank's feature is the mean over its own tokens: add sums, divide by the tokens of all ranks.
        total = at.owner.bincount(minlength=at.count)
        features = features * counts[:, None]
        dist.all_reduce(features, group=group)
        return features / total.clamp(min=1)[:, None]
