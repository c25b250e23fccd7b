"""The LM head of a model in one of TRL's trainers: where it is, what enters it, and who answers its calls.

TRL asks a model for log-probs by `model(..., fused_lm_head=True)`. `scoring_of` puts a forward around TRL's,
which follows the `Scoring` that the model holds. The forward is a bound method: copies of a model compute
with their own weights, and accelerate can take its wrappers off.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel, gather_object
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

import g2rl_kernels as g2

from ..errors import TrainerError
from ..head.logprobs import LOGITS_MEMORY
from ..models.lm_head import LMHead, backbone_of, base_model
from ..trainer.startup import Logprobs, check_policy, runs_exactly
from .trl_seams import FusedCausalLMOutput, GRPOTrainer
from .trl_support import KeptRow, next_support


class HeadInputs(NamedTuple):
    """Arguments of `g2.head_features` and `g2.linear_logprobs`: N scored tokens of B responses, packed."""

    hidden: Tensor  # [N, d], in the dtype that TRL multiplies in
    weight: Tensor  # [V, d], in the same dtype
    bias: Tensor | None  # [V]
    tokens: Tensor  # [N] int64
    cu_seqlens: Tensor  # [B + 1]
    mask: Tensor  # [B, L - 1] bool: where the packed tokens stand


def head_inputs(head: LMHead, hidden: Tensor, labels: Tensor, float32: bool) -> HeadInputs:
    """Packs the tokens that are scored, with the hidden states that predict them.

    hidden: [B, L, d], of the backbone; labels: [B, L] int64, -100 where a token is not scored; float32: TRL
    has cast the head (`cast_lm_head_to_fp32`), so that autocast leaves it alone.
    """
    device, dtype = head.output.weight.device, head.output.weight.dtype
    if torch.is_autocast_enabled(device.type) and not float32:
        dtype = torch.get_autocast_dtype(device.type)
    hidden, labels = hidden.to(device)[:, :-1], labels.to(device)[:, 1:]
    mask = labels != -100
    packed, tokens, cu_seqlens = g2.pack_responses(hidden, labels, mask)
    return HeadInputs(packed.to(dtype), *head.weights(dtype), tokens, cu_seqlens, mask)


# What sees hidden states [B, L, d] and labels [B, L] of a forward: gives log-probs and entropies, [N] each.
Measure = Callable[[LMHead, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Scoring:
    """Who answers `model(..., fused_lm_head=True)`, and how. A model holds one; a copy of it, a copy."""

    head: LMHead | None = None  # its arithmetic alone counts: the modules are those of the model at each call
    fused: bool = False  # log-probs come from `linear_logprobs` or `measure`, else from TRL's head
    temperature: float = 1.0
    logits_memory: int = LOGITS_MEMORY  # of `linear_logprobs`
    float32: bool = False  # TRL's cast_lm_head_to_fp32
    positions: bool = False  # positions are counted by `count_positions`
    measure: Measure | None = None  # while a forward is measured
    kept: Iterator[KeptRow] | None = None  # of the rows that are scored next; None: all ids
    copied: bool = False  # a copy of a model that is in a trainer

    def __deepcopy__(self, memo: dict[int, Any]) -> Scoring:
        return replace(self, measure=None, kept=None, copied=True)

    @contextmanager
    def over(self, kept: Sequence[KeptRow]) -> Iterator[None]:
        """Forwards within score the rows of `kept`, in order, over these ids alone."""
        self.kept = iter(kept)
        try:
            yield
        finally:
            self.kept = None

    def answer(self, model: Any, theirs: Callable[..., Any], args: tuple[Any, ...], inputs: Any) -> Any:
        """Answers `model(*args, **inputs)`, with fused_lm_head among the inputs; theirs: TRL's forward."""
        if self.positions:
            count_positions(inputs)
        if self.head is None or not (self.fused or self.measure):
            return theirs(model, *args, **inputs)
        head = current_head(self.head, model)
        if not self.fused and self.measure:
            with last_hidden_state(head.backbone) as seen:
                output = theirs(model, *args, **inputs)
            self.measure(head, seen[0], inputs["labels"])
            return output
        del inputs["fused_lm_head"]
        labels = inputs.pop("labels").to(head.output.weight.device)  # a model may be split over devices
        hidden = head.backbone(*args, **inputs, use_cache=False).last_hidden_state
        if self.measure:
            logprobs, entropy = self.measure(head, hidden, labels)
        else:
            packed, weight, bias, tokens, _, scored = head_inputs(head, hidden, labels, self.float32)
            options = {**head.options(self.temperature), "logits_memory": self.logits_memory}
            options["support"] = next_support(self.kept, scored)
            logprobs, entropy = g2.linear_logprobs(packed, weight, tokens, bias=bias, **options)
        mask = labels[:, 1:] != -100
        log_probs, entropies = (
            values.new_zeros(mask.shape).masked_scatter(mask, values) for values in (logprobs, entropy)
        )
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropies, label_mask=mask)


