"""A rollout engine that generates nothing: responses are random tokens, and right if they hold token 7.

verl finds it by `actor_rollout_ref.model.external_lib=scripted actor_rollout_ref.rollout.name=scripted` and
`...rollout.agent.agent_loop_manager_class=scripted.ScriptedAgentLoopManager`.
"""

from __future__ import annotations

from typing import Any

import torch
import transfer_queue as tq
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry


def answer(text: str) -> str | None:
    """The answer in a response of random characters: its last digit, by halves of ten."""
    digits = [character for character in text if character.isdigit()]
    return "low" * (digits[-1] < "5") or "high" if digits else None


class ScriptedReplica(RolloutReplica):
    async def launch_servers(self) -> None:
        self._server_address = f"nowhere:{self.replica_rank}"


class ScriptedRollout(base.BaseRollout):
    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(self, weights: Any, **_: Any) -> None:
        for _ in weights:  # gathered from all ranks
            pass


base._ROLLOUT_REGISTRY["scripted", "async"] = "scripted.ScriptedRollout"
RolloutReplicaRegistry.register("scripted", lambda: ScriptedReplica)


class ScriptedAgentLoopManager:
    def __init__(self, config: Any) -> None:
        self.config = config
        self.random = torch.Generator().manual_seed(0)

    @classmethod
    def create(cls, config: Any, **_: Any) -> ScriptedAgentLoopManager:
        return cls(config)

    def generate_sequences(self, prompts: Any) -> None:
        step = int(prompts["global_steps"])
        for uid in prompts["uid"]:
            sessions = range(self.config.actor_rollout_ref.rollout.n)
            keys, fields, tags = map(list, zip(*(self._row(str(uid), step, session) for session in sessions)))
            tq.kv_batch_put(keys, "train", fields=list_of_dict_to_tensordict(fields), tags=tags)
            tq.kv_put(str(uid), "train", tag={"status": "finished"})

    def _row(self, uid: str, step: int, session: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
        def draw(low: int, high: int, *size: int) -> torch.Tensor:
            return torch.randint(low, high, size or (1,), generator=self.random)

        prompt, response = (draw(3, 20, int(draw(*lengths))) for lengths in ((2, 6), (1, 9)))
        ids = torch.cat([prompt, response])
        scores = torch.zeros(len(response))
        scores[-1] = float((response == 7).any())
        fields = {
            "uid": uid,
            "prompts": prompt,
            "responses": response,
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "response_mask": torch.ones_like(response),
            "loss_mask": torch.ones_like(response),
            "rollout_log_probs": -torch.rand(len(response), generator=self.random),
            "rm_scores": scores,
            "num_turns": 2,
        }
        tags = {
            "status": "success",
            "prompt_len": len(prompt),
            "response_len": len(response),
            "seq_len": len(ids),
            "global_steps": step,
            "min_global_steps": step,
            "max_global_steps": step,
        }
        return f"{uid}_{session}_0", fields, tags
