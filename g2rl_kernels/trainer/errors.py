"""Errors whose message is one line, what is wrong and what to do: the command line prints only that."""


class TrainerError(RuntimeError):
    """The run cannot start or go on."""


class ConfigError(TrainerError, ValueError):
    """A configuration value, known before any work."""


class RewardError(TrainerError):
    """A task's score raised or was not a finite number; raised before the update that would have used it."""


def need(package: str, error: ImportError, extra: str = "train") -> TrainerError:
    """The error for a dependency that is an extra of this package."""
    return TrainerError(f"{package} is not usable here ({error}): pip install 'g2rl-kernels[{extra}]'")
