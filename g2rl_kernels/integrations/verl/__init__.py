"""G2RL in verl 0.9: a plugin that verl loads in every process (entry point group `verl.plugins`).

    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=g2rl_sync algorithm.adv_estimator=grpo ...

verl imports this module at the end of its own `__init__`. When verl first imports the two modules that they
extend, trainer.py registers the trainer and engine.py adds features to the FSDP engine. (Importing those two
at once would fix verl's platform before other plugins could change it.) docs/verl.md is for users.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ... import __version__

logger = logging.getLogger(__name__)

REMEDY = "pip install 'verl>=0.9.1,<0.10'"


def check_version(version: str) -> None:
    """Raises ImportError for any verl but 0.9, whose internals trainer.py and engine.py use."""
    if not re.match(r"0\.9(\D|$)", version):
        raise ImportError(f"verl {version} is installed, the plugin is for verl 0.9: {REMEDY}")


def _register_trainer() -> None:
    from ..verl import trainer  # noqa: F401  (importing it registers it)


def _patch_engine() -> None:
    from ..verl import engine

    engine.patch()


EXTENDED = {
    "verl.trainer.ppo.v1.trainer_sync": _register_trainer,
    "verl.workers.engine.fsdp.transformer_impl": _patch_engine,
}


class _AfterImport(MetaPathFinder):
    """Runs each module's action once, right after the module's first import."""

    def __init__(self, actions: dict[str, Callable[[], None]]) -> None:
        self.actions = dict(actions)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        action = self.actions.pop(fullname)
        spec = importlib.util.find_spec(fullname)  # now by the other finders
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            _run(action)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def _run(action: Callable[[], None]) -> None:
    """Runs an action; logs an error instead of raising it, so that verl's own trainers still work."""
    try:
        action()
    except Exception:
        logger.exception("g2rl-kernels %s: its verl plugin FAILED; g2rl_sync cannot be used", __version__)


def install() -> None:
    """Registers the two actions and logs that it did; verl itself logs a plugin's failure at DEBUG only.

    Raises ImportError, and logs it, for a verl other than 0.9.
    """
    try:
        version = importlib.metadata.version("verl")
        check_version(version)
    except ImportError as error:
        logger.error("g2rl-kernels %s: its verl plugin was NOT loaded: %s", __version__, error)
        raise
    late = {name: action for name, action in EXTENDED.items() if name not in sys.modules}
    sys.meta_path.insert(0, _AfterImport(late))
    for name in EXTENDED.keys() - late.keys():
        _run(EXTENDED[name])
    logger.warning(
        "g2rl-kernels %s: plugin loaded into verl %s; trainer.v1.trainer_mode=g2rl_sync selects it",
        __version__,
        version,
    )


install()
