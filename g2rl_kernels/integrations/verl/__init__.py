"""G2RL in verl 0.9: a plugin that verl loads by itself (entry point group `verl.plugins`), in every process.

    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=g2rl_sync algorithm.adv_estimator=grpo ...

verl imports this module at the end of its own `__init__`. Nothing heavy happens then: trainer.py, which
registers the trainer, and engine.py, which teaches the FSDP engine to compute features, run when verl first
imports the modules that they extend (importing those here would settle verl's platform before other plugins
had their say). docs/verl.md is for users.
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
    """Raises ImportError for a verl other than 0.9: trainer and engine reach into what only it has."""
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
    """Runs an action once the module that it belongs to has been imported, whoever imports it."""

    def __init__(self, actions: dict[str, Callable[[], None]]) -> None:
        self.actions = dict(actions)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        action = self.actions.pop(fullname)
        spec = importlib.util.find_spec(fullname)  # by all other finders
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            _run(action)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def _run(action: Callable[[], None]) -> None:
    """A plugin that fails must not take verl's own trainers with it, and must not fail in silence."""
    try:
        action()
    except Exception:
        logger.exception("g2rl-kernels %s: its verl plugin FAILED; g2rl_sync cannot be used", __version__)


def install() -> None:
    """Arranges for trainer and engine, and says so: verl itself reports a plugin's failure at DEBUG only."""
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
