"""One clock for all timings: it waits for a GPU before it is read."""

from __future__ import annotations

import time

import torch


def clock(device: torch.device) -> float:
    """time.perf_counter() in seconds, read after a CUDA device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
