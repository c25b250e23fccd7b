"""The parts of another package that an integration builds on, checked before it is changed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .. import versions


def check_seams(package: str, seams: Mapping[Any, Mapping[str, str]]) -> None:
    """Raises ImportError, naming them, where seams of `package` are missing.

    seams: class or module -> names in it that the integration uses, each with the parameters that it passes
    to it by position or by name, separated by spaces ("" where it calls nothing).
    """
    missing = []
    for owner, names in seams.items():
        for name, parameters in names.items():
            found = getattr(owner, name, None)
            lacks = [one for one in parameters.split() if found and not _takes(found, one)]
            if found is None or lacks:
                of = f" (its parameters {', '.join(lacks)})" if lacks else ""
                missing.append(f"{owner.__name__}.{name}{of}")
    if missing:
        raise ImportError(missing_seams(package, missing))


def missing_seams(package: str, missing: list[str]) -> str:
    """What to say of a package that lacks the parts named."""
    oldest, newest = versions.TESTED[package]
    tested = oldest if oldest == newest else f"{oldest} to {newest}"
    return (
        f"{package} {versions.installed(package)} lacks what g2rl-kernels builds on: {', '.join(missing)}; "
        f"install a version that it is tested with ({tested}: pip install '{package}=={newest}.*'), or a "
        "g2rl-kernels that knows this one"
    )


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
