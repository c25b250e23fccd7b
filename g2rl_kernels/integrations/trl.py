"""G2RL in TRL: a script for GRPO imports `G2RLConfig` and `G2RLTrainer` instead, and changes nothing else.

    from g2rl_kernels.integrations.trl import G2RLConfig, G2RLTrainer

    trainer = G2RLTrainer(model, reward_funcs=accuracy_reward, args=G2RLConfig("out"), train_dataset=dataset)

Where it enters, in the order of `GRPOTrainer._generate_and_score_completions`:

    _generate                               tool masks and the sampler's log-probs are noted
    _get_per_token_logps_and_entropies      the forward under the policy that sampled: the features come from
                                            the same pass (where TRL would skip it, it is made to run)
    _get_per_token_logps_and_entropies      again with beta > 0, for the reference: not measured
    _calculate_rewards                      the rewards of all ranks are noted, and left as they are; for
                                            evol_rl and majority labels, texts and answers of this rank
    metrics, completions, advantages        TRL's, of the raw rewards

and then the advantages, and only they, are replaced by TRL's own formula on shaped rewards. The entropy bonus
is TRL's.

Log-probabilities: where TRL calls `model(..., fused_lm_head=True)`, for log-probs instead of logits, this
package's `linear_logprobs` answers (`g2rl_fused_logprobs`). That is inside the model's forward, where FSDP
has the head's weight whole.
"""

# ruff: noqa: E402 (TRL's version is looked at before its inside is imported)

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

TESTED = "1.16"

try:
    _found = importlib.metadata.version("trl")
except importlib.metadata.PackageNotFoundError:
    raise ImportError("g2rl_kernels.integrations.trl needs TRL: pip install 'g2rl-kernels[trl]'") from None
if _found.split(".")[:2] != TESTED.split("."):
    raise ImportError(
        f"g2rl_kernels.integrations.trl is tested with TRL {TESTED}, found {_found}, and relies on TRL's "
        f"inside: pip install 'trl=={TESTED}.*', or look for a g2rl-kernels that knows TRL {_found}"
    )

import torch
from accelerate.utils import gather, gather_object, is_peft_model
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id, maybe_gather_lm_head_ctx, nanstd

import g2rl_kernels as g2

from ..group.evol import compared_text
from ..group.options import ShapingOptions, option_field
from ..group.shaping import (
    ALGORITHMS,
    ENTROPY_COEF,
    EVOL_CLIP_HIGH,
    LABELS,
    check_gap,
    check_options,
    response_keys,
    shape_scores,
)
from ..models.encoder import DEFAULT_ENCODER, SentenceEncoder
from ..models.lm_head import LMHead, find_head
from ..tasks.answers import math_answer


