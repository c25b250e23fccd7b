"""The training loop: sample, verify, measure, shape, update. `Trainer.step` is the place to start reading."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import g2rl_kernels as g2

from .._files import whole_directory, write_whole
from ..errors import ConfigError, TrainerError, check_packages
from ..group.evol import compared_text, majority_labels
from ..group.metrics import describe
from ..group.options import ShapingOptions
from ..group.shaping import response_keys, shape_rewards
from ..head.backend import choose_backend
from ..models.checkpointing import checkpointing, enable_checkpointing
from ..models.encoder import SentenceEncoder
from ..models.lm_head import LMHead, find_head, frozen_copy, response_hidden
from ..tasks.base import Task, final_answer, item_of, score_completion
from . import checkpoint
from .config import TrainerConfig
from .objective import policy_loss, token_weights
from .report import Report, bar_text
from .sampling import Rollout, Sampler, autocast


@dataclass
class Measured:
    """What the verifier and one forward under the policy that sampled say about a rollout."""

    scores: Tensor  # [S], of the task
    rewards: Tensor  # [S], +1 | -1, by the scores or by the majority
    logprobs: Tensor  # [S, L]
    reference: Tensor | None  # [S, L], log-probs under the starting policy
    entropy: float  # nats, mean over tokens
    geometry: g2.GroupGeometry
    feature_seconds: float


class Trainer:
    """Trains `model` (a transformers causal LM, in place) by group-relative policy gradients, G2RL or GRPO.

    tasks: one task or several (see tasks.py). Whatever can be known to fail is checked here and raises
    TrainerError, before `train` spends any time.
    """

    def __init__(self, model: Any, tokenizer: Any, tasks: Task | Sequence[Task], config: TrainerConfig):
        config.check()
        check_packages()
        self.given, config = config, config.resolved()  # config.yaml is what was given
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.tasks: list[Any] = list(tasks) if isinstance(tasks, (list, tuple)) else [tasks]
        self.device = next(model.parameters()).device
        try:
            choose_backend(config.backend, self.device)
        except (ValueError, ImportError) as error:
            raise ConfigError(str(error)) from None
        self.output_dir = Path(config.output_dir).expanduser()
        self.head = find_head(model)
        self.sampler = Sampler(model, tokenizer, self.tasks, config)
        self.ops_dtype: torch.dtype = self.head.output.weight.dtype
        if config.autocast == "bfloat16":
            self.ops_dtype = torch.bfloat16
        self._check_tasks()
        self._check_disk()
        if config.algorithm == "evol_rl":
            self.encoder = SentenceEncoder(config.encoder, self.device)
        self.reference = frozen_copy(self.head, config.autocast == "bfloat16") if config.beta > 0 else None
        model.eval()  # no dropout: the policy that is updated must be the one that sampled
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.trained:
            raise TrainerError("model: no parameter requires a gradient, so nothing would be trained")
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

    # --- one step -------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """One step; returns its metrics. What may fail, the task's score above all, precedes the update."""
        times = [self._clock()]
        rollout = self.sampler.sample()
        times.append(self._clock())
        scores = self.verify(rollout)
        times.append(self._clock())
        measured = self.measure(rollout, scores)
        times.append(self._clock())
        update = self.update(rollout, measured)
        times.append(self._clock())
        self.step_number += 1
        self.last = rollout, measured
        names = ("generate_seconds", "verify_seconds", "forward_seconds", "update_seconds")
        return {
            "step": self.step_number,
            **self._describe(rollout, measured),
            **update,
            "tokens_per_second": round(rollout.mask.sum().item() / (times[-1] - times[0]), 1),
            "seconds": round(times[-1] - times[0], 3),
            "feature_seconds": round(measured.feature_seconds, 4),
            **{name: round(end - start, 3) for name, start, end in zip(names, times, times[1:])},
        }

    def verify(self, rollout: Rollout) -> Tensor:
        """The task's score of every response, [S] float32."""
        pairs = zip(rollout.items, rollout.completions)
        scores = [score_completion(task, text, item) for (task, item), text in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def measure(self, rollout: Rollout, scores: Tensor) -> Measured:
        """Old log-probs, entropy and features from one forward; rewards, their shaping, the advantages."""
        config = self.config
        self.model.eval()
        logprobs = torch.zeros(rollout.mask.shape, device=self.device)
        reference = torch.zeros_like(logprobs) if self.reference else None
        features, keys, entropy, seconds = [], [], 0.0, 0.0
        weight, bias = self.head.weights(self.ops_dtype)
        for rows in _slices(len(scores), config.micro_batch_size):
            hidden, tokens, cu_seqlens, mask = self._response_hidden(self.head, rollout, rows)
            start = self._clock()
            options = self.head.options(config.temperature)
            out = g2.head_features(
                hidden, weight, tokens, cu_seqlens, bias=bias, backend=config.backend, **options
            )
            seconds += self._clock() - start
            features.append(out.features)
            keys.append(response_keys(tokens, cu_seqlens))
            logprobs[rows, : mask.shape[1]] = _padded(out.logprobs, mask)
            entropy += out.entropy.sum().item()
            if self.reference and reference is not None:
                reference[rows, : mask.shape[1]], _ = self._logprobs(self.reference, rollout, rows)
        entropy /= max(int(rollout.mask.sum()), 1)

        groups = torch.arange(len(scores), device=self.device) // config.group_size
        if config.truncated == "drop":  # -1: a row that touches nobody
            groups = groups.masked_fill(rollout.truncated, -1)
        start = self._clock()
        rewards, geometry = self._shape(torch.cat(features), torch.cat(keys), scores, groups, rollout)
        seconds += self._clock() - start
        return Measured(scores, rewards, logprobs, reference, entropy, geometry, seconds)

    def _shape(
        self, features: Tensor, keys: Tensor, scores: Tensor, groups: Tensor, rollout: Rollout
    ) -> tuple[Tensor, g2.GroupGeometry]:
        """Rewards [S], +1 and -1, and what the algorithm makes of them."""
        config = self.config
        right, answers = scores >= config.score_gate, None
        novelty: dict[str, Any] = {}
        if config.labels == "majority" or config.algorithm == "evol_rl":
            pairs = zip(rollout.items, rollout.completions)
            answers = [final_answer(task, text, item) for (task, item), text in pairs]
            if config.labels == "majority":
                right = majority_labels(answers, groups).to(self.device)
        if config.algorithm == "evol_rl":
            assert answers is not None
            novelty["embeddings"] = self.encoder([compared_text(text) for text in rollout.completions])
            novelty["answered"] = torch.tensor([a is not None for a in answers], device=self.device)
        rewards = torch.where(right, 1.0, -1.0)
        grouping: dict[str, Any] = {"group_size": config.group_size}  # ids make a GPU wait
        if config.truncated == "drop":
            grouping = {"group_ids": groups}
        return rewards, shape_rewards(
            features,
            rewards,
            ShapingOptions.of(config),
            **grouping,
            keys=keys,
            algorithm=config.algorithm,
            **novelty,
        )

    def update(self, rollout: Rollout, measured: Measured) -> dict[str, Any]:
        """`epochs` passes of clipped policy-gradient updates over the rollout; means over the updates."""
        with checkpointing(self.model) if self.config.gradient_checkpointing else nullcontext():
            return self._update(rollout, measured)

    def _update(self, rollout: Rollout, measured: Measured) -> dict[str, Any]:
        config, lr = self.config, self.learning_rate()
        totals, updates = {"loss": 0.0, "kl": 0.0, "grad_norm": 0.0, "clip_fraction": 0.0}, 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        coef, high = config.entropy_coef, config.ratio_clip_high
        assert coef is not None  # self.config is resolved
        assert high is not None
        for mini in config.epochs * [*_slices(config.batch_size, config.mini_batch_size)]:
            weights = token_weights(rollout.mask[mini], config.loss_mean)
            for micro in _slices(config.mini_batch_size, config.micro_batch_size):
                rows = slice(mini.start + micro.start, mini.start + micro.stop)
                logprobs, entropy = self._logprobs(self.head, rollout, rows)
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
                    "dtype=float32; the last checkpoint is whole"
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            totals["grad_norm"] += norm
            updates += 1
        means: dict[str, Any] = {key: value / updates for key, value in totals.items()}
        return {**means, "kl": means["kl"] if self.reference else None, "lr": lr}

    def learning_rate(self) -> float:
        """Of the step to come: linear warm-up, then the schedule."""
        config, done = self.config, self.step_number
        if done < config.warmup_steps:
            return config.lr * (done + 1) / config.warmup_steps
        left = (config.steps - done) / max(config.steps - config.warmup_steps, 1)
        factors = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
        return config.lr * factors[config.lr_schedule]

    def _response_hidden(
        self, head: LMHead, rollout: Rollout, rows: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The hidden states [N, d] that predict the response tokens [N], cu_seqlens, and the mask [B, L]."""
        ids, attention, mask = rollout.rows(rows)
        with autocast(self.config, self.device):
            hidden, tokens, cu_seqlens = response_hidden(head, ids, attention, mask)
        return hidden.to(self.ops_dtype), tokens, cu_seqlens, mask

    def _logprobs(self, head: LMHead, rollout: Rollout, rows: slice) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the response tokens, [B, L]; differentiable in the head's model."""
        hidden, tokens, _, mask = self._response_hidden(head, rollout, rows)
        weight, bias = head.weights(self.ops_dtype)
        options = head.options(self.config.temperature)
        out = g2.linear_logprobs(hidden, weight, tokens, bias=bias, **options)
        return _padded(out.logprobs, mask), _padded(out.entropy, mask)

    def _describe(self, rollout: Rollout, measured: Measured) -> dict[str, float]:
        """Metrics of a rollout. What dropped responses did not take part in is a mean over the others."""
        shaping = describe(measured.geometry, measured.rewards)
        return {
            "reward": measured.rewards.mean().item(),
            "accuracy": (measured.scores >= self.config.score_gate).float().mean().item(),
            "shaped_reward": shaping["shaped_reward_mean"],
            "length": rollout.mask.sum().item() / max(int(rollout.mask.any(1).sum()), 1),
            "truncated": rollout.truncated.float().mean().item(),
            "entropy": measured.entropy,
            **{
                key: shaping[key]
                for key in ("cos_mean", "negative_pairs", "exploration_score_mean", "sign_flips")
            },
        }

    # --- the run --------------------------------------------------------------------------------------------

    def train(self) -> list[dict[str, Any]]:
        """Runs, or goes on, to `config.steps`; leaves checkpoints and reports; returns every step's metrics.

        A run that was killed and goes on gives the numbers of one that was not: on a CPU to the bit, with the
        same number of threads.
        """
        from tqdm import tqdm

        config = self.config
        self.begin()
        bar = tqdm(total=config.steps, initial=self.step_number, desc=config.algorithm, dynamic_ncols=True)
        with bar:
            while self.step_number < config.steps:
                metrics = self.step()
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
        """Starts afresh, or from the newest checkpoint of the same configuration.

        What an earlier run left stays until a step has succeeded: a run that fails at once destroys nothing.
        """
        config, start = self.config, self.resume_point()
        for left in self.output_dir.glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        random.seed(config.seed)
        numpy.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        if start:
            state = checkpoint.load(start, self.model, self.optimizer)
            self.step_number, self.sampler.position = state["step"], state["position"]
            self._begin_files(self.step_number)

    def _replace_earlier_run(self) -> None:
        """Deletes what an earlier run left, with resume=overwrite its checkpoints too, before the first line.

        Oldest checkpoint first, its metrics last: killed meanwhile, either that run can still go on from its
        newest checkpoint, with its own metrics, or no checkpoint is left and the new run starts over.
        """
        for path in checkpoint.find_all(self.output_dir):
            checkpoint.remove(path)
        self._begin_files(0)

    def _begin_files(self, step: int) -> None:
        self.report.begin(step)
        write_whole(self.output_dir / "config.yaml", self.given.to_yaml())

    def resume_point(self) -> Path | None:
        """The checkpoint that `train` will go on from; raises where it was made with other settings."""
        found = checkpoint.find_all(self.output_dir)
        if not found or self.config.resume == "overwrite":
            return None
        path = found[-1]
        try:
            other = json.loads((path / "state.json").read_text())
            keys = self.config.differences(other["config"])
        except (OSError, ValueError, KeyError):
            raise TrainerError(f"{path} is damaged: delete it to go on from the one before") from None
        if keys:
            now = self.config.to_dict()
            what = ", ".join(f"{key}={other['config'][key]!r} (now {now[key]!r})" for key in keys)
            raise ConfigError(
                f"{path} has {what}: choose another output_dir, or resume=overwrite to start over"
            )
        if other["step"] > self.config.steps:
            raise ConfigError(
                f"{path} is past steps={self.config.steps}: raise it, or choose another output_dir"
            )
        return path

    def save_checkpoint(self) -> Path:
        """Writes checkpoint-<step>, whole or not at all."""
        state = {"position": self.sampler.position, "config": self.config.to_dict()}
        parts = self.model, self.tokenizer, self.optimizer
        self.report.flush()
        return checkpoint.save(self.output_dir, self.step_number, *parts, state, self.config.keep_checkpoints)

    def save_model(self) -> Path:
        """The trained model, for from_pretrained, in output_dir/model; generation_config as it came."""
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

    def _samples(self) -> list[dict[str, Any]]:
        """Rows from the first group that had something to learn from, else from the first."""
        rollout, measured = self.last
        geometry, size = measured.geometry, self.config.group_size
        first = int((geometry.advantages.abs() > 1e-3).float().argmax()) // size * size
        last = min(first + self.config.samples_shown, len(rollout.completions))
        return [
            {
                "step": self.step_number,
                "question": rollout.items[row][1]["question"],
                "completion": rollout.completions[row],
                "score": measured.scores[row].item(),
                "reward": measured.rewards[row].item(),
                "exploration_score": geometry.exploration_score[row].item(),
                "shaped_reward": geometry.shaped_rewards[row].item(),
                "advantage": geometry.advantages[row].item(),
            }
            for row in range(first, last)
        ]

    # --- checks ---------------------------------------------------------------------------------------------

    def _check_tasks(self) -> None:
        for task in self.tasks:
            if len(task) == 0:
                raise ConfigError(f"task: {type(task).__name__} holds no items")
            item = item_of(task, 0)  # the others are looked at as they are drawn
            try:  # templates are programs of the model's authors; some refuse a system role
                self.sampler.encode(item)
            except Exception as error:
                what = " ".join(str(error).split())[:200]
                raise ConfigError(
                    f"chat template: {what}: drop system_prompt, or set chat_template: never"
                ) from error
            score_completion(task, "", item)  # legal, and shows a broken function now rather than later
        self.sampler.draw(1)  # raises where max_prompt_tokens lets no prompt pass
        self.sampler.position = 0

    def _check_disk(self) -> None:
        where, config = f"output_dir={self.config.output_dir}", self.config
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            probe = self.output_dir / ".write-test"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"{where}: cannot write there ({error.strerror})") from None
        policy = sum(t.numel() * t.element_size() for t in checkpoint.state_tensors(self.model).values())
        moments = 2 * sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        held = sum(file.stat().st_size for file in self.output_dir.rglob("*") if file.is_file())
        needed = (config.keep_checkpoints + 1) * (policy + moments) + policy - held
        free = shutil.disk_usage(self.output_dir).free
        if free < needed:
            raise ConfigError(
                f"{where}: checkpoints need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: free some, "
                "choose another output_dir, or lower keep_checkpoints"
            )

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _padded(packed: Tensor, mask: Tensor) -> Tensor:
    """[N] values of the response tokens as [B, L], 0 elsewhere; differentiable."""
    out = torch.zeros(mask.shape, dtype=packed.dtype, device=packed.device)
    out[mask] = packed
    return out


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
