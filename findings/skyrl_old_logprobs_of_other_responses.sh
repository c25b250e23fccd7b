#!/usr/bin/env bash
# SkyRL: with step-wise trajectories on several ranks, responses get the old log-probs of other responses.
#
# Expected: action_log_probs of a row are those of its own response, so the first update's ratios are exactly 1. That is
#   what recompute_old_logprobs_per_minibatch, on by default, is documented to ensure.
# Observed: it forwards each mini-batch by itself and fills it up with copies of its first row until ranks divide it.
#   The outputs of these copies stay in between when those of all mini-batches are joined, and [:len(batch)] cuts
#   real ones off the end. After the first such mini-batch, each row has the log-probs of a row before it. With the
#   option false, on one rank, or where ranks divide all mini-batches, each row has its own.
# Why it matters: with step-wise trajectories a mini-batch has as many rows as its trajectories have turns, so ranks
#   seldom divide all of them. Ratios, clipping and KL in the reward are noise after the first that they do not divide,
#   without an error; only policy/rollout_train_logprobs_abs_diff_* hints at it. Old values are joined the same way.
# Real here: SkyRL's batch, mini-batches, dispatch and trainer's forward pass. Each rank is a Ray actor whose log-probs
#   are made from a response's tokens in place of a model.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv  # Python 3.11 or newer
# Without skyrl's requirements that need a GPU.
venv/bin/pip install --quiet --no-deps skyrl==0.3.0
venv/bin/pip install --quiet skyrl-gym==0.4.0 torch==2.13.0 ray==2.56.0 tensordict==0.15.3 transformers==5.8.0 \
  peft==0.18.1 omegaconf==2.3.1 loguru==0.7.3 jaxtyping==0.3.11 datasets==5.2.0 torchdata==0.11.0 fastapi==0.165.0 \
  uvicorn==0.54.0 aiohttp==3.14.5 httpx==0.28.1 pydantic==2.14.4
# SkyRL's models for pydantic need this before Python 3.12, in Ray's processes too.
cat >sitecustomize.py <<'PROGRAM'
import sys
import typing

if sys.version_info < (3, 12):
    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict
PROGRAM

PYTHONPATH=$folder HF_HUB_OFFLINE=1 venv/bin/python - <<'PROGRAM'
import warnings
from importlib.metadata import version

import ray
import torch
from loguru import logger
from skyrl.backends.skyrl_train.distributed.dispatch import ActorInfo, MeshDispatch, MeshRank, WorkerOutput
from skyrl.backends.skyrl_train.workers.worker_dispatch import WorkerDispatch
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.trainer import RayPPOTrainer

warnings.filterwarnings("ignore")
logger.remove()
for name in ("torch", "ray", "skyrl"):
    print(name, version(name))
LENGTH = 3  # tokens of a response


def logprobs(sequences):
    """What a rank answers: depends on a response's own tokens only, and differs from row to row."""
    return -sequences[:, -LENGTH:] / 10


@ray.remote(num_cpus=0)
class Rank:
    def forward(self, data):
        return WorkerOutput(loss_fn_outputs=[{"logprobs": row} for row in logprobs(data["sequences"]).tolist()])


class Ranks:
    def __init__(self, count):
        mesh = {"sp": 0, "tp": 0, "pp": 0, "world_size": count, "dp_size": count, "pp_size": 1}
        self.actor_infos = [ActorInfo(Rank.remote(), MeshRank(dp=dp, **mesh)) for dp in range(count)]

    def async_run_ray_method(self, dispatch, method, *_, **data):
        return MeshDispatch.dispatch(self.actor_infos, method, **data) if dispatch == "mesh" else []


class Tokenizer:
    pad_token_id = 0


def old_logprobs(turns, ranks, recompute):
    """The trainer, and its batch with old log-probs. turns: of each trajectory, four a prompt; one row a turn."""
    trainer = object.__new__(RayPPOTrainer)
    trainer.cfg = SkyRLTrainConfig.from_cli_overrides(
        [
            "trainer.placement.colocate_all=false",
            "trainer.placement.colocate_policy_ref=false",
            f"trainer.train_batch_size={len(turns)}",
            "trainer.policy_mini_batch_size=1",
            "generator.n_samples_per_prompt=4",
            "generator.step_wise_trajectories=true",
            *([] if recompute else ["trainer.recompute_old_logprobs_per_minibatch=false"]),
        ]
    )
    trainer.tokenizer, trainer.all_metrics, trainer.ref_model = Tokenizer(), {}, None
    trainer.dispatch = WorkerDispatch(trainer.cfg, Ranks(ranks))
    uids = [f"prompt {i}" for i, counts in enumerate(turns) for _ in range(sum(counts))]
    responses = [[(7 * row + 11 * i) % 41 + 1 for i in range(LENGTH)] for row in range(len(uids))]
    generated = {
        "prompt_token_ids": [[43, 44]] * len(uids),
        "response_ids": responses,
        "rewards": [[0.0] * LENGTH] * len(uids),
        "loss_masks": [[1] * LENGTH] * len(uids),
        "rollout_logprobs": [[-token / 10 for token in row] for row in responses],
        "is_last_step": [turn == count for counts in turns for count in counts for turn in range(1, count + 1)],
    }
    return trainer, trainer.fwd_logprobs_values_reward(trainer.convert_to_training_input(generated, uids))


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
ODD = [(1, 2, 1, 1), (2, 1, 1, 1), (2, 2, 1, 2)]  # 5, 5 and 7 rows
EVEN = [(1, 2, 2, 1), (1, 1, 1, 1), (2, 2, 2, 2)]  # 6, 4 and 8 rows
for what, turns, ranks, recompute, right in (
    ("mini-batches of 5, 5, 7 rows on 2 ranks", ODD, 2, True, False),
    ("the same, recompute_old_logprobs_per_minibatch=false", ODD, 2, False, True),
    ("the same rows on 1 rank", ODD, 1, True, True),
    ("mini-batches of 6, 4, 8 rows on 2 ranks", EVEN, 2, True, True),
):
    trainer, batch = old_logprobs(turns, ranks, recompute)
    rows = sum(map(sum, turns))
    own, old = logprobs(batch["sequences"])[:rows], batch["action_log_probs"][:rows]
    owner = torch.cdist(old, own).argmin(1).tolist()
    ratios = (own - old).exp()
    far = ((ratios < 0.8) | (ratios > 1.2)).any(1).sum()
    print(what)
    print("    old log-probs of rows 0, 1, ... are those of rows", *owner)
    seen = trainer.all_metrics["policy/rollout_train_logprobs_abs_diff_max"]
    print(f"    first ratio outside 0.8 to 1.2: {far} of {rows} rows; rollout_train_logprobs_abs_diff_max: {seen:.1f}")
    assert (owner == [*range(rows)]) is right
    if right:
        assert torch.allclose(own, old)
    else:  # 0, 5 and 10 begin mini-batches, whose pads repeat their first rows
        assert owner == [0, 1, 2, 3, 4, 0, 5, 6, 7, 8, 9, 5, 10, 11, 12, 13, 14]
PROGRAM
