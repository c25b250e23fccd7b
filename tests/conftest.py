from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if importlib.util.find_spec("triton"):
    import interpreter

    interpreter.hasten()

# Folders whose tests need the extra [train]; without it they are not collected.
TRAINS = ("evaluation", "geometry", "models", "tasks", "trainer")
NEEDED = ("transformers", "safetensors", "yaml", "tqdm", "matplotlib")
MISSING = [package for package in NEEDED if importlib.util.find_spec(package) is None]
COMMANDS = tuple(f"cli/test_{name}_command.py" for name in ("eval", "geometry", "train"))
collect_ignore = [*TRAINS, *COMMANDS] if MISSING else []


def pytest_report_header() -> str:
    return f"not collected without {', '.join(MISSING)}: {', '.join(TRAINS)}" if MISSING else ""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """One torch thread for tests with tiny models, which more threads slow down."""
    if not {*TRAINS, "cli", "integrations"}.intersection(request.path.parts):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