@dataclass
class G2RLConfig(GRPOConfig):
    """GRPOConfig and what G2RL adds to it, all under `g2rl_`. The same words as in `g2.group_geometry`.

    `entropy_coef` and `epsilon_high` are TRL's; unset they are those of the algorithm.
    """

    g2rl_algorithm: str = field(
        default="g2rl",
        metadata={
            "help": "'g2rl'; or what the paper compares it with, where g2rl/* is measured all the same: "
            "'grpo', 'entropy_bonus' (grpo with entropy_coef), 'evol_rl' (arXiv 2509.15194).",
            "choices": list(ALGORITHMS),
        },
    )
    g2rl_lam: float = option_field("lam", help="Exploration strength of g2rl; 0 is GRPOTrainer, to the bit.")
    g2rl_clip: float = option_field("clip")
    g2rl_shaping: str = option_field("shaping")
    g2rl_exploration_score: str = option_field("exploration_score")
    g2rl_uniform_groups: str = option_field("uniform_groups")
    g2rl_correctness_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function that says whether an answer is right, and that is shaped. "
            "Needed where there are several; the others are left alone."
        },
    )
    g2rl_correctness_threshold: float = field(
        default=0.5,
        metadata={"help": "Answers whose correctness reward reaches this are right."},
    )
    g2rl_correctness_gap: float = field(
        default=1.0,
        metadata={
            "help": "How far apart the correctness rewards of right and wrong answers are: 1 for 0 and 1, 2 "
            "for -1 and +1. It makes g2rl_lam mean the same in every unit."
        },
    )
    g2rl_labels: str = field(
        default="truth",
        metadata={
            "help": "What is right: by 'truth', the correctness reward, or by 'majority', the group's most "
            "frequent answer. With 'majority' the correctness reward counts in metrics only.",
            "choices": list(LABELS),
        },
    )
    g2rl_answer_func: str | None = field(
        default=None,
        metadata={
            "help": "For evol_rl and majority labels: dotted path of a function from a completion's text to "
            "its answer, None where it has none. Unset: the last answer that math-verify finds."
        },
    )
    g2rl_encoder: str = field(
        default=DEFAULT_ENCODER,
        metadata={
            "help": "evol_rl: the sentence-transformers model that sees what is novel: a hub name, a local "
            "directory or pypi:<package>."
        },
    )
    entropy_coef: float | None = field(
        default=None,
        metadata={
            "help": "Coefficient of the mean per-token entropy, which the loss rewards. Unset: 0.003 for "
            "entropy_bonus and evol_rl, 0 else."
        },
    )
    g2rl_fused_logprobs: bool | None = field(
        default=None,
        metadata={
            "help": "Whether log-probs and entropies of policy and reference come from g2.linear_logprobs "
            "(float32 logits, tile by tile, forward and backward) instead of TRL's chunked head. Unset: yes, "
            "unless g2rl_lam is 0, or under ZeRO-3 or a mixture-of-experts loss, which need TRL's."
        },
    )

    def __post_init__(self) -> None:
        prefix = "g2rl_"
        ours = {k.removeprefix(prefix): v for k, v in vars(self).items() if k.startswith(prefix)}
        check_options(ours, prefix)
        algorithm = self.g2rl_algorithm
        if self.entropy_coef is None:
            self.entropy_coef = ENTROPY_COEF[algorithm]
        bonus = self.entropy_coef != 0 or self.use_adaptive_entropy
        if (algorithm == "grpo" and bonus) or (algorithm == "entropy_bonus" and not bonus):
            raise ValueError(
                f"entropy_coef: got {self.entropy_coef} with g2rl_algorithm={algorithm}: grpo has no entropy "
                "bonus, and entropy_bonus has one; leave it unset for the algorithm's own"
            )
        if self.epsilon_high is None and algorithm == "evol_rl":  # type: ignore[has-type]
            self.epsilon_high = EVOL_CLIP_HIGH
        super().__post_init__()


@dataclass
class _Measurement:
    """What one batch of responses leaves behind on its way through `_generate_and_score_completions`."""

    tool_mask: list[list[int]] | None = None  # of this rank's responses: 1 the model's token, 0 a tool's
    known_logprobs: list[list[float | None]] | None = None  # of this rank's, as the sampler reported them
    completion_columns: int = 0  # the last of the padded ids
    running: bool = False  # the forward under the policy that sampled
    features: list[Tensor] = field(default_factory=list)  # of this rank's responses, a forward each
    keys: list[Tensor] = field(default_factory=list)
    has_tokens: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    rewards: Tensor | None = None  # [responses of all ranks, reward functions], raw
    texts: list[str] = field(default_factory=list)  # this rank's completions


