"""One training step of verl in one process: the trainer's own methods, its real engine as the only worker,
and a dictionary in place of the TransferQueue, which needs Ray (test_verl_training.py runs all of it)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import verl.trainer.ppo.padding_utils
from engines import Rows, infer, make_engine
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base
from verl.utils import tensordict_utils as tu
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

import g2rl_kernels.integrations.verl.trainer as ours


def compose_config(*overrides: str, config_name: str = "ppo_trainer") -> DictConfig:
    """verl's configuration as its command line makes it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(config_name, list(overrides))


class Store:
    """The functions of `transfer_queue` that the step calls."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any = None, tags: Any = None) -> Any:
        assert fields.batch_size[0] == len(keys)
        for i, key in enumerate(keys):
            row = self.rows.setdefault(key, {})
            for name, values in fields.items():
                value = values[i]
                row[name] = value.data if isinstance(value, NonTensorData) else value
            if tags is not None:
                row["tag"] = tags[i]
        return KVBatchMeta(partition_id=partition_id, keys=keys, tags=[self.rows[key]["tag"] for key in keys])

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: Any = None) -> TensorDict:
        rows = [self.rows[key] for key in keys]
        names = [name for name in select_fields or rows[0] if name in rows[0] and name != "tag"]
        return list_of_dict_to_tensordict([{name: row[name] for name in names} for row in rows])


class Workers:
    """A worker group of one: the real engine, which reads from the store and writes to it."""

    def __init__(self, engine: Any, store: Store, ranks: int) -> None:
        self.engine, self.store = engine, store
        self._dispatch_info = {"actor": list(range(ranks))}
        self.requests: list[dict[str, Any]] = []

    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        self.requests.append(dict(batch.extra_info))
        data = self.store.kv_batch_get(batch.keys, batch.partition_id)
        defaults = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1}
        tu.assign_non_tensor(data, **defaults, **batch.extra_info)
        fields = TensorDict(infer(self.engine, data), batch_size=len(batch.keys))
        self.store.kv_batch_put(batch.keys, batch.partition_id, fields=fields)
        return batch


# Six responses to each of two prompts, of which some are right.
PROMPTS = ("one", "two")
SCORES = ((1.0, 0.0, 1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 0.0, 1.0, 0.0))


class Step:
    """A trainer of the given mode with twelve responses in its store, ready for `run`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, model: Path, mode: str, *overrides: str, ranks: int = 1
    ) -> None:
        self.store = Store()
        for module in (ours, trainer_base, verl.trainer.ppo.padding_utils):
            monkeypatch.setattr(module, "tq", self.store)
        config = compose_config(
            f"trainer.v1.trainer_mode={mode}",
            "algorithm.adv_estimator=grpo",
            "actor_rollout_ref.rollout.name=vllm",
            "actor_rollout_ref.rollout.n=6",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "actor_rollout_ref.actor.strategy=fsdp2",
            f"actor_rollout_ref.model.path={model}",
            *overrides,
        )
        self.trainer = get_trainer_cls(mode)(config)
        self.trainer.actor_rollout_wg = self.workers = Workers(make_engine(model), self.store, ranks)
        self.trainer.tokenizer = SimpleNamespace(eos_token_id=1)
        self.trainer.global_steps = 1
        self.metrics: dict[str, Any] = {}
        self.batch = self._put_responses()

    def _put_responses(self) -> KVBatchMeta:
        keys, fields, tags = [], [], []
        for p, (uid, scores) in enumerate(zip(PROMPTS, SCORES)):
            rows = Rows(seed=p)
            for r, score in enumerate(scores):
                ids, mask = rows.ids[r], torch.ones_like(rows.masks[r])
                raw = torch.zeros(len(mask))
                raw[-1] = score
                keys.append(f"{uid}_{r}_0")
                fields.append(
                    {
                        "uid": uid,
                        "prompts": ids[: -len(mask)],
                        "responses": ids[-len(mask) :],
                        "input_ids": ids,
                        "position_ids": torch.arange(len(ids)),
                        "response_mask": mask,
                        "loss_mask": mask,
                        "rollout_log_probs": -torch.ones(len(mask)),
                        "rm_scores": raw,
                    }
                )
                lengths = {"prompt_len": len(ids) - len(mask), "response_len": len(mask)}
                tags.append({"seq_len": len(ids), **lengths})
        return self.store.kv_batch_put(keys, "train", list_of_dict_to_tensordict(fields), tags)

    def run(self) -> dict[str, Tensor]:
        """Balance, old log-probs, advantages; each response's advantages by its key."""
        batch = self.trainer._balance_batch(self.batch, self.metrics)
        batch.extra_info["temperature"] = 1.0
        batch = self.trainer._compute_old_log_prob(batch, self.metrics)
        self.batch = self.trainer._compute_advantage(batch, self.metrics)
        return {key: self.store.rows[key]["advantages"] for key in self.batch.keys}
