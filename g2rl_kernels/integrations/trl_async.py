"""G2RL in TRL's AsyncGRPOTrainer (experimental), whose rollout worker scores groups before any forward pass.

    AsyncG2RLTrainer     hands the worker the LM head's weight in shared memory, and renews it at each sync
    G2RLRolloutLoop      in the worker's process: asks vLLM for the top log-probabilities of each token, makes
                         features of them (`topk_features`), and shapes the rewards of a group

docs/topk.md is for users.
"""

# ruff: noqa: E402 (TRL is looked at before its internals are imported)

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

import g2rl_kernels as g2

from .. import versions
from ..group.options import SCORE_GATE, option, option_field
from ..group.shaping import REWARDS, response_keys
from ..models.lm_head import find_head
from .seams import check_seams
from .systems import ShapingSettings
from .vllm import served_logprobs

MODULE = "trl.experimental.async_grpo"
SEAMS = {
    f"{MODULE}.async_rollout_worker:_AsyncRolloutLoop": {
        "_generate_one": "",
        "_post": "path payload /",
        "_push_metrics": "values /",
        "_score_group": "group /",
        "reward_func_names": "",
    },
    f"{MODULE}.async_rollout_worker:AsyncRolloutWorker": {"_loop_cls": "", "_loop_kwargs": ""},
    f"{MODULE}.async_grpo_trainer:AsyncGRPOTrainer": {"_streaming_iter": "", "rollout_worker": ""},
    f"{MODULE}.async_grpo_trainer": {"_iter_vllm_named_params": "model /"},
}
check_seams("trl", SEAMS)
versions.warn_untested("trl")

from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.experimental.async_grpo.async_grpo_trainer import _iter_vllm_named_params
from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop

from .trl_config import correctness_column
from .trl_seams import get_callable_name

COMPLETIONS = "/v1/completions"
_choices: ContextVar[list[dict[str, Any]]] = ContextVar("choices")  # of the rollout that this task makes


@dataclass
class AsyncG2RLConfig(AsyncGRPOConfig):
    """AsyncGRPOConfig with settings of G2RL by the names and meanings of `G2RLConfig`, and `g2rl_top_k`.

    Raises:
        ValueError, TypeError: a setting cannot work; the message starts with its name.
    """

    g2rl_lam: float = option_field("lam", help="Exploration strength; 0 is AsyncGRPOTrainer.")
    g2rl_clip: float = option_field("clip")
    g2rl_shaping: str = option_field("shaping")
    g2rl_exploration_score: str = option_field("exploration_score")
    g2rl_uniform_groups: str = option_field("uniform_groups")
    g2rl_correctness_reward: str | None = option(None, "As in G2RLConfig.")
    g2rl_rewards: str = option("binary", "As in G2RLConfig.", REWARDS)
    g2rl_correctness_threshold: float = option(SCORE_GATE, "As in G2RLConfig.")
    g2rl_correctness_gap: float = option(1.0, "As in G2RLConfig.")
    g2rl_top_k: int = option(
        20, "Log-probabilities a token that vLLM reports; its server's --max-logprobs is at least this."
    )

    def __post_init__(self) -> None:
        AsyncSettings.of(self).check(self.num_generations, "num_generations")
        if isinstance(self.g2rl_top_k, bool) or not isinstance(self.g2rl_top_k, int) or self.g2rl_top_k < 1:
            raise ValueError(f"g2rl_top_k: got {self.g2rl_top_k!r}, needs a whole number, 1 or more")
        super().__post_init__()


class AsyncSettings(ShapingSettings):
    """The settings of an AsyncG2RLConfig, as slime's integration has them."""

    prefix = "g2rl_"

    @classmethod
    def of(cls, args: AsyncG2RLConfig) -> AsyncSettings:
        return cls(**{one.name: getattr(args, cls.prefix + one.name) for one in fields(cls)})


@dataclass
class Scoring:
    """What the worker's process needs beside TRL's arguments."""

    settings: AsyncSettings
    top_k: int
    correctness: str | None  # g2rl_correctness_reward
    weight: Tensor  # [V, d] in shared memory
    logit_scale: float


