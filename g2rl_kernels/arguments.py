"""Checks of the public functions' arguments."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch.compile sees a constant


def sizes(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_tensor(
    name: str, value: Any, dtypes: tuple[torch.dtype, ...] | None, device: torch.device | None = None
) -> None:
    """A plain tensor of one of `dtypes` (any float dtype if None), on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a torch.Tensor")
    if hasattr(value, "full_tensor"):  # a DTensor holds this rank's shard under the shape of the whole
        remedy = f"pass {name}.full_tensor()"
        placements: Any = getattr(value, "placements", ())
        if name in ("weight", "bias") and len(placements) == 1 and placements[0].is_shard(0):
            remedy += (
                f", or, if all ranks have the same hidden (a vocabulary-parallel head, not FSDP), "
                f"{name}.to_local() and process_group={name}.device_mesh.get_group()"
            )
        raise TypeError(f"{name}: got a DTensor, needs a plain tensor; {remedy}")
    if dtypes is None and not value.dtype.is_floating_point:
        raise TypeError(f"{name}: got {value.dtype}, needs a floating-point dtype")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name}: got {value.dtype}, needs {' or '.join(map(str, dtypes))}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got device {value.device}, needs {device} like the first argument")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {sizes(tensor)}, needs {list(shape)}: {meaning}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(map(repr, choices))}")


def check_positive(name: str, value: float, remedy: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a number")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, needs a positive finite number{remedy}")


def check_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a number")
    largest = sys.float_info.max
    if not -largest <= value <= largest:  # math.isfinite would break a compiled graph
        raise ValueError(f"{name}: got {value}, needs a finite number")


def check_scale(name: str, value: float, remedy: str = "") -> None:
    """Products and quotients of three such numbers, and of logits, stay within float32."""
    check_positive(name, value, remedy)
    if not 1e-8 <= value <= 1e8:
        raise ValueError(f"{name}: got {value}, needs a number from 1e-8 to 1e8{remedy}")


def check_bytes(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a whole number of bytes")
    if not 0 <= value < 2**63:
        raise ValueError(f"{name}: got {value}, needs a number of bytes, 0 or more")


def may_read_values(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("G2RL_CHECK") == "1"


def check_token_values(tokens: Tensor, V: int) -> None:
    if tokens.numel():
        low, high = (int(t) for t in torch.aminmax(tokens))
        if low < 0 or high >= V:
            raise ValueError(f"tokens: got values from {low} to {high}, needs 0 to V - 1 = {V - 1}")


def check_cu_seqlens_values(cu_seqlens: Tensor, N: int) -> None:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != N:
        raise ValueError(f"cu_seqlens: runs from {first} to {last}, needs 0 to N = {N}, the number of tokens")
    falls = (cu_seqlens.diff() < 0).nonzero()
    if falls.numel():
        at = int(falls[0]) + 1
        raise ValueError(
            f"cu_seqlens: falls from {int(cu_seqlens[at - 1])} to {int(cu_seqlens[at])} at entry {at}"
        )