_SCORING = "_g2rl_scoring"  # the model's attribute, and the mark of our forward


def scoring_of(model: Any) -> Scoring:
    """The `Scoring` of a model that TRL's `add_fused_lm_head` has prepared; at first TRL's own head answers.

    Where a later trainer has prepared the model again, TRL's newer forward stands before ours: a new
    `Scoring` and a forward around that one replace the earlier trainer's.

    In a copy of such a model TRL's forward would compute logits with the original's weights, which it has
    bound, so there the class's own forward gives them.
    """
    scoring: Scoring | None = vars(model).get(_SCORING)
    if scoring is not None and answers_by(model, scoring):
        return scoring
    bound = model.forward
    theirs = getattr(bound, "__func__", lambda _, *args, **inputs: bound(*args, **inputs))

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        own: Scoring = getattr(self, _SCORING)
        if inputs.get("fused_lm_head"):
            return own.answer(self, theirs, args, inputs)
        return (type(self).forward if own.copied else theirs)(self, *args, **inputs)

    # generate() reads the signature. functools.wraps would also set __wrapped__, by which accelerate's
    # unwrap_model(keep_fp32_wrapper=False) goes past this function.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    forward.__doc__ = type(model).forward.__doc__
    setattr(forward, _SCORING, True)
    scoring = Scoring(copied=scoring is not None and scoring.copied)
    setattr(model, _SCORING, scoring)
    model.forward = types.MethodType(forward, model)
    return scoring


def answers_by(model: Any, scoring: Scoring) -> bool:
    """Whether the model's forward follows `scoring`: no other trainer has prepared it since."""
    forward = model.forward
    while not hasattr(forward, _SCORING) and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__  # accelerate's autocast; TRL's own names the class's forward there
    return vars(model).get(_SCORING) is scoring and hasattr(forward, _SCORING)


def without_autocast(model: Any) -> None:
    """Takes off the autocast that an earlier trainer's accelerate has left around a model's forward.

    Log-probs of the backbone and of the whole model would differ, and so would this trainer's precision.
    """
    if isinstance(model, nn.Module):
        extract_model_from_parallel(model, keep_fp32_wrapper=False)


@contextmanager
def adapters_on_the_head(allowed: bool) -> Iterator[None]:
    """GRPOTrainer may be made of a model with an adapter on its LM head, if allowed.

    GRPOTrainer refuses it, as its own log-probs would leave the adapter out; ours do not.
    """
    theirs, name = vars(sys.modules[GRPOTrainer.__module__]), "BaseTunerLayer"
    if not allowed or name not in theirs:  # PEFT is not installed
        yield
        return
    kept, theirs[name] = theirs[name], type("NoLayer", (), {})  # what the refusal asks the head for
    try:
        yield
    finally:
        theirs[name] = kept


def innermost(model: Any) -> Any:
    """The transformers model within DDP, FSDP, DeepSpeed and PEFT."""
    while hasattr(model, "module"):
        model = model.module
    return base_model(model)  # accelerate's is_peft_model takes milliseconds: it looks for the package


def runs_here(accelerator: Any, model: Any) -> bool:
    """Whether this process can run the model before training, to compare log-probs.

    ZeRO-3 has sharded the weights by then. FSDP may load them on one process of a node, and leaves them on
    the CPU, where FlashAttention cannot run.
    """
    flash = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
    away = model.device.type != accelerator.device.type
    return accelerator.is_local_main_process and not is_deepspeed_zero3_enabled() and not (flash and away)


def takes_positions(model: Any) -> bool:
    """Whether the backbone's forward takes `position_ids`."""
    return "position_ids" in inspect.signature(type(model.base_model).forward).parameters


