"""hypothesis where it is installed. Without it (on a bare GPU machine, say) its tests are skipped, all others
run: import `given`, `settings`, `assume` and `st` from here."""

from __future__ import annotations

import os
from typing import Any

import pytest

try:
    from hypothesis import assume, given, settings
    from hypothesis import strategies as st

    # The same examples on every run, so that a red test is one's own doing; HYPOTHESIS_PROFILE=explore looks
    # further.
    settings.register_profile("default", derandomize=True, deadline=None, max_examples=40)
    settings.register_profile("explore", deadline=None, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
except ImportError:

    class _Absent:
        """Stands for strategies and what they make: does nothing, whatever is asked."""

        def __getattr__(self, name: str) -> Any:
            return _Absent()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _Absent()

        def __or__(self, other: Any) -> Any:
            return self

    assume = st = _Absent()  # type: ignore[assignment]

    def settings(*args: Any, **kwargs: Any) -> Any:  # type: ignore[no-redef]
        return lambda function: function

    def given(*args: Any, **kwargs: Any) -> Any:  # type: ignore[no-redef]
        return pytest.mark.skip(reason="needs hypothesis: pip install hypothesis")


__all__ = ["assume", "given", "settings", "st"]
