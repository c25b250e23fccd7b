"""The trainer `g2rl_sync`: verl's synchronous trainer with GRPO advantages of shaped rewards.

settings.py: its options.

`PPOTrainer._step_once` calls, in this order:

    _balance_batch           verl's own: reorders rows, and adds padding rows
    _compute_old_log_prob    the workers return features too, from the same forward pass (engine.py)
    _compute_advantage       shapes the rewards, has verl compute advantages from them (or replaces those by a
                             method's), and restores the raw rewards: critic/score/* and dumped rollouts show
                             those
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from ..seams import check_seams
from ..systems import TextReader
from .engine import FEATURES, KEYS, MASKS, REQUEST, SAMPLING, SECONDS, is_patched
from .settings import G2RLSettings

check_seams(
    "verl",
    {
        PPOTrainerSync: {
            "__init__": "config",
            "_build_replay_buffer": "",
            "_setup": "",
            "_compute_old_log_prob": "batch metrics",
            "_compute_advantage": "batch metrics",
        },
        tq: {
            "kv_batch_get": "keys partition_id select_fields",
            "kv_batch_put": "keys partition_id fields",
        },
    },
)


@register_trainer("g2rl_sync")
class G2RLTrainerSync(PPOTrainerSync):
    """verl's `sync` trainer with GRPO advantages of rewards shaped by G2RL.

    Adds the metrics g2rl/exploration_score_mean, cos_mean, negative_pairs, accuracy, shaped_reward_mean,
    sign_flips (see `g2rl_kernels.group.metrics.describe`), feature_seconds (seconds per step, mean over
    data-parallel ranks), and alarm, 1 once a collapse has been warned of (`CollapseAlarm`).

    Raises:
        ValueError: an option cannot work: see `G2RLSettings.read`.
        RuntimeError: a worker runs without the plugin.
        TrainerError (in a worker): the model does something unknown between hidden states and logits.
    """

    def __init__(self, config: DictConfig):
        self.g2rl = G2RLSettings.read(config)
        self.g2rl.apply(config)
        self.g2rl_reader = TextReader(self.g2rl) if self.g2rl.reads_texts else None
        self.g2rl_alarm = self.g2rl.alarm()
        self.g2rl_sampling = self.g2rl.sampling(config.actor_rollout_ref.rollout)
        super().__init__(config)

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # the base class decides by this name
        return super()._build_replay_buffer()

    def _setup(self) -> None:
        super()._setup()
        self._check_workers()

    def _check_workers(self) -> None:
        """Loads the plugin on every worker whose verl has not; raises RuntimeError before any rollout."""
        try:
            answers = self.actor_rollout_wg.execute_all_sync("execute_func_rank_zero", is_patched)
        except Exception as error:  # Ray's, for example on a node without this package
            raise RuntimeError(NO_PLUGIN.format(reason=str(error).strip().splitlines()[-1])) from error
        if not all(answers):
            ranks = [rank for rank, answer in enumerate(answers) if not answer]
            raise RuntimeError(NO_PLUGIN.format(reason=f"ranks {ranks} run verl's own engine"))

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        request: dict[str, Any] = {REQUEST: True}
        if self.g2rl_sampling is not None:
            request[SAMPLING] = self.g2rl_sampling
        batch.extra_info.update(request)
        try:
            result = super()._compute_old_log_prob(batch, metrics)
        finally:
            for name in request:
                batch.extra_info.pop(name, None)  # the reference model's forward is not measured
        for name in request:
            result.extra_info.pop(name, None)
        return result

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        start = time.perf_counter()
        fields = ["rm_scores", "response_mask", FEATURES, KEYS, SECONDS]
        if self.g2rl_reader is not None:
            fields.append("responses")
        if self.g2rl_sampling is not None:
            fields.append(MASKS)
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        if FEATURES not in data.keys():  # noqa: SIM118 (a TensorDict iterates over rows)
            raise RuntimeError(NO_PLUGIN.format(reason="no features came back"))
        features, keys, times = (torch.stack(data[name].unbind()) for name in (FEATURES, KEYS, SECONDS))
        raw, groups = data["rm_scores"], group_ids(batch.keys, batch.tags)
        scores = _row_sums(raw).masked_fill(groups < 0, torch.nan)  # padding is not scored
        shaped = self.g2rl.shape(
            features,
            scores,
            group_ids=groups,
            keys=keys[:, 0],
            has_tokens=_row_sums(data["response_mask"]) > 0,
            scale="group" if self.config.algorithm.get("norm_adv_by_std_in_grpo", True) else "none",
            **(self.g2rl_reader(self._texts(data), groups) if self.g2rl_reader else {}),
        )
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        seconds = times.sum().item() / ranks + time.perf_counter() - start
        found = {**shaped.metrics, "feature_seconds": seconds}
        if self.g2rl_sampling is not None:
            found |= mask_metrics(torch.stack(data[MASKS].unbind())[groups >= 0])
        watched = {**found, "entropy": metrics.get("actor/entropy")}
        found |= self.g2rl_alarm.watch(self.global_steps, watched)
        metrics.update({f"g2rl/{name}": value for name, value in found.items()})
        change = (shaped.scores - scores).masked_fill(groups < 0, 0.0)  # majority labels replace scores too
        self._put_scores(batch, _with_bonus(raw, change))
        try:
            result = super()._compute_advantage(batch, metrics)
        finally:
            self._put_scores(batch, raw)
        if shaped.advantages is not None:
            self._put_advantages(batch, shaped.advantages, groups)
        return result

    def _put_advantages(self, batch: KVBatchMeta, advantages: Tensor, groups: Tensor) -> None:
        """Replaces advantages and returns; all outputs of a session have its last one's, as in GRPO."""
        names = [key.rsplit("_", 1)[0] for key in batch.keys]
        parts = zip(names, advantages.tolist(), groups.tolist())
        known = {name: value for name, value, group in parts if group >= 0}
        of_row = torch.tensor([known.get(name, 0.0) for name in names])
        # Rollout correction may have masked more tokens by now.
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"]
        )
        mask = data["response_mask"]
        values = mask.values() * of_row.repeat_interleave(mask.offsets().diff().cpu()).to(mask.device)
        replaced = torch.nested.nested_tensor_from_jagged(values.float(), mask.offsets())
        fields = TensorDict({"advantages": replaced, "returns": replaced}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _texts(self, data: TensorDict) -> list[str]:
        """The text of each response, without the tokens that its mask leaves out."""
        rows = zip(data["responses"].unbind(), data["response_mask"].unbind())
        own = [tokens[mask.bool()].tolist() for tokens, mask in rows]
        texts: list[str] = self.tokenizer.batch_decode(own, skip_special_tokens=True)
        return texts

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

    Padding takes no part, nor do a session's outputs before its last one, as in verl's GRPO.
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


def mask_metrics(rows: Tensor) -> dict[str, float]:
    """kept_ids, the mean of tokens with a list; whole_tokens and added_tokens, shares. rows: see MASKS."""
    kept, whole, added, tokens = rows.double().sum(0).tolist()
    return {
        "kept_ids": kept / max(tokens - whole, 1),
        "whole_tokens": whole / max(tokens, 1),
        "added_tokens": added / max(tokens, 1),
    }


def _row_sums(nested: Tensor) -> Tensor:
    return nested.to_padded_tensor(0).float().sum(-1)


def _with_bonus(scores: Tensor, bonus: Tensor) -> Tensor:
    """Adds each row's bonus [S] at its last token, to token-level scores [S, jagged]; 0 changes no bit."""
    values, offsets = scores.values().clone(), scores.offsets()  # type: ignore[attr-defined]
    filled = offsets.diff() > 0
    values.index_add_(0, offsets[1:][filled] - 1, bonus[filled])
    return torch.nested.nested_tensor_from_jagged(values, offsets)
