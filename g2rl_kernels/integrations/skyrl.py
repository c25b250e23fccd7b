"""G2RL in SkyRL: its FSDP policy workers return features, and its trainer shapes rewards.

    python -m skyrl.train.entrypoints.main_base trainer.algorithm.g2rl.lam=0.5 \\
        trainer.override_entrypoint=g2rl_kernels.integrations.skyrl ...

`RayPPOTrainer.train` calls, in this order:

    fwd_logprobs_values_reward        the forward for the old log-probs gives features too: a worker returns
                                      each response's row as [log-probs, features], and the trainer parts them
    apply_reward_kl_penalty           where the KL is in the reward
    compute_advantages_and_returns    shapes the rewards, has SkyRL compute advantages from them (or replaces
                                      those by a method's), and restores the raw rewards in
                                      loss/avg_final_rewards

A trainer of your own inherits from `G2RLTrainer` in place of `RayPPOTrainer`. docs/skyrl.md is for users.
"""

# No `from __future__ import annotations`: SkyRL reads the classes of nested settings from annotations.

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker import FSDPPolicyWorkerBase
from skyrl.train.config import AlgorithmConfig, make_config
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.trainer import RayPPOTrainer
from skyrl.train.utils import initialize_ray, validate_cfg
from torch import Tensor

from .. import head_features, pack_responses, versions
from ..group.shaping import response_keys
from .measure import COMPARED, Measurement
from .seams import check_seams
from .systems import SystemSettings, TextReader

check_seams(
    "skyrl",
    {
        FSDPPolicyWorkerBase: {"_forward_micro_batch": "micro_batch"},
        RayPPOTrainer: {
            "build_models": "PolicyWorker CriticWorker RefWorker",
            "fwd_logprobs_values_reward": "training_input",
            "_execute_forward_pass": "model data_fwd_pass key mini_batch_boundaries",
            "_skip_policy_forward": "training_input",
            "compute_advantages_and_returns": "data",
        },
    },
)
versions.warn_untested("skyrl")

REQUEST = "g2rl_measure"  # in a batch's metadata: its log-probs come back with features
EPS_CLIP_HIGH = 0.2  # SkyRL's default


@dataclass
class G2RLSettings(SystemSettings):
    """`SystemSettings` as `trainer.algorithm.g2rl.<name>=...` on SkyRL's command line."""

    prefix = "trainer.algorithm.g2rl."

    def apply(self, cfg: Any) -> None:
        """Checks settings and SkyRL's options; sets the options that the algorithm decides.

        Raises ValueError, naming the option, for one that cannot work: GRPO's advantages of whole responses
        and the FSDP workers are needed.
        """
        self.check(cfg.generator.n_samples_per_prompt, "generator.n_samples_per_prompt")
        trainer, algorithm = cfg.trainer, cfg.trainer.algorithm
        needs = {
            "strategy": (trainer.strategy, "fsdp"),
            "algorithm.advantage_estimator": (algorithm.advantage_estimator, "grpo"),
            "policy.sequence_parallel_size": (trainer.policy.sequence_parallel_size, 1),
            "fully_async.enabled": (trainer.fully_async.enabled, False),
        }
        for name, (found, needed) in needs.items():
            if found != needed:
                raise ValueError(f"trainer.{name}: got {found}, G2RLTrainer needs {needed}")
        if self.gives_advantages and algorithm.use_kl_in_reward:
            raise ValueError(
                f"trainer.algorithm.use_kl_in_reward: got True with {self.prefix}algorithm={self.algorithm}, "
                "whose advantages leave the KL out: set use_kl_loss instead"
            )
        theirs = algorithm.entropy_loss_coef if algorithm.use_entropy_loss else 0.0
        coef = self.entropy(theirs, "trainer.algorithm.entropy_loss_coef")
        algorithm.use_entropy_loss = coef > 0
        if coef:
            algorithm.entropy_loss_coef = coef
        algorithm.eps_clip_high = self.clip_high(algorithm.eps_clip_high, EPS_CLIP_HIGH)


@dataclass
class G2RLAlgorithmConfig(AlgorithmConfig):
    """SkyRL's algorithm options, with G2RL's under `g2rl`."""

    g2rl: G2RLSettings = field(default_factory=G2RLSettings)


G2RLConfig = make_config(algorithm_cls=G2RLAlgorithmConfig)


