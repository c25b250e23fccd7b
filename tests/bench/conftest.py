import pytest


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns Triton's interpreter off, as on a user's machine."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
