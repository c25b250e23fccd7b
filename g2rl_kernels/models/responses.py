"""Runs a backbone on prompts and their responses; what several rows have in common is run once.

The responses of a group begin with the same prompt, and short ones are often equal. Where `LMHead.shares`
allows it, each distinct prompt is run once, and each distinct response against the prompt's cached keys and
values: the same function of the parameters, with the same gradients, from fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import out_of_memory
from ..head.features import pack_responses
from .lm_head import LMHead, base_model, evaluation_mode, some_tokens

PAYS = 0.9  # prompts are run alone if that leaves at most this share of the tokens
FEW = 2048  # scores of a row in one head


def response_hidden(
    head: LMHead, ids: Tensor, attention: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the backbone; returns hidden [N, d] that predict the response tokens [N], and cu_seqlens [B + 1].

    Args:
        head: of `find_head`.
        ids: [B, P + L] int64, prompts padded on the left and responses padded on the right.
        attention: [B, P + L], 0 on padding.
        mask: [B, L] bool, True for the N response tokens that count.
    """
    length = mask.shape[1]
    hidden = (_of_distinct_rows if head.shares else _of_rows)(head, ids, attention, length)
    return pack_responses(hidden, ids[:, -length:], mask)


def _of_rows(head: LMHead, ids: Tensor, attention: Tensor, length: int) -> Tensor:
    """[B, L, d] from one forward over all rows."""
    out = head.backbone(
        input_ids=ids, attention_mask=attention, position_ids=_positions(attention), use_cache=False
    )
    hidden: Tensor = out.last_hidden_state[:, -length - 1 : -1]
    return hidden


def _of_distinct_rows(head: LMHead, ids: Tensor, attention: Tensor, length: int) -> Tensor:
    """[B, L, d] from one forward over the distinct rows, or over distinct prompts and then over the rest."""
    (ids, attention), row = torch.stack([ids, attention]).unique(dim=1, return_inverse=True)
    width = ids.shape[1] - length
    (prompts, seen), prompt = torch.stack([ids, attention])[..., :width].unique(dim=1, return_inverse=True)
    ids, attention = ids[:, :-1], attention[:, :-1]  # no token follows the last one
    if prompts.numel() + ids[:, width:].numel() > PAYS * ids.numel():
        return _forward(head, ids, attention, use_cache=False).last_hidden_state[row, -length:]
    out = _forward(head, prompts, seen, use_cache=True)
    hidden = out.last_hidden_state[prompt, -1:]
    if length > 1:
        cache = out.past_key_values
        for layer in cache.layers:
            layer.update = partial(_repeated, layer, prompt)
        out = _forward(head, ids[:, width:], attention, past_key_values=cache, use_cache=True)
        hidden = torch.cat([hidden, out.last_hidden_state], 1)
    return hidden[row]


def _forward(head: LMHead, ids: Tensor, attention: Tensor, **cache: Any) -> Any:
    """The output for the newest tokens `ids` [R, n] of rows; attention: [R, P + n], of all their tokens."""
    positions = _positions(attention)[:, -ids.shape[1] :]
    given = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    if ids.shape[1] == 1:  # while sampling there is no backward pass
        return head.backbone(**given, **cache)
    with _attention(ids.device.type, head.output.weight.dtype, ids.shape[1] * attention.shape[1]):
        return head.backbone(**given, **cache)


def _attention(device: str, dtype: torch.dtype, scores: int) -> AbstractContextManager[Any]:
    """The backend of torch's attention: on CPUs the fused one's backward pass is slow for few bf16 scores."""
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and dtype == torch.bfloat16 and scores <= FEW:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _repeated(
    layer: Any, prompt: Tensor, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any
) -> tuple[Tensor, Tensor]:
    """`update` of a prompts' cache layer: repeats it for their responses, and stores nothing of those."""
    before = layer.keys[prompt], layer.values[prompt]
    return torch.cat([before[0], keys], -2), torch.cat([before[1], values], -2)


def _positions(attention: Tensor) -> Tensor:
    return (attention.cumsum(1) - 1).clamp(min=0)  # counted from the first token that is not padding


Choose = Callable[[Tensor, Tensor], Tensor]  # logits [R, V] and each response's row of them [B] -> tokens [B]


