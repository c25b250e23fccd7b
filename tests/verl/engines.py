"""verl's real FSDP engine around a tiny random Qwen3 on a CPU, batches for it, and the features expected."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import verl  # noqa: F401  (loads its plugins, ours among them)
from tensordict import TensorDict
from tiny import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, HFModelConfig
from verl.workers.config.optimizer import FSDPOptimizerConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

from g2rl_kernels.head import reference
from g2rl_kernels.head.spec import HeadSpec, Responses

V = 25  # of the tiny model's vocabulary


def start_processes() -> None:
    """Initialises the process group: torchrun's, or one of this process alone."""
    if dist.is_initialized():
        return
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group("gloo")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"tcp://127.0.0.1:{port}")


def save_model(path: Path, **settings: Any) -> Path:
    make_model(**{"max_position_embeddings": 512, **settings}).save_pretrained(path)
    return path


class UnsyncedFSDP(transformer_impl.FSDP):
    """FSDP1 broadcasts the first rank's weights on GPUs only; here every rank loads them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "sync_module_states": False})


transformer_impl.FSDP = UnsyncedFSDP


def make_engine(
    path: Path,
    *,
    strategy: str = "fsdp2",
    packed: bool = True,
    dtype: str = "fp32",
    sp: int = 1,
    **model: Any,
) -> Any:
    start_processes()
    engine = EngineRegistry.new(
        model_type="language_model",
        backend=strategy,
        model_config=HFModelConfig(
            path=str(path),
            load_tokenizer=False,
            use_remove_padding=packed,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
            **model,
        ),
        engine_config=FSDPEngineConfig(
            strategy=strategy,
            use_torch_compile=False,
            ulysses_sequence_parallel_size=sp,
            mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


class Rows:
    """Prompts and responses of random tokens. Row 1's mask has a gap, as around a tool's answer. Row 3 is
    padding of `_balance_batch`: a response of one token that does not count."""

    lengths = ((3, 5), (6, 7), (2, 1), (9, 1), (4, 8), (5, 2))  # of prompt and response

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.ids = [torch.randint(3, V, (p + r,), generator=random) for p, r in self.lengths]
        self.masks = [torch.ones(r, dtype=torch.long) for _, r in self.lengths]
        self.masks[1][2:5] = 0
        self.masks[3][:] = 0

    def batch(self, rows: list[int], **options: Any) -> TensorDict:
        """The rows as verl's workers get them; by default two rows a micro-batch."""

        def jagged(tensors: list[Tensor]) -> Tensor:
            return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

        masks = jagged([self.masks[row] for row in rows])
        fields = {
            "input_ids": jagged([self.ids[row] for row in rows]),
            "position_ids": jagged([torch.arange(len(self.ids[row])) for row in rows]),
            "response_mask": masks,
            "loss_mask": masks,
        }
        data = TensorDict(fields, batch_size=len(rows))
        defaults = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, "temperature": 1.0}
        tu.assign_non_tensor(data, **{**defaults, "calculate_entropy": True, **options})
        return data

    def features(self, path: Path, temperature: float = 1.0, top_k: int = V) -> Tensor:
        """[rows, d] float64, by the reference, each row on its own, with all weights in float64.

        top_k: the softmax is over so many ids, and the token's own if it is not among them.
        """
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        features = []
        for ids, mask in zip(self.ids, self.masks):
            with torch.no_grad():
                hidden = model.model(input_ids=ids[None]).last_hidden_state[0]
            kept = mask.bool()
            start = len(ids) - len(mask)
            rows, tokens = hidden[start - 1 : -1][kept], ids[start:][kept]
            weight = model.lm_head.weight.detach()
            features.append(feature(rows, tokens, weight, temperature, top_k))
        return torch.stack(features)


def feature(
    hidden: Tensor, tokens: Tensor, weight: Tensor, temperature: float = 1.0, top_k: int = V
) -> Tensor:
    """[d] of one response: by the reference, or over the top_k ids and the token's own, from logits."""
    if top_k == V:
        head, response = HeadSpec(weight, temperature=temperature), Responses(torch.tensor([0, len(tokens)]))
        return reference.head_features(hidden, tokens, head, response)[0][0]
    z = hidden @ weight.T / temperature
    left_out = z < z.topk(top_k).values[:, -1:]
    left_out[torch.arange(len(tokens)), tokens] = False
    p = z.masked_fill(left_out, -torch.inf).softmax(-1)
    return ((torch.nn.functional.one_hot(tokens, V) - p) @ weight).sum(0) / max(len(tokens), 1)


def infer(engine: Any, data: TensorDict) -> dict[str, Tensor]:
    """The outputs of the engine's forward-only pass."""
    with engine.eval_mode():
        return engine.infer_batch(data)["model_output"]


def stacked(nested: Tensor) -> Tensor:
    return torch.stack(nested.unbind())
