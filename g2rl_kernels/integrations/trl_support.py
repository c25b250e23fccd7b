"""The ids that sampling kept, response by response, as they travel with the batches of TRL's trainer.

They are found once for a generation batch (trl_masks.py). TRL shuffles and splits a batch by rows, lists as
well as tensors, so they are a list with one `KeptRow` for each response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..head.sampling_support import SamplingSupport
from ..head.support.spec import Support

KEPT = "g2rl_kept"  # in TRL's batches: one KeptRow for each response
GIVEN = "sampling_mask"  # what a rollout_func may return


class KeptRow(NamedTuple):
    """Which ids each of a response's L tokens is one of, as `g2.sampling_support` gives them."""

    ids: Tensor  # [K] int32: token t is one of ids[offsets[t]:offsets[t + 1]]
    offsets: Tensor  # [L + 1] int64
    whole: Tensor  # [L] bool: the list is empty and stands for the whole vocabulary
    added: Tensor  # [L] bool: recomputation leaves the token out, and it was added


def rows_of(found: SamplingSupport, lengths: Sequence[int]) -> list[KeptRow]:
    """The rows of B responses whose tokens are packed; lengths: B numbers of tokens."""
    ends = list(accumulate(lengths, initial=0))
    at = found.offsets[torch.tensor(ends, device=found.offsets.device)].tolist()
    return [
        KeptRow(
            found.ids[at[row] : at[row + 1]],
            found.offsets[first : last + 1] - at[row],
            found.whole[first:last],
            found.added[first:last],
        )
        for row, (first, last) in enumerate(pairwise(ends))
    ]


def rows_of_lists(
    lists: list[list[list[int]]], completions: list[list[int]], V: int, device: torch.device
) -> list[KeptRow]:
    """Rows of a sampler's own lists: for each response, for each of its tokens, the ids it is one of.

    This is the form of vLLM's `CompletionOutput.sampling_mask.token_ids`. An empty list stands for the whole
    vocabulary, which has V entries. Raises ValueError where lists do not fit the completions' token ids, or
    hold an id twice or outside of the vocabulary.
    """
    if len(lists) != len(completions):
        raise ValueError(f"{GIVEN}: got {len(lists)} responses, needs {len(completions)}, one for each")
    rows = []
    for number, (kept, tokens) in enumerate(zip(lists, completions)):
        if len(kept) != len(tokens):
            raise ValueError(
                f"{GIVEN}: response {number} has {len(kept)} lists, needs {len(tokens)}, one for each token"
            )
        for place, (ids, token) in enumerate(zip(kept, tokens)):
            _check_list(ids, token, V, f"{GIVEN}: list {place} of response {number}")
        counts = torch.tensor([len(ids) for ids in kept], dtype=torch.int64, device=device)
        entries = torch.tensor([one for ids in kept for one in ids], dtype=torch.int32, device=device)
        offsets = pad(counts.cumsum(0), (1, 0))
        rows.append(KeptRow(entries, offsets, counts == 0, torch.zeros_like(counts, dtype=torch.bool)))
    return rows


def _check_list(ids: list[int], token: int, V: int, name: str) -> None:
    """Checks what a sampler gives: on a GPU the ops check no values."""
    if len(ids) == 0:
        return
    if min(ids) < 0 or max(ids) >= V:
        wrong = next(one for one in ids if not 0 <= one < V)
        raise ValueError(f"{name} has id {wrong}, needs 0 to V - 1 = {V - 1}")
    if token not in ids:
        raise ValueError(
            f"{name} lacks its token, {token}: a sampler that drew it had it; an empty list stands for the "
            "whole vocabulary"
        )
    if len(set(ids)) < len(ids):
        wrong = next(one for place, one in enumerate(ids) if one in ids[:place])
        raise ValueError(f"{name} has id {wrong} twice, needs each id once")


def support_of(rows: Sequence[KeptRow], mask: Tensor) -> Support:
    """`support` of the ops for the tokens that a forward scores, packed.

    mask: [B, L] bool, the tokens; of each row the first ones, or none where TRL masks a truncated response.
    """
    ids, lengths, whole = [], [], []
    for row, count in zip(rows, mask.sum(1).tolist(), strict=True):
        ids.append(row.ids if count == len(row.whole) else row.ids[: int(row.offsets[count])])
        lengths.append(row.offsets.diff()[:count])
        whole.append(row.whole[:count])
    offsets = pad(torch.cat(lengths).cumsum(0), (1, 0))
    return Support(torch.cat(ids), offsets, torch.cat(whole))


def next_support(rows: Iterator[KeptRow] | None, mask: Tensor) -> Support | None:
    """`support_of` the next rows, as many as mask [B, L] has; None where there are no rows."""
    return None if rows is None else support_of([*islice(rows, len(mask))], mask)
