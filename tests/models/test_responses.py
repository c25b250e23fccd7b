"""Rows that share prompts and responses give the hidden states and gradients of rows that are run alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels.models.lm_head import LMHead
from g2rl_kernels.models.responses import continuations, may_share, response_hidden

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'g2rl-kernels[train]'"
)

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
WINDOW: dict[str, Any] = {"head_dim": 16, "sliding_window": 4}
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "untied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "windows": ("Mistral", {**WINDOW}),
    "softcaps, windows": (
        "Gemma2",
        {**WINDOW, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
    ),
    "two rotations, windows": ("Gemma3", {**WINDOW}),
    "scale": ("Cohere", {"logit_scale": 0.25}),
    "bias": ("Phi", {"num_key_value_heads": 2}),
    "learned positions": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "experts": (
        "Qwen3Moe",
        {"head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
}


def make(family: str, settings: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    class_ = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return getattr(transformers, class_)(getattr(transformers, name)(**{**SIZES, **settings, **more})).eval()


def rollout(cut: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of four responses to prompts of 9, 5 and 7 tokens, without the first `cut` rows."""
    g = torch.Generator().manual_seed(1)
    prompts, lengths = (9, 5, 7), (5, 2, 5, 1, 4, 4, 3, 5, 2, 2, 1, 3)
    ids, attention = torch.zeros(12, 14, dtype=torch.int64), torch.zeros(12, 14, dtype=torch.int64)
    for group, width in enumerate(prompts):
        ids[4 * group : 4 * group + 4, 9 - width : 9] = torch.randint(2, 60, (width,), generator=g)
    for row, length in enumerate(lengths):
        ids[row, 9 : 9 + length] = torch.randint(2, 60, (length,), generator=g)
        attention[row, 9 - prompts[row // 4] : 9 + length] = 1
    ids[5], ids[9] = ids[4], ids[8]  # equal responses
    return ids[cut:], attention[cut:], attention[cut:, 9:].bool()


def states_and_gradients(model: Any, head: LMHead, batch: tuple[Tensor, ...]) -> list[Tensor]:
    hidden, _, _ = response_hidden(head, *batch)
    model.zero_grad()
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weights.to(hidden.dtype)).sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def apart(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("name", SHARING)
def test_states_and_gradients_are_those_of_rows_alone(name: str) -> None:
    """In float32 to its rounding; in bfloat16 as near to float32 as rows alone are."""
    model = make(*SHARING[name])
    head = g2.find_head(model)
    assert may_share(model, head)
    heads = replace(head, shares=False), replace(head, shares=True)
    model.bfloat16()
    rounded = [states_and_gradients(model, one, rollout()) for one in heads]
    model.float()
    exact, found = (states_and_gradients(model, one, rollout()) for one in heads)
    assert len(exact) > 5
    assert max(apart(found, exact)) < 2e-5
    if name != "experts":  # a rounded router sends tokens elsewhere
        alone, shared = (apart(one, exact) for one in rounded)
        assert max(alone) > 1e-3
        assert all(a <= 2 * b + 2e-3 for a, b in zip(shared, alone))


def test_autocast() -> None:
    model = make(*SHARING["tied"])
    head = g2.find_head(model)
    batch = rollout()
    exact = states_and_gradients(model, replace(head, shares=False), batch)
    rounded = []
    for shares in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            rounded.append(states_and_gradients(model, replace(head, shares=shares), batch))
    alone, shared = (max(apart(one, exact)) for one in rounded)
    assert shared <= 1.5 * alone
    assert alone > 1e-3


def tokens_run(head: LMHead, batch: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    """The shapes [rows, tokens] of the forwards."""
    shapes: list[tuple[int, ...]] = []
    hook = head.backbone.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    response_hidden(head, *batch)
    hook.remove()
    return shapes


def test_what_is_run() -> None:
    model = make(*SHARING["tied"])
    head = g2.find_head(model)
    ids, attention, mask = rollout()
    assert tokens_run(head, (ids, attention, mask)) == [(10, 14)]
    head.shares = True
    assert tokens_run(head, (ids, attention, mask)) == [(3, 9), (8, 4)]
    assert tokens_run(head, (ids[:1], attention[:1], mask[:1])) == [(1, 13)]  # nothing is shared
    assert tokens_run(head, (ids[2:4], attention[2:4], mask[2:4])) == [(1, 13)]  # equal rows
    assert tokens_run(head, (ids[2::4], attention[2::4], mask[2::4])) == [(2, 13)]  # no prompt twice
    one = ids[:, :10], attention[:, :10], mask[:, :1]  # one token each: its states are the prompt's
    assert tokens_run(head, one) == [(3, 9)]
    found, _, _ = response_hidden(head, *one)
    expected, _, _ = response_hidden(replace(head, shares=False), *one)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "state space": ("Mamba", {}),
    "hybrid": ("Qwen3_5", {"head_dim": 16}),
    "frequencies by length": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_share(name: str) -> None:
    family, settings = REFUSED[name]
    config = "Qwen3_5TextConfig" if family == "Qwen3_5" else f"{family}Config"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, config)(**{**SIZES, **settings})
    ).eval()
    assert not may_share(model, g2.find_head(model))


def test_other_peoples_code_does_not_share() -> None:
    model = make("Llama", {})
    head = g2.find_head(model)
    assert may_share(model, head)

    class Other(type(model.model)):  # type: ignore[misc]
        pass

    model.model.__class__ = Other
    assert not may_share(model, head)


def test_a_cache_that_gives_other_states_is_found() -> None:
    model = make("Llama", {})
    forward = model.model.forward

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        kwargs["past_key_values"] = None
        return forward(*args, **kwargs)

    model.model.forward = forgetful
    assert not may_share(model, g2.find_head(model))


@pytest.mark.parametrize("name", [name for name in SHARING if name != "experts"])
def test_continuations_are_those_of_generate(name: str) -> None:
    """The same random numbers give the same tokens; ends, padding and the longest length too."""
    model = make(*SHARING[name], vocab_size=8)
    head = replace(g2.find_head(model), shares=True)
    prompts = torch.tensor([[0, 0, 3, 4], [2, 5, 3, 4], [0, 6, 7, 2]]).repeat_interleave(6, 0)
    attention = (prompts > 0).long()
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.3,
        top_k=0,
        top_p=1.0,
        max_new_tokens=12,
        eos_token_id=[1, 5],
        pad_token_id=0,
    )
    model.generation_config = transformers.GenerationConfig()

    def choose(logits: Tensor, row: Tensor) -> Tensor:
        return torch.multinomial((logits / 1.3).softmax(-1)[row], 1)[:, 0]

    shapes = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _module, args, kwargs: shapes.append(tuple((*args, kwargs.get("input_ids"))[0].shape)),
        with_kwargs=True,
    )
    for seed in range(10):
        torch.manual_seed(seed)
        expected = model.generate(input_ids=prompts, attention_mask=attention, generation_config=settings)[
            :, 4:
        ]
        torch.manual_seed(seed)
        shapes.clear()
        found = continuations(head, prompts, attention, choose, [1, 5], 0, 12)
        assert torch.equal(found, expected)
        assert shapes[0] == (3, 4)
        assert len(shapes) == found.shape[1]
        assert all(rows <= 18 and width == 1 for rows, width in shapes[1:])
    hook.remove()
