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
        return settings

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