class G2RLTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are of rewards shaped by G2RL; the same arguments, `args` a G2RLConfig.

    TRL's metrics and completions tables hold the rewards as the reward functions gave them. G2RL adds the
    column `g2rl_bonus`, what shaping added to the correctness reward, and the metrics
    `g2rl/exploration_score_mean`, `cos_mean`, `negative_pairs`, `accuracy`, `shaped_reward_mean`,
    `sign_flips` (see `g2rl_kernels.group.metrics.describe`) and `feature_seconds` (a generation batch, this
    rank).

    Raises:
        TypeError: args is a GRPOConfig.
        ValueError: several reward functions, and none named in `g2rl_correctness_reward`; fewer prompts than
            one generation batch takes; `g2rl_fused_logprobs=True` where it cannot be.
        TrainerError: what the model does between hidden states and logits is unknown.
    """

    _tag_names = ["trl", "grpo", "g2rl"]  # noqa: RUF012 (as in TRL)
    _name = "G2RL"
    _paper = {  # noqa: RUF012
        "title": "Can LLMs Guide Their Own Exploration? Gradient-Guided Reinforcement Learning for LLM "
        "Reasoning",
        "id": "2512.15687",
    }

    num_iterations: int

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: G2RLConfig | None = None,
        train_dataset: Any = None,
        *others: Any,
        **keywords: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = G2RLConfig(f"{name.split('/')[-1]}-G2RL")
        if not isinstance(args, G2RLConfig):
            raise TypeError(f"args: got {type(args).__name__}, needs a G2RLConfig (g2rl_lam=0 is plain GRPO)")
        _check_prompts(train_dataset, args)
        super().__init__(model, reward_funcs, args, train_dataset, *others, **keywords)
        self._shapes = args.g2rl_algorithm != "g2rl" or args.g2rl_lam > 0 or args.g2rl_labels != "truth"
        self._measurement: _Measurement | None = None
        self._answer = None
        if args.g2rl_algorithm == "evol_rl" or args.g2rl_labels == "majority":
            self._answer = _answer_function(args.g2rl_answer_func)
        if args.g2rl_algorithm == "evol_rl":
            self._encoder = SentenceEncoder(args.g2rl_encoder, self.accelerator.device)
        if self._shapes:
            self._correctness = correctness_column(self.reward_func_names, args.g2rl_correctness_reward)
        fused = self._may_fuse(args.g2rl_fused_logprobs)
        if fused or self._shapes:
            # ZeRO-3 has taken the weights apart, and FSDP may have loaded them on the first process alone
            whole = self.accelerator.is_local_main_process and not is_deepspeed_zero3_enabled()
            self._add_ops(innermost(self.model), fused, compare=whole)
        if fused and self.ref_model is not None:
            self._add_ops(innermost(self.ref_model), fused, compare=False)  # by now it may be sharded

    # --- the model's forward --------------------------------------------------------------------------------

    def _may_fuse(self, asked: bool | None) -> bool:
        if asked is None and not self._shapes:
            return False
        why_not = None
        if is_deepspeed_zero3_enabled():
            why_not = "ZeRO-3 takes the head's weight apart before the backward pass needs it"
        elif self.aux_loss_enabled:
            why_not = "the load-balancing loss of a mixture of experts is computed by TRL's head"
        if asked and why_not:
            raise ValueError(f"g2rl_fused_logprobs=True: {why_not}; leave it unset, and TRL's head is used")
        return asked is not False and why_not is None

    def _add_ops(self, model: Any, fused: bool, compare: bool) -> None:
        """Answers `model(..., fused_lm_head=True)` by our ops. `model.forward` is TRL's addition already."""
        head, theirs = find_head(model, compare), model.forward

        @functools.wraps(theirs)
        def forward(*args: Any, **inputs: Any) -> Any:
            asked = self._measurement
            measurement = asked if asked is not None and asked.running else None
            if not inputs.get("fused_lm_head") or not (fused or measurement):
                return theirs(*args, **inputs)
            # FSDP and PEFT replace both after this function was made
            now = replace(head, backbone=model.base_model, output=model.get_output_embeddings())
            if measurement and not fused:
                with _last_hidden_state(now.backbone) as hidden:
                    output = theirs(*args, **inputs)
                self._measure(measurement, now, hidden[0], inputs["labels"])
                return output
            del inputs["fused_lm_head"]
            labels = inputs.pop("labels").to(now.output.weight.device)  # of a model split over devices
            hidden = now.backbone(*args, **inputs, use_cache=False).last_hidden_state
            if measurement:
                logprobs, entropy = self._measure(measurement, now, hidden, labels)
            else:
                packed, weight, bias, tokens, _, _ = head_inputs(now, hidden, labels, self.args)
                logprobs, entropy = g2.linear_logprobs(
                    packed, weight, tokens, bias=bias, **now.options(self.temperature)
                )
            mask = labels[:, 1:] != -100
            padded = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (logprobs, entropy))
            log_probs, entropies = padded
            return FusedCausalLMOutput(log_probs=log_probs, entropy=entropies, label_mask=mask)

        model.forward = forward

    def _measure(
        self, measurement: _Measurement, head: LMHead, hidden: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds some responses' features to the measurement; log-probs and entropy [N] of their tokens."""
        start = self._clock()
        with maybe_gather_lm_head_ctx(head.output.weight, head.output.bias):
            packed, weight, bias, tokens, cu_seqlens, mask = head_inputs(head, hidden, labels, self.args)
            rows, columns = sum(map(len, measurement.features)), measurement.completion_columns
            options = head.options(self.temperature)
            counts = mask
            if measurement.tool_mask is not None:
                ours = _pad_like(mask, measurement.tool_mask[rows : rows + len(mask)], columns)
                counts = mask & (ours > 0)
                options["token_weights"] = ours[mask]
            if measurement.known_logprobs is not None:
                known = measurement.known_logprobs[rows : rows + len(mask)]
                options["known_logprobs"] = _pad_like(mask, known, columns)[mask]
            out = g2.head_features(packed, weight, tokens, cu_seqlens, bias=bias, **options)
        measurement.features.append(out.features)
        measurement.keys.append(response_keys(tokens, cu_seqlens))
        measurement.has_tokens.append(counts.any(1))
        measurement.seconds += self._clock() - start
        return out.logprobs, out.entropy

    def _clock(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        return time.perf_counter()

    # --- one batch of responses -----------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._shapes:
            return super()._generate_and_score_completions(inputs)
        if not self.model.training:  # evaluation is of the rewards as they are
            self._logs["extra"]["g2rl_bonus"].extend([None] * len(inputs) * self.accelerator.num_processes)
            return super()._generate_and_score_completions(inputs)
        self._measurement = measurement = _Measurement()
        try:
            with self._old_logprobs() as added:
                batch = super()._generate_and_score_completions(inputs)
        finally:
            self._measurement = None
        if added:  # as TRL: the ratio of the one update is 1 to the bit
            del batch["old_per_token_logps"]
        batch["advantages"] = self._shape(measurement, len(inputs))
        return batch

    @contextmanager
    def _old_logprobs(self) -> Iterator[bool]:
        """Has TRL compute the old log-probs, whether it would or not; yields whether it would not.

        It skips them where each generation serves one update. `num_iterations` has no other use within
        `_generate_and_score_completions`.
        """
        args, iterations = self.args, self.num_iterations
        every = args.steps_per_generation * iterations
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        skips = args.gradient_accumulation_steps % every == 0 and not corrects
        try:
            if skips:
                self.num_iterations = args.gradient_accumulation_steps + 1
            yield skips
        finally:
            self.num_iterations = iterations

    def _generate(self, prompts: list) -> tuple[Any, ...]:
        generated = super()._generate(prompts)
        if self._measurement is not None:
            self._measurement.tool_mask, self._measurement.known_logprobs = generated[2], generated[4]
        return generated

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *others: Any,
        **keywords: Any,
    ) -> tuple[Any, ...]:
        measurement = self._measurement
        if measurement is not None and not measurement.features:  # the reference comes second
            measurement.completion_columns, measurement.running = logits_to_keep, True
        try:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *others, **keywords
            )
        finally:
            if measurement is not None:
                measurement.running = False

    def _calculate_rewards(self, *inputs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*inputs)
        if self._measurement is not None:
            self._measurement.rewards = rewards
            self._measurement.texts = [_text(completion) for completion in inputs[2]]
        return rewards

    def _read(self, texts: list[str]) -> dict[str, Any]:
        """Answers and embeddings of all ranks' completions, for `shape_scores`; this rank's are `texts`."""
        if self._answer is None:
            return {}
        args, device = self.args, self.accelerator.device
        answers = gather_object([(self._answer(text) or "").strip() or None for text in texts])
        if answers.count(None) == len(answers):
            warnings.warn(
                "no completion of the batch has an answer: g2rl_answer_func names the function that finds it",
                stacklevel=2,
            )
        found: dict[str, Any] = {}
        if args.g2rl_labels == "majority":
            found["votes"] = answers
        if args.g2rl_algorithm == "evol_rl":
            found["answered"] = torch.tensor([answer is not None for answer in answers], device=device)
            found["embeddings"] = gather(self._encoder([compared_text(text) for text in texts]))
        return found

    def _shape(self, measurement: _Measurement, count: int) -> Tensor:
        """This rank's advantages [count], of the shaped rewards of all ranks; metrics, completions table."""
        args, start = self.args, self._clock()
        rewards = measurement.rewards
        assert rewards is not None
        scores = rewards[:, self._correctness]
        name = f"rewards of {self.reward_func_names[self._correctness]}"
        check_gap(scores, args.g2rl_correctness_gap, name, "g2rl_correctness_gap")
        shaped = shape_scores(
            gather(torch.cat(measurement.features)),
            scores,
            ShapingOptions.of(args, "g2rl_"),
            group_size=self.num_generations,  # a prompt's responses are consecutive, and may straddle ranks
            has_tokens=gather(torch.cat(measurement.has_tokens)),
            keys=gather(torch.cat(measurement.keys)),
            threshold=args.g2rl_correctness_threshold,
            gap=args.g2rl_correctness_gap,
            algorithm=args.g2rl_algorithm,
            **self._read(measurement.texts),
        )
        rewards = rewards.clone()
        rewards[:, self._correctness] = shaped.scores
        advantages = self._advantages(rewards)
        seconds = measurement.seconds + self._clock() - start
        for name, value in {**shaped.metrics, "feature_seconds": seconds}.items():
            self._metrics["train"][f"g2rl/{name}"].append(value)
        self._logs["extra"]["g2rl_bonus"].extend(shaped.bonus.tolist())
        self._logs["advantages"].extend(advantages.tolist())  # it holds one batch: TRL's own drop out
        first = self.accelerator.process_index * count
        return advantages[first : first + count]

    def _advantages(self, rewards: Tensor) -> Tensor:
        """[S] of rewards [S, K]: what TRL computes inline, to the bit. Responses without a reward get 0."""
        m, none = self.num_generations, rewards.isnan().all(1)
        weights = self.reward_weights.to(rewards.device)
        separately = self.multi_objective_aggregation == "normalize_then_sum"
        if separately:
            grouped = rewards.view(-1, m, rewards.shape[1])
            spread = nanstd(grouped, dim=1, keepdim=True)
            rewards = ((grouped - grouped.nanmean(1, keepdim=True)) / (spread + 1e-4)).view(rewards.shape)
        total = (rewards * weights).nansum(1).masked_fill(none, torch.nan)
        if separately:
            advantages = (total - total.nanmean()) / (nanstd(total) + 1e-4)
        else:
            grouped = total.view(-1, m)
            advantages = total - grouped.nanmean(1).repeat_interleave(m)
            if self.scale_rewards == "group":
                advantages = advantages / (nanstd(grouped, dim=1).repeat_interleave(m) + 1e-4)
            elif self.scale_rewards == "batch":
                advantages = advantages / (nanstd(total) + 1e-4)
        return advantages.nan_to_num(nan=0.0)


