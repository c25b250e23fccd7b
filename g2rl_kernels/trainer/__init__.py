"""A small trainer: group-relative policy gradients with gradient-guided exploration (G2RL) or without (GRPO).

    from g2rl_kernels.trainer import Trainer, TrainerConfig, load_model, load_tasks

    config = TrainerConfig.load("recipes/demo.yaml", ["steps=50"])
    Trainer(*load_model(config), load_tasks(config.tasks), config).train()

Start reading at Trainer.step in trainer.py; it calls the other files.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, RewardError, TrainerError
from .config import TrainerConfig

__all__ = [
    "ConfigError",
    "RewardError",
    "Trainer",
    "TrainerConfig",
    "TrainerError",
    "load_model",
    "load_tasks",
]


def __getattr__(name: str) -> Any:  # so that --help need not import transformers
    if name == "Trainer":
        from .trainer import Trainer

        return Trainer
    if name == "load_model":
        from ..models.loading import load_model

        return load_model
    if name == "load_tasks":
        from ..tasks.sources import load_tasks

        return load_tasks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
