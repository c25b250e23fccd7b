"""What each rank of test_megatron.py runs: python megatron_ranks.py RANK WORLD FOLDER CORE.

CORE is "stand-in" (megatron_stand_in.py) or "core": the Megatron Core that is installed, with its own
GPTModel on a CPU. A Core older than 0.18 has no `output_processor`: its GPTModel then gets the seam here.
Each rank writes what it found, by case, to FOLDER/rank<RANK>.pt.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_stand_in
import torch
import torch.distributed as dist
from kept import kept_logits
from torch import Tensor, nn

D, SEQUENCE, BATCH = 32, 12, 3


@dataclass(frozen=True)
class Case:
    vocab_size: int = 300  # of 512 rows: the second rank of two has tokens and padding
    rows: int = 512
    dtype: torch.dtype = torch.float64
    sequence_parallel: bool = False
    tied: bool = False
    mup: float | None = None  # factor of the logits
    temperature: float = 1.0
    features: bool = False
    grad: bool = True
    masked: bool = True  # loss_mask leaves out prompts, and one sequence whole
    logits_memory: int | None = None  # None: the option's default


CASES = {
    "plain": Case(vocab_size=512, masked=False),
    "all": Case(sequence_parallel=True, temperature=0.7, mup=1.5),
    "tied": Case(tied=True, temperature=1.3),
    "tied, sequence parallel": Case(tied=True, sequence_parallel=True),
    "one rank is all padding": Case(vocab_size=200),
    "float32, features": Case(dtype=torch.float32, features=True, temperature=0.7, sequence_parallel=True),
    "no logits kept": Case(dtype=torch.float32, temperature=0.7, logits_memory=0),
    "all logits kept": Case(dtype=torch.float32, temperature=0.7, logits_memory=1 << 30),
    "bfloat16, features": Case(dtype=torch.bfloat16, features=True, temperature=0.7, mup=1.5),
    "no gradients": Case(dtype=torch.float32, features=True, temperature=0.7, grad=False),
}


def batch(case: Case) -> dict[str, Tensor]:
    """The same on all ranks: ids, labels, loss_mask [BATCH, SEQUENCE], and what comes in as gradients."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(case.vocab_size, (BATCH, SEQUENCE + 1), generator=g)
    mask = torch.ones(BATCH, SEQUENCE)
    if case.masked:
        mask = (torch.arange(SEQUENCE) >= torch.tensor([[3], [SEQUENCE], [7]])).float()
        mask[0, 8] = 0  # a gap
    labels = ids[:, 1:].clone()
    labels[mask == 0] = -100  # what does not count is not looked at
    grads = torch.randn(2, BATCH, SEQUENCE, generator=g)
    return {"ids": ids[:, :-1].contiguous(), "labels": labels, "mask": mask, "grads": grads}


