"""find_head with PEFT's adapters on the LM head: log-probs, features and gradients are the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_model

import g2rl_kernels as g2
from g2rl_kernels.errors import TrainerError
from g2rl_kernels.models.lm_head import LMHead, frozen_copy

peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")


def adapted(tied: bool = False, **settings: Any) -> Any:
    """The tiny model with LoRA on its head, of random weights."""
    torch.manual_seed(0)
    model = make_model(tie_word_embeddings=tied)
    options = {"r": 3, "lora_alpha": 2, "target_modules": ["lm_head"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**options | settings)).eval()


def rows(model: Any) -> tuple[LMHead, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its head, hidden states and tokens, and its own log-probs."""
    head = g2.find_head(model)
    ids = torch.randint(5, 25, (3, 9), generator=torch.Generator().manual_seed(1))
    hidden = head.backbone(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    tokens = ids[:, 1:].flatten()
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return head, hidden, tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"target_modules": ["lm_head", "q_proj"]}], ids=str
)
def test_the_models_log_probs_gradients_and_features(tied: bool, settings: dict[str, Any]) -> None:
    model = adapted(tied, **settings)
    head, hidden, tokens, theirs = rows(model)
    assert head.lora is not None
    ours = g2.linear_logprobs(hidden, tokens=tokens, **head.arguments()).logprobs
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == (6 if "target_modules" in settings else 2)  # the model has two layers
    for a, b in zip(torch.autograd.grad(ours.sum(), trained), torch.autograd.grad(theirs.sum(), trained)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert b.abs().max() > 1e-3

    cu_seqlens = torch.tensor([0, 10, 24])
    found = g2.head_features(hidden, tokens=tokens, cu_seqlens=cu_seqlens, **head.arguments()).features
    merged = model.merge_and_unload()
    exact = g2.head_features(hidden, tokens=tokens, cu_seqlens=cu_seqlens, **g2.find_head(merged).arguments())
    torch.testing.assert_close(found, exact.features, rtol=1e-4, atol=1e-5)


def test_merged_and_disabled_adapters_are_not_counted_twice() -> None:
    model = adapted()
    head = g2.find_head(model)
    with model.disable_adapter():
        assert head.lora is None
    model.merge_adapter()
    assert head.lora is None
    head, hidden, tokens, theirs = rows(model)
    ours = g2.linear_logprobs(hidden, tokens=tokens, **head.arguments()).logprobs
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert head.lora is not None


def test_a_frozen_copy_keeps_its_adapter() -> None:
    model = adapted()
    head, hidden, tokens, theirs = rows(model)
    for autocast in (False, True):
        copy = frozen_copy(head, autocast)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        dtype = copy.output.weight.dtype
        assert (dtype == torch.bfloat16) == autocast
        found = g2.linear_logprobs(hidden.to(dtype), tokens=tokens, **copy.arguments())
        tolerance = 0.1 if autocast else 1e-5
        torch.testing.assert_close(found.logprobs, theirs, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            for p in model.parameters():
                p.div_(1.5)


def test_several_active_adapters_are_refused() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    g2.find_head(model)
    model.set_adapter("other")
    head = g2.find_head(model)
    assert head.lora[0].shape[0] == 2
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(TrainerError, match=r"2 active adapters \(default, other\).*leave lm_head out"):
        g2.find_head(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
    ],
    ids=["DoRA", "bias"],
)
def test_variants_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainerError, match=f"the LM head carries .*{message}.*leave lm_head out"):
        g2.find_head(adapted(**config))


def test_other_adapters_are_refused() -> None:
    model = peft.get_peft_model(make_model(), peft.LoHaConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(TrainerError, match="adapter that is not LoRA"):
        g2.find_head(model)


def test_dropout_counts_while_it_is_on() -> None:
    model = adapted(lora_dropout=0.2)
    head = g2.find_head(model)
    assert head.lora is not None
    model.train()
    with pytest.raises(TrainerError, match=r"lora_dropout = 0\.2"):
        head.arguments()
