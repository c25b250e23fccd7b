"""Marks that the head's tests share: every backend (`BACKENDS`), instruction set and dtype."""

import pytest
from oracle import BACKEND_IDS, BACKENDS, CPU_BACKENDS
from strategies import DTYPES

backends = pytest.mark.parametrize("backend", BACKENDS, ids=BACKEND_IDS)
isas = pytest.mark.parametrize("isa", [isa for _, isa in CPU_BACKENDS])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
