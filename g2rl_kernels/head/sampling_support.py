"""`sampling_support`: the vocabulary entries that a sampler with top_k, top_p or min_p could have drawn.

One pass over the vocabulary, tile by tile as in tiled.py, keeps each token's logsumexp and its likeliest
entries. The sampler's rules are then applied to these. Samplers rank logits in float32, and so does this
file. An entry is one int64, its logit's bits above its place among equals: no order is left to chance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_choice, check_token_values
from . import reference
from .lora import Lora, with_lora
from .spec import DTYPES, HeadSpec
from .tiled import TOKENS, _blocks, _entries, _index, elements, slices

RULES = ("transformers", "vllm")
TIES = 64  # entries that are looked at beyond top_k, before all up to `limit` are
REALISED = 1 << 31  # sets the realised token before others of the same logit


class SamplingSupport(NamedTuple):
    """What `sampling_support` returns; without gradients."""

    ids: Tensor  # [K] int32: token t is one of ids[offsets[t]:offsets[t + 1]], rising
    offsets: Tensor  # [N + 1] int64
    whole: Tensor  # [N] bool: the list is empty and stands for the whole vocabulary
    added: Tensor  # [N] bool: tokens[t] is listed although the rules leave it out


class _Settings(NamedTuple):
    """The sampler's settings for a vocabulary of V; 0, 1.0 and 0.0 where they leave out nothing."""

    top_k: int
    top_p: float
    min_p: float
    limit: int
    rules: str
    logits_dtype: torch.dtype | None

    @property
    def exact_k(self) -> bool:
        """Whether at most top_k entries stay, whatever their logits."""
        return self.rules == "vllm" and self.top_k > 0

    def sizes(self, V: int) -> list[int]:
        """How many of the likeliest entries to look at; the second number where the first were too few."""
        if self.exact_k:
            return [self.top_k]
        most = min(V, max(self.limit, self.top_k) + 1)
        return sorted({min(most, self.top_k + TIES), most}) if self.top_k else [most]