class G2RLRolloutLoop(_AsyncRolloutLoop):
    """TRL's loop, with the advantages of shaped rewards.

    A response's feature is of all tokens that the model generated in it. The weight is the trainer's latest,
    a sync or a few later than the rollout's.
    """

    def __init__(self, *, g2rl: Scoring, **theirs: Any) -> None:
        super().__init__(**theirs)
        self.g2rl = g2rl
        self.column = correctness_column(self.reward_func_names, g2rl.correctness)
        self.choices: dict[str, list[dict[str, Any]]] = {}  # by rollout, until its group is scored

    async def _post(self, path: str, payload: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        if path != COMPLETIONS:
            return await super()._post(path, payload, *args, **kwargs)
        asked = {**payload, "logprobs": self.g2rl.top_k, "return_tokens_as_token_ids": True}
        reply = await super()._post(path, asked, *args, **kwargs)
        _choices.get().append(reply["choices"][0])
        return reply

    async def _generate_one(self, *args: Any, **kwargs: Any) -> Any:
        """Each rollout is a task of its own, so that its requests find their own list."""
        choices: list[dict[str, Any]] = []
        _choices.set(choices)
        result = await super()._generate_one(*args, **kwargs)
        sequences = result[2]
        if sequences:  # rows of one rollout; none without generated tokens
            self.choices[sequences[0].rollout_id] = choices
        return result

    async def _score_group(self, group: Any) -> Any:
        samples = await super()._score_group(group)  # a row or more of each rollout, with TRL's advantages
        rows = [len(sequences) for sequences in group.completions_sequences]
        turns = [
            self.choices.pop(sequences[0].rollout_id, []) if sequences else []
            for sequences in group.completions_sequences
        ]
        if not all(rows):  # a rollout without generated tokens has no row that says what its reward is
            return samples
        firsts = [samples[end - count] for end, count in zip(accumulate(rows), rows)]
        bonus, metrics = await asyncio.to_thread(self._bonus, turns, [one.metrics for one in firsts])
        advantages = group_advantages(np.array([one.metrics["reward"] for one in firsts]) + bonus)
        for sample, advantage in zip(samples, np.repeat(advantages, rows)):
            sample.advantage = float(advantage)
        self._push_metrics({f"g2rl/{name}": value for name, value in metrics.items()})
        return samples

    def _bonus(
        self, turns: list[list[dict[str, Any]]], rewards: list[dict[str, float]]
    ) -> tuple[np.ndarray, dict[str, float]]:
        """What shaping adds to each rollout's reward, and metrics. turns: what vLLM replied in each."""
        sampled = served_logprobs(choice for choices in turns for choice in choices)
        ends = torch.tensor([0, *accumulate(map(len, turns))])
        cu_seqlens = sampled.cu_seqlens[ends]  # a response is all turns of a rollout
        sampled = sampled._replace(cu_seqlens=cu_seqlens)
        out = g2.topk_features(self.g2rl.weight, *sampled, logit_scale=self.g2rl.logit_scale)
        name = self.reward_func_names[self.column]
        shaped = self.g2rl.settings.shape(
            out.features,
            torch.tensor([one[f"rewards/{name}"] for one in rewards]),
            "rewards",
            group_size=len(turns),
            keys=response_keys(sampled.tokens, cu_seqlens),
            has_tokens=cu_seqlens.diff() > 0,
        )
        return shaped.bonus.double().numpy(), {
            **shaped.metrics,
            "missing_mass": float(out.missing_mass.mean()),
        }


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """What TRL's loop makes of the rewards of a group [m], NaN where there is none."""
    scored = rewards[~np.isnan(rewards)]
    if not scored.size:
        return np.zeros_like(rewards)
    return np.nan_to_num((rewards - scored.mean()) / (scored.std() + 1e-8))


class AsyncG2RLTrainer(AsyncGRPOTrainer):
    """TRL's AsyncGRPOTrainer with `args` an AsyncG2RLConfig; all other arguments are TRL's.

    The server that TRL samples from needs `--logprobs-mode processed_logprobs`, and `--max-logprobs` where
    g2rl_top_k is above 20.

    Raises:
        TypeError: args is no AsyncG2RLConfig.
        ValueError: rollout_worker is given, g2rl_correctness_reward is needed, or the head has a softcap.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(AsyncGRPOTrainer).bind(*args, **kwargs).arguments
        if not isinstance(config := given.get("args"), AsyncG2RLConfig):
            raise TypeError(f"args: got {type(config).__name__}, needs an AsyncG2RLConfig")
        if given.get("rollout_worker") is not None:
            raise ValueError("rollout_worker: got one, g2rl scores groups in TRL's own: leave it unset")
        if given.get("environment_factory") is None:  # else the worker's process finds and checks the names
            functions = given.get("reward_funcs") or []
            functions = functions if isinstance(functions, list) else [functions]
            names = [get_callable_name(function) for function in functions]
            correctness_column(names, config.g2rl_correctness_reward)
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        head = find_head(model, compare=False)
        if head.logit_softcap is not None:
            raise ValueError(
                f"model: its logits have a softcap of {head.logit_softcap}, whose slope log-probabilities do "
                "not give: use G2RLTrainer"
            )
        parameter = head.output.weight
        named = _iter_vllm_named_params(model)
        self.head_name = next((name for name, one in named if one is parameter), None)
        weight = head.weights(parameter.dtype)[0].detach().cpu().clone().share_memory_()
        self.head_weight = weight
        if self.rollout_worker is None:  # not the main process
            return
        self.rollout_worker._loop_cls = G2RLRolloutLoop
        self.rollout_worker._loop_kwargs["g2rl"] = Scoring(
            AsyncSettings.of(config),
            config.g2rl_top_k,
            config.g2rl_correctness_reward,
            weight,
            head.logit_scale,
        )

    def _streaming_iter(self) -> Iterator[tuple[str, Tensor]]:
        """TRL's parameters on their way to vLLM, of which the head's is copied for the worker."""
        for name, whole in super()._streaming_iter():
            if name == self.head_name and self.accelerator.is_main_process:
                self.head_weight.copy_(whole[: len(self.head_weight)])
            yield name, whole
