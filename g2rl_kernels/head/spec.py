"""What a head is, and which tokens make up a response: two small objects that cross the Python code whole.

Operators cannot take them. At an operator's boundary they are flattened once, in the order of the schemas
below, by `flat`, and put together again by `HeadSpec(*...)`. A new option of the head touches this file, the
C++ schemas (csrc/ops/head.cpp) and the kernels, nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

HEAD_SCHEMA = "Tensor weight, Tensor? bias, float temperature, float logit_scale, float logit_softcap"
RESPONSES_SCHEMA = "Tensor cu_seqlens, Tensor? token_weights"


class HeadSpec(NamedTuple):
    """The LM head: z = softcap(logit_scale (W h + b)), softcap(x) = c tanh(x / c).

    p = softmax(z / temperature). All backends take it in this form, checked.
    """

    weight: Tensor  # [V, d], dtype of hidden
    bias: Tensor | None = None  # [V]
    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # c; 0: no softcap

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        logit_scale: float,
        logit_softcap: float | None,
    ) -> HeadSpec:
        """From a public function's arguments, where no softcap is None."""
        return cls(weight, bias, float(temperature), float(logit_scale), float(logit_softcap or 0.0))

    def flat(self) -> tuple[Any, ...]:
        """In the order of HEAD_SCHEMA."""
        return tuple(self)


class Responses(NamedTuple):
    """Which rows of hidden belong to which response, and their weights."""

    cu_seqlens: Tensor  # [S + 1]; response s owns rows cu_seqlens[s]:cu_seqlens[s + 1]
    token_weights: Tensor | None = None  # [N] float32, alpha_t; None: all 1