def count_positions(inputs: dict[str, Any]) -> None:
    """Adds to a forward's inputs the positions counted from the first token that is not padding, in place.

    TRL passes no position_ids: a model with learned positions then counts them from the padding.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and inputs.get("position_ids") is None:
        given = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[
            :, -given.shape[1] :
        ]  # a prefix has passed


def compare_log_probs(trainer: Any, logprobs: Logprobs, samples: bool) -> None:
    """`check_policy` for one of TRL's trainers; where float32 weights are autocast, first without that."""
    model, accelerator = trainer.model, trainer.accelerator
    settings: dict[str, Any] = {"temperature": trainer.temperature, "samples": samples, "logprobs": logprobs}
    pad = trainer._tokenizer.pad_token_id
    if runs_exactly(model) and not runs_exactly(model, accelerator.autocast):
        accelerator.autocast = nullcontext  # TRL enters it around each forward
        try:
            check_policy(model, pad, **settings)
        finally:
            del accelerator.autocast
    check_policy(model, pad, context=accelerator.autocast, **settings)


def settle_positions(
    accelerator: Any, model: Any, check: Callable[[], None], use: Callable[[], None]
) -> bool:
    """Runs `check`; if it fails, calls `use`, which makes forwards count positions, and checks again.

    check: raises TrainerError; it runs where this process can run the model. use: runs on all ranks, if one
    needs it. Returns whether it was called. All ranks must call this, and all raise the TrainerError of one.
    """
    said, used = None, False
    if runs_here(accelerator, model):
        try:
            try:
                check()
            except TrainerError:
                if not takes_positions(model):
                    raise
                used = True
                use()
                check()
        except TrainerError as error:
            said = str(error)
    everyone = gather_object([(said, used)])
    for told, _ in everyone:
        if told is not None:
            raise TrainerError(told)
    anywhere = any(by for _, by in everyone)
    if anywhere and not used:
        use()
    return anywhere


def current_head(head: LMHead, model: Any) -> LMHead:
    """`head` with the modules that the model has now: FSDP and PEFT replace those found before training."""
    return replace(head, backbone=backbone_of(model), output=model.get_output_embeddings())


@contextmanager
def last_hidden_state(backbone: Any, newest: bool = False) -> Iterator[list[Tensor]]:
    """Yields a list; the hidden states [B, L, d] of every call of the backbone are appended to it.

    newest: those of the last position alone, [B, d], from which generate() samples.
    """
    seen: list[Tensor] = []

    def keep(*call: Any) -> None:
        hidden = call[-1].last_hidden_state
        seen.append(hidden[:, -1].detach().clone() if newest else hidden)

    hook = backbone.register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def states_of_rows(states: list[Tensor], labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states [b, L + 1, d] and labels [b, L + 1] as a forward has them, of `size` rows at a time.

    states: [B, d] that generate() drew each token from; labels: [B, L], -100 where there is no token.
    """
    labels, more = pad(labels, (1, 0), value=-100), 1 + labels.shape[1] - len(states)
    for first in range(0, len(labels), size):
        rows = slice(first, first + size)
        yield pad(torch.stack([state[rows] for state in states], 1), (0, 0, 0, more)), labels[rows]


def pad_like(mask: Tensor, rows: list[list[Any]], columns: int) -> Tensor:
    """Rows of numbers as [B, L - 1] float32, the shape of `mask`.

    Each row starts where the last `columns` columns start. Samplers may nest each number in a list.
    Other places, None, NaN and lists of several numbers become 0.
    """

    def number(x: Any) -> float:
        if isinstance(x, (list, tuple)):
            x = x[0] if len(x) == 1 else None
        return 0.0 if x is None else float(x)

    values = torch.zeros(mask.shape)
    first = mask.shape[1] - columns
    for row, found in enumerate(rows):
        values[row, first : first + len(found)] = torch.tensor([number(x) for x in found])
    return values.nan_to_num(nan=0.0).to(mask.device)


def completion_text(completion: Any) -> str:
    """The text of a completion; of a conversation, the model's own messages."""
    if isinstance(completion, str):
        return completion
    said = (m.get("content") for m in completion if m.get("role") == "assistant")
    return "\n".join(text for text in said if isinstance(text, str))
