"""The trainer `g2rl_sync`: verl's synchronous trainer with GRPO advantages of shaped rewards.

Where it enters, in the order of `PPOTrainer._step_once`:

    _balance_batch           as it is: rows change places, and padding rows are added
    _compute_old_log_prob    asks the workers for features, from the same forward pass (engine.py)
    _compute_advantage       shapes the rewards, lets verl compute its advantages of them, and puts the raw
                             rewards back: critic/score/* and what is dumped are of those
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import AdvantageEstimator
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from ...group.options import ShapingOptions
from ...group.shaping import check_gap, check_options, shape_scores
from .engine import FEATURES, KEYS, REQUEST, SECONDS, is_patched

STRATEGIES = ("fsdp", "fsdp2")


@dataclass
class G2RLSettings:
    """`+algorithm.g2rl.<name>=...` on verl's command line. The same words as in `g2.group_geometry`."""

    lam: float = ShapingOptions.lam  # exploration strength, 0 or more; 0 is verl's GRPO, to the bit
    clip: float = ShapingOptions.clip  # bound of the shaped reward, where right is +1 and wrong is -1
    shaping: str = ShapingOptions.shaping  # intent | equation | right | none
    exploration_score: str = ShapingOptions.exploration_score  # linear | sqrt
    uniform_groups: str = ShapingOptions.uniform_groups  # all right or all wrong answers: shape | skip
    correctness_threshold: float = 0.5  # answers whose score reaches it are right
    correctness_gap: float = 1.0  # of the scores of right and wrong answers: 1 for 0 and 1, 2 for -1 and +1

    @classmethod
    def read(cls, config: DictConfig) -> G2RLSettings:
        """The settings in verl's configuration, checked; raises ValueError naming the option.

        So do other options of verl that leave nothing to shape, or no forward pass to take features from.
        """
        try:
            merged = OmegaConf.merge(OmegaConf.structured(cls), config.algorithm.get("g2rl") or {})
            settings: G2RLSettings = OmegaConf.to_object(merged)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"algorithm.g2rl: {reason}; options: {', '.join(cls.__annotations__)}") from None
        check_options(vars(settings), "algorithm.g2rl.")
        algorithm, strategy = config.algorithm, config.actor_rollout_ref.actor.strategy
        if algorithm.adv_estimator != AdvantageEstimator.GRPO:
            raise ValueError(f"algorithm.adv_estimator: got {algorithm.adv_estimator}, g2rl_sync needs grpo")
        if (algorithm.get("rollout_correction") or {}).get("bypass_mode", False):
            raise ValueError(
                "algorithm.rollout_correction.bypass_mode: g2rl_sync needs False, for features come from the "
                "forward pass that it leaves out"
            )
        if strategy not in STRATEGIES:
            raise ValueError(
                f"actor_rollout_ref.actor.strategy: got {strategy}, g2rl_sync needs {' or '.join(STRATEGIES)}"
            )
        return settings


