"""G2RL in verl: a plugin that verl loads in every process (entry point group `verl.plugins`).

    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=g2rl_sync algorithm.adv_estimator=grpo ...

verl imports this module at the end of its own `__init__`. When verl first imports the two modules that they
extend, trainer.py registers the trainer and engine.py adds features to the FSDP engine. (Importing those two
at once would fix verl's platform before other plugins could change it.) Each first checks the methods that it
builds on, so any verl that has them will do. docs/verl.md is for users.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ... import __version__, versions
from ..seams import missing_seams

logger = logging.getLogger(__name__)


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

    Raises ImportError, and logs it, for a verl without the modules that are extended.
    """
    try:
        version = importlib.metadata.version("verl")
        missing = [name for name in EXTENDED if not _exists(name)]
        if missing:
            raise ImportError(missing_seams("verl", missing))
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
    untested = versions.untested("verl", version)
    if untested:
        logger.warning("g2rl-kernels: %s; what its plugin builds on is checked when it is used", untested)


def _exists(module: str) -> bool:
    """Whether verl has a module, found without importing it."""
    spec = importlib.util.find_spec("verl")
    folders = (spec.submodule_search_locations if spec else None) or []
    return any(Path(folder, *module.split(".")[1:]).with_suffix(".py").is_file() for folder in folders)


install()
