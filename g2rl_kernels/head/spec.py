"""What a head is, and which tokens make up a response: two small objects that cross the Python code whole.

Operators cannot take them. At an operator's boundary they are flattened once, in the order of the schemas
below (`*head`, `*responses`), and put together again (`HeadSpec(*...)`). A new option of the head touches
this file, the C++ schemas (csrc/ops/head.cpp) and the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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

STATISTICS = ("sum_p_squared", "top_token")  # what `statistics=` may ask for

STATISTICS_SCHEMA = (
    "Tensor sum_p_squared, Tensor top_token, Tensor top_logprob"  # results; empty if not asked for
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HeadSpec(NamedTuple):
    """The LM head: z = softcap(logit_scale (W h + b)), softcap(x) = c tanh(x / c).

    p = softmax(z / temperature). Public functions build it from their arguments; `checked` gives the form
    that operators and backends take.
    """

    weight: Tensor  # [V, d], dtype of hidden
    bias: Tensor | None = None  # [V]; -inf takes an entry out of the vocabulary
    temperature: Any = 1.0  # float. Before `checked`: float, or a tensor [N] of one a token
    logit_scale: float = 1.0
    logit_softcap: float | None = 0.0  # c; 0: no softcap. Before `checked`: None, as public functions have it
    # [N], one a token, in place of `temperature`, which is then 1; float32 (float64 for a float64 hidden)
    temperatures: Tensor | None = None
    low_hidden: Tensor | None = None  # [N, r], scaling A h of `lora`: B low_hidden is added to W h (lora.py)
    low_weight: Tensor | None = None  # [V, r], B of `lora`; backends get both in the dtype of hidden

    def checked(self, hidden: Tensor, tokens: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> HeadSpec:
        """The same with plain numbers, if hidden [N, d], tokens [N] and the head fit together.

        Raises TypeError or ValueError naming the argument. Values of temperatures are checked where they may
        be read; values of other tensors are not.
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
        check_scale("logit_scale", logit_scale)
        if logit_softcap is not None:
            check_scale("logit_softcap", logit_softcap, "; None for no softcap")
        name = "logit_scale" if logit_softcap is None else "logit_softcap"
        size = float(logit_softcap or logit_scale)
        spec = HeadSpec(weight, bias, 1.0, float(logit_scale), float(logit_softcap or 0.0))
        if isinstance(temperature, Tensor):
            return spec._replace(temperatures=_checked_temperatures(temperature, hidden, name, size))
        check_scale("temperature", temperature)
        check_scale(f"{name} / temperature", size / temperature)
        return spec._replace(temperature=float(temperature))

    def temperature_of_tokens(self, dtype: torch.dtype) -> Any:
        """The number, or [N, 1] in `dtype`: what logits [N, V] are divided by."""
        return self.temperature if self.temperatures is None else self.temperatures.to(dtype)[:, None]

    def detached(self) -> HeadSpec:
        """The same without gradients."""
        weight, bias, temperature, logit_scale, logit_softcap, *others = self
        bias, *others = (None if t is None else t.detach() for t in (bias, *others))
        return HeadSpec(weight.detach(), bias, temperature, logit_scale, logit_softcap, *others)

    def rounded(self) -> HeadSpec:
        """The same with its low-rank part in the dtype of weight, as backends take it."""
        if self.low_hidden is None or self.low_weight is None:
            return self
        dtype = self.weight.dtype
        return self._replace(low_hidden=self.low_hidden.to(dtype), low_weight=self.low_weight.to(dtype))

    @property
    def rank(self) -> int:
        """r of the low-rank part; 0 without."""
        return 0 if self.low_weight is None else self.low_weight.shape[1]

    def bytes_of_logit(self, dtype: torch.dtype) -> int:
        """Bytes of a logit that is kept for the backward pass: 2 where all gradients are bfloat16, but not
        behind a softcap, whose slope needs more; else 4. dtype: of hidden."""
        rounded = dtype == torch.bfloat16 and (self.bias is None or self.bias.dtype != torch.float32)
        return 2 if rounded and not self.logit_softcap else 4

    def at(self, rows: slice | Tensor) -> HeadSpec:
        """The same for some of the tokens; rows: a slice or indices."""
        temperatures, low_hidden = (
            None if t is None else t[rows] for t in (self.temperatures, self.low_hidden)
        )
        return self._replace(temperatures=temperatures, low_hidden=low_hidden)


def _checked_temperatures(values: Tensor, hidden: Tensor, name: str, size: float) -> Tensor:
    """Temperatures [N] as `HeadSpec` holds them. `name`, `size`: what they divide, with the same bounds."""
    check_per_token("temperature", values, hidden)
    if values.requires_grad:
        raise ValueError(
            "temperature: got a tensor that requires grad, needs one without; it gets no gradient"
        )
    found = values.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32).contiguous()
    if may_read_values(hidden):
        for what, scale in (("temperature", found), (f"{name} / temperature", size / found)):
            outside = ~((scale >= 1e-8) & (scale <= 1e8))
            if bool(outside.any()):
                at = int(outside.nonzero()[0])
                raise ValueError(
                    f"{what}: entry {at} is {float(scale[at]):g}, needs a number from 1e-8 to 1e8"
                )
    return found


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


def asked_for(
    names: Sequence[str], sum_p_squared: Tensor, top_token: Tensor, top_logprob: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `statistics` asks for; None for the rest."""
    squares, top = (name in names for name in STATISTICS)
    return sum_p_squared if squares else None, top_token if top else None, top_logprob if top else None


def check_statistics(names: Any) -> None:
    if not isinstance(names, (tuple, list)):
        raise TypeError(f"statistics: got {names!r}, needs a tuple of names")
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"statistics: got {name!r}, needs any of {', '.join(map(repr, STATISTICS))}")


def check_per_token(name: str, values: Tensor | None, hidden: Tensor) -> None:
    """[N] of any float dtype, or None."""
    if values is not None:
        check_tensor(name, values, None, hidden.device)
        check_shape(name, values, (hidden.shape[0],), "[N], one for each row of hidden")
