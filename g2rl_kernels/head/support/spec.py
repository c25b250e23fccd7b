"""Which ids each token is one of: `support=` of the public functions, in the form that operators take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...arguments import check_shape, check_tensor, may_read_values, sizes
from ..reference import in_bounds
from ..vocab_parallel import check_ids, local_tokens

SUPPORT_SCHEMA = "Tensor ids, Tensor offsets"


class Support(NamedTuple):
    """Token t is one of ids[offsets[t]:offsets[t+1]], in any order; K = len(ids).

    `whole` marks tokens whose list is empty and whose softmax is that of the whole vocabulary
    (`sampling_support` gives it). mixed.py takes them out; operators get the rest.
    """

    ids: Tensor  # [K]; outside [0, V): of other ranks
    offsets: Tensor  # [N + 1]
    whole: Tensor | None = None  # [N] bool

    def checked(self, hidden: Tensor, tokens: Tensor, V: int | None) -> Support:
        """The same with int64 ids and offsets, if it fits hidden [N, d] and tokens [N].

        Raises TypeError or ValueError naming support. Values are checked where they may be read. V: of the
        whole vocabulary; None where the weight is one rank's rows.
        """
        N, integers = hidden.shape[0], (torch.int64, torch.int32)
        ids, offsets, whole = self
        check_tensor("support: ids", ids, integers, hidden.device)
        if ids.dim() != 1:
            raise ValueError(f"support: ids: got shape {sizes(ids)}, needs [K], the lists of all tokens")
        check_tensor("support: offsets", offsets, integers, hidden.device)
        check_shape("support: offsets", offsets, (N + 1,), "[N + 1] for the N rows of hidden")
        if whole is not None:
            check_tensor("support: whole", whole, (torch.bool,), hidden.device)
            check_shape("support: whole", whole, (N,), "[N], one for each row of hidden")
        found = Support(ids.long().contiguous(), offsets.long().contiguous(), whole)
        if may_read_values(hidden):
            _check_offsets(found.offsets, ids.shape[0])
            _check_lists(found, tokens)
            if V is not None:
                check_ids(found.ids, V)
        return found

    def rows(self) -> Tensor:
        """The token of each entry, [K] int64; no wait for the device. Entries behind the last list are the
        last token's."""
        N = self.offsets.shape[0] - 1
        entries = torch.arange(self.ids.shape[0], device=self.ids.device)
        return torch.searchsorted(self.offsets, entries, right=True).sub_(1).clamp_(0, max(N - 1, 0))

    def for_backend(self, name: str) -> Support:
        """What an operator gives its backend, as values may be unchecked: `within`, or for "cpu" the same.

        Raises ValueError for "cpu" whose offsets are wrong; its C++ has the same checks.
        """
        if name == "cpu":
            _check_offsets(self.offsets, self.ids.shape[0])
            return self
        return self.within()

    def within(self) -> Support:
        """The same with offsets that stay within ids whatever they are, as they may come unchecked."""
        offsets = in_bounds(self.offsets, self.ids.shape[0])
        offsets[:1] = 0
        return self._replace(offsets=offsets)

    def local(self, V: int, group: str) -> Support:
        """The same with ids counted from this rank's first row; see vocab_parallel.local_tokens."""
        return self._replace(ids=local_tokens(self.ids, V, group)) if group else self

    def of(self, tokens: Tensor) -> Support:
        """The lists of some tokens, given by their rows [n] int64, with `whole` where it is known."""
        first, lengths = self.offsets[tokens], self.offsets.diff()[tokens]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        shift = torch.repeat_interleave(first - offsets[:-1], lengths)
        ids = self.ids[torch.arange(len(shift), device=shift.device) + shift]
        return Support(ids, offsets, None if self.whole is None else self.whole[tokens])


# What public functions take.
SupportArgument = Support | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | None


def support_of(value: Any) -> Support | None:
    """The argument `support` of a public function, not yet checked. Raises TypeError naming it."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) < 2:
        got = f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(
            f"support: got {got}, needs (ids [K], offsets [N + 1]) or what sampling_support gives"
        )
    return Support(*value[:3])


def facts_of(support: Support | None) -> dict[str, Tensor | None]:
    """What has to be the same on all ranks of a group (vocab_parallel.agree)."""
    return {
        f"support: {name}": None if support is None else getattr(support, name) for name in Support._fields
    }


def _check_offsets(offsets: Tensor, K: int) -> None:
    if int(offsets[0]) != 0 or int(offsets[-1]) != K:
        raise ValueError(
            f"support: offsets: got {int(offsets[0])} to {int(offsets[-1])}, needs 0 to {K}, the length of "
            "ids"
        )
    if bool((offsets.diff() < 0).any()):
        at = int((offsets.diff() < 0).nonzero()[0])
        raise ValueError(f"support: offsets: entry {at + 1} is below entry {at}; needs to rise from 0")


def _check_lists(support: Support, tokens: Tensor) -> None:
    """Each list holds its token and no id twice; a list is empty where `whole` says so, and nowhere else."""
    ids, offsets, whole = support
    lengths = offsets.diff()
    empty = lengths == 0
    if whole is not None:
        if bool((empty != whole).any()):
            at = int((empty != whole).nonzero()[0])
            raise ValueError(
                f"support: whole: entry {at} is {bool(whole[at])}, but its list has {int(lengths[at])} ids; "
                "needs an empty list exactly where whole is True"
            )
    elif bool(empty.any()):
        raise ValueError(
            f"support: token {int(empty.nonzero()[0])} has an empty list; needs its realised token at least, "
            "or `whole` as sampling_support gives it"
        )
    N, K = tokens.shape[0], ids.shape[0]
    rows = torch.repeat_interleave(torch.arange(N, device=ids.device), lengths, output_size=K)
    held = torch.zeros_like(empty).index_fill_(0, rows[ids == tokens[rows]], True)
    if not bool((held | empty).all()):
        at = int((~(held | empty)).nonzero()[0])
        raise ValueError(
            f"support: the list of token {at} lacks the realised token, {int(tokens[at])}; add it (a sampler "
            "that drew it had it)"
        )
    falls = (ids[1:] <= ids[:-1]).nonzero()[:, 0] + 1
    if bool(torch.isin(falls, offsets).all()):
        return  # ascending lists, as samplers' usually are
    order = torch.argsort(ids, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    twice = (ids[order].diff() == 0) & (rows[1:] == rows[:-1])
    if bool(twice.any()):
        at = int(order[int(twice.nonzero()[0])])
        raise ValueError(f"support: the list of token {int(rows[at])} has id {int(ids[at])} twice")
