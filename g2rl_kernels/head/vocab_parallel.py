"""Vocabulary-parallel heads: each rank of a process group holds consecutive rows of weight and bias.

All ranks have the same hidden, tokens and options, and end with the same bits. Over the network go, for N
tokens, S responses and hidden size d,

    int64   [world]         number of rows of each rank               local_tokens
    float   [world, 4, N]   m, s, u and z_y of each token             over_ranks
    int64   [world, 2, N]   v at m, and y; only for statistics, which make the above [world, 5, N]
    float32 [S, d]          features, summed over ranks               features._over_ranks
    float32 [N, d]          hidden's gradient, summed, then rounded   logprobs._gradients

The ranks' statistics are joined as strips of the vocabulary, in rank order. The realised token is
left out of all sums and lives on one rank only, so 1 - p keeps its digits here too. Features and gradients
are sums over the vocabulary: once the normaliser is known, each rank adds up its own rows.

Operators take the group's name, which torch.compile can keep, and "" where there is no group. Where values
are checked, each rank also sends MESSAGE bytes first (`agree`); nothing else waits for the device.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from .._ops import qualified
from ..arguments import check_token_values, may_read_values, sizes
from . import tiled
from .spec import HeadSpec

ELSEWHERE, NOWHERE = -1, -2  # a token in another rank's rows; in no rank's
CHUNK = 2**20  # tokens times ranks whose statistics are gathered at a time
REDUCED = 2**22  # numbers that are summed over ranks at a time
MESSAGE = 4096  # bytes that each rank sends before it begins

Result = TypeVar("Result")


# --- before: all ranks go on, or all raise ------------------------------------------------------------------


def checked(
    check: Callable[..., Result], process_group: Any,
    hidden: Tensor, tokens: Tensor, head: HeadSpec, facts: dict[str, Any],
) -> tuple[Result, Tensor, str]:  # fmt: skip
    """What `check` returns, the tokens that operators take, and the group's name.

    Without a group, check(whole=True), the tokens as they are and "". With one, `agree`, and local tokens.
    """
    if process_group is None:
        return check(whole=True), tokens, ""
    result = agree(check, process_group, hidden, tokens, head, facts)
    group = process_group.group_name
    return result, local_tokens(tokens, head.weight.shape[0], group), group


def agree(
    check: Callable[[], Result],
    process_group: Any,
    hidden: Any,
    tokens: Any,
    head: HeadSpec,
    facts: dict[str, Any],
) -> Result:
    """Runs `check` on this rank; raises the same error on every rank of the group.

    Where values may be read, each rank sends what it found: an error on one rank is then raised by all, and
    so is a difference between ranks in what has to be the same, which is everything but the rows of weight
    and bias (the values of hidden are not compared). Elsewhere a rank that raises leaves the others waiting
    for it, up to the group's timeout.

    Args:
        check: looks at this rank's arguments.
        facts: what else has to be the same, by name.

    Raises:
        TypeError, ValueError, ImportError: `check` raised it, on any rank; ranks differ; process_group is not
            a group, or not one of this process's; a token lies outside the vocabulary of all ranks.
    """
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this process is no member of it; call on its members only")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: got {type(process_group).__name__}, needs a "
            "torch.distributed.ProcessGroup; a DeviceMesh has get_group()"
        )
    tensors = [t for t in (hidden, head.weight, tokens) if isinstance(t, Tensor)]
    if tensors and not may_read_values(tensors[0]):
        return check()
    problem: Exception | None = None
    try:
        result = check()
        facts = {"function": facts["function"], "hidden": hidden, "tokens": tokens, **head._asdict(), **facts}
        message = {"rows": len(head.weight), **{name: _fact(name, value) for name, value in facts.items()}}
    except (TypeError, ValueError, ImportError) as error:
        problem, message = error, {"error": type(error).__name__, "text": str(error)[:500]}
    messages = _exchange(message, process_group, tensors[0].device if tensors else torch.device("cpu"))
    for rank, other in enumerate(messages):
        if "error" in other:
            kind = {"TypeError": TypeError, "ImportError": ImportError}.get(other["error"], ValueError)
            raise kind(f"{other['text']} (rank {rank} of process_group)") from problem
    for rank, other in enumerate(messages):
        for name, value in messages[0].items():
            if name != "rows" and other.get(name) != value:
                raise ValueError(
                    f"{name}: rank {rank} of process_group has {other.get(name)}, rank 0 has {value}; all "
                    "ranks need the same"
                )
    V = sum(other["rows"] for other in messages)
    check_token_values(tokens, V)
    if facts.get("support: ids") is not None:
        check_ids(facts["support: ids"], V)
    return result


def check_ids(ids: Tensor, V: int) -> None:
    """Raises ValueError unless all ids of `support` lie in the vocabulary."""
    low, high = (int(t) for t in torch.aminmax(ids)) if ids.numel() else (0, 0)
    if low < 0 or high >= V:
        at = int(((ids < 0) | (ids >= V)).nonzero()[0])
        raise ValueError(f"support: ids: entry {at} is {int(ids[at])}, needs to be in [0, {V})")


def _fact(name: str, value: Any) -> str:
    if name == "lora" and value is not None:
        A, B, scaling = value
        trained = ", requires grad" if A.requires_grad and torch.is_grad_enabled() else ""
        return f"A {_fact('A', A)}{trained}, B {_fact('bias', B)}, scaling {scaling!r}"
    if not isinstance(value, Tensor):
        return repr(value)
    if name in ("weight", "bias"):  # their rows differ
        return str(value.dtype)
    if name == "hidden":
        trained = ", requires grad" if value.requires_grad and torch.is_grad_enabled() else ""
        return f"{sizes(value)} {value.dtype}{trained}"
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{sizes(value)} {value.dtype} of checksum {zlib.crc32(content):08x}"


def _exchange(
    message: dict[str, Any], group: dist.ProcessGroup, device: torch.device
) -> list[dict[str, Any]]:
    text = json.dumps(message).encode().ljust(MESSAGE)
    mine = torch.tensor([*text], dtype=torch.uint8, device=device)
    return [json.loads(bytes(other.tolist())) for other in _gathered(mine, group)]


# --- tokens and statistics ----------------------------------------------------------------------------------


def _members(group: str) -> dist.ProcessGroup:
    resolve: Any = distributed_c10d._resolve_process_group  # some versions of torch want a subtype of str
    return resolve(group)


def _gathered(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[world, *mine.shape], in rank order."""
    everyone = mine.new_empty(group.size(), *mine.shape)
    dist.all_gather([*everyone], mine, group=group)
    return everyone


