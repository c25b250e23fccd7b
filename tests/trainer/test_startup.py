"""Start-up checks: sampler, update and model agree on two padded prompts, or it is said which does not."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHARACTERS, make_model, make_tokenizer, make_trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from g2rl_kernels.models.lm_head import find_head
from g2rl_kernels.trainer import TrainerError
from g2rl_kernels.trainer.startup import check_policy, make_probe

SIZES: dict[str, Any] = {
    "vocab_size": len(CHARACTERS) + 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3_moe", {"head_dim": 16, **EXPERTS}),
    ("mixtral", EXPERTS),
    ("gpt_oss", {"head_dim": 16, **EXPERTS}),
    ("gemma2", {"head_dim": 16}),
    ("gemma3_text", {"head_dim": 16}),
    ("mistral", {}),
    ("phi3", {}),
    ("gpt2", GPT),
    ("gpt_neox", {}),
    ("granite", {"logits_scaling": 4.0}),
    ("cohere", {}),
    ("olmo2", {}),
    ("falcon", {}),
    ("bloom", {}),
    ("mpt", {"d_model": 32, "n_heads": 2, "n_layers": 2}),
    ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    ("mamba", {"state_size": 8}),
    ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1}),
    ("bamba", {"attn_layer_indices": [1], **MAMBA}),
    ("lfm2", {}),
    ("minimax", {"head_dim": 16, **EXPERTS, "layer_types": ["full_attention", "linear_attention"]}),
]
BAD: list[tuple[str, dict[str, Any], str, tuple[float, float]]] = [
    ("rwkv", {}, "it ignores attention_mask", (0.1, 3.0)),
    (
        "minimax",
        {"head_dim": 16, **EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
        r"after padding on the left, generate\(\) samples from another distribution",
        (1.0, 10.0),
    ),
    (
        "nemotron_h",
        {"head_dim": 16, "layers_block_type": ["mamba", "attention"]},
        r"generate\(\), with its cache, computes other logits than one forward",
        (1e-3, 0.1),
    ),
]


def make(family: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def check(model: Any, autocast: bool = False, **others: Any) -> None:
    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    others.setdefault("head", find_head(model, compare=False))
    check_policy(model, 0, context=context, **others)


@pytest.mark.parametrize(("family", "settings"), GOOD, ids=[name for name, _ in GOOD])
def test_common_families_agree_in_every_precision(family: str, settings: dict[str, Any]) -> None:
    check(make(family, settings))
    check(make(family, settings), autocast=True)
    check(make(family, settings, torch.bfloat16, seed=1), temperature=0.7)


@pytest.mark.parametrize(("family", "settings", "why", "nats"), BAD, ids=[row[0] for row in BAD])
def test_families_that_sample_or_score_another_policy_are_named(
    tmp_path: Path, family: str, settings: dict[str, Any], why: str, nats: tuple[float, float]
) -> None:
    model = make(family, settings)
    with pytest.raises(TrainerError, match=f"{type(model).__name__}: {why}") as told:
        make_trainer(tmp_path, model=model)
    found = re.search(r"the sampler's log-probs by ([\d.]+) nats", str(told.value))
    assert found is not None
    assert nats[0] < float(found[1]) < nats[1]
    assert ("the update's agree" in str(told.value)) == (family != "rwkv")


@pytest.mark.parametrize("family", ["rwkv", "minimax"])
def test_bfloat16_does_not_hide_them(family: str) -> None:
    settings = next(row[1] for row in BAD if row[0] == family)
    for keys in ({"dtype": torch.bfloat16}, {"autocast": True}):
        with pytest.raises(TrainerError, match="On two padded prompts this moves the sampler's log-probs"):
            check(make(family, settings, keys.get("dtype", torch.float32)), bool(keys.get("autocast")))


def test_autocast_of_float32_weights_does_not_hide_small_faults(tmp_path: Path) -> None:
    settings = next(row[1] for row in BAD if row[0] == "nemotron_h")
    with pytest.raises(TrainerError, match=r"the sampler's log-probs by 0\.0\d+ nats"):
        make_trainer(tmp_path, model=make("nemotron_h", settings), autocast="bfloat16")
    check(make("nemotron_h", settings, torch.bfloat16))  # here rounding does


def masked(model: Any, excluded: slice) -> Any:
    """The model with -inf among its logits, as some families exclude tokens."""
    forward = model.forward

    @functools.wraps(forward)
    def excluding(*args: Any, **inputs: Any) -> Any:
        out = forward(*args, **inputs)
        out.logits[..., excluded] = -torch.inf
        return out

    model.forward = excluding
    return model


def test_infinite_logits_do_not_switch_it_off(tmp_path: Path) -> None:
    said = "unknown.* between (its )?hidden states and logits"
    with pytest.raises(TrainerError, match=said):
        make_trainer(tmp_path, model=masked(make_model(), slice(3, 9)))
    model = make_model()
    head = find_head(model)
    with pytest.raises(TrainerError, match=said):
        check(masked(model, slice(3, 9)), head=head)


def test_excluded_tokens_without_probability_are_no_fault() -> None:
    """As rows of a padded vocabulary."""
    model = make_model(tie_word_embeddings=False)
    model.lm_head.bias = nn.Parameter(torch.zeros(25).index_fill(0, torch.arange(15, 25), -60.0))
    head = find_head(model)
    check(masked(model, slice(15, 25)), head=head)


def test_not_a_number_differs_from_everything() -> None:
    model = make_model()
    with pytest.raises(TrainerError, match="the update's log-probs by inf nats"):
        check(model, logprobs=lambda probe: torch.full((int(probe.mask.sum()),), torch.nan))


def test_learned_positions_counted_from_the_padding_are_told() -> None:
    """As a trainer scores that passes no position_ids."""
    model = make("gpt2", GPT)

    def logprobs(probe: Any) -> Tensor:
        logits = model(probe.ids, attention_mask=probe.attention).logits
        length = probe.mask.shape[1]
        z = logits[:, -length - 1 : -1].log_softmax(-1)
        return z.gather(2, probe.ids[:, -length:, None])[..., 0][probe.mask]

    with pytest.raises(TrainerError, match=r"learned positions.*the update's log-probs by .*sampler's agree"):
        check(model, logprobs=logprobs)
    check(make("llama", {}), samples=False, logprobs=None)


def test_the_probe_is_padded_and_holds_no_special_tokens() -> None:
    model = make("gpt2", {**GPT, "max_position_embeddings": 8, "n_positions": 8})
    probe = make_probe(model, 0)
    assert probe.ids.shape[1] <= 8
    assert probe.attention[1, 0] == 0
    assert probe.attention[0, 0] == 1
    assert not probe.mask.all()
    assert not torch.isin(probe.ids[probe.attention.bool()], torch.tensor([0, 1])).any()
    check(model)


def test_a_model_whose_generate_fails_is_told(tmp_path: Path) -> None:
    model = make_model()

    def generate(**inputs: Any) -> Any:
        raise ValueError("no cache")

    model.generate = generate
    with pytest.raises(TrainerError, match=r"generate\(\) fails on padded prompts \(ValueError: no cache\)"):
        make_trainer(tmp_path, model=model)


def test_the_check_draws_no_random_numbers_and_leaves_the_model_as_it_was() -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    settings = model.generation_config.to_dict()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == before
    assert model.generation_config.to_dict() == settings
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_head_of_zeros_agrees() -> None:
    model = make_model(tie_word_embeddings=False)
    nn.init.zeros_(model.lm_head.weight)
    check(model)


# --- learned prompts ------------------------------------------------------------------------------------


def _prompt_tuning(peft: Any) -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def _prefix_tuning(peft: Any) -> Any:
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def _p_tuning(peft: Any) -> Any:
    return peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)


@pytest.mark.parametrize("kind", [_prompt_tuning, _prefix_tuning, _p_tuning])
def test_learned_prompts_are_refused(tmp_path: Path, kind: Callable[[Any], Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), kind(peft))
    with pytest.raises(TrainerError, match=r"adapter is a learned prompt \(P.*use LoRA"):
        make_trainer(tmp_path, model=model)


def test_lora_agrees(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    make_trainer(tmp_path, model=peft.get_peft_model(make_model(), lora))


# --- tokens and weights ---------------------------------------------------------------------------------


def test_a_token_without_embedding_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])

    class Task:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"question": "ab<new>c"}

        def score(self, completion: str, item: dict[str, Any]) -> float:
            return 0.0

    said = r"task: Task\[[01]\] has the token '<new>', number 25, but the model embeds 25 tokens"
    with pytest.raises(TrainerError, match=f"{said}: resize_token_embeddings"):
        make_trainer(tmp_path, task=Task(), tokenizer=tokenizer)
    model = make_model()
    model.resize_token_embeddings(26)
    make_trainer(tmp_path, task=Task(), tokenizer=tokenizer, model=model)


def test_bfloat16_weights_that_will_not_move_are_counted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=make_model().bfloat16(), dtype="bfloat16", lr=1e-2)
    before = [parameter.detach().clone() for parameter in trainer.trained]
    with pytest.warns(UserWarning, match=r"dtype=bfloat16: an update of lr=1e-05 is rounded away in (\d+)%"):
        trainer = make_trainer(tmp_path, model=make_model().bfloat16(), dtype="bfloat16", lr=1e-5, steps=1)
    trainer.step()
    moved = [(a != b).float().mean().item() * a.numel() for a, b in zip(before, trainer.trained)]
    assert sum(moved) / sum(b.numel() for b in before) < 0.1


def test_a_generation_that_ends_early_is_told() -> None:
    model = make_model()
    model.generation_config.max_time = 1e-9
    with pytest.raises(TrainerError, match="ends after 1 tokens of 6: its generation_config limits it"):
        check_policy(model, 0)
