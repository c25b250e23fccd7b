"""Models whose logits are more than a product, and models that cannot be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHARACTERS, make_model, make_trainer
from torch import nn

from g2rl_kernels.trainer import TrainerError

SMALL: dict[str, Any] = {
    "vocab_size": len(CHARACTERS) + 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {}),
        ("Gemma2", {"final_logit_softcapping": 2.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Phi", {}),  # its head has a bias
    ],
)
def test_families(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    import transformers

    torch.manual_seed(0)
    accepted = {k: v for k, v in SMALL.items() if not (family == "Phi" and k == "head_dim")}
    config = getattr(transformers, f"{family}Config")(**accepted, **settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    if family == "Phi":
        nn.init.normal_(model.lm_head.bias)
    trainer = make_trainer(tmp_path, model=model, steps=2)
    rollout = trainer.sampler.sample()
    measured = trainer.measure(rollout, trainer.verify(rollout))
    positions = (rollout.attention.cumsum(1) - 1).clamp(min=0)
    logits = model(rollout.ids, attention_mask=rollout.attention, position_ids=positions).logits
    length = rollout.mask.shape[1]
    plain = logits[:, -length - 1 : -1].log_softmax(-1).gather(2, rollout.ids[:, -length:, None])[..., 0]
    torch.testing.assert_close(measured.logprobs, plain * rollout.mask, rtol=0, atol=2e-4)
    assert len(trainer.train()) == 2


def test_unknown_logit_arithmetic_is_told(tmp_path: Path) -> None:
    model = make_model()
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = doubled
    with pytest.raises(TrainerError, match="something unknown between hidden states and logits"):
        make_trainer(tmp_path, model=model)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "autocast": "bfloat16"}], ids=["float32", "bf16, KL"])
def test_an_adapter_on_the_head_is_measured_and_trained(tmp_path: Path, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=2,
        lora_dropout=0.1,  # never on: the trainer runs the model in evaluation mode
        target_modules=["lm_head"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(make_model(tie_word_embeddings=False), config)
    trainer = make_trainer(tmp_path, model=model, steps=2, **settings)
    head = model.get_base_model().lm_head
    adapter = [head.lora_A["default"].weight, head.lora_B["default"].weight]
    base, start = head.weight.detach().clone(), [t.detach().clone() for t in adapter]
    rollout = trainer.sampler.sample()
    measured = trainer.measure(rollout, trainer.verify(rollout))
    positions = (rollout.attention.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=rollout.ids, attention_mask=rollout.attention, position_ids=positions).logits
    length = rollout.mask.shape[1]
    plain = logits[:, -length - 1 : -1].log_softmax(-1).gather(2, rollout.ids[:, -length:, None])[..., 0]
    tolerance = 0.2 if settings else 2e-4
    torch.testing.assert_close(measured.logprobs, plain * rollout.mask, rtol=0, atol=tolerance)
    assert len(trainer.train()) == 2
    assert torch.equal(head.weight, base)
    assert not any(torch.equal(a, b) for a, b in zip(adapter, start))


def test_another_adapter_on_the_head_is_told(tmp_path: Path) -> None:
    class OtherLinear(nn.Module):
        def __init__(self, base_layer: nn.Linear):
            super().__init__()
            self.base_layer = base_layer
            self.weight = base_layer.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x)

    model = make_model(tie_word_embeddings=False)
    model.lm_head = OtherLinear(model.lm_head)
    with pytest.raises(TrainerError, match=r"adapter that is not LoRA .*OtherLinear.*merge"):
        make_trainer(tmp_path, model=model)


def test_not_a_language_model(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="not a transformers causal language model"):
        make_trainer(tmp_path, model=nn.Linear(3, 3))
