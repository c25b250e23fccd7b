"""Small tiles and budgets for the head's kernels."""

import pytest
import torch


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Many tiles, blocks, strips and programs for a small problem."""
    from head_modes import TINY

    from g2rl_kernels.head.triton import tile

    monkeypatch.setattr(tile, "choose", lambda *_: TINY)


@pytest.fixture
def tiny_budgets(monkeypatch, tiny_tiles):
    """Several chunks of tokens, batches of responses and slabs of the vocabulary."""
    from g2rl_kernels.head.triton import driver

    monkeypatch.setattr(driver, "CHUNK", 50)
    monkeypatch.setattr(driver, "SLOTS", 16 * 4 * 24)  # 16 responses, d = 24
    monkeypatch.setattr(driver, "WORKSPACE", 4 * 16 * 4 * 20)


@pytest.fixture
def sums_of_one_order(monkeypatch):
    from interpreter import sum_in_one_order

    sum_in_one_order(monkeypatch)


@pytest.fixture
def own_file(monkeypatch, tmp_path):
    monkeypatch.setenv("G2RL_CACHE", str(tmp_path / "cache"))
    from g2rl_kernels.head.triton import tuning

    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def hopper(monkeypatch):
    """A GPU, as far as tuning asks it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    from g2rl_kernels.cli import tune as command

    monkeypatch.setattr(command, "find_spec", lambda name: object())
    return "NVIDIA H100"
