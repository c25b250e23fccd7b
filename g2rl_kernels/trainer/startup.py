"""Checks before any work: does the sampler draw from the distribution that the update scores?

`check_policy` runs a probe of two prompts of different length, each with a short response, and compares three
log-probs of the response tokens:

    own       by the model's logits, one forward over each prompt and response alone, without padding
    sampler   by the logits from which generate() samples, with a cache and prompts padded on the left
    update    by the trainer's op, on prompts padded on the left and responses padded on the right

They agree but for rounding, or training would move another policy than the one that samples.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Container, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import g2rl_kernels as g2

from ..errors import ConfigError, TrainerError, one_line, out_of_memory
from ..models.lm_head import LMHead, base_model, evaluation_mode
from ..models.responses import response_hidden
from .checkpoint import state_tensors
from .config import TrainerConfig
from .sampling import Rollout, autocast

PROMPT, RESPONSES = 9, (3, 6)  # tokens of the probe; its second prompt is half as long

# What rounding explains: `spread` times the deviation of the logits (errors of hidden states) plus `last`
# times the largest logit (their own rounding). Forty tiny random families and SmolLM2-135M stay below a tenth
# of it in float32, and below a half in bfloat16. In float32 the largest difference of all tokens counts;
# otherwise the median of a response: a router near a tie may send single tokens to other experts.
EXACT = {"spread": 3e-4, "last": 2**-23}
COARSE = {"spread": 0.08, "last": 2**-8}  # float16, bfloat16, quantised weights, TF32


LORA = "LoRA, or another adapter that changes weights"

Logprobs = Callable[[Rollout], Tensor]  # of the N response tokens, row by row: [N]
Context = Callable[[], AbstractContextManager]  # makes the autocast context of one forward


def check_trainer(trainer: Any) -> None:
    """`check_policy` and `warn_unmoved` for a `Trainer` whose parameters to train are known."""
    config, head = trainer.config, trainer.head
    check_policy(
        trainer.model,
        trainer.tokenizer.pad_token_id,
        head=head,
        logprobs=lambda probe: trainer._logprobs(head, probe, slice(None))[0][probe.mask],
        temperature=config.temperature,
        context=lambda: autocast(config, trainer.device),
    )
    remedy = "set dtype=float32 (with autocast=bfloat16 for bf16's speed), or raise lr"
    warn_unmoved(trainer.trained, config.lr, remedy)


def check_disk(model: nn.Module, config: TrainerConfig, output_dir: Path) -> None:
    """Raises ConfigError if output_dir cannot be written, or has no room for the checkpoints."""
    where = f"output_dir={config.output_dir}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".write-test"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{where}: cannot write there ({error.strerror})") from None
    policy = sum(t.numel() * t.element_size() for t in state_tensors(model).values())
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
    needed = (config.keep_checkpoints + 1) * (policy + moments) + policy - held
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise ConfigError(
            f"{where}: checkpoints need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: free some, "
            "choose another output_dir, or lower keep_checkpoints"
        )


def check_policy(
    model: Any,
    pad_token_id: int,
    *,
    head: LMHead | None = None,
    logprobs: Logprobs | None = None,
    temperature: float = 1.0,
    samples: bool = True,
    context: Context = nullcontext,
) -> None:
    """Compares the log-probs of sampler and update with the model's own, on two padded prompts.

    Where autocast rounds the products of float32 weights, a first comparison without it is the sharper one.

    Args:
        model: a causal language model of transformers, also within PEFT.
        pad_token_id: the token that pads prompts and responses.
        head: of `find_head`; the update's log-probs then come from `response_hidden` and `linear_logprobs`.
        logprobs: gives the update's log-probs at `temperature` for a probe, instead of head, which then
            serves without autocast. Without both only the sampler is compared.
        temperature: of sampling.
        samples: whether model.generate() samples; False for another engine (it adds no padding).
        context: makes the autocast context of each forward.

    Raises:
        TrainerError: they differ by more than rounding explains, or generate() fails. The message says which
            of them differs, by how many nats, and what the model does.
    """
    given: dict[str, Any] = {"temperature": temperature, "samples": samples}
    if runs_exactly(model) and not runs_exactly(model, context) and (head is not None or logprobs is None):
        check_policy(model, pad_token_id, head=head, **given)
    if logprobs is None and head is not None:
        logprobs = _head_logprobs(head, temperature, context)
    policy = _Policy(model, pad_token_id, temperature, context)
    with torch.no_grad(), evaluation_mode(model):
        probe = make_probe(model, pad_token_id)
        own = policy.own(probe)
        found: dict[str, float] = {}
        if samples:
            found["sampler"] = own.apart(policy.sampled(probe))
        if logprobs is not None:
            found["update"] = own.apart(logprobs(probe))
        wrong = {who: nats for who, nats in found.items() if not nats <= own.tolerance}
        if not wrong:
            return
        why = _why(policy, probe, own, wrong, logprobs)
    said = " and ".join(f"the {who}'s log-probs by {nats:.2g} nats" for who, nats in wrong.items())
    agrees = "".join(f"; the {who}'s agree" for who in found if who not in wrong)
    raise TrainerError(
        f"model: {policy.name}: {why}. On two padded prompts this moves {said}, against its own logits "
        f"without padding (rounding explains {own.tolerance:.1g}){agrees}. The run would go wrong: "
        f"use {LORA if _learned_prompt(model) else 'another model'}"
    )


def runs_exactly(model: Any, context: Context = nullcontext) -> bool:
    """Whether every product of a forward in this context is computed in float32 or better."""
    device = model.get_input_embeddings().weight.device
    dtypes = {parameter.dtype for parameter in model.parameters()}
    with context():
        if torch.is_autocast_enabled(device.type):
            dtypes.add(torch.get_autocast_dtype(device.type))
    convolves = any(isinstance(module, nn.Conv1d) for module in model.modules())  # in TF32 by default
    tf32 = device.type == "cuda" and (convolves or torch.get_float32_matmul_precision() != "highest")
    return dtypes <= {torch.float32, torch.float64} and not tf32


def check_adapter(model: Any) -> None:
    """Raises TrainerError for PEFT adapters that are learned prompts: `find_head`'s backbone skips them."""
    if kind := _learned_prompt(model):
        raise TrainerError(
            f"model: its adapter is a learned prompt ({kind}), which log-probs and features would leave out: "
            f"use {LORA}"
        )


