"""G2RLTrainer: training with log-probs of `linear_logprobs` agrees with TRL's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from kept import asked_memory, kept_logits
from tiny_trl import (
    G2RLConfig,
    Watched,
    assert_same_run,
    logged,
    make_tokenizer,
    trained,
    weights,
)
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

import g2rl_kernels as g2
from g2rl_kernels.head.logprobs import LOGITS_MEMORY

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1, "num_iterations": 2, "max_steps": 4},
        {"entropy_coef": 0.05, "temperature": 0.7},
        {"top_entropy_quantile": 0.5},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2, "max_steps": 4},
        {"mask_truncated_completions": True, "max_completion_length": 2},
        {"gradient_checkpointing": True},
    ],
    ids=lambda s: "-".join(s),
)
def test_our_log_probs_train_as_trls(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    ours, theirs = trained(make, **settings), trained(make, g2rl_fused_logprobs=False, **settings)
    for key in ("loss", "grad_norm", "entropy", "g2rl/cos_mean", "g2rl/shaped_reward_mean"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=2e-3, abs=2e-5), key
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, weights(theirs)[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("fused", [None, True, False])
def test_whose_head_computes_the_log_probs(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fused: bool | None
) -> None:
    import trl.trainer.utils as utils

    calls, theirs = [], utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", lambda *a: (calls.append(1), theirs(*a))[1])
    make(g2rl_fused_logprobs=fused, beta=0.1).train()
    assert bool(calls) == (fused is False)
    calls.clear()
    make(g2rl_lam=0, g2rl_fused_logprobs=fused, beta=0.1).train()
    assert bool(calls) == (fused is not True)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_kept_logits_change_no_bit_in_float32(make: Callable[..., Any], checkpointed: bool) -> None:
    """Only the loss keeps logits: not the check before training, old log-probs or the reference."""
    settings = {"beta": 0.1, "num_iterations": 2, "max_steps": 2, "gradient_checkpointing": checkpointed}
    runs = []
    for memory in (0, 1 << 30):
        with kept_logits() as kept:
            runs.append(trained(make, g2rl_logits_memory=memory, entropy_coef=0.01, **settings))
        assert len(kept) == 2  # one micro-batch a step
        assert (min(kept) > 0) == (max(kept) > 0) == (memory > 0)
    assert_same_run(*runs)
    assert min(logged(runs[0], "grad_norm")) > 0


def test_logits_memory_reaches_policy_and_reference(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_memory(monkeypatch)
    for settings, memory in (({}, LOGITS_MEMORY), ({"g2rl_logits_memory": 12345}, 12345)):
        trainer = make(beta=0.1, max_steps=1, **settings)
        asked.clear()
        trainer.train()
        assert asked == [memory] * 2


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "got -1, needs a number of bytes, 0 or more"),
        (2**63, ValueError, "got 9223372036854775808, needs a number of bytes"),
        (1e9, TypeError, "got float, needs a whole number of bytes"),
        (True, TypeError, "got bool, needs a whole number of bytes"),
    ],
)
def test_logits_memory_that_cannot_work_is_named(
    tmp_path: Path, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^g2rl_logits_memory: {message}"):
        G2RLConfig(str(tmp_path), use_cpu=True, g2rl_logits_memory=value)


def gemma() -> Any:
    """A model whose logits are capped."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = {"vocab_size": 40, "num_hidden_layers": 1, "head_dim": 16, "initializer_range": 0.5}
    return Gemma2ForCausalLM(Gemma2Config(**text, **small, final_logit_softcapping=2.0))


def llava() -> Any:
    """A model whose backbone takes pixels."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = Qwen3Config(**sizes, vocab_size=40, num_key_value_heads=1, head_dim=16, initializer_range=0.3)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, image_seq_length=4)
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("family", [gemma, llava])
def test_families_have_the_log_probs_that_trl_gives_them(
    make: Callable[..., Any], family: Callable[[], Any]
) -> None:
    trainer, model = make(temperature=0.7), family()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, 38, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "fused_lm_head": True}
    inputs["labels"] = ids.clone().index_fill(1, torch.arange(8), -100)
    if family is llava:
        ids[:, 1:5] = 39
        inputs["pixel_values"] = torch.randn(2, 3, 8, 8)
    theirs = model(**inputs)
    trainer._add_ops(model, fused=True, compare=True)
    ours = model(**inputs)
    assert (ours.log_probs[:, -4:] < -0.1).all()
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_a_mixture_of_experts_keeps_trls_head_and_is_measured(
    make: Callable[..., Any], model_dir: str
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    moe = Qwen3MoeConfig(
        **sizes, **experts, vocab_size=25, head_dim=16, initializer_range=0.3, pad_token_id=0
    )
    given = {"model": Qwen3MoeForCausalLM(moe), "processing_class": make_tokenizer()}
    trainer = trained(make, Watched, max_steps=1, router_aux_loss_coef=0.1, **given)
    assert logged(trainer, "aux_loss")[0] > 0
    torch.testing.assert_close(trainer.seen[0]["features"], trainer.seen[0]["expected"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="g2rl_fused_logprobs=True: the load-balancing loss"):
        make(g2rl_fused_logprobs=True, router_aux_loss_coef=0.1, **given)


def test_bf16_autocast_computes_in_the_dtype_of_trls_products(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes, theirs = set(), g2.linear_logprobs
    monkeypatch.setattr(
        g2,
        "linear_logprobs",
        lambda h, w, *a, **k: (dtypes.add((h.dtype, w.dtype)), theirs(h, w, *a, **k))[1],
    )
    ours = make(bf16=True, max_steps=1)
    dtypes.clear()  # the check before training also runs without autocast
    ours.train()
    other = trained(make, bf16=True, max_steps=1, g2rl_fused_logprobs=False)
    assert dtypes == {(torch.bfloat16, torch.bfloat16)}
    assert logged(ours, "entropy") == pytest.approx(logged(other, "entropy"), rel=2e-2)
    ours = make(bf16=True, max_steps=1, cast_lm_head_to_fp32=True)
    dtypes.clear()
    ours.train()
    assert dtypes == {(torch.float32, torch.float32)}


def test_a_batch_of_masked_responses_has_a_gradient_of_zeros(make: Callable[..., Any]) -> None:
    trainer = make(mask_truncated_completions=True, max_completion_length=1, max_steps=1)
    trainer.eos_token_ids = []  # nothing ends: all are truncated
    before = weights(trainer)
    trainer.train()
    assert logged(trainer, "loss") == [0.0]
    assert logged(trainer, "grad_norm") == [0.0]
    assert logged(trainer, "g2rl/cos_mean") == [0.0]
    assert all(torch.equal(before[name], weight) for name, weight in weights(trainer).items())
