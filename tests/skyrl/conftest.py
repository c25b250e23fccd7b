"""The SkyRL integration, where SkyRL is installed: `make test-verl`. Elsewhere nothing here is collected."""

from __future__ import annotations

import importlib.metadata
import sys
import typing
from pathlib import Path

HERE = Path(__file__).resolve().parent

try:
    importlib.metadata.version("skyrl")
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["*"]
else:
    import typing_extensions

    # This folder, tests/tiny.py, and a stand-in for flash-attn, which needs a GPU.
    sys.path[:0] = [str(HERE), str(HERE / "stand_in"), str(HERE.parent)]
    if sys.version_info < (3, 12):  # SkyRL's models for pydantic are written for 3.12
        typing.TypedDict = typing_extensions.TypedDict
