"""Every option of GRPOConfig: `make test-trl`. Tests that are not marked `slow` are in `make test` too."""

from __future__ import annotations

import functools
import gc
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("trl") is None:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session", autouse=True)
def _collect_less() -> Iterator[None]:
    """Each training collects garbage, which takes longer than a tiny training once all is imported."""
    import tiny_trl  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    from tiny_trl import save_model

    @functools.cache
    def save(**settings: Any) -> str:
        return save_model(tmp_path_factory.mktemp("model"), **settings)

    return save


@pytest.fixture
def place(tmp_path: Path, model_dir: Callable[..., str]) -> Callable[[Any], Any]:
    """place(case): where its runs live."""
    from three_ways import Place

    return lambda case: Place(tmp_path, model_dir, case)
