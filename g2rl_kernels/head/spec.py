"""What a head is, and which tokens make up a response: two small objects that cross the Python code whole.

Operators cannot take them. At an operator's boundary they are flattened once, in the order of the schemas
below (`*head`, `*responses`), and put together again (`HeadSpec(*...)`). A new option of the head touches
this file, the C++ schemas (csrc/ops/head.cpp) and the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import (
    check_cu_seqlens_values,
    check_scale,
    check_shape,
    check_tensor,
    may_read_values,
    sizes,
)

HEAD_SCHEMA = (
    "Tensor weight, Tensor? bias, float temperature, float logit_scale, float logit_softcap, "
    "Tensor? temperatures, Tensor? low_hidden, Tensor? low_weight"
)
RESPONSES_SCHEMA = "Tensor cu_seqlens, Tensor? token_weights"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HeadSpec(NamedTuple):
    """The LM head: z = softcap(logit_scale (W h + b)), softcap(x) = c tanh(x / c).

    p = softmax(z / temperature). Public functions build it from their arguments; `checked` gives the form
    that operators and backends take.
    """

    weight: Tensor  # [V, d], dtype of hidden
    bias: Tensor | None = None  # [V]; -inf takes an entry out of the vocabulary
    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = 0.0  # c; 0: no softcap. Before `checked`: None, as public functions have it
    temperatures: Tensor | None = None  # [N] float32, one a token, in place of `temperature`, which is then 1
    low_hidden: Tensor | None = None  # [N, r], scaling A h of `lora`: B low_hidden is added to W h
    low_weight: Tensor | None = None  # [V, r], B of `lora`

    def checked(self, hidden: Tensor, tokens: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> HeadSpec:
        """The same with plain numbers, if hidden [N, d], tokens [N] and the head fit together.

        Raises TypeError or ValueError naming the argument; values of tensors are not read.
        """
        weight, bias, temperature, logit_scale, logit_softcap, *_ = self
        check_tensor("hidden", hidden, dtypes)
        if hidden.dim() != 2 or hidden.shape[1] == 0:
            raise ValueError(
                f"hidden: got shape {sizes(hidden)}, needs [N, d] with d > 0; see pack_responses"
            )
        check_tensor("weight", weight, dtypes, hidden.device)
        if weight.dtype != hidden.dtype:
            raise TypeError(f"weight: got {weight.dtype}, needs the dtype of hidden, {hidden.dtype}")
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
            raise ValueError(f"weight: got shape {sizes(weight)}, needs [V, {hidden.shape[1]}] with V > 0")
        check_tensor("tokens", tokens, (torch.int64,), hidden.device)
        check_shape("tokens", tokens, (hidden.shape[0],), "[N], one for each row of hidden")
        if bias is not None:
            check_tensor("bias", bias, dtypes if hidden.dtype == torch.float64 else DTYPES, hidden.device)
            check_shape("bias", bias, (weight.shape[0],), "[V], one for each row of weight")
        check_scale("temperature", temperature)
        check_scale("logit_scale", logit_scale)
        if logit_softcap is not None:
            check_scale("logit_softcap", logit_softcap, "; None for no softcap")
        name = "logit_scale" if logit_softcap is None else "logit_softcap"
        check_scale(f"{name} / temperature", (logit_softcap or logit_scale) / temperature)
        return HeadSpec(weight, bias, float(temperature), float(logit_scale), float(logit_softcap or 0.0))

    def detached(self) -> HeadSpec:
        """The same without gradients."""
        weight, bias, temperature, logit_scale, logit_softcap, *others = self
        bias, *others = (None if t is None else t.detach() for t in (bias, *others))
        return HeadSpec(weight.detach(), bias, temperature, logit_scale, logit_softcap, *others)

    def bytes_of_logit(self, dtype: torch.dtype) -> int:
        """Bytes of a logit that is kept for the backward pass: 2 where all gradients are bfloat16, but not
        behind a softcap, whose slope needs more; else 4. dtype: of hidden."""
        rounded = dtype == torch.bfloat16 and (self.bias is None or self.bias.dtype != torch.float32)
        return 2 if rounded and not self.logit_softcap else 4

    def at(self, rows: slice) -> HeadSpec:
        """The same for some of the tokens."""
        temperatures, low_hidden = (
            None if t is None else t[rows] for t in (self.temperatures, self.low_hidden)
        )
        return self._replace(temperatures=temperatures, low_hidden=low_hidden)


FIELDS = len(HeadSpec._fields)  # of an operator's arguments, that make up a head


class Responses(NamedTuple):
    """Which rows of hidden belong to which response, and how much each token counts."""

    cu_seqlens: Tensor  # [S + 1]; response s owns rows cu_seqlens[s]:cu_seqlens[s + 1]
    token_weights: Tensor | None = None  # [N] alpha_t >= 0; None: all 1

    def checked(self, hidden: Tensor) -> Responses:
        """The same with float32 weights, if it fits hidden [N, d].

        Raises TypeError or ValueError naming the argument. Values are checked where they may be read.
        """
        cu_seqlens, token_weights = self
        N = hidden.shape[0]
        check_tensor("cu_seqlens", cu_seqlens, (torch.int64, torch.int32), hidden.device)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens: got shape {sizes(cu_seqlens)}, needs [S + 1], starting with 0")
        check_per_token("token_weights", token_weights, hidden)
        if may_read_values(hidden):
            check_cu_seqlens_values(cu_seqlens, N)
            if token_weights is not None and not bool((token_weights >= 0).all()):
                at = int((~(token_weights >= 0)).nonzero()[0])
                raise ValueError(
                    f"token_weights: entry {at} is {float(token_weights[at])}, needs to be 0 or more"
                )
        weights = None if token_weights is None else token_weights.detach().float()
        return Responses(cu_seqlens, weights)


def check_per_token(name: str, values: Tensor | None, hidden: Tensor) -> None:
    """[N] of any float dtype, or None."""
    if values is not None:
        check_tensor(name, values, None, hidden.device)
        check_shape(name, values, (hidden.shape[0],), "[N], one for each row of hidden")
