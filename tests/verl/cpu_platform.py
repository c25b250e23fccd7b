"""A platform of verl for machines without accelerators; VERL_USE_EXTERNAL_MODULES names this module.

verl chooses its engine by device; VERL_ENGINE_DEVICE=cuda makes it the FSDP engine of GPUs.
"""

from __future__ import annotations

import functools
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from verl.plugin.platform import PlatformRegistry, set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA


def nothing(*args: Any) -> None:
    pass


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        synchronize=nothing,
        empty_cache=nothing,
        mem_get_info=lambda: (0, 0),
        get_device_name=lambda: "cpu",
        is_available=lambda: True,
        **dict.fromkeys(
            ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), lambda: 0
        ),
    )
    set_device = synchronize = set_allocator_settings = empty_cache = nothing

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def communication_backend_name(self) -> str:
        return "gloo"


set_platform(PlatformCPU())

# verl asks for "cpu:gloo" and its device's backend, which here is the same device.
init_process_group = dist.init_process_group


@functools.wraps(init_process_group)
def with_one_backend(backend: str, *args: Any, **options: Any) -> None:
    init_process_group("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **options)


dist.init_process_group = torch.distributed.init_process_group = with_one_backend

if os.environ.get("WITHOUT_G2RL") == "workers" and "RANK" in os.environ:
    sys.modules["g2rl_kernels"] = None  # type: ignore[assignment]  # as on a node where it is not installed
