"""The plugin's settings in verl's configuration: `+algorithm.g2rl.<name>=...` on its command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.trainer.ppo.core_algos import AdvantageEstimator

from ..systems import SystemSettings

STRATEGIES = ("fsdp", "fsdp2")
CLIP_RATIO_HIGH = 0.2  # verl's default


@dataclass
class G2RLSettings(SystemSettings):
    """`SystemSettings` read from verl's configuration."""

    # features over the ids that the rollout's top_k and top_p keep; verl's log-probs stay those of all ids
    keep_sampling_mask: bool = False

    @classmethod
    def read(cls, config: DictConfig) -> G2RLSettings:
        """Reads and checks the settings in verl's configuration.

        Raises ValueError, naming the option, for a setting that cannot work, and for options of verl that
        leave no GRPO advantages to shape or no forward pass that gives features.
        """
        given = config.algorithm.get("g2rl")
        if not isinstance(given, DictConfig | None):
            raise ValueError(f"algorithm.g2rl: got {given!r}, needs options; leave it out for the defaults")
        try:
            merged = OmegaConf.merge(OmegaConf.structured(cls), given or {})
            settings: G2RLSettings = OmegaConf.to_object(merged)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            names = ", ".join(OmegaConf.structured(cls))
            raise ValueError(f"algorithm.g2rl: {reason}; options: {names}") from None
        settings.check(config.actor_rollout_ref.rollout.n, "actor_rollout_ref.rollout.n")
        algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
        if algorithm.adv_estimator != AdvantageEstimator.GRPO:
            raise ValueError(f"algorithm.adv_estimator: got {algorithm.adv_estimator}, g2rl_sync needs grpo")
        if (algorithm.get("rollout_correction") or {}).get("bypass_mode", False):
            raise ValueError(
                "algorithm.rollout_correction.bypass_mode: g2rl_sync needs False, because features come from "
                "the forward pass that bypass_mode leaves out"
            )
        if actor.strategy not in STRATEGIES:
            raise ValueError(
                f"actor_rollout_ref.actor.strategy: got {actor.strategy}, g2rl_sync needs "
                f"{' or '.join(STRATEGIES)}"
            )
        if settings.gives_advantages and algorithm.use_kl_in_reward:
            raise ValueError(
                f"algorithm.use_kl_in_reward: got True with algorithm.g2rl.algorithm={settings.algorithm}, "
                "whose advantages leave the KL out: use actor_rollout_ref.actor.use_kl_loss instead"
            )
        settings.of_loss(actor)
        settings.sampling(config.actor_rollout_ref.rollout)
        return settings

    def sampling(self, rollout: DictConfig) -> dict[str, Any] | None:
        """Arguments of `g2.sampling_support` for the rollout, None without keep_sampling_mask.

        logits_dtype is a name, as it travels to the workers. Raises ValueError where the rollout leaves
        nothing out, or its rules are not known.
        """
        if not self.keep_sampling_mask:
            return None
        option, options = "algorithm.g2rl.keep_sampling_mask", "actor_rollout_ref.rollout"
        if rollout.name != "vllm":
            raise ValueError(
                f"{option}: got True with {options}.name={rollout.name}; vllm's rules of truncation are known"
            )
        top_k, top_p = max(int(rollout.top_k or 0), 0), float(rollout.top_p)
        if top_k == 0 and top_p == 1:
            raise ValueError(
                f"{option}: got True, but {options}.top_k={rollout.top_k} and top_p={rollout.top_p} leave "
                "nothing out: set one of them, or leave it out"
            )
        dtype = {"half": "float16"}.get(rollout.dtype, rollout.dtype)
        rounded = dtype if dtype in ("bfloat16", "float16") else None
        return {"top_k": top_k, "top_p": top_p, "rules": "vllm", "logits_dtype": rounded}

    def of_loss(self, actor: DictConfig) -> dict[str, Any]:
        """The actor's options that the algorithm decides: entropy bonus and upper clip of the ratio."""
        return {
            "entropy_coeff": self.entropy(actor.entropy_coeff, "actor_rollout_ref.actor.entropy_coeff"),
            "clip_ratio_high": self.clip_high(actor.clip_ratio_high, CLIP_RATIO_HIGH),
        }

    def apply(self, config: DictConfig) -> None:
        """Sets the actor's options that the algorithm decides, before verl builds workers from them."""
        actor = config.actor_rollout_ref.actor
        actor.update(self.of_loss(actor))