@torch.no_grad()
def continuations(
    head: LMHead, ids: Tensor, attention: Tensor, choose: Choose, ends: Sequence[int], pad: int, limit: int
) -> Tensor:
    """Responses [B, L] int64 to B prompts, token by token; prefixes that several of them share are run once.

    Args:
        head: of `find_head`, with `shares`.
        ids, attention: [B, P] int64, prompts padded on the left, and 0 on padding.
        choose: the next token of every response, also of those that have ended.
        ends: tokens that end a response. pad: fills the rest of it. limit: L is at most this.
    """
    (new, seen), row = torch.stack([ids, attention]).unique(dim=1, return_inverse=True)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    stops, cache = torch.tensor(ends, device=ids.device), None
    chosen: list[Tensor] = []
    while True:
        out = _forward(head, new, seen, past_key_values=cache, use_cache=True)
        logits = head.logits(out.last_hidden_state[:, -1])
        tokens = choose(logits, row).masked_fill(done, pad)
        chosen.append(tokens)
        done = done | torch.isin(tokens, stops)
        if len(chosen) == limit or bool(done.all()):
            return torch.stack(chosen, 1)
        size = logits.shape[-1]
        longer, inverse = (row * size + tokens)[~done].unique(return_inverse=True)
        row = torch.zeros_like(row).masked_scatter(~done, inverse)
        parent, new = longer // size, longer % size
        cache = out.past_key_values
        if len(parent) != len(seen) or not torch.equal(parent, torch.arange(len(seen), device=ids.device)):
            for layer in cache.layers:
                layer.batch_select_indices(parent)
        new, seen = new[:, None], torch.nn.functional.pad(seen[parent], (0, 1), value=1)


# --- which models ------------------------------------------------------------------------------------------


def may_share(model: Any, head: LMHead) -> bool:
    """Whether rows of this model may share what they have in common: True for `LMHead.shares`.

    The model is of transformers, its cache holds keys and values alone, no setting makes the keys of a prompt
    depend on what follows, and on four short rows both ways give the same states, so the same gradients.
    """
    config = base_model(model).config.get_text_config()
    if not type(head.backbone).__module__.startswith("transformers.models."):
        return False
    if any(kind in str(getattr(config, "rope_parameters", None)) for kind in ("dynamic", "longrope")):
        return False  # frequencies follow the longest position of a forward
    if getattr(config, "attention_chunk_size", None):
        return False
    try:
        with evaluation_mode(model), torch.no_grad():
            return _shares(base_model(model), head)
    except Exception as error:  # whatever a family's forward raises at a cache
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        return False


def _shares(model: Any, head: LMHead) -> bool:
    """Compares both ways on two prompts of different length with two responses each."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    tokens = some_tokens(model, head).to(model.get_input_embeddings().weight.device)
    first = head.backbone(input_ids=tokens, use_cache=True)
    plain = {DynamicLayer, DynamicSlidingWindowLayer}
    cache = first.past_key_values
    if type(cache) is not DynamicCache or not {type(layer) for layer in cache.layers} <= plain:
        return False
    width, answers = tokens.shape[1], tokens.flatten()[3:12].view(3, 3)
    ids = torch.cat([tokens.repeat_interleave(2, 0), answers[[0, 1, 1, 2]]], 1)
    attention = torch.ones_like(ids)
    attention[2:, :3] = 0
    attention[1, -1] = 0
    mask = attention[:, width:].bool()
    expected, _, _ = response_hidden(replace(head, shares=False), ids, attention, mask)
    found, _, _ = response_hidden(replace(head, shares=True), ids, attention, mask)
    drawn: list[Tensor] = []

    def force(logits: Tensor, row: Tensor) -> Tensor:
        drawn.append(logits[row])
        return ids[:, width + len(drawn) - 1]

    continuations(head, ids[:, :width], attention[:, :width], force, [], 0, mask.shape[1])
    logits = torch.stack(drawn, 1)[mask]
    return _agree(found, expected) and _agree(logits, head.logits(expected))


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether states [N, d] are the same but for rounding.

    In 16 bits their median counts: a router near a tie may send single tokens to other experts.
    """
    finite = theirs.isfinite() & ours.isfinite()
    a, b = (x.double().masked_fill(~finite, 0) for x in (ours, theirs))
    error = (a - b).norm(dim=-1) / b.norm(dim=-1)
    exact = theirs.dtype in (torch.float32, torch.float64)
    return bool((error.max() <= 1e-3) if exact else (error.median() <= 0.1))
