"""Triton's interpreter in half the time, and with its overflow check in force.

Triton 3.7 patches triton.language anew for each call of a device function, though the kernel that calls has
done so; builds a table of dtypes for each translation of one; and computes each integer sum and product again
in int64 to find overflows, of which it reports none (`device_assert` needs an option that nothing sets).
Another version that has none of these functions is left as it is.
"""

import functools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from triton import language as tl
from triton.runtime import interpreter

UFUNCS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def hasten() -> None:
    """For this process."""
    if hasattr(interpreter, "_LangPatchScope"):  # which _patch_lang returns, and which restores
        interpreter._patch_lang = PatchOnce(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = remember(interpreter._get_np_dtype)
    semantic = getattr(interpreter, "interpreter_semantic", None)
    if hasattr(semantic, "binary_op_sanitize_overflow_impl"):
        semantic.binary_op_sanitize_overflow_impl = check_overflow


class PatchOnce:
    """_patch_lang(fn) for a kernel; nothing for the device functions that it calls and that see no more of
    triton.language."""

    def __init__(self, patch: Any) -> None:
        self.patch = patch
        self.patched: set[str] = set()  # names of modules, while a kernel runs

    def __call__(self, fn: Any) -> Any:
        modules = modules_of(fn)
        if modules and modules <= self.patched:
            return interpreter._LangPatchScope()  # nothing to restore
        outermost = not self.patched
        self.patched |= modules
        scope = self.patch(fn)
        if outermost:
            restore = scope.restore

            def end() -> None:
                self.patched.clear()
                restore()

            scope.restore = end
        return scope


def remember(numpys: Any) -> Any:
    """By name: pointers' types have no hash."""
    known: dict[str, np.dtype] = {}

    def dtype_of(dtype: tl.dtype) -> np.dtype:
        if dtype.name not in known:
            known[dtype.name] = numpys(dtype)
        return known[dtype.name]

    return dtype_of


@functools.cache
def modules_of(fn: Any) -> set[str]:
    """Of triton.language, that a function sees."""
    seen = {value.__name__ for value in fn.__globals__.values() if isinstance(value, ModuleType)}
    return seen & {tl.__name__, tl.core.__name__}


def check_overflow(lhs: Any, rhs: Any, binary_op: Any) -> None:
    """Raises AssertionError where a sum, difference or product of fewer than 64 bits leaves its dtype."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth >= 64:
        return
    exact = UFUNCS[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    low, high = dtype.get_int_min_value(), dtype.get_int_max_value()
    assert ((exact >= low) & (exact <= high)).all(), f"{dtype} overflow in {binary_op.__name__}"


def sum_in_one_order(patch: pytest.MonkeyPatch) -> None:
    """The interpreter's products are numpy's, whose bits depend on a tile's width on some CPUs (Zen 1), as a
    GPU's do not. Added up in float64 they are rounded once."""

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        product = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
