"""The clock of every measurement of time."""

from __future__ import annotations

import time

import torch


def clock(device: torch.device) -> float:
    """Seconds, from an arbitrary start, once a GPU has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