class RowMeasurement(Measurement):
    """Features of a micro-batch of SkyRL's policy worker: B rows of L tokens, responses at their ends.

    wrapper: the worker's `HFModelWrapper`; batch: sequences and attention_mask [B, L], loss_mask [B, T].
    """

    compared = slice(-COMPARED, None)  # rows are padded on the left

    def __init__(self, wrapper: Any, batch: Any, temperature: float, compare: bool) -> None:
        super().__init__(wrapper.model, compare)
        self.batch, self.temperature = batch, temperature
        self.packed: bool = wrapper.remove_microbatch_padding

    def _features(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ids, attention, mask = (self.batch[name] for name in ("sequences", "attention_mask", "loss_mask"))
        length = mask.shape[1]
        if self.packed:  # [1, n, d]: the tokens that attention_mask keeps, row after row
            whole = hidden.new_zeros(*ids.shape, hidden.shape[-1])
            hidden = whole.masked_scatter(attention.bool()[..., None], hidden)
        rows = pack_responses(hidden[:, -length - 1 : -1], ids[:, -length:], mask.bool())
        packed, tokens, cu_seqlens = rows
        options = self.head.options(self.temperature)
        return head_features(packed, weight, tokens, cu_seqlens, bias=bias, **options).features


class G2RLPolicyWorkerBase(FSDPPolicyWorkerBase):
    """SkyRL's FSDP policy worker, whose log-probs come with features where they are requested."""

    g2rl_compared = False

    def _forward_micro_batch(self, micro_batch: Any) -> Any:
        if not (micro_batch.metadata or {}).get(REQUEST):
            return super()._forward_micro_batch(micro_batch)
        temperature = self.cfg.algorithm.temperature
        with RowMeasurement(self.model, micro_batch, temperature, not self.g2rl_compared) as measurement:
            output = super()._forward_micro_batch(micro_batch)
        self.g2rl_compared = True
        features = measurement.found().cpu()
        seconds = torch.full_like(features[:, :1], measurement.seconds / len(features))
        output["output"] = torch.cat([output["output"].float(), features, seconds], 1)
        return output


PolicyWorker = ray.remote(num_gpus=1)(G2RLPolicyWorkerBase)


class G2RLTrainer(RayPPOTrainer):
    """SkyRL's trainer with GRPO advantages of rewards shaped by G2RL.

    cfg is a G2RLConfig. Adds the metrics g2rl/exploration_score_mean, cos_mean, negative_pairs, accuracy,
    shaped_reward_mean, sign_flips (see `g2rl_kernels.group.metrics.describe`), feature_seconds (seconds
    per step, mean over data-parallel ranks), and alarm, 1 once a collapse has been warned of
    (`CollapseAlarm`).

    Raises:
        ValueError: an option cannot work: see `G2RLSettings.apply`.
        TrainerError (in a worker): the model does something unknown between hidden states and logits.
    """

    def __init__(self, cfg: Any, *others: Any, **keywords: Any) -> None:
        self.g2rl: G2RLSettings = cfg.trainer.algorithm.g2rl
        self.g2rl.apply(cfg)
        self.g2rl_reader = TextReader(self.g2rl) if self.g2rl.reads_texts else None
        self.g2rl_alarm = self.g2rl.alarm()
        super().__init__(cfg, *others, **keywords)

    def build_models(self, PolicyWorker: Any, CriticWorker: Any, RefWorker: Any) -> None:
        super().build_models(globals()["PolicyWorker"], CriticWorker, RefWorker)

    def fwd_logprobs_values_reward(self, training_input: Any) -> Any:
        self._g2rl_batch = training_input
        self._g2rl_scores = training_input["rewards"].float().sum(-1)  # without the KL penalty
        return super().fwd_logprobs_values_reward(training_input)

    def _skip_policy_forward(self, training_input: Any) -> bool:
        return False  # it gives the features

    def _execute_forward_pass(
        self, model: str, data_fwd_pass: Any, key: str, mini_batch_boundaries: Any
    ) -> Tensor:
        if model != "policy":
            found: Tensor = super()._execute_forward_pass(model, data_fwd_pass, key, mini_batch_boundaries)
            return found
        ranks = self.dispatch.dp_size(model)
        if any((end - start) % ranks for start, end in mini_batch_boundaries or ()):
            mini_batch_boundaries = None  # SkyRL would leave padding rows between the mini-batches
        data = data_fwd_pass.select([*data_fwd_pass])  # a copy: other models' forwards are not measured
        data["loss_mask"] = self._g2rl_batch["loss_mask"]
        data.metadata = {**data_fwd_pass.metadata, REQUEST: True}
        rows = super()._execute_forward_pass(model, data, key, mini_batch_boundaries)
        length = data["loss_mask"].shape[1]
        self._g2rl_features, self._g2rl_seconds = rows[:, length:-1], rows[:, -1]
        return rows[:, :length].contiguous()

    def compute_advantages_and_returns(self, data: Any) -> Any:
        start = time.perf_counter()
        groups = group_ids(data.metadata)
        scores = self._g2rl_scores.masked_fill(groups < 0, torch.nan)  # padding is not scored
        ids, attention, mask = (data[name] for name in ("sequences", "attention_mask", "loss_mask"))
        cu_seqlens = torch.nn.functional.pad(attention.sum(1).cumsum(0), (1, 0))
        shaped = self.g2rl.shape(
            self._g2rl_features[: len(scores)],
            scores,
            group_ids=groups,
            keys=response_keys(ids[attention.bool()], cu_seqlens),
            has_tokens=mask.sum(1) > 0,
            scale="group" if self.cfg.trainer.algorithm.grpo_norm_by_std else "none",
            **(self.g2rl_reader(self._texts(ids, mask), groups) if self.g2rl_reader else {}),
        )
        change = (shaped.scores - scores).masked_fill(groups < 0, 0.0)
        ranks = self.dispatch.dp_size("policy")
        seconds = self._g2rl_seconds.sum().item() / ranks + time.perf_counter() - start
        metrics = {**shaped.metrics, "feature_seconds": seconds}
        metrics |= self.g2rl_alarm.watch(self.global_step, metrics)
        self.all_metrics.update({f"g2rl/{name}": value for name, value in metrics.items()})
        raw = data["rewards"]
        moved = raw.clone()
        moved[:, -1] += change.to(raw.dtype)  # responses end in the last column
        data["rewards"] = moved
        data = super().compute_advantages_and_returns(data)
        data["rewards"] = raw
        if shaped.advantages is not None:
            replaced = trajectory_values(shaped.advantages, groups, data.metadata)[:, None]
            data["advantages"] = data["returns"] = replaced * data["response_mask"].to(replaced.dtype)
        mean = raw.sum(-1)[groups >= 0].mean().item()
        data.metadata["metrics"]["avg_final_rewards"] = mean
        self.all_metrics["loss/avg_final_rewards"] = mean
        return data

    def _texts(self, ids: Tensor, mask: Tensor) -> list[str]:
        """The text of each response, without the tokens that its mask leaves out."""
        own = [row[kept].tolist() for row, kept in zip(ids[:, -mask.shape[1] :], mask.bool())]
        texts: list[str] = self.tokenizer.batch_decode(own, skip_special_tokens=True)
        return texts


def group_ids(metadata: dict[str, Any]) -> Tensor:
    """[S] int64: a number for each prompt, -1 for rows that take no part.

    Padding takes no part, nor do a trajectory's steps before its last one, as in SkyRL's GRPO.
    """
    uids = metadata["uids"]
    numbers: dict[Any, int] = {}
    ids = torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in uids])
    takes_part = torch.arange(len(uids)) < len(uids) - metadata.get("pad_size", 0)
    if metadata.get("is_last_step") is not None:
        takes_part &= torch.tensor(metadata["is_last_step"], dtype=torch.bool)
    return ids.masked_fill(~takes_part, -1)