def _check_prompts(train_dataset: Any, args: G2RLConfig) -> None:
    """TRL drops what does not fill a generation batch: with fewer prompts it trains nothing, silently."""
    needed = args.generation_batch_size // args.num_generations
    if hasattr(train_dataset, "__len__") and len(train_dataset) < needed:
        raise ValueError(
            f"train_dataset: {len(train_dataset)} prompts, but a generation batch takes {needed} "
            f"(generation_batch_size={args.generation_batch_size} / num_generations={args.num_generations}), "
            "so nothing would be trained; give more prompts, or lower per_device_train_batch_size or "
            "gradient_accumulation_steps"
        )


def correctness_column(names: list[str], asked: str | None) -> int:
    """Index of the reward function that shaping is about."""
    if asked is None and len(names) == 1:
        return 0
    if asked is None or names.count(asked) != 1:
        raise ValueError(
            f"g2rl_correctness_reward: got {asked!r}, needs the name of the one reward function that says "
            f"whether an answer is right: {', '.join(names)}"
        )
    return names.index(asked)


def _answer_function(path: str | None) -> Callable[[str], str | None]:
    """The function at a dotted path; without one, math-verify's reading."""
    if path is None:
        try:
            import math_verify  # noqa: F401
        except ImportError:
            raise ValueError("g2rl_answer_func: name a function, or pip install math-verify") from None
        return math_answer
    module, _, name = path.rpartition(".")
    try:
        function: Callable[[str], str | None] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"g2rl_answer_func: cannot import {path!r} ({error})") from None
    return function


