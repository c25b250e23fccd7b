"""find_head: its arguments give the log-probabilities of the model's own logits, family by family."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import g2rl_kernels as g2

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'g2rl-kernels[train]'"
)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# family, the settings that act between hidden states and logits, (logit_scale, logit_softcap)
FAMILIES = [
    ("Qwen3", {"head_dim": 16}, (1.0, None)),
    ("Cohere", {"logit_scale": 0.25}, (0.25, None)),
    ("Granite", {"logits_scaling": 4.0}, (0.25, None)),
    ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 0.5}, (1.0, 0.5)),
]


def make(family: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize(("family", "settings", "expected"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_arguments_are_those_of_the_family(family: str, settings: dict[str, Any], expected: tuple) -> None:
    model = make(family, settings)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # so that a softcap and a scale matter
    head = g2.find_head(model)
    assert (head.logit_scale, head.logit_softcap) == expected
    ids = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(1))
    hidden = head.backbone(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    tokens = ids[:, 1:].flatten()
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    theirs = (logits / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    ours = g2.linear_logprobs(hidden, tokens=tokens, **head.arguments(0.7)).logprobs
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(ours.sum(), parameters), torch.autograd.grad(theirs.sum(), parameters)
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    cu_seqlens = torch.arange(0, 25, 8)
    out = g2.head_features(hidden, tokens=tokens, cu_seqlens=cu_seqlens, **head.arguments(0.7))
    torch.testing.assert_close(out.logprobs, theirs.detach(), rtol=1e-4, atol=1e-5)


def test_arguments_in_a_dtype() -> None:
    model = make("Qwen3", {"head_dim": 16})
    model.lm_head.bias = torch.nn.Parameter(torch.randn(60))
    head = g2.find_head(model)
    plain, cast = head.arguments(), head.arguments(dtype=torch.bfloat16)
    assert plain["weight"] is model.lm_head.weight
    assert torch.equal(plain["bias"], model.lm_head.bias)
    assert cast["weight"].dtype == cast["bias"].dtype == torch.bfloat16
    assert plain["temperature"] == 1.0


def test_logits_that_the_configuration_does_not_explain_are_refused() -> None:
    model = make("Qwen3", {"head_dim": 16})
    model.config.logit_scale = 3.0  # Qwen3 does not look at it
    with pytest.raises(RuntimeError, match="does something unknown between hidden states and logits, after"):
        g2.find_head(model)
    assert g2.find_head(model, compare=False).logit_scale == 3.0
    with pytest.raises(RuntimeError, match="not a transformers causal language model"):
        g2.find_head(torch.nn.Linear(2, 2))


def test_importing_the_package_loads_no_models() -> None:
    code = (
        "import sys, g2rl_kernels as g2; assert 'g2rl_kernels.models' not in sys.modules;"
        "assert 'find_head' in g2.__all__; g2.find_head; assert 'g2rl_kernels.models' in sys.modules;"
        "assert not hasattr(g2, 'find_heads')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_comparison_leaves_every_module_in_its_mode() -> None:
    model = make("Qwen3", {"head_dim": 16}).train()
    model.model.layers[0].eval()  # as one freezes dropout of a layer
    before = [module.training for module in model.modules()]
    g2.find_head(model)
    assert [module.training for module in model.modules()] == before
    model.config.logit_scale = 3.0
    with pytest.raises(RuntimeError, match="does something unknown"):
        g2.find_head(model)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_model_that_accelerate_has_prepared(precision: str) -> None:
    """Its autocast is around the model's forward alone, and stays there."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True)
        model = accelerator.prepare(make("Qwen3", {"head_dim": 16}))
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model.forward, model(input_ids=ids).logits
    head = g2.find_head(model)
    assert head.output is model.get_output_embeddings()
    assert model.forward == before[0]
    assert torch.equal(model(input_ids=ids).logits, before[1])
