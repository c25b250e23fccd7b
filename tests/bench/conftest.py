import pytest
from bench_helpers import measure as commands

from benchmarks import measure


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result's header has them: at full size they take seconds where bf16 is emulated."""
    for module in (measure, commands):  # in a checkout the command may find its modules by another name
        for name, size in (("PRODUCT_SIZE", 64), ("COPY_BYTES", 4096)):
            monkeypatch.setitem(getattr(module, name), "cpu", size)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns Triton's interpreter off, as on a user's machine."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
