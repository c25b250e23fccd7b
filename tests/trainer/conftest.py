from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

for package in ("transformers", "safetensors", "yaml", "tqdm", "matplotlib"):
    pytest.importorskip(package, reason=f"the trainer needs {package}: pip install 'g2rl-kernels[train]'")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
