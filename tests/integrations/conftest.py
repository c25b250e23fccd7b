"""A tiny model on disk, and G2RLTrainer or GRPOTrainer around it. Test files need TRL; this file does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tiny_trl import save_model

    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(tmp_path: Path, model_dir: str) -> Callable[..., Any]:
    """make(trainer class, settings of its configuration) with the tiny model and the reward `parity`."""
    from tiny_trl import G2RLConfig, G2RLTrainer, config, parity, prompts
    from trl import GRPOConfig, GRPOTrainer

    def make(kind: type = G2RLTrainer, **settings: Any) -> Any:
        names = "model reward_funcs train_dataset eval_dataset peft_config processing_class rollout_func"
        given = {name: settings.pop(name) for name in names.split() if name in settings}
        args = config(tmp_path / "out", GRPOConfig if kind is GRPOTrainer else G2RLConfig, **settings)
        return kind(
            **{"model": model_dir, "reward_funcs": parity, "train_dataset": prompts(), **given}, args=args
        )

    return make
