"""Errors with a one-line message: what is wrong and what to do. Commands print only that line."""

from __future__ import annotations

import importlib.util


class CommandError(RuntimeError):
    """A command cannot start or continue."""


class TrainerError(CommandError):
    """A run cannot start or continue."""


class ConfigError(TrainerError, ValueError):
    """A wrong configuration value; raised before any work."""


class RewardError(TrainerError):
    """A task's score failed or was not a finite number; raised before the update that needs it."""


PACKAGES = ("transformers", "safetensors", "yaml", "tqdm", "matplotlib")  # tasks and models may need more


def check_packages() -> None:
    """Raises TrainerError for a missing package, even one that a run imports only at its end."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise need(package, ImportError("not installed"))


def need(package: str, error: ImportError, extra: str = "train") -> TrainerError:
    """The error for a missing dependency; names the extra of this package that installs it."""
    return TrainerError(f"{package} is not usable here ({error}): pip install 'g2rl-kernels[{extra}]'")


def one_line(error: BaseException, limit: int = 240) -> str:
    """The error's message on one line, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]


def out_of_memory(error: RuntimeError) -> bool:
    """True for torch's out-of-memory errors, on GPUs and CPUs."""
    said = str(error).lower()
    return "out of memory" in said or "can't allocate memory" in said