@torch.no_grad()
def sampling_support(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *,
    top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    limit: int = 1024,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0, logit_scale: float = 1.0, logit_softcap: float | None = None,
    lora: Lora | None = None,
    rules: str = "transformers", logits_dtype: torch.dtype | None = None,
) -> SamplingSupport:  # fmt: skip
    """The vocabulary entries that a sampler with these settings could have drawn in place of tokens[t].

    A truncating sampler draws from the softmax over these entries alone. The lists come from logits that are
    computed again, for the head described at `head_features`, without a tensor of N x V. An entry whose
    decision lies within rounding may be decided otherwise than by the sampler.

    In rules' order, with p the softmax of z / temperature over what is left, likeliest first:

        "transformers"  top_k: entries at least as likely as the k-th; top_p: entries before which the sum of
                        p is less than top_p; min_p: entries of p >= min_p max p
        "vllm"          min_p: as above; top_k: the first k; top_p: as above

    The likeliest entry always stays. Where a cut goes through equal logits, as many of them stay as with the
    sampler, which keeps their probability mass: first tokens[t] if it is one of them, then the lowest ids
    ("vllm", as it does) or the highest ("transformers", where torch.sort may choose others). A row of equal
    logits is cut like any other; vLLM keeps it whole.

    "transformers" is what `generate` of transformers 5.23 does, "vllm" the native GPU sampler of vLLM 0.32,
    whose masks `return_sampling_mask` gives; docs/sampling.md has the other samplers of vLLM.

    Args:
        hidden: [N, d] float32, bfloat16, float16 or float64, as in `head_features`.
        weight: [V, d], dtype of hidden.
        tokens: [N] int64 in [0, V): the realised tokens.
        top_k: 0 or more; 0 and V or more leave out nothing.
        top_p: in (0, 1]; 1 leaves out nothing.
        min_p: in [0, 1]; 0 leaves out nothing.
        limit: longest list, 1 or more. A token with more entries is flagged in `whole`. Fewer tokens are
            worked on at a time where limit or top_k is large, so that memory stays bounded.
        bias, temperature, logit_scale, logit_softcap, lora: see `head_features`. -inf in bias takes an entry
            out of every list.
        rules: "transformers" or "vllm".
        logits_dtype: torch.bfloat16 or torch.float16 where the sampler's logits are rounded to it before it
            divides by the temperature, as those of a 16-bit model are unless its head is float32. Many are
            equal then. None: logits are not rounded.

    Returns:
        SamplingSupport(ids [K] int32, offsets [N + 1] int64, whole [N] bool, added [N] bool). The list of
        token t, ids[offsets[t]:offsets[t + 1]], rises, holds at most `limit` entries, and among them
        tokens[t]: where the rules leave it out it is added, and added[t] is True. The share of such tokens
        tells how far the settings, or the logits, are from the sampler's. whole[t] is True, and the list
        empty, where it would be longer than limit, where no setting leaves out anything, and where a logit
        is NaN or +inf or all are -inf.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit, a token lies outside [0, V), or a setting is out of range.

    The size of ids depends on values: on a GPU this waits for the device, and checks tokens too.
    """
    for name, value, least in (("top_k", top_k, 0), ("limit", limit, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {type(value).__name__}, needs a whole number")
        if value < least:
            raise ValueError(f"{name}: got {value}, needs {least} or more")
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise TypeError(f"{name}: got {type(share).__name__}, needs a number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, needs a share in (0, 1]; 1 leaves out nothing")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: got {min_p}, needs a share in [0, 1]; 0 leaves out nothing")
    check_choice("rules", rules, RULES)
    if logits_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"logits_dtype: got {logits_dtype!r}, needs torch.bfloat16, torch.float16 or None")
    head = HeadSpec(weight, bias, temperature, logit_scale, logit_softcap)
    head = head.checked(hidden, tokens, (*DTYPES, torch.float64))
    head = with_lora(head, hidden, lora).detached().rounded()
    N, V = len(hidden), len(weight)
    check_token_values(tokens, V)
    settings = _Settings(top_k if top_k < V else 0, top_p, min_p, limit, rules, logits_dtype)
    if settings[:3] == (0, 1, 0):
        none, everything = tokens.new_zeros(N), tokens.new_ones(N, dtype=torch.bool)
        return SamplingSupport(none[:0].int(), tokens.new_zeros(N + 1), everything, ~everything)
    found = [(tokens[:0].int(), tokens[:0], *[tokens.new_zeros(0, dtype=torch.bool)] * 2)]
    step = min(TOKENS, max(1, elements(hidden) // settings.sizes(V)[-1]))
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in slices(0, N, step):
            found.append(_lists(hidden[rows], tokens[rows], head.at(rows), settings))
    ids, counts, whole, added = (torch.cat(part) for part in zip(*found))
    return SamplingSupport(ids, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), whole, added)


def _lists(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists of n tokens, one behind the other; their lengths, `whole` and `added`, [n] each."""
    V, token = len(head.weight), tokens[:, None]
    hidden = hidden.to(reference.accumulation_dtype(hidden))
    for size in settings.sizes(V):
        z, ids, lse = _likeliest(hidden, tokens, head, size, settings)
        keep = _kept(z, lse, hidden, head, settings)
        if not keep[:, -1].any():
            break
    added = ~(keep & (ids == token)).any(1)
    unknown = ~(lse.isfinite() & z[:, 0].isfinite())
    whole = unknown | (keep.sum(1) + added > settings.limit)
    added &= ~whole
    listed = torch.cat([ids.masked_fill(~keep, V), token.masked_fill(~added[:, None], V)], dim=1)
    listed = listed.masked_fill(whole[:, None], V).sort(1).values
    inside = listed < V
    return listed[inside].int(), inside.sum(1), whole, added


# --- the likeliest entries ----------------------------------------------------------------------------------


def _logits(hidden: Tensor, head: HeadSpec, block: slice, settings: _Settings) -> Tensor:
    """z / temperature of a block of the vocabulary, as the sampler's, in the dtype of hidden."""
    z, _ = reference.logits(hidden, _entries(head, block)._replace(temperature=1.0, temperatures=None))
    if settings.logits_dtype is not None:
        z = z.to(settings.logits_dtype).to(z.dtype)
    return z / head.temperature_of_tokens(z.dtype)


def _likeliest(
    hidden: Tensor, tokens: Tensor, head: HeadSpec, size: int, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The `size` likeliest entries of each token, logits [n, size] float32 and ids [n, size] int64, likeliest
    first and equal ones in the order in which they are kept; and the logsumexp [n] float64."""
    n, V = len(hidden), len(head.weight)
    keys = torch.empty((n, 0), dtype=torch.int64, device=hidden.device)
    lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=hidden.device)
    places = torch.arange(V, device=hidden.device)
    if settings.rules == "vllm":
        places = places.flip(0)
    for block in _blocks(hidden, 0, V):
        z = _logits(hidden, head, block, settings)
        lse = torch.logaddexp(lse, z.logsumexp(1).double())
        found = _rising(z).long().bitwise_left_shift_(32).add_(places[block])
        index, inside = _index(tokens, block)
        found.scatter_add_(1, index, torch.where(inside, REALISED, 0))
        keys = torch.cat([keys, found], dim=1)
        keys = keys.topk(min(size, keys.shape[1]), dim=1, sorted=False).values
    keys = keys.sort(1, descending=True).values
    places = keys & (REALISED - 1)
    ids = V - 1 - places if settings.rules == "vllm" else places
    return _flipped((keys >> 32).int()).view(torch.float32), ids, lse


def _rising(z: Tensor) -> Tensor:
    """int32 that rise with z in float32; the same for 0 and -0."""
    return _flipped((z.float() + 0.0).view(torch.int32))


def _flipped(bits: Tensor) -> Tensor:
    """From the bits of a float32 to an integer of the same order, or back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


# --- the samplers' rules ------------------------------------------------------------------------------------


def _kept(z: Tensor, lse: Tensor, hidden: Tensor, head: HeadSpec, settings: _Settings) -> Tensor:
    """Which of the likeliest entries stay, [n, size] bool: the first so many of each row.

    z [n, size] falls. Entries beyond it are as likely as its last one, or less.
    """
    top_k, top_p, min_p, *_ = settings
    more = z.shape[1] < len(head.weight) and not settings.exact_k
    top = z[:, :1].double()
    likely = z.double() >= top + (math.log(min_p) if min_p else -math.inf)
    keep, floor = z > -torch.inf, None
    if settings.rules == "vllm":
        keep &= likely
        if min_p:
            floor = top + math.log(min_p)
    elif top_k:
        floor = z[:, top_k - 1 : top_k].double()
        keep &= z >= floor
    if top_p < 1:
        p = (z.double() - top).exp().masked_fill(~keep, 0.0)
        total = p.sum(1, keepdim=True)
        beyond = keep[:, -1:]
        if more and bool(beyond.any()):
            everything = (lse[:, None] - top).exp()
            if floor is not None:
                everything = _sum_above(floor, top, hidden, head, settings)
            total = torch.where(beyond, everything, total)
        keep &= p.cumsum(1) - p < top_p * total
    return keep & likely


def _sum_above(floor: Tensor, top: Tensor, hidden: Tensor, head: HeadSpec, settings: _Settings) -> Tensor:
    """sum of exp(z - top) over the entries of at least `floor`, [n, 1] float64: logits are computed again."""
    total = torch.zeros_like(top)
    for block in _blocks(hidden, 0, len(head.weight)):
        z = _logits(hidden, head, block, settings).float().double()
        total += (z - top).exp().masked_fill(z < floor, 0.0).sum(1, keepdim=True)
    return total
