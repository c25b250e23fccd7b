"""`g2rl_keep_sampling_mask`: which ids each token was drawn from, in TRL.

The sets are made once for a generation batch, for the policy that sampled: the sampler's own where a
rollout_func returns them, else computed again from hidden states.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import g2rl_kernels as g2

from ..models.lm_head import LMHead
from .trl_head import HeadInputs, current_head, head_inputs, innermost, states_of_rows
from .trl_measurement import Measurement
from .trl_support import GIVEN, KeptRow, rows_of, rows_of_lists

OPTION = "g2rl_keep_sampling_mask"
SIXTEEN = (torch.bfloat16, torch.float16)


def check_masks(args: Any) -> None:
    """Raises ValueError where a G2RLConfig asks for the ids that sampling kept and cannot have them."""
    if not args.g2rl_keep_sampling_mask:
        return
    if truncation(args) == {"top_k": 0, "top_p": 1.0, "min_p": 0.0}:
        raise ValueError(
            f"{OPTION}=True: top_k={args.top_k}, top_p={args.top_p} and min_p={args.min_p} leave nothing out "
            "of sampling: set one of them, or leave the option False"
        )
    if args.g2rl_algorithm == "g2rl" and args.g2rl_lam == 0 and args.g2rl_labels == "truth":
        raise ValueError(
            f"{OPTION}=True: g2rl_lam=0 is GRPOTrainer, whose log-probs are of the whole vocabulary; "
            "g2rl_algorithm='grpo' is plain GRPO over the ids that sampling kept"
        )
    if args.g2rl_fused_logprobs is False:
        raise ValueError(
            f"{OPTION}=True: needs g2.linear_logprobs, as TRL's head knows the whole vocabulary only: leave "
            "g2rl_fused_logprobs unset"
        )
    for name, neutral in NEUTRAL.items():
        if getattr(args, name, None) not in neutral:
            raise ValueError(
                f"{OPTION}=True: {name}={getattr(args, name)!r} changes which ids sampling can draw, and is "
                "not computed again: leave it unset, or the option False"
            )


# Options that move logits before truncation, and the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
    "vllm_structured_outputs_regex": (None,),
}


# Settings of a GenerationConfig that do so, and the values that do not. None does not either.
NEUTRAL_OF_MODEL: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": (),
    "bad_words_ids": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "repetition_penalty": (1.0,),
    "sequence_bias": (),
    "suppress_tokens": (),
    "top_h": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}


def truncation(settings: Any) -> dict[str, Any]:
    """top_k, top_p and min_p of a GRPOConfig or GenerationConfig, as `g2.sampling_support` takes them."""
    top_p = 1.0 if settings.top_p is None else float(settings.top_p)
    return {"top_k": max(settings.top_k or 0, 0), "top_p": top_p, "min_p": float(settings.min_p or 0)}


def generation_settings(trainer: Any) -> Any:
    """The GenerationConfig that the trainer's model samples by: what TRL leaves unset is the model's own."""
    settings = trainer.generation_config
    if not trainer.use_transformers_continuous_batching:  # which takes TRL's alone
        settings, _ = innermost(trainer.model)._prepare_generation_config(settings)
    return settings


def moving(settings: Any) -> dict[str, Any]:
    """The settings of a GenerationConfig that change which ids sampling can draw, but for its truncation."""
    found = {name: getattr(settings, name, None) for name in NEUTRAL_OF_MODEL}
    return {k: v for k, v in found.items() if v is not None and v not in NEUTRAL_OF_MODEL[k]}


def truncation_of_generate(trainer: Any) -> dict[str, Any]:
    """`truncation` as the model's own generate() does it.

    Raises ValueError where its settings change otherwise which ids sampling can draw.
    """
    settings = generation_settings(trainer)
    for name, value in moving(settings).items():
        raise ValueError(
            f"{OPTION}=True: generate() samples with {name}={value!r}, which changes which ids it can draw "
            f"and is not computed again: set model.generation_config.{name} = None (TRL sets suppress_tokens "
            "itself for models with images), or leave the option False"
        )
    return truncation(settings)


def warn_of_models_settings(trainer: Any) -> None:
    """Warns where the model samples by settings of its own generation_config that GRPOConfig leaves unset."""
    if trainer.use_vllm or trainer.rollout_func:
        return
    settings, mine = generation_settings(trainer), trainer.generation_config
    names = [*moving(settings), *(k for k, v in truncation(settings).items() if v != truncation(mine)[k])]
    found = ", ".join(f"{k}={getattr(settings, k)!r}" for k in names if getattr(mine, k, None) is None)
    if found:
        warnings.warn(
            f"model.generation_config has {found}, by which generate() samples where GRPOConfig sets nothing,"
            " while the loss takes log-probs of the whole softmax: set it to None there, or in GRPOConfig",
            stacklevel=3,
        )


class SamplingMasks:
    """Finds which ids the tokens of a generation batch were drawn from, for a `G2RLTrainer`.

    Raises ValueError where log-probs are not those of `g2.linear_logprobs`, and as `truncation_of_generate`.
    """

    def __init__(self, trainer: Any, fused: bool) -> None:
        if not fused:
            raise ValueError(
                f"{OPTION}=True: needs g2.linear_logprobs, which this run does not have (ZeRO-3, or the "
                "load-balancing loss of a mixture of experts)"
            )
        self.trainer = trainer
        if trainer.use_vllm or trainer.rollout_func:
            self.settings = truncation(trainer.args)
        else:
            self.settings = truncation_of_generate(trainer)
        self.settings["rules"] = "vllm" if trainer.use_vllm else "transformers"

    def recomputed(self, head: LMHead, inputs: HeadInputs) -> list[KeptRow]:
        """The rows of B responses, from their hidden states under the policy that sampled."""
        hidden, weight, bias, tokens, _, mask = inputs
        dtype = self._logits_dtype(hidden.dtype)
        options = {**self.settings, **head.options(self.trainer.temperature), "logits_dtype": dtype}
        found = g2.sampling_support(hidden, weight, tokens, bias=bias, **options)
        return rows_of(found, mask.sum(1).tolist())

    @torch.no_grad()
    def of_states(self, states: list[Tensor], completions: list[list[int]]) -> list[KeptRow]:
        """The same from the hidden states [B, d] that the model's own generate() drew each token from."""
        trainer, kept = self.trainer, []
        labels = pad_sequence([torch.tensor(row) for row in completions], True, -100)
        head = current_head(trainer._scoring.head, innermost(trainer.model))
        size = trainer.args.per_device_train_batch_size
        for hidden, some in states_of_rows(states, labels.to(states[0].device), size):
            with trainer.accelerator.autocast():
                inputs = head_inputs(head, hidden, some, trainer._scoring.float32)
                kept += self.recomputed(head, inputs)
        return kept

    def _logits_dtype(self, products: torch.dtype) -> torch.dtype | None:
        """What the sampler rounds its logits to. products: the dtype of the trainer's own head.

        vLLM has a model of its own, which is 16-bit where the checkpoint is float32.
        """
        if self.trainer.use_vllm:
            engine = getattr(getattr(self.trainer.vllm_generation, "llm", None), "llm_engine", None)
            found = getattr(getattr(engine, "model_config", None), "dtype", None)
            products = found or (products if products in SIXTEEN else torch.bfloat16)
        return products if products in SIXTEEN else None

    def given(self, fields: dict[str, Any], completions: list[list[int]]) -> list[KeptRow]:
        """The sampler's own lists, which a rollout_func returned and which are taken out of `fields`; [] if
        it returned none, or None for a response."""
        lists = fields.pop(GIVEN, None)
        if lists is None or any(row is None for row in lists):
            return []
        head = self.trainer._scoring.head
        V = head.rows or head.output.out_features
        return rows_of_lists(lists, completions, V, self.trainer.accelerator.device)

    def metrics(self, measurement: Measurement) -> dict[str, float]:
        """Of all ranks' tokens but a tool's: kept_ids, the mean of those with a list; whole_tokens and
        added_tokens, shares; masks_recomputed, 0 or 1."""
        counts, whole, added = (
            torch.cat(part)
            for part in zip(*((row.offsets.diff(), row.whole, row.added) for row in measurement.kept))
        )
        own = torch.ones_like(whole)
        if measurement.tool_mask is not None:
            pairs = zip(measurement.kept, measurement.tool_mask)
            flags = [flag for row, flags in pairs for flag in flags[: len(row.whole)]]
            own = torch.tensor(flags, device=own.device) > 0
        sums = torch.stack([part[own].sum() for part in (counts, whole, added, own)])
        kept, wholes, adds, tokens = self.trainer.accelerator.gather(sums[None]).sum(0).tolist()
        return {
            "kept_ids": kept / max(tokens - wholes, 1),
            "whole_tokens": wholes / max(tokens, 1),
            "added_tokens": adds / max(tokens, 1),
            "masks_recomputed": float(measurement.recomputed),
        }
