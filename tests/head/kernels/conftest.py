"""Small tiles and budgets for the head's kernels."""

import pytest


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
    monkeypatch.setattr(driver, "SEEDED_CHUNK", 40)
    monkeypatch.setattr(driver, "SLOTS", 16 * 4 * 24)  # 16 responses, d = 24
    monkeypatch.setattr(driver, "WORKSPACE", 4 * 16 * 4 * 20)