@register_trainer("g2rl_sync")
class G2RLTrainerSync(PPOTrainerSync):
    """verl's `sync` trainer, its GRPO advantages of rewards shaped by G2RL.

    Adds the metrics g2rl/exploration_score_mean, cos_mean, negative_pairs, accuracy, shaped_reward_mean,
    sign_flips (see `g2rl_kernels.group.metrics.describe`) and feature_seconds (a step, mean over
    data-parallel ranks).

    Raises:
        ValueError: an option cannot work: see `G2RLSettings`.
        RuntimeError: a worker runs without the plugin.
        TrainerError (in a worker): what the model does between hidden states and logits is unknown.
    """

    def __init__(self, config: DictConfig):
        self.g2rl = G2RLSettings.read(config)
        super().__init__(config)

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # the base class goes by the name
        return super()._build_replay_buffer()

    def _setup(self) -> None:
        super()._setup()
        self._check_workers()

    def _check_workers(self) -> None:
        """Has every worker load the plugin, if its verl has not: better to fail before the first rollout."""
        try:
            answers = self.actor_rollout_wg.execute_all_sync("execute_func_rank_zero", is_patched)
        except Exception as error:  # whatever Ray makes of it: a node without this package, say
            raise RuntimeError(NO_PLUGIN.format(reason=str(error).strip().splitlines()[-1])) from error
        if not all(answers):
            ranks = [rank for rank, answer in enumerate(answers) if not answer]
            raise RuntimeError(NO_PLUGIN.format(reason=f"ranks {ranks} run verl's own engine"))

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch.extra_info[REQUEST] = True
        try:
            result = super()._compute_old_log_prob(batch, metrics)
        finally:
            batch.extra_info.pop(REQUEST, None)  # the reference model's forward is none to measure
        result.extra_info.pop(REQUEST, None)
        return result

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        start = time.perf_counter()
        fields = ["rm_scores", "response_mask", FEATURES, KEYS, SECONDS]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        if FEATURES not in data.keys():  # noqa: SIM118 (a TensorDict iterates over rows)
            raise RuntimeError(NO_PLUGIN.format(reason="no features came back"))
        raw, settings, groups = data["rm_scores"], self.g2rl, group_ids(batch.keys, batch.tags)
        scores = _row_sums(raw).masked_fill(groups < 0, torch.nan)  # padding must not count as wrong
        check_gap(scores, settings.correctness_gap, "scores", "algorithm.g2rl.correctness_gap")
        shaped = shape_scores(
            torch.stack(data[FEATURES].unbind()),
            scores,
            ShapingOptions.of(settings),
            group_ids=groups,
            keys=torch.stack(data[KEYS].unbind())[:, 0],
            has_tokens=_row_sums(data["response_mask"]) > 0,
            threshold=settings.correctness_threshold,
            gap=settings.correctness_gap,
        )
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        seconds = torch.stack(data[SECONDS].unbind()).sum().item() / ranks + time.perf_counter() - start
        metrics.update({f"g2rl/{name}": value for name, value in shaped.metrics.items()})
        metrics["g2rl/feature_seconds"] = seconds
        self._put_scores(batch, _with_bonus(raw, shaped.bonus))
        try:
            return super()._compute_advantage(batch, metrics)
        finally:
            self._put_scores(batch, raw)

    @staticmethod
    def _put_scores(batch: KVBatchMeta, scores: Tensor) -> None:
        fields = TensorDict({"rm_scores": scores}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


NO_PLUGIN = (
    "trainer_mode=g2rl_sync, but not every worker could load the plugin of g2rl-kernels ({reason}): install "
    "g2rl-kernels on every node, in the same version, and look for it in the workers' logs"
)


def group_ids(keys: list[str], tags: list[dict]) -> Tensor:
    """[S] int64: a number for each prompt, -1 for rows that take no part. Keys are {uid}_{session}_{index}.

    Those are padding, and what a session gave before its last output: verl's GRPO, too, compares sessions by
    their last.
    """
    last: dict[str, int] = {}
    for key in keys:
        session, index = key.rsplit("_", 1)
        last[session] = max(last.get(session, 0), int(index))
    numbers: dict[str, int] = {}
    ids = []
    for key, tag in zip(keys, tags):
        session, index = key.rsplit("_", 1)
        takes_part = not tag.get("is_padding", False) and int(index) == last[session]
        uid = session.rsplit("_", 1)[0]
        ids.append(numbers.setdefault(uid, len(numbers)) if takes_part else -1)
    return torch.tensor(ids)


def _row_sums(nested: Tensor) -> Tensor:
    return nested.to_padded_tensor(0).float().sum(-1)


def _with_bonus(scores: Tensor, bonus: Tensor) -> Tensor:
    """Token-level scores [S, jagged] with each row's bonus added at its last token; 0 changes no bit."""
    values, offsets = scores.values().clone(), scores.offsets()  # type: ignore[attr-defined]
    filled = offsets.diff() > 0
    values.index_add_(0, offsets[1:][filled] - 1, bonus[filled])
    return torch.nested.nested_tensor_from_jagged(values, offsets)