def trajectory_values(values: Tensor, groups: Tensor, metadata: dict[str, Any]) -> Tensor:
    """[S]: each row's value of the last step of its trajectory; 0 in padding rows.

    values, groups: [S], of `group_ids`.
    """
    last_steps = metadata.get("is_last_step")
    if last_steps is None:
        return values.masked_fill(groups < 0, 0.0)
    last = torch.tensor(last_steps, dtype=torch.bool)
    number = torch.nn.functional.pad(last[:-1].long().cumsum(0), (1, 0))
    return values.masked_fill(groups < 0, 0.0)[last][number]


class G2RLExp(BasePPOExp):
    """SkyRL's experiment with a G2RLTrainer."""

    def get_trainer(self, *arguments: Any, **keywords: Any) -> G2RLTrainer:
        return G2RLTrainer(*arguments, **keywords)


@ray.remote(num_cpus=1)
def _entrypoint(cfg: Any) -> None:
    G2RLExp(cfg).run()


def main() -> None:
    """Trains with the options of the command line; SkyRL calls it for `trainer.override_entrypoint`."""
    own = "trainer.override_entrypoint="
    cfg = G2RLConfig.from_cli_overrides([arg for arg in sys.argv[1:] if not arg.startswith(own)])
    validate_cfg(cfg)
    cfg.trainer.algorithm.g2rl.apply(cfg)  # fail before Ray starts
    initialize_ray(cfg)
    ray.get(_entrypoint.remote(cfg))


if __name__ == "__main__":
    main()
