"""The verl integration, in verl's environment: `make test-verl`. Elsewhere nothing here is collected."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

try:
    importlib.metadata.version("verl")  # not `import verl`, which would find this folder
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["*"]

# For this process and those that tests start: verl on a CPU, this folder, tests/tiny.py, this checkout.
PATHS = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
os.environ |= {
    "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
    "VERL_ENGINE_DEVICE": "cuda",  # the engine that GPUs get
    "PYTHONPATH": os.pathsep.join(PATHS),
}
sys.path[:0] = PATHS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from engines import save_model

    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_step(monkeypatch, model):
    """make_step(trainer's mode, *overrides) with scripted libraries in place of those that load texts."""
    from steps import Step
    from tiny import make_tokenizer

    monkeypatch.syspath_prepend(HERE / "stand_in")

    def make(mode, *overrides, **options):
        step = Step(monkeypatch, model, mode, *overrides, **options)
        step.trainer.tokenizer = make_tokenizer()
        return step

    return make
