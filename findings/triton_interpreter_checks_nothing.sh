#!/usr/bin/env bash
# Triton: in the interpreter device_assert and the overflow check never fail, TRITON_DEBUG=1 or not.
#
# Expected: the documentation says that device_assert runs where TRITON_DEBUG is 1, and that the interpreter, whose
#   options say sanitize_overflow=True, is there to debug kernels. So an assertion that is false raises there, and so
#   does an int32 product beyond 2**31.
# Observed: neither does, with TRITON_DEBUG=1, with debug=True at the launch, or both. `assert` over a block of several
#   elements passes too; over one element it raises. The interpreter's options keep debug=False, whatever is set: it
#   computes each sum and product of integers again in int64 for the check, and drops the result.
# Why it matters: tests of kernels on CPUs believe that offsets are checked for overflow and that the assertions of a
#   kernel hold. Neither was ever looked at.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet triton==3.7.1 torch==2.13.0 numpy==2.4.6

cat > program.py <<'PROGRAM'
from importlib.metadata import version

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import interpreter_semantic

for name in ("triton", "torch", "numpy"):
    print(name, version(name))


@triton.jit
def with_device_assert(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.device_assert(value < 0, "must be negative")
    tl.store(out + i, value)


@triton.jit
def with_assert(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    assert value < 0, "must be negative"
    tl.store(out + i, value)


@triton.jit
def square(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out + i, value * value)


def raises(kernel, N, **options):
    x = torch.full((N,), 70_000, dtype=torch.int32)  # its square is 4,900,000,000
    out = torch.empty_like(x)
    try:
        kernel[(1,)](x, out, N, **options)
        result = f"no error, {out[0]}"
    except Exception as error:
        result = str(error)
    print(f"{kernel.fn.__name__:20} {N:3} elements, {options or 'no option'}: {result}")
    return not result.startswith("no error")


for options in ({}, {"debug": True}):
    assert not raises(with_device_assert, 16, **options)
    assert not raises(square, 16, **options)
    assert not raises(with_assert, 16, **options)
    assert raises(with_assert, 1, **options)
print("options of the interpreter:", interpreter_semantic.builder.options)
assert interpreter_semantic.builder.options.sanitize_overflow
assert not interpreter_semantic.builder.options.debug
PROGRAM

for debug in 0 1; do
  echo "TRITON_DEBUG=$debug"
  TRITON_INTERPRET=1 TRITON_DEBUG=$debug venv/bin/python program.py
done
