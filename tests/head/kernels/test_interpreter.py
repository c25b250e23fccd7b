"""What tests/interpreter.py changes of Triton's interpreter."""

import pytest
import torch
from oracle import GPU

pytest.importorskip("triton", reason="pip install triton")

import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(GPU.type != "cpu", reason="kernels run on the GPU here")


@triton.jit
def squared(value):
    return tl.where(value > 0, value * value, 0)


@triton.jit
def square_kernel(x, out, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(out + o_n, squared(tl.load(x + o_n)) + 1)


def square(value: int) -> torch.Tensor:
    x = torch.full((16,), value, dtype=torch.int32)
    out = torch.empty_like(x)
    square_kernel[(1,)](x, out, N=16)
    return out


def test_a_device_function_computes_and_the_language_is_restored():
    before = tl.where, tl.core.where, tl.tensor.__add__
    assert (square(3) == 10).all()
    assert (tl.where, tl.core.where, tl.tensor.__add__) == before


@pytest.mark.parametrize("value", [70_000, 46_341])
def test_an_overflow_is_an_error(value):
    """46,341 squared is 2**31 and 4,633 more; 46,340 squared fits."""
    with pytest.raises(Exception, match="int32 overflow in mul"):
        square(value)
    assert (square(46_340) == 46_340**2 + 1).all()