def _learned_prompt(model: Any) -> str | None:
    """PEFT's name of a learned prompt, whose tokens precede the prompt's; None for other adapters."""
    active: Any = getattr(model, "active_peft_config", None)
    if not getattr(active, "is_prompt_learning", False):
        return None
    return str(getattr(active.peft_type, "value", active.peft_type))


def make_probe(model: Any, pad_token_id: int) -> Rollout:
    """A probe of tokens that the model embeds, spread over the vocabulary; special tokens are left out."""
    embeddings = model.get_input_embeddings().weight
    config = base_model(model).config
    settings = config.get_text_config()
    rows = min(embeddings.shape[0], getattr(settings, "vocab_size", None) or embeddings.shape[0])
    special = {pad_token_id, *_special(config), *_special(settings)}
    usable = [token for token in range(rows - 1, -1, -max(rows // 1000, 1)) if token not in special]
    if not usable:
        raise TrainerError(f"model: all of its {rows} tokens are special tokens")
    width, length = PROMPT, max(RESPONSES)
    if limit := getattr(settings, "max_position_embeddings", None):
        width = max(min(width, limit - length), 2)
    prompts = (width, width // 2)
    ids = torch.full((len(prompts), width + length), pad_token_id)
    attention = torch.zeros_like(ids)
    for row, (before, after) in enumerate(zip(prompts, RESPONSES)):
        for place in range(width - before, width + after):
            ids[row, place] = usable[(7919 * (place + 1) + 104729 * row) % len(usable)]
            attention[row, place] = 1
    ids, attention = ids.to(embeddings.device), attention.to(embeddings.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    return Rollout(ids, attention, attention[:, width:].bool(), ended, items=[], completions=[])


def _width(probe: Rollout) -> int:
    """The longest prompt, in tokens."""
    return probe.ids.shape[1] - probe.mask.shape[1]


def _alone(probe: Rollout) -> list[Rollout]:
    """Each row as a rollout of its own, without padding."""
    rows = []
    for row, (ids, attention, mask) in enumerate(zip(probe.ids, probe.attention, probe.mask)):
        seen = ids[attention.bool()][None]
        ended = probe.truncated[row : row + 1]
        rows.append(Rollout(seen, torch.ones_like(seen), mask[mask][None], ended, items=[], completions=[]))
    return rows


def _special(config: Any) -> Iterable[int]:
    """Tokens that a configuration names: ends, padding, places of images."""
    for key, value in vars(config).items():
        if key.endswith(("_token_id", "_token_ids", "_token_index")):
            yield from (token for token in (value if isinstance(value, list) else [value]) if token)


# --- three log-probs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Own:
    """The model's own log-probs of a probe's N response tokens, and how far others may be from them."""

    logprobs: Tensor  # [N]
    lengths: list[int]  # of the responses
    exact: bool  # computed in float32 or better
    tolerance: float  # nats

    def apart(self, logprobs: Tensor) -> float:
        """Nats between log-probs [N] and these: the largest if `exact`, else the larger median of a response.

        NaN counts as infinitely far. Tokens that the model excludes (-inf) do not count: they are never
        sampled.
        """
        own = self.logprobs
        nats = (logprobs.to(own.device).float() - own).abs().nan_to_num(nan=math.inf)
        excluded = own == -math.inf
        if excluded.all():
            return math.inf
        nats = nats.masked_fill(excluded, 0.0)
        return max((r.max() if self.exact else r.median()).item() for r in nats.split(self.lengths))


@dataclass(frozen=True)
class _Policy:
    """A model, asked in several ways for log-probs [N] of a probe's response tokens."""

    model: Any
    pad: int
    temperature: float
    context: Context

    @property
    def name(self) -> str:
        learned = _learned_prompt(self.model)
        return type(base_model(self.model)).__name__ + (f" with {learned}" if learned else "")

    def own(self, probe: Rollout) -> _Own:
        """By its logits, from one forward over each row alone, without padding."""
        found = []
        for row in _alone(probe):
            with self.context():
                out = self.model(input_ids=row.ids, attention_mask=row.attention, use_cache=False)
            found.append(out.logits[0, -row.mask.shape[1] - 1 : -1].float() / self.temperature)
        z = torch.cat(found)
        tokens = probe.ids[:, _width(probe) :][probe.mask]
        exact, finite = runs_exactly(self.model, self.context), z[z.isfinite()]
        share, tolerance = EXACT if exact else COARSE, 1e-5  # of log-softmax itself, in float32
        if finite.numel() > 1:
            tolerance += share["spread"] * finite.std().item() + share["last"] * finite.abs().max().item()
        return _Own(_chosen(z, tokens), probe.mask.sum(1).tolist(), exact, tolerance)

    def sampled(self, probe: Rollout) -> Tensor:
        """By the logits of generate(), which is made to choose the probe's tokens."""
        from transformers import GenerationConfig

        response = probe.ids[:, _width(probe) :]

        def force(ids: Tensor, scores: Tensor) -> Tensor:
            only = torch.full_like(scores, -torch.inf)
            return only.scatter_(1, response[:, ids.shape[1] - _width(probe), None], 0.0)

        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            max_new_tokens=response.shape[1],
            pad_token_id=self.pad,
            eos_token_id=self.pad,  # ends a response where the probe's ends
            output_logits=True,
            return_dict_in_generate=True,
        )
        try:
            with self.context():
                out = self.model.generate(
                    input_ids=probe.ids[:, : _width(probe)],
                    attention_mask=probe.attention[:, : _width(probe)],
                    generation_config=settings,
                    logits_processor=[force],
                )
        except Exception as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            raise TrainerError(
                f"model: {self.name}: generate() fails on padded prompts "
                f"({type(error).__name__}: {one_line(error, 160)})"
            ) from error
        if len(out.logits) < response.shape[1]:
            raise TrainerError(
                f"model: {self.name}: generate() ends after {len(out.logits)} tokens of {response.shape[1]}: "
                "its generation_config limits it (max_time, for example)"
            )
        return _chosen(torch.stack(out.logits, 1).float() / self.temperature, response)[probe.mask]

    def padded(self, probe: Rollout, attention: Tensor) -> Tensor:
        """By its logits, from one forward over the padded batch."""
        with self.context():
            out = self.model(input_ids=probe.ids, attention_mask=attention, use_cache=False)
        z = out.logits[:, -probe.mask.shape[1] - 1 : -1].float() / self.temperature
        return _chosen(z, probe.ids[:, _width(probe) :])[probe.mask]


def _head_logprobs(head: LMHead, temperature: float, context: Context) -> Logprobs:
    """By `response_hidden` and `linear_logprobs`, in the dtype of the head's weight."""

    def logprobs(probe: Rollout) -> Tensor:
        with context():
            hidden, tokens, _ = response_hidden(head, probe.ids, probe.attention, probe.mask)
        arguments = head.arguments(temperature)
        hidden = hidden.to(arguments["weight"].dtype)
        return g2.linear_logprobs(hidden, tokens=tokens, **arguments).logprobs

    return logprobs


def _chosen(z: Tensor, tokens: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, tokens.to(z.device)[..., None])[..., 0]


def _why(policy: _Policy, probe: Rollout, own: _Own, wrong: Container[str], logprobs: Logprobs | None) -> str:
    """What the model does, found by leaving out the padding, then the attention mask."""

    def agrees_alone(ask: Logprobs) -> bool:
        return own.apart(torch.cat([ask(row) for row in _alone(probe)])) <= own.tolerance

    if "update" in wrong and logprobs is not None and not agrees_alone(logprobs):
        return "something unknown happens between its hidden states and logits, even without padding"
    if "sampler" in wrong and not agrees_alone(policy.sampled):
        return "generate(), with its cache, computes other logits than one forward, even without padding"
    masked, unmasked = (policy.padded(probe, a) for a in (probe.attention, torch.ones_like(probe.attention)))
    if torch.equal(masked, unmasked):
        return "it ignores attention_mask, so that padding changes its logits"
    if "update" in wrong:
        return "padding on the left changes its logits, by learned positions or a state that sees it"
    return "after padding on the left, generate() samples from another distribution"


# --- weights ----------------------------------------------------------------------------------------------


def share_unmoved(parameters: Iterable[Tensor], lr: float) -> float:
    """Share of the weights that an update of size `lr` leaves as they are, since their dtype rounds it away.

    One Adam step moves a weight by about lr; it is lost below half the spacing of numbers near the weight.
    At most about a million weights of each parameter are looked at.
    """
    unmoved, total = 0.0, 0
    for parameter in parameters:
        weight = parameter.detach()
        weight = getattr(weight, "to_local", lambda weight=weight: weight)().flatten()
        if weight.numel() == 0:
            continue
        looked = weight[:: max(weight.numel() // 1_000_000, 1)]
        still = ((looked + lr) == looked) & ((looked - lr) == looked)
        unmoved += still.double().mean().item() * weight.numel()
        total += weight.numel()
    return unmoved / max(total, 1)


def warn_unmoved(parameters: Iterable[Tensor], lr: float, remedy: str) -> None:
    """Warns if more than half of the weights do not move at this learning rate; remedy: what to do."""
    parameters = [p for p in parameters if p.requires_grad]
    coarse = {p.dtype for p in parameters} - {torch.float32, torch.float64}
    if not coarse or lr == 0:
        return
    share = share_unmoved(parameters, lr)
    if share > 0.5:
        dtype = str(min(map(str, coarse))).removeprefix("torch.")
        warnings.warn(
            f"dtype={dtype}: an update of lr={lr:g} is rounded away in {share:.0%} of the trained weights, "
            f"which will not move: {remedy}",
            stacklevel=3,
        )
