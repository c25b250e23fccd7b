"""The training loop: sample, verify, measure, update. Start reading at `Trainer.step`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import g2rl_kernels as g2

from .._clock import clock
from .._files import remove_temporary, whole_directory, write_whole
from ..errors import ConfigError, TrainerError, check_packages
from ..group.alarm import CollapseAlarm, remedy
from ..group.evol import compared_text, majority_labels
from ..group.metrics import describe
from ..group.options import MethodOptions, ShapingOptions
from ..group.shaping import compares_texts, response_keys, shape_rewards
from ..head.backend import choose_backend
from ..head.tiled import slices
from ..models.checkpointing import checkpointing, enable_checkpointing
from ..models.encoder import SentenceEncoder
from ..models.lm_head import LMHead, find_head, frozen_copy
from ..models.responses import may_share, response_hidden
from ..tasks.base import Task, fingerprint, item_of, stored_messages
from ..tasks.verify import unify, verify
from . import checkpoint
from .config import TrainerConfig, warn_emulated
from .method_inputs import RolloutInputs
from .objective import policy_loss, token_weights
from .report import Report, SampleRow, bar_text, shown
from .sampling import Rollout, Sampler, autocast
from .startup import check_adapter, check_disk, check_trainer


@dataclass
class Verified:
    """What the tasks say about a rollout."""

    scores: Tensor  # [S] float32
    answers: list[str | None] | None = None  # S; the same text for equal ones of a group; None: no votes
    failures: int = 0  # responses that the verifier could not judge; they score 0


@dataclass
class MeasuredRollout:
    """Scores of a rollout, and the results of one forward pass under the policy that sampled it."""

    scores: Tensor  # [S], by the task
    rewards: Tensor  # [S], +1 | -1, by the scores or by the majority
    logprobs: Tensor  # [S, L], 0 where there is no response token
    reference: Tensor | None  # [S, L], log-probs under the starting policy
    entropy: float  # nats, mean over tokens
    geometry: g2.GroupGeometry  # exploration scores, shaped rewards, advantages
    feature_seconds: float  # spent in head_features and group_geometry
    states: tuple[Tensor, Tensor, Tensor] | None = None  # hidden, tokens, mask: for the first update


class Trainer:
    """Trains `model` (a transformers causal LM, in place) by group-relative policy gradients, G2RL or GRPO.

    tasks: one or several (tasks/base.py). Raises TrainerError, before any training, for settings, models,
    tokenizers and tasks that cannot work.
    """

    def __init__(self, model: Any, tokenizer: Any, tasks: Task | Sequence[Task], config: TrainerConfig):
        config.check()
        check_packages()
        self.given = config  # for config.yaml
        self.model, self.tokenizer = model, tokenizer
        self.tasks: list[Any] = list(tasks) if isinstance(tasks, (list, tuple)) else [tasks]
        self.device = next(model.parameters()).device
        self.output_dir = Path(config.output_dir).expanduser()
        self.config = config = self._resolved(config)
        self.limits = config.limits()
        try:
            choose_backend(config.backend, self.device)
        except (ValueError, ImportError) as error:
            raise ConfigError(str(error)) from None
        check_adapter(model)
        self.head = find_head(model)
        self.head.shares = may_share(model, self.head)
        self.sampler = Sampler(model, tokenizer, self.tasks, config, self.head)
        if config.gradient_checkpointing:  # layers whose activations are computed again take no cache
            self.head = replace(self.head, shares=False)
        self.ops_dtype: torch.dtype = self.head.output.weight.dtype
        if config.autocast == "bfloat16":
            self.ops_dtype = torch.bfloat16
        self._check_tasks()
        check_disk(model, config, self.output_dir)
        if compares_texts(config.algorithm, config.similarity):
            self.encoder = SentenceEncoder(config.encoder, self.device)
        self.inputs = RolloutInputs(config, self.head, self.sampler, tokenizer, self.ops_dtype)
        self.reference = frozen_copy(self.head, config.autocast == "bfloat16") if config.beta > 0 else None
        model.eval()  # no dropout: the updated policy must be the one that sampled
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.trained:
            raise TrainerError("model: no parameter requires a gradient, so nothing would be trained")
        check_trainer(self)
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step_number = 0  # steps done
        title = f"{config.algorithm.upper()} · {config.model or type(model).__name__}"
        self.report = Report(self.output_dir, title)
        self.alarm = CollapseAlarm(remedy(ShapingOptions.of(config), config.algorithm))

    # --- one step -------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """One step: sample, verify, measure, update. Returns its metrics; times are in seconds.

        Raises RewardError or TrainerError before the model is changed.
        """
        times = [clock(self.device)]
        rollout = self.sampler.sample()
        times.append(clock(self.device))
        verified = self.verify(rollout)
        times.append(clock(self.device))
        measured = self.measure(rollout, verified, updates=True)
        times.append(clock(self.device))
        update = self.update(rollout, measured)
        times.append(clock(self.device))
        self.step_number += 1
        self.last = rollout, measured
        names = ("generate_seconds", "verify_seconds", "forward_seconds", "update_seconds")
        return {
            "step": self.step_number,
            **self._describe(rollout, measured),
            "verify_failures": verified.failures,
            **update,
            "tokens_per_second": round(rollout.mask.sum().item() / (times[-1] - times[0]), 1),
            "seconds": round(times[-1] - times[0], 3),
            "feature_seconds": round(measured.feature_seconds, 4),
            **{name: round(end - start, 3) for name, start, end in zip(names, times, times[1:])},
        }

    def verify(self, rollout: Rollout, votes: bool = False) -> Verified:
        """The task's score of every response; with `votes`, or where the algorithm votes, their answers.

        Raises RewardError if a user's function fails.
        """
        config = self.config
        votes = votes or config.labels == "majority" or config.algorithm == "evol_rl"
        asked = [(task, item, text) for (task, item), text in zip(rollout.items, rollout.completions)]
        verdicts = verify(asked, answers=votes, limits=self.limits)
        answers: list[str | None] | None = None
        if votes:
            groups = [
                (getattr(asked[rows.start][0], "judge", None), [one.answer for one in verdicts[rows]])
                for rows in slices(0, len(asked), config.group_size)
            ]
            answers = [answer for group in unify(groups, self.limits) for answer in group]
        scores = torch.tensor([one.score for one in verdicts], dtype=torch.float32, device=self.device)
        return Verified(scores, answers, sum(one.failure is not None for one in verdicts))

    @torch.no_grad()
    def measure(self, rollout: Rollout, verified: Verified, updates: bool = False) -> MeasuredRollout:
        """Log-probs, entropy and features from one forward pass; rewards and advantages from those.

        verified: from `verify`. updates: `update` follows; if it is one micro-batch, it takes this forward's
        graph instead of a second forward.
        """
        config, scores = self.config, verified.scores
        self.model.eval()
        logprobs = torch.zeros(rollout.mask.shape, device=self.device)
        reference = torch.zeros_like(logprobs) if self.reference else None
        features, keys, entropy, seconds = [], [], 0.0, 0.0
        weight, bias = self.head.weights(self.ops_dtype)
        self.inputs.begin(rollout)
        keeps = updates and config.micro_batch_size == len(scores) and not config.gradient_checkpointing
        states: tuple[Tensor, Tensor, Tensor] | None = None
        for rows in slices(0, len(scores), config.micro_batch_size):
            with torch.set_grad_enabled(keeps):
                hidden, tokens, cu_seqlens, mask = self._response_hidden(self.head, rollout, rows)
            if keeps:
                states = hidden, tokens, mask
            hidden = hidden.detach()
            start = clock(self.device)
            options = {**self.head.options(config.temperature), "bias": bias, "backend": config.backend}
            options["support"] = rollout.support(rows)
            weights = self.inputs.token_weights(hidden)
            out = g2.head_features(hidden, weight, tokens, cu_seqlens, token_weights=weights, **options)
            self.inputs.add(hidden, weight, tokens, cu_seqlens, **options)
            seconds += clock(self.device) - start
            features.append(out.features)
            keys.append(response_keys(tokens, cu_seqlens))
            logprobs[rows, : mask.shape[1]] = _padded(out.logprobs, mask)
            entropy += out.entropy.sum().item()
            if self.reference and reference is not None:
                reference[rows, : mask.shape[1]], _ = self._logprobs(self.reference, rollout, rows)
        entropy /= max(int(rollout.mask.sum()), 1)

        groups = torch.arange(len(scores), device=self.device) // config.group_size
        if config.truncated == "drop":  # -1: in no group
            groups = groups.masked_fill(rollout.truncated, -1)
        start = clock(self.device)
        rewards, geometry = self._shape(torch.cat(features), torch.cat(keys), verified, groups, rollout)
        seconds += clock(self.device) - start
        return MeasuredRollout(scores, rewards, logprobs, reference, entropy, geometry, seconds, states)

    def _shape(
        self, features: Tensor, keys: Tensor, verified: Verified, groups: Tensor, rollout: Rollout
    ) -> tuple[Tensor, g2.GroupGeometry]:
        """Rewards [S], +1 or -1, and the geometry with the rewards and advantages that `algorithm` shapes."""
        config = self.config
        right, answers = verified.scores >= config.score_gate, verified.answers
        novelty: dict[str, Any] = {}
        if config.labels == "majority":
            assert answers is not None
            right = majority_labels(answers, groups).to(self.device)
        if compares_texts(config.algorithm, config.similarity):
            novelty["embeddings"] = self.encoder([compared_text(text) for text in rollout.completions])
        if config.algorithm == "evol_rl":
            assert answers is not None
            novelty["answered"] = torch.tensor([a is not None for a in answers], device=self.device)
        rewards = torch.where(right, 1.0, -1.0)
        grouping: dict[str, Any] = {"group_size": config.group_size}  # group_ids would make a GPU wait
        if config.truncated == "drop":
            grouping = {"group_ids": groups}
        return rewards, shape_rewards(
            features,
            rewards,
            ShapingOptions.of(config),
            **grouping,
            keys=keys,
            algorithm=config.algorithm,
            alignment=self.inputs.alignment(),
            method_options=MethodOptions.of(config),
            **novelty,
        )

    def update(self, rollout: Rollout, measured: MeasuredRollout) -> dict[str, Any]:
        """`epochs` passes of clipped policy-gradient updates; returns metrics, means over the updates."""
        with checkpointing(self.model) if self.config.gradient_checkpointing else nullcontext():
            return self._update(rollout, measured)

    def _update(self, rollout: Rollout, measured: MeasuredRollout) -> dict[str, Any]:
        config, lr = self.config, self.learning_rate()
        totals, updates = {"loss": 0.0, "kl": 0.0, "grad_norm": 0.0, "clip_fraction": 0.0}, 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        coef, high = config.entropy_coef, config.ratio_clip_high
        assert coef is not None  # self.config is resolved
        assert high is not None
        for mini in config.epochs * [*slices(0, config.batch_size, config.mini_batch_size)]:
            weights = token_weights(rollout.mask[mini], config.loss_mean)
            for micro in slices(0, config.mini_batch_size, config.micro_batch_size):
                rows = slice(mini.start + micro.start, mini.start + micro.stop)
                logprobs, entropy = self._logprobs(self.head, rollout, rows, measured.states)
                measured.states = None  # of the policy before the first update
                length = logprobs.shape[1]
                loss, stats = policy_loss(
                    logprobs,
                    measured.logprobs[rows, :length],
                    measured.geometry.advantages[rows],
                    rollout.mask[rows, :length],
                    weights[micro, :length],
                    ratio=config.ratio,
                    clip=(config.ratio_clip, high),
                    reference=None if measured.reference is None else measured.reference[rows, :length],
                    beta=config.beta,
                    entropy=entropy if coef > 0 else None,
                    entropy_coef=coef,
                )
                loss.backward()
                for key, value in {"loss": loss.item(), **stats}.items():
                    totals[key] += value
            norm = torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm).item()
            if not math.isfinite(norm):
                raise TrainerError(
                    f"step {self.step_number + 1}: the gradient is not finite; lower lr={lr:g} or use "
                    "dtype=float32; the last checkpoint is intact"
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            totals["grad_norm"] += norm
            updates += 1
        means: dict[str, Any] = {key: value / updates for key, value in totals.items()}
        return {**means, "kl": means["kl"] if self.reference else None, "lr": lr}

    def learning_rate(self) -> float:
        """Learning rate for the next step: linear warm-up, then the schedule."""
        config, done = self.config, self.step_number
        if done < config.warmup_steps:
            return config.lr * (done + 1) / config.warmup_steps
        left = (config.steps - done) / max(config.steps - config.warmup_steps, 1)
        factors = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
        return config.lr * factors[config.lr_schedule]

    def _response_hidden(
        self, head: LMHead, rollout: Rollout, rows: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states [N, d] that predict the response tokens [N], cu_seqlens [B + 1], and mask [B, L]."""
        ids, attention, mask = rollout.rows(rows)
        with autocast(self.config, self.device):
            hidden, tokens, cu_seqlens = response_hidden(head, ids, attention, mask)
        return hidden.to(self.ops_dtype), tokens, cu_seqlens, mask

    def _logprobs(
        self,
        head: LMHead,
        rollout: Rollout,
        rows: slice,
        states: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the response tokens, [B, L]; differentiable in the head's model.

        states: hidden, tokens and mask of these rows, where they are known.
        """
        if states is None:
            hidden, tokens, _, mask = self._response_hidden(head, rollout, rows)
        else:
            hidden, tokens, mask = states
        weight, bias = head.weights(self.ops_dtype)
        options = {**head.options(self.config.temperature), "logits_memory": self.config.logits_memory}
        support = rollout.support(rows)
        out = g2.linear_logprobs(hidden, weight, tokens, bias=bias, support=support, **options)
        return _padded(out.logprobs, mask), _padded(out.entropy, mask)

    def _describe(self, rollout: Rollout, measured: MeasuredRollout) -> dict[str, float]:
        """Metrics of a rollout; length, entropy and geometry are of the responses that were not dropped."""
        shaping = describe(measured.geometry, measured.rewards)
        return {
            "reward": measured.rewards.mean().item(),
            "accuracy": (measured.scores >= self.config.score_gate).float().mean().item(),
            "shaped_reward": shaping["shaped_reward_mean"],
            "length": rollout.mask.sum().item() / max(int(rollout.mask.any(1).sum()), 1),
            "truncated": rollout.truncated.float().mean().item(),
            "entropy": measured.entropy,
            **rollout.truncation(),
            **{
                key: shaping[key]
                for key in ("cos_mean", "negative_pairs", "exploration_score_mean", "sign_flips")
            },
        }

    # --- the run --------------------------------------------------------------------------------------------

    def train(self) -> list[dict[str, Any]]:
        """Trains to `config.steps`, from the newest checkpoint if there is one; returns every step's metrics.

        Writes checkpoints, reports and the trained model to output_dir. A killed run that is started again
        gives the numbers of an uninterrupted one: on a CPU to the bit, with the same number of threads.

        Raises ConfigError for a checkpoint of other settings or data, RewardError for a verifier that raises,
        TrainerError for what cannot be written or has become NaN.
        """
        from tqdm import tqdm

        config = self.config
        self.begin()
        bar = tqdm(total=config.steps, initial=self.step_number, desc=config.algorithm, dynamic_ncols=True)
        with bar:
            while self.step_number < config.steps:
                metrics = self.step()
                metrics |= self.alarm.watch(self.step_number, metrics)
                if self.step_number == 1:
                    self._replace_earlier_run()
                self.report.log(metrics)
                if self._due(config.report_every):
                    self.report.log_samples(self._samples())
                    self.report.draw()
                if self._due(config.checkpoint_every):
                    self.save_checkpoint()
                bar.set_postfix_str(bar_text(metrics), refresh=False)
                bar.update()
        self.save_model()
        return self.report.metrics

    def begin(self) -> None:
        """Seeds the generators, or restores the newest checkpoint.

        Files of an earlier run stay until the first step has succeeded.
        """
        config, start = self.config, self.resume_point()
        remove_temporary(self.output_dir)
        random.seed(config.seed)
        numpy.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        if start:
            state = checkpoint.load(start, self.model, self.optimizer)
            self.step_number, self.sampler.position = state["step"], state["position"]
            self._begin_files(self.step_number)
            self.alarm.replay(self.report.metrics)

    def _replace_earlier_run(self) -> None:
        """Deletes the files of an earlier run, after the first step of one that starts at step 0.

        Deletes the oldest checkpoint first and the metrics last. If this process is killed meanwhile, the
        earlier run can continue from its newest checkpoint, or no checkpoint is left.
        """
        for path in checkpoint.find_all(self.output_dir):
            checkpoint.remove(path)
        self._begin_files(0)

    def _begin_files(self, step: int) -> None:
        self.report.begin(step)
        given = replace(self.given, resume="auto")  # a run of the file goes on with this one
        write_whole(self.output_dir / "config.yaml", given.to_yaml())

    def resume_point(self) -> Path | None:
        """The checkpoint that `train` will continue from, or None.

        Raises ConfigError if it was made with other settings or data, TrainerError if it is damaged.
        """
        if self.config.resume == "overwrite":
            return None
        return checkpoint.newest(self.output_dir, self.config, self.data)

    def save_checkpoint(self) -> Path:
        """Writes checkpoint-<step>; returns its path."""
        state = {"position": self.sampler.position, "config": self.config.to_dict(), "data": self.data}
        saved = self.model, self.tokenizer, self.optimizer
        keep, generation = self.config.keep_checkpoints, self.sampler.own_generation
        self.report.flush()
        return checkpoint.save(self.output_dir, self.step_number, *saved, state, keep, generation)

    def save_model(self) -> Path:
        """Writes the trained model to output_dir/model, with its original generation_config."""
        emptied, self.model.generation_config = self.model.generation_config, self.sampler.own_generation
        try:
            with whole_directory(self.output_dir / "model") as directory:
                self.model.save_pretrained(directory)
                self.tokenizer.save_pretrained(directory)
        finally:
            self.model.generation_config = emptied
        return self.output_dir / "model"

    def _due(self, every: int) -> bool:
        return self.step_number == self.config.steps or (every > 0 and self.step_number % every == 0)

    def _samples(self) -> list[SampleRow]:
        """Rows from the first group with advantages that are not 0, else from the first group."""
        rollout, measured = self.last
        geometry, size = measured.geometry, self.config.group_size
        first = int((geometry.advantages.abs() > 1e-3).float().argmax()) // size * size
        last = min(first + self.config.samples_shown, len(rollout.completions))
        return [
            SampleRow(
                step=self.step_number,
                question=shown(rollout.items[row][1]["question"]),
                completion=rollout.completions[row],
                score=measured.scores[row].item(),
                reward=measured.rewards[row].item(),
                exploration_score=geometry.exploration_score[row].item(),
                shaped_reward=geometry.shaped_rewards[row].item(),
                advantage=geometry.advantages[row].item(),
            )
            for row in range(first, last)
        ]

    # --- checks ---------------------------------------------------------------------------------------------

    def _resolved(self, config: TrainerConfig) -> TrainerConfig:
        """`config` with derived values filled in. With autocast=auto, a resumed run keeps its autocast."""
        used = config.resolved(self.device.type)
        found = checkpoint.find_all(self.output_dir)
        if config.autocast == "auto" and config.resume == "auto" and found:
            with suppress(OSError, ValueError, KeyError):  # resume_point() reports a damaged one
                saved = json.loads((found[-1] / "state.json").read_text())["config"]
                used = replace(used, autocast=saved["autocast"])
        warn_emulated(used, self.device.type)
        return used

    def _check_tasks(self) -> None:
        for task in self.tasks:
            if len(task) == 0:
                raise ConfigError(f"task: {type(task).__name__} holds no items")
            item = item_of(task, 0)  # rows of files have been checked; other items are when they are drawn
            for one in (item, *stored_messages(task)):
                self.sampler.encode(one)
            verify([(task, item, "")], limits=self.limits)  # fail early if the function is broken
        self.data = [fingerprint(task) for task in self.tasks]
        self.sampler.draw(1)  # fail early if every prompt is too long
        self.sampler.position = 0


def _padded(packed: Tensor, mask: Tensor) -> Tensor:
    """Packed values [N] of the response tokens as [B, L], 0 where mask is False; differentiable."""
    out = torch.zeros(mask.shape, dtype=packed.dtype, device=packed.device)
    out[mask] = packed
    return out
