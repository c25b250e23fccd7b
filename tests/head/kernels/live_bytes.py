"""Memory that a launcher asks for, counted without a GPU."""

import importlib
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.seen and storage.nbytes():
                    self.seen.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.release, storage.data_ptr(), storage.nbytes())
        return out

    def release(self, pointer: int, size: int) -> None:
        self.seen.discard(pointer)
        self.now -= size


class Launch:
    """Stands in for a kernel, and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def no_launches(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """No head_{name} kernel is launched. A launch of another in the interpreter, of minutes, is an error."""

    def refuse(executor, *args, **kwargs):
        raise AssertionError(f"{executor.fn.__name__} was launched: name it in no_launches")

    monkeypatch.setattr(GridExecutor, "__call__", refuse)
    for name in names:
        module = importlib.import_module(f"g2rl_kernels.head.triton.{name}")
        monkeypatch.setattr(module, f"head_{name}_kernel", Launch())
