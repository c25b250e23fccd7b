"""The parts of another package that an integration builds on, checked before it is changed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from .. import versions


def check_seams(package: str, seams: Mapping[Any, Mapping[str, str]]) -> None:
    """Raises ImportError, naming them, where `package` is missing or lacks seams.

    A dependency of the package that is missing raises its own ModuleNotFoundError.

    Args:
        package: its name on PyPI, and to import it.
        seams: owner -> names in it that the integration uses, each with the parameters that it passes to it
            by position or by name, separated by spaces ("" where it calls nothing). Parameters before a "/"
            must be the first, in this order. An owner is a class or module, or the place of one, to be
            imported: "package.module" or "package.module:Class". What a class's __init__ sets is in it too.
    """
    missing = []
    for place, names in seams.items():
        owner = _imported(package, place) if isinstance(place, str) else place
        if owner is None:
            missing.append(place.replace(":", "."))
            continue
        for name, parameters in names.items():
            if not _has(owner, name):
                missing.append(f"{owner.__name__}.{name}")
            elif lacks := _lacks(getattr(owner, name, None), parameters):
                missing.append(f"{owner.__name__}.{name} (its parameters {', '.join(lacks)})")
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


def _imported(package: str, place: str) -> Any:
    """The module or class at a place; None where the package does not have it."""
    module, _, name = place.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            said = f"g2rl-kernels' integration needs {package}: pip install 'g2rl-kernels[{package}]'"
            raise ImportError(said) from None
        if (error.name or "").partition(".")[0] != package:
            raise  # the package is there, and something that it needs is not
        return None
    return getattr(found, name, None) if name else found


def _has(owner: Any, name: str) -> bool:
    """Whether a module or class has the name, or the class's __init__ sets it."""
    init = getattr(owner, "__init__", None)
    code = getattr(inspect.unwrap(init), "__code__", None) if callable(init) else None
    return hasattr(owner, name) or (code is not None and name in code.co_names)


def _lacks(function: Any, parameters: str) -> list[str]:
    """Those of the parameters that a function does not take by that name, or not at that place."""
    if not parameters:
        return []
    taken = inspect.signature(function).parameters if callable(function) else {}
    placed, _, named = parameters.rpartition("/")
    at = [name for name in taken if name != "self"]
    lacks = [name for place, name in enumerate(placed.split()) if at[place : place + 1] != [name]]
    if any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        return lacks
    return lacks + [name for name in named.split() if name not in taken]