def all_reduce(values: Tensor, group: str) -> None:
    """Replaces values, contiguous, by their sum over all ranks; does nothing without a group.

    Each number is summed in rank order: rank r adds up the r-th part of all ranks' values, then all gather
    the sums. torch's own all_reduce sends as much, and its order depends on where in a tensor a number lies.
    """
    if not group:
        return
    members = _members(group)
    world, flat = members.size(), values.view(-1)
    for rows in tiled.slices(0, flat.numel(), REDUCED):
        n = rows.stop - rows.start
        size = -(-n // world)
        parts = flat.new_zeros(world * size)
        parts[:n] = flat[rows]
        mine = torch.empty_like(parts)
        dist.all_to_all_single(mine, parts, group=members)
        total = mine[:size].clone()
        for part in mine.view(world, size)[1:]:
            total += part
        flat[rows] = _gathered(total, members).flatten()[:n]


@torch.library.custom_op(qualified("local_tokens"), mutates_args=())
def local_tokens(tokens: Tensor, V: int, group: str) -> Tensor:
    """From tokens [N] counted over the rows of all ranks to the index among this rank's V rows, ELSEWHERE or
    NOWHERE."""
    members = _members(group)
    end = _gathered(tokens.new_full((1,), V), members).flatten().cumsum(0)
    local = tokens - (end[members.rank()] - V)
    known = (tokens >= 0) & (tokens < end[-1])
    return torch.where((local >= 0) & (local < V), local, torch.where(known, ELSEWHERE, NOWHERE))


@local_tokens.register_fake
def _(tokens: Tensor, V: int, group: str) -> Tensor:
    return torch.empty_like(tokens)


def over_ranks(
    partial: Tensor, target: Tensor, tokens: Tensor, top: Tensor, V: int, group: str
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The arguments of `finish` for all ranks, [world, 3 or 4, n], [n], [n] and [world, n or 0], for n tokens
    at a time, from this rank's `statistics`, [1, 3 or 4, N], [N] and [1, N or 0].

    tokens [N] are local, of this rank's V; a token in no rank's rows gets NaN for its logit.
    """
    members = _members(group)
    mine = torch.cat([partial[0], target[None]])
    mine[-1].masked_fill_(tokens == NOWHERE, torch.nan)
    more = partial.shape[1] == 4
    if more:  # counted over all ranks
        end = _gathered(tokens.new_full((1,), V), members).flatten().cumsum(0)
        begin = end[members.rank()] - V
        top = torch.where(top < 0, top, top + begin)
        tokens = torch.where((tokens >= 0) & (tokens < V), tokens + begin, ELSEWHERE)
    for rows in tiled.slices(0, len(tokens), CHUNK // members.size()):
        everyone = _gathered(mine[:, rows].contiguous(), members)
        y, v = tokens[rows], top.new_empty(members.size(), 0)
        if more:
            indices = _gathered(torch.stack([top[0, rows], y]), members)
            y, v = indices[:, 1].amax(0), indices[:, 0]
        yield everyone[:, :-1], everyone[:, -1].amax(0), y, v  # the logit is -inf on all ranks but one
