"""Adds slots to features: features[s] = kappa features[s] +- the sum of its slots, in order.

In: slots [k, responses, d], float32. Out: features, in place. Exact: one program per number, slots in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .chunk import response_arguments
from .launch import launch_kernel
from .tile import given

BD = 512


@triton.heuristics(given("HAS_KAPPA", "kappa"))
@triton.jit(do_not_specialize=["s_begin", "n_responses", "n_slots", "D"])
def head_reduce_kernel(
    slots, features, cu_seqlens, kappa,
    s_begin, n_responses, n_slots,
    sign,
    D,
    BD: tl.constexpr,
    HAS_KAPPA: tl.constexpr,
):  # fmt: skip
    i_s, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(cu_seqlens + s_begin) == tl.load(cu_seqlens + s_begin + n_responses):
        return  # these responses have no tokens: the slots were not written
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_sum = tl.zeros([BD], dtype=tl.float32)
    for i_slot in range(n_slots):
        b_sum += tl.load(slots + (i_slot * n_responses + i_s) * D + o_d, mask=m_d, other=0.0)
    p_features = features + (s_begin + i_s) * D + o_d
    b_features = tl.load(p_features, mask=m_d, other=0.0)
    if HAS_KAPPA:  # where kappa is 0, features may be infinite
        b_features = tl.where(tl.load(kappa) > 0, b_features, 0.0)
    tl.store(p_features, b_features + sign * b_sum, mask=m_d)


def head_reduce(
    slots: Tensor,
    features: Tensor,
    cu_seqlens: Tensor,
    responses: range,
    sign: float,
    kappa: Tensor | None = None,
) -> None:
    """slots [k, len(responses), d] into features [S, d], in place; kappa [1], 1 or 0, on the device."""
    n_slots, S, D = slots.shape
    launch_kernel(
        head_reduce_kernel,
        (S, triton.cdiv(D, BD)),
        **response_arguments(cu_seqlens, responses),
        slots=slots,
        features=features,
        kappa=kappa,
        n_slots=n_slots,
        sign=sign,
        D=D,
        BD=BD,
        num_warps=4,
    )