def _text(completion: Any) -> str:
    """What a completion says, if a conversation: the model's own messages of it."""
    if isinstance(completion, str):
        return completion
    said = (m.get("content") for m in completion if m.get("role") == "assistant")
    return "\n".join(text for text in said if isinstance(text, str))


def head_inputs(head: LMHead, hidden: Tensor, labels: Tensor, args: Any) -> tuple[Any, ...]:
    """Packed hidden [N, d], weight and bias in the dtype that TRL multiplies in; tokens [N], cu_seqlens
    [B + 1] and mask [B, L - 1]. hidden [B, L, d], labels [B, L] with -100 at what is not scored; args: the
    trainer's."""
    device, dtype = head.output.weight.device, head.output.weight.dtype
    if torch.is_autocast_enabled(device.type) and not getattr(args, "cast_lm_head_to_fp32", False):
        dtype = torch.get_autocast_dtype(device.type)
    hidden, labels = hidden.to(device)[:, :-1], labels.to(device)[:, 1:]
    mask = labels != -100
    packed, tokens, cu_seqlens = g2.pack_responses(hidden, labels, mask)
    return packed.to(dtype), *head.weights(dtype), tokens, cu_seqlens, mask


def innermost(model: Any) -> Any:
    """The transformers model within DDP, FSDP, DeepSpeed and PEFT."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if is_peft_model(model) else model


@contextmanager
def _last_hidden_state(backbone: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What the backbone returns within the block, a list of one [B, L, d]."""
    seen: list[Tensor] = []
    hook = backbone.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        yield seen
    finally:
        hook.remove()


def _pad_like(mask: Tensor, rows: list[list[Any]], columns: int) -> Tensor:
    """[B, L - 1] float32 with each row's values at the beginning of the last `columns`; 0 elsewhere, and for
    None and NaN: what a sampler could not score counts as unknown."""
    values = torch.zeros(mask.shape)
    first = mask.shape[1] - columns
    for row, found in enumerate(rows):
        numbers = [0.0 if x is None else float(x) for x in found]
        values[row, first : first + len(found)] = torch.tensor(numbers)
    return values.nan_to_num(nan=0.0).to(mask.device)