def measured(model: nn.Module, case: Case, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the processor gives on this rank, and every gradient: by the processor, and by Core's logits."""
    from g2rl_kernels.integrations.megatron import HeadOptions, HeadOutput, head_output

    kept: dict[str, Any] = {}

    def spy(**given: Any) -> HeadOutput:
        kept.update(given)
        if case.grad:
            given["hidden_states"].retain_grad()
        return head_output(**given)

    places = torch.arange(SEQUENCE).expand(BATCH, -1)
    causal = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    vocab_size = None if case.vocab_size == case.rows else case.vocab_size
    options = {"temperature": case.temperature, "vocab_size": vocab_size, "features": case.features}
    if case.logits_memory is not None:
        options["logits_memory"] = case.logits_memory
    with contextlib.nullcontext() if case.grad else torch.no_grad(), kept_logits() as kept_bytes:
        out = model(
            inputs["ids"], places, causal, labels=inputs["labels"], loss_mask=inputs["mask"],
            output_processor=spy, output_processor_context=HeadOptions(**options),
        )  # fmt: skip
    weight = kept["output_layer"].weight if kept["output_weight"] is None else kept["output_weight"]
    found = {
        "hidden": kept["hidden_states"].detach(),
        "weight": weight.detach(),
        "kept bytes": sum(kept_bytes),
        **{name: value.detach() for name, value in vars(out).items() if value is not None},
    }
    if not case.grad:
        return found
    g, e = inputs["grads"].to(out.logprobs)
    torch.autograd.backward([out.logprobs, out.entropy], [g, e])
    found |= {"hidden grad": kept["hidden_states"].grad, "ours": gradients(model)}
    logits = model(inputs["ids"], places, causal, runtime_gather_output=True)[..., : case.vocab_size]
    scores = (logits.to(out.logprobs) / case.temperature).log_softmax(-1)
    entropy = -(scores.exp() * scores).sum(-1)
    logprobs = scores.gather(-1, inputs["labels"].clamp(min=0)[..., None])[..., 0]
    mask = inputs["mask"]
    torch.autograd.backward([logprobs, entropy], [g * mask, e * mask])
    found |= {"theirs": gradients(model), "their logprobs": logprobs.detach() * mask}
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters, which are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# --- models -------------------------------------------------------------------------------------------------


def stand_in(case: Case) -> nn.Module:
    config = megatron_stand_in.config(
        hidden_size=D, params_dtype=case.dtype, sequence_parallel=case.sequence_parallel,
        use_mup=case.mup is not None, mup_output_mult=case.mup,
    )  # fmt: skip
    return megatron_stand_in.GPTModel(config, case.rows, case.tied)


class Norm(nn.Module):
    """Layer norm for Core's specs: its own for a CPU refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **others: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps, dtype=config.params_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def core(case: Case) -> nn.Module:
    """Core's own GPTModel of two layers, with attention."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    mup = {} if case.mup is None else {"use_mup": True, "mup_base_hidden_size": D}
    has_mup = "use_mup" in inspect.signature(TransformerConfig).parameters
    config = TransformerConfig(
        num_layers=2, hidden_size=D, ffn_hidden_size=2 * D, num_attention_heads=4, init_method_std=0.3,
        params_dtype=case.dtype, pipeline_dtype=case.dtype, use_cpu_initialization=True,
        tensor_model_parallel_size=dist.get_world_size(), sequence_parallel=case.sequence_parallel,
        attention_dropout=0.0, hidden_dropout=0.0, bias_dropout_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, apply_rope_fusion=False, **(mup if has_mup else {}),
    )  # fmt: skip
    config.mup_output_mult = case.mup
    config.use_mup = case.mup is not None
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    torch.manual_seed(0)
    model = with_processor(GPTModel)(
        config, TransformerBlockSubmodules(layer_specs=[layer, layer], layer_norm=Norm), case.rows, SEQUENCE,
        share_embeddings_and_output_weights=case.tied, position_embedding_type="rope",
    )  # fmt: skip
    for parameter in model.parameters():  # of the same start on all ranks, so that none has to be sent
        parameter.requires_grad_()
    return model


def with_processor(kind: type) -> type:
    """Core's GPTModel, with the seam of 0.18 where it has none: a processor in place of the output layer."""
    if "output_processor" in inspect.signature(kind.forward).parameters:
        return kind

    class GPTModel(kind):  # type: ignore[misc, valid-type]
        def forward(
            self,
            *args: Any,
            output_processor: Any = None,
            output_processor_context: Any = None,
            **kwargs: Any,
        ) -> Any:
            self.processor = output_processor, output_processor_context
            return super().forward(*args, **kwargs)

        def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            processor, context = self.processor
            tied = self.share_embeddings_and_output_weights
            weight = self.shared_embedding_or_output_weight() if tied else None
            if processor is not None:
                return processor(
                    hidden_states=hidden_states,
                    output_layer=self.output_layer,
                    output_weight=weight,
                    context=context,
                    scale_logits=self._scale_logits,
                    config=self.config,
                    **{name: kwargs[name] for name in ("labels", "loss_mask", "packed_seq_params")},
                )
            logits, _ = self.output_layer(hidden_states, weight=weight, runtime_gather_output=True)
            return self._scale_logits(logits).transpose(0, 1).contiguous()

        def _scale_logits(self, logits: Tensor) -> Tensor:
            return logits * self.config.mup_output_mult if self.config.use_mup else logits

    return GPTModel


def start_core() -> None:
    """Core's groups, on CPUs: it asks for the current CUDA device, and for CUDA's random numbers."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())


# --- without a model ----------------------------------------------------------------------------------------


def packed(group: Any) -> dict[str, Any]:
    """`head_output` alone: packed sequences, then sequences in parts on context-parallel ranks."""
    from g2rl_kernels.integrations.megatron import HeadOptions, head_output

    g = torch.Generator().manual_seed(2)
    T, rows = 24, 128
    hidden, weight = torch.randn(T, 1, D, generator=g), torch.randn(rows, D, generator=g)
    labels, mask = torch.randint(100, (1, T), generator=g), torch.rand(1, T, generator=g) < 0.6
    found: dict[str, Any] = {"hidden": hidden, "weight": weight, "labels": labels, "mask": mask}
    world, rank = group.size(), group.rank()

    def features(part: slice, tp: Any, cp: Any, bounds: dict[str, Any]) -> Tensor:
        vocabulary = slice(None) if tp.size() == 1 else slice(*[rows // 2 * i for i in (rank, rank + 1)])
        layer = SimpleNamespace(weight=weight[vocabulary], bias=None, tp_group=tp, sequence_parallel=False)
        params = SimpleNamespace(**{"cu_seqlens_q_padded": None, **bounds})
        return head_output(
            hidden_states=hidden[part], output_layer=layer, labels=labels[:, part], loss_mask=mask[:, part],
            packed_seq_params=params, context=HeadOptions(0.7, 100, True, cp), max_seqlen=None,
        ).features  # fmt: skip

    alone = [dist.new_group([i]) for i in range(world)][rank]
    bounds = torch.tensor([0, 8, 8, 12, 20], dtype=torch.int32)  # the last four rows belong to no sequence
    everything = slice(0, T)
    found["packed"] = features(everything, group, None, {"cu_seqlens_q": bounds})
    found["padded"] = features(
        everything, group, None, {"cu_seqlens_q": bounds // 2, "cu_seqlens_q_padded": bounds}
    )
    # this rank's half of each sequence; the ranks' rows need not be in order for a mean
    own = torch.cat([torch.arange(i, j).chunk(world)[rank] for i, j in ((0, 8), (8, 12), (12, 20))])
    hidden, labels, mask = hidden[own], labels[:, own], mask[:, own]
    bounds = torch.tensor([0, 8, 12, 20], dtype=torch.int32)
    found["context parallel"] = features(slice(0, len(own)), alone, group, {"cu_seqlens_q": bounds})
    return found


def errors(group: Any) -> dict[str, str]:
    """What is said of arguments that cannot work."""
    from g2rl_kernels.integrations.megatron import HeadOptions, head_output

    layer = {"weight": torch.ones(64, D), "bias": None, "tp_group": group, "sequence_parallel": False}
    layer["gtp_remat_size"] = 1
    good = {
        "hidden_states": torch.ones(24, 1, D),
        "labels": torch.zeros(1, 24, dtype=torch.int64),
        "output_layer": SimpleNamespace(**layer),
    }
    cases: dict[str, dict[str, Any]] = {
        "no labels": {"labels": None},
        "deferred": {"config": SimpleNamespace(defer_embedding_wgrad_compute=True)},
        "no group": {"output_layer": nn.Linear(D, 64)},
        "spread further": {"output_layer": SimpleNamespace(**{**layer, "gtp_remat_size": 2})},
        "vocabulary too large": {"context": HeadOptions(vocab_size=129)},
        "labels of another shape": {"labels": good["labels"][:, 1:]},
        "mask of another shape": {"loss_mask": torch.ones(1, 23)},
        "temperature": {"context": HeadOptions(temperature=0.0)},
        "logits memory": {"context": HeadOptions(logits_memory=-1)},
    }
    said = {}
    for name, changes in cases.items():
        try:
            head_output(**{**good, **changes})
            said[name] = "no error"
        except (TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def main(rank: int, world: int, folder: Path, kind: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    if kind == "core":
        start_core()
    else:
        megatron_stand_in.install()
        megatron_stand_in.initialize(tensor_parallel=world)
    build = core if kind == "core" else stand_in
    found = {name: measured(build(case), case, batch(case)) for name, case in CASES.items()}
    if kind == "stand-in":
        found |= {"packed": packed(dist.group.WORLD), "errors": errors(dist.group.WORLD)}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
