"""G2RL in TRL: `G2RLConfig` and `G2RLTrainer` replace GRPO's two classes in a script.

Several reward functions need `g2rl_correctness_reward`; rewards of -1 and +1 need `g2rl_correctness_gap=2`.

    from g2rl_kernels.integrations.trl import G2RLConfig, G2RLTrainer

    trainer = G2RLTrainer(model, reward_funcs=accuracy_reward, args=G2RLConfig("out"), train_dataset=dataset)

G2RLTrainer overrides `GRPOTrainer._generate_and_score_completions`. TRL's own runs inside it and calls, in
this order:

    _generate                               tool masks and the sampler's log-probs are kept; where TRL skips
                                            the next forward and the model's generate() samples, the hidden
                                            states too, which give the features (and, with
                                            g2rl_keep_sampling_mask, always the ids that were kept)
    _get_per_token_logps_and_entropies      the forward under the policy that sampled: the same pass gives the
                                            features (where TRL would skip it, another engine samples or the
                                            weights are sharded, it is made to run)
    _get_per_token_logps_and_entropies      with beta > 0 again, for the reference: not measured
    _calculate_rewards                      the rewards of all ranks and this rank's texts are kept; evol_rl
                                            and majority labels read answers from the texts

TRL then computes metrics, completions table and advantages from the raw rewards. At the end `_shape` replaces
the advantages alone: TRL's formula, applied to shaped rewards, or those that a method gives. The entropy
bonus is TRL's.

TRL asks a model for log-probs by `model(..., fused_lm_head=True)`. `_add_ops` replaces the answer:
`linear_logprobs` gives it, or `head_features` in the measured forward, which is the first one after
`_generate`; with `g2rl_fused_logprobs=False` TRL's own head gives it. The ops run inside the model's forward,
where FSDP has gathered the head's weight.

trl_config.py: G2RLConfig. trl_head.py: the model's head and what enters it. trl_seams.py: what TRL must have.
trl_measurement.py: what is kept of a batch. trl_masks.py, trl_support.py: the ids that sampling kept.
trl_methods.py: what dirl and gar need.
systems.py, shared with other trainers: shaping by the settings, answers and embeddings of texts.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

import g2rl_kernels as g2

from .._clock import clock
from ..errors import one_line, short
from ..group.shaping import response_keys
from ..head.cpu import share_of_right_responses
from ..models.head_adapter import active_adapter, check_head_adapter
from ..models.lm_head import LMHead, backbone_of, find_head
from ..trainer.sampling import Rollout, check_embedded, embedded_rows
from ..trainer.startup import warn_unmoved
from .systems import TextReader
from .trl_config import (
    G2RLConfig,
    TRLSettings,
    check_prompts,
    check_rewards,
    reward_names,
    warn_save_steps,
)
from .trl_head import (
    Scoring,
    adapters_on_the_head,
    answers_by,
    compare_log_probs,
    completion_text,
    current_head,
    head_inputs,
    innermost,
    last_hidden_state,
    pad_like,
    runs_here,
    scoring_of,
    settle_positions,
    states_of_rows,
    without_autocast,
)
from .trl_masks import SamplingMasks, warn_of_models_settings
from .trl_measurement import Measurement
from .trl_methods import BatchInputs
from .trl_seams import GRPOTrainer, get_config_model_id, maybe_gather_lm_head_ctx, nanstd
from .trl_support import KEPT, KeptRow, support_of


class G2RLTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages come from rewards shaped by G2RL.

    Takes GRPOTrainer's arguments, with a G2RLConfig as `args`. TRL's metrics and completions tables hold the
    raw rewards. G2RL adds the column `g2rl_bonus` (what shaping added to the correctness reward) and the
    metrics `g2rl/exploration_score_mean`, `cos_mean`, `negative_pairs`, `accuracy`, `shaped_reward_mean`,
    `sign_flips` (see `g2rl_kernels.group.metrics.describe`), `feature_seconds` (seconds per generation
    batch, on this rank), and `alarm`, 1 once a collapse has been warned of (`CollapseAlarm`).

    Raises:
        TypeError: args is a plain GRPOConfig.
        RuntimeError: from `train()`, another trainer was made of the same model since.
        ValueError: several reward functions without `g2rl_correctness_reward`; `g2rl_fused_logprobs=True`
            where TRL's head is needed; from `train()`, fewer prompts than one generation batch takes.
        TrainerError: the model does something unknown between hidden states and logits.
    """

    _tag_names = ["trl", "grpo", "g2rl"]  # noqa: RUF012 (as in TRL)
    _name = "G2RL"
    _paper = {  # noqa: RUF012
        "title": "Can LLMs Guide Their Own Exploration? Gradient-Guided Reinforcement Learning for LLM "
        "Reasoning",
        "id": "2512.15687",
        "citation": """\
@article{liang2025g2rl,
    title        = {{Can LLMs Guide Their Own Exploration? Gradient-Guided Reinforcement Learning for LLM Reasoning}},
    author       = {Zhenwen Liang and Sidi Lu and Wenhao Yu and Kishan Panaganti and Yujun Zhou and Haitao Mi and Dong Yu},
    year         = 2025,
    eprint       = {arXiv:2512.15687},
}""",  # noqa: E501
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
        self._shapes = args.g2rl_algorithm != "g2rl" or args.g2rl_lam > 0 or args.g2rl_labels != "truth"
        if not self._shapes:  # the run is GRPOTrainer's, and so is its model card
            self._name, self._paper = GRPOTrainer._name, GRPOTrainer._paper
            self._tag_names = GRPOTrainer._tag_names
        elif reward_funcs and not keywords.get("environment_factory"):  # which may bring a reward of its own
            check_rewards(reward_names(reward_funcs), args)
        without_autocast(model)
        wants = self._shapes if args.g2rl_fused_logprobs is None else args.g2rl_fused_logprobs
        with adapters_on_the_head(wants and not args.cast_lm_head_to_fp32):
            super().__init__(model, reward_funcs, args, train_dataset, *others, **keywords)
        self._measurement: Measurement | None = None
        self._kept: list[KeptRow] | None = None  # of the rows that a forward of the loss scores
        settings = TRLSettings.of(args)
        self._reader = TextReader(settings, self.accelerator.device) if settings.reads_texts else None
        self._alarm = settings.alarm()
        if self._shapes:
            self._correctness = check_rewards(self.reward_func_names, args)
        fused, self._scoring = self._may_fuse(args.g2rl_fused_logprobs), Scoring()
        self._check_head_adapter(fused)
        if fused or self._shapes:
            policy = innermost(self.model)
            self._scoring = self._add_ops(policy, fused, compare=runs_here(self.accelerator, policy))
        if fused and self.ref_model is not None:
            self._add_ops(innermost(self.ref_model), fused, compare=False)  # it may be sharded by now
        self._check_policy()
        self._inputs = BatchInputs(self)
        self._masks = SamplingMasks(self, fused) if args.g2rl_keep_sampling_mask else None
        if self._masks is None:
            warn_of_models_settings(self)
        warn_save_steps(args, self.num_iterations)
        warn_unmoved(
            self.model.parameters(),
            args.learning_rate,
            "load it in float32 (model_init_kwargs={'dtype': 'float32'}; in a recipe dtype: float32) and set "
            "bf16=True for bf16's speed, or raise learning_rate",
        )

    # --- checks before work ---------------------------------------------------------------------------------

    def train(self, *args: Any, **keywords: Any) -> Any:
        """GRPOTrainer's. RuntimeError: a model that another trainer took. ValueError: too few prompts."""
        if self._scoring.head is not None and not answers_by(innermost(self.model), self._scoring):
            raise RuntimeError(
                "model: another trainer was made of it since, and answers its calls with its own settings: "
                "train with that one, or make a new G2RLTrainer"
            )
        if self._shapes:
            check_prompts(self.train_dataset, self.args)
        return super().train(*args, **keywords)

    def _check_policy(self) -> None:
        """Sampler, update and model give the same log-probs; positions are passed where that needs them."""
        model, tokenizer = innermost(self.model), self._tokenizer
        rows = embedded_rows(model)
        check_embedded([tokenizer.pad_token_id], rows, tokenizer, "processing_class: its padding")

        def logprobs(probe: Rollout) -> Tensor:
            length = probe.mask.shape[1]
            found = self._get_per_token_logps_and_entropies(self.model, probe.ids, probe.attention, length)
            return found[0][probe.mask]

        def check() -> None:
            padless = self.use_vllm or self.use_transformers_continuous_batching
            try:
                compare_log_probs(self, logprobs, samples=not (padless or self._is_vlm))
            except (TypeError, ValueError, AttributeError) as error:
                if not self._is_vlm:
                    raise
                what = f"{type(error).__name__}: {one_line(error, 160)}"
                warnings.warn(f"log-probs were not checked, as text alone fails ({what})", stacklevel=3)

        def use_positions() -> None:
            for one in (self.model, self.ref_model):
                if one is not None:
                    scoring_of(innermost(one)).positions = True

        if settle_positions(self.accelerator, model, check, use_positions):
            warnings.warn(
                f"{type(model).__name__} needs position_ids for prompts padded on the left, and TRL passes "
                "none: they are passed here, so log-probs are right and differ from GRPOTrainer's",
                stacklevel=3,
            )

    def _tokenize_prompts(self, prompts: list) -> tuple[Any, ...]:
        tokenized: tuple[Any, ...] = super()._tokenize_prompts(prompts)
        if self._is_vlm:  # the embeddings of images may be elsewhere
            return tokenized
        rows = embedded_rows(innermost(self.model))
        for prompt, ids in zip(prompts, tokenized[0]):
            check_embedded(ids, rows, self._tokenizer, f"prompt {short(prompt)}")
        return tokenized

    # --- the model's forward --------------------------------------------------------------------------------

    def _may_fuse(self, asked: bool | None) -> bool:
        if asked is None and not self._shapes:
            return False
        why_not = None
        if is_deepspeed_zero3_enabled():
            why_not = "ZeRO-3 shards the head's weight again before the backward pass needs it"
        elif self.aux_loss_enabled:
            why_not = "the load-balancing loss of a mixture of experts is computed by TRL's head"
        if asked and why_not:
            raise ValueError(f"g2rl_fused_logprobs=True: {why_not}; leave it unset to use TRL's head")
        return asked is not False and why_not is None

    def _check_head_adapter(self, fused: bool) -> None:
        """Raises for an adapter on the LM head that would not be trained, or not as it samples."""
        head = innermost(self.model).get_output_embeddings()
        check_head_adapter(head, dropout=False)
        if not fused and active_adapter(head) is not None:
            raise ValueError(
                "peft_config: the adapter on lm_head needs fused log-probs, which this run does not have "
                "(ZeRO-3, or the load-balancing loss of a mixture of experts): leave lm_head out of "
                "target_modules"
            )

    def _add_ops(self, model: Any, fused: bool, compare: bool) -> Scoring:
        """Makes this package's ops answer `model(..., fused_lm_head=True)`.

        fused: log-probs come from `linear_logprobs`, else from TRL's head; compare: see `find_head`.
        """
        head, scoring = find_head(model, compare), scoring_of(model)
        scoring.head, scoring.fused, scoring.temperature = head, fused, self.temperature
        scoring.float32 = self.args.cast_lm_head_to_fp32
        scoring.logits_memory = self.args.g2rl_logits_memory
        return scoring

    def _measure(
        self, measurement: Measurement, head: LMHead, hidden: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds some responses' features to the measurement; returns log-probs and entropies, [N] each."""
        start = clock(self.accelerator.device)
        with maybe_gather_lm_head_ctx(head.output.weight, head.output.bias):
            inputs = head_inputs(head, hidden, labels, self._scoring.float32)
            packed, weight, bias, tokens, cu_seqlens, mask = inputs
            done, columns = sum(map(len, measurement.features)), measurement.completion_columns
            rows = slice(done, done + len(mask))
            options = head.options(self.temperature)
            if self._masks is not None:
                if len(measurement.kept) == done:
                    measurement.kept += self._masks.recomputed(head, inputs)
                options["support"] = support_of(measurement.kept[rows], mask)
            counts = mask
            own = None
            if measurement.tool_mask is not None:
                ours = pad_like(mask, measurement.tool_mask[rows], columns)
                counts = mask & (ours > 0)
                own = ours[mask]
            self._inputs.add(packed, weight, tokens, cu_seqlens, own, bias=bias, **options)
            weights = self._inputs.token_weights(packed, own)
            if weights is not None:
                options["token_weights"] = weights
            known = None
            if measurement.known_logprobs is not None:
                known = pad_like(mask, measurement.known_logprobs[rows], columns)[mask]
                if self._known_logprobs_pay(measurement, packed.device):
                    options["known_logprobs"] = known
            out = g2.head_features(packed, weight, tokens, cu_seqlens, bias=bias, **options)
            if known is not None and packed.device.type == "cpu":
                right = share_of_right_responses(
                    known, out.logprobs, cu_seqlens, options.get("token_weights")
                )
                measurement.known_fit = right > 0.95
        measurement.features.append(out.features)
        measurement.keys.append(response_keys(tokens, cu_seqlens))
        measurement.has_tokens.append(counts.any(1))
        measurement.entropies.append(out.entropy)
        measurement.seconds += clock(self.accelerator.device) - start
        return out.logprobs, out.entropy

    def _known_logprobs_pay(self, measurement: Measurement, device: torch.device) -> bool:
        """Whether they save time. On a CPU one wrong token costs more for its response than a right response
        saves: the responses measured before tell, in one generation batch, how it is with this sampler."""
        return device.type != "cpu" or measurement.known_fit

    # --- one batch of responses -----------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not (self._shapes and self.model.training):  # evaluation reports raw rewards
            if self._shapes:
                nothing = [None] * len(inputs) * self.accelerator.num_processes
                self._logs["extra"]["g2rl_bonus"].extend(nothing)
            return super()._generate_and_score_completions(inputs)
        self._measurement = measurement = Measurement()
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self._measurement = None
            self._settle(measurement)
        if measurement.num_iterations is not None:  # as without us: the only update's ratio is 1, to the bit
            del batch["old_per_token_logps"]
        if measurement.states:
            self._measure_states(measurement, batch)
        measurement.alignment = self._inputs.alignment(inputs, batch)
        batch["advantages"] = self._shape(measurement, len(inputs))
        if self._masks is not None:
            batch[KEPT] = measurement.kept
            for name, value in self._masks.metrics(measurement).items():
                self._metrics["train"][f"g2rl/{name}"].append(value)
        return batch

    def _generate(self, prompts: list) -> tuple[Any, ...]:
        measurement, args = self._measurement, self.args
        if measurement is None:
            return tuple(super()._generate(prompts))
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        every = args.steps_per_generation * self.num_iterations
        skips = args.gradient_accumulation_steps % every == 0 and not corrects  # as TRL decides
        watched: AbstractContextManager[list[Tensor]] = nullcontext([])
        if (skips or self._masks is not None) and self._samples_itself():
            watched = last_hidden_state(backbone_of(innermost(self.model)), newest=True)
        with watched as states:
            generated: tuple[Any, ...] = super()._generate(prompts)
        ids = generated[1]
        if self._masks is not None:
            measurement.kept = self._masks.given(generated[5], ids)
            measurement.recomputed = not measurement.kept
        # Otherwise a token took several forwards, or a forward gave several tokens
        if states and [len(state) for state in states] == [len(ids)] * max(map(len, ids)):
            if self._masks is not None:  # rounding decides otherwise in the next forward, for many in 16 bits
                measurement.kept = self._masks.of_states(states, ids)
            if skips:
                measurement.states = states
                return generated
        # Only now is the forward due: a rollout_func may call forwards of its own
        measurement.tool_mask, measurement.known_logprobs, measurement.due = generated[2], generated[4], True
        if skips:  # TRL is made to run the forward. Until it does, num_iterations has no other use
            measurement.num_iterations = self.num_iterations
            self.num_iterations = args.gradient_accumulation_steps + 1
        return generated

    def _samples_itself(self) -> bool:
        """Whether the model's own generate() draws each token from one forward, with all weights at hand."""
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching or self.rollout_func
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not (elsewhere or sharded or self.tools or self.args.generation_kwargs)

    @torch.no_grad()
    def _measure_states(self, measurement: Measurement, batch: dict[str, Any]) -> None:
        """`_measure` on the hidden states that the sampler left."""
        labels = batch["completion_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        assert self._scoring.head is not None
        head = current_head(self._scoring.head, innermost(self.model))
        size = self.args.per_device_train_batch_size
        for hidden, some in states_of_rows(measurement.states, labels, size):
            with self.accelerator.autocast():
                self._measure(measurement, head, hidden, some)

    def _settle(self, measurement: Measurement) -> None:
        """The forward is not due any more, and num_iterations is the trainer's own again."""
        measurement.due = False
        if measurement.num_iterations is not None:
            self.num_iterations = measurement.num_iterations

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *others: Any,
        **keywords: Any,
    ) -> tuple[Any, ...]:
        measurement, given = self._measurement, (model, input_ids, attention_mask, logits_to_keep, *others)
        if measurement is None or not measurement.due:
            kept = self._kept if measurement is None else measurement.kept
            with scoring_of(innermost(model)).over(kept) if kept else nullcontext():
                return super()._get_per_token_logps_and_entropies(*given, **keywords)
        self._settle(measurement)
        measurement.completion_columns = logits_to_keep
        self._scoring.measure = functools.partial(self._measure, measurement)
        try:
            return super()._get_per_token_logps_and_entropies(*given, **keywords)
        finally:
            self._scoring.measure = None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._kept = inputs.get(KEPT)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._kept = None

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: list[Any], *others: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, *others)
        if self._measurement is not None:
            self._measurement.rewards = rewards
            self._measurement.texts = [completion_text(completion) for completion in completions]
        return rewards

    def _read(self, texts: list[str]) -> dict[str, Any]:
        """What `shape_scores` needs to know of all ranks' completions, from the texts of this rank's."""
        if self._reader is None:
            return {}
        mine, embeddings = self._reader.read(texts)
        answers: list[str | None] = gather_object(mine)
        groups = torch.arange(len(answers), device=self.accelerator.device) // self.num_generations
        return self._reader.arguments(answers, None if embeddings is None else gather(embeddings), groups)

    def _shape(self, measurement: Measurement, count: int) -> Tensor:
        """This rank's advantages [count], from the shaped rewards of all ranks; logs metrics and bonus."""
        start = clock(self.accelerator.device)
        assert measurement.rewards is not None
        rewards = measurement.rewards.clone()
        shaped = TRLSettings.of(self.args).shape(
            gather(torch.cat(measurement.features)),
            rewards[:, self._correctness],
            f"rewards of {self.reward_func_names[self._correctness]}",
            self.scale_rewards,
            group_size=self.num_generations,  # a prompt's responses are consecutive, and may straddle ranks
            keys=gather(torch.cat(measurement.keys)),
            has_tokens=gather(torch.cat(measurement.has_tokens)),
            **self._read(measurement.texts),
            **measurement.alignment,
        )
        rewards[:, self._correctness] = shaped.scores
        if shaped.advantages is None:
            advantages = self._advantages(rewards)
        else:
            advantages = shaped.advantages.nan_to_num(nan=0.0)
        seconds = measurement.seconds + clock(self.accelerator.device) - start
        found = {**shaped.metrics, "feature_seconds": seconds}
        if self.accelerator.is_main_process:
            entropy = torch.cat(measurement.entropies).mean().item()
            found |= self._alarm.watch(self.state.global_step, {**found, "entropy": entropy})
        for name, value in found.items():
            self._metrics["train"][f"g2rl/{name}"].append(value)
        self._logs["extra"]["g2rl_bonus"].extend(shaped.bonus.tolist())
        self._logs["advantages"].extend(advantages.tolist())  # it holds one batch, so TRL's own drop out
        first = self.accelerator.process_index * count
        return advantages[first : first + count]

    def _advantages(self, rewards: Tensor) -> Tensor:
        """Advantages [S] of rewards [S, K] by TRL's formula, to the bit; 0 where all rewards are NaN."""
        m, unscored = self.num_generations, rewards.isnan().all(1)
        weights = self.reward_weights.to(rewards.device)
        separately = self.multi_objective_aggregation == "normalize_then_sum"
        if separately:
            grouped = rewards.view(-1, m, rewards.shape[1])
            spread = nanstd(grouped, dim=1, keepdim=True)
            rewards = ((grouped - grouped.nanmean(1, keepdim=True)) / (spread + 1e-4)).view(rewards.shape)
        total = (rewards * weights).nansum(1).masked_fill(unscored, torch.nan)
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
