"""Errors whose message is one line, what is wrong and what to do: the command line prints only that."""

from __future__ import annotations

import importlib.util


class CommandError(RuntimeError):
    """A command cannot start or go on."""


class TrainerError(CommandError):
    """A run cannot start or go on."""


class ConfigError(TrainerError, ValueError):
    """A configuration value, known before any work."""


class RewardError(TrainerError):
    """A task's score raised or was not a finite number; raised before the update that would have used it."""


PACKAGES = ("transformers", "safetensors", "yaml", "tqdm", "matplotlib")  # tasks and models may need more


def check_packages() -> None:
    """Raises TrainerError unless everything that a run imports, at its end too, is installed."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise need(package, ImportError("not installed"))


def need(package: str, error: ImportError, extra: str = "train") -> TrainerError:
    """The error for a dependency that is an extra of this package."""
    return TrainerError(f"{package} is not usable here ({error}): pip install 'g2rl-kernels[{extra}]'")


def one_line(error: BaseException, limit: int = 240) -> str:
    """The error's message on one line, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says, of a GPU or a CPU, that memory ran out."""
    said = str(error).lower()
    return "out of memory" in said or "can't allocate memory" in said
