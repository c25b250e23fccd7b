"""The training loop on a tiny random model."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import CHARACTERS, LetterTask, make_model, make_tokenizer, make_trainer
from torch import nn
from torch.utils import checkpoint as checkpoint_utils
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, modeling_utils

import g2rl_kernels as g2
from g2rl_kernels.trainer import ConfigError, RewardError, TrainerError
from g2rl_kernels.trainer import trainer as trainer_module
from g2rl_kernels.trainer.checkpoint import find_all
from g2rl_kernels.trainer.sampling import Rollout

TIMES = ("seconds", "tokens_per_second")


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if not key.endswith(TIMES)}


def gradients_of_a_step(trainer: Any, rollout: Rollout | None = None) -> dict[str, torch.Tensor]:
    """What the optimiser would be given for one rollout, before clipping (max_grad_norm is out of reach)."""
    torch.manual_seed(1)
    rollout = rollout or trainer.sampler.sample()
    found: dict[str, torch.Tensor] = {}
    trainer.optimizer.step = lambda: found.update(
        {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    )
    trainer.update(rollout, trainer.measure(rollout, trainer.verify(rollout)))
    return found


# --- numbers ------------------------------------------------------------------------------------------------


def test_ratio_is_one_at_the_first_update(tmp_path: Path) -> None:
    """Old log-probs, the policy's, and plain log_softmax of the model's own logits are the same numbers."""
    trainer = make_trainer(tmp_path, temperature=0.7)
    rollout = trainer.sampler.sample()
    assert rollout.attention[:, 0].min() == 0  # the prompts do differ in length
    measured = trainer.measure(rollout, trainer.verify(rollout))
    policy, _ = trainer._logprobs(trainer.head, rollout, slice(0, 8))
    torch.testing.assert_close(policy, measured.logprobs, rtol=0, atol=1e-5)
    positions = (rollout.attention.cumsum(1) - 1).clamp(min=0)
    logits = trainer.model(rollout.ids, attention_mask=rollout.attention, position_ids=positions).logits
    length = rollout.mask.shape[1]
    plain = (logits[:, -length - 1 : -1] / 0.7).log_softmax(-1)
    chosen = plain.gather(2, rollout.ids[:, -length:, None])[..., 0] * rollout.mask
    torch.testing.assert_close(measured.logprobs, chosen, rtol=0, atol=1e-5)
    entropy = -(plain.exp() * plain).sum(-1)[rollout.mask].mean().item()
    assert measured.entropy == pytest.approx(entropy, abs=1e-5)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """Log-probs and features of each response alone, without padding, are those of the padded batch."""
    trainer = make_trainer(tmp_path)
    rollout = trainer.sampler.sample()
    prompt = rollout.ids.shape[1] - rollout.mask.shape[1]
    hidden, _, cu_seqlens, _ = trainer._response_hidden(trainer.head, rollout, slice(0, 8))
    for row in range(8):
        real = rollout.attention[row].bool()
        alone = trainer.model.base_model(input_ids=rollout.ids[row, real][None]).last_hidden_state[0]
        start, length = int(real[:prompt].sum()), int(rollout.mask[row].sum())
        expected = alone[start - 1 : start + length - 1]
        got = hidden[cu_seqlens[row] : cu_seqlens[row + 1]]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss_mean", ["response", "token"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_accumulation_is_one_big_batch(tmp_path: Path, loss_mean: str, ratio: str) -> None:
    keys: dict[str, Any] = {"loss_mean": loss_mean, "ratio": ratio, "max_grad_norm": 1e9, "beta": 0.1}
    whole = gradients_of_a_step(make_trainer(tmp_path / "a", **keys))
    parts = gradients_of_a_step(make_trainer(tmp_path / "b", **keys, micro_batch_size=2))
    assert whole.keys() == parts.keys()
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_copies_of_a_response_are_not_told_apart_by_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in bf16, where the same tokens get other bits in a micro-batch of another width."""
    trainer = make_trainer(tmp_path, micro_batch_size=2)
    rollout = trainer.sampler.sample()
    for part in (rollout.ids, rollout.attention, rollout.mask):  # the first group: four copies
        part[1:4] = part[0]
    exact, calls = g2.head_features, []

    def rounded(*args: Any, **keywords: Any) -> Any:
        out = exact(*args, **keywords)
        calls.append(1)
        return out._replace(features=out.features * (1 + 1e-3 * torch.rand(out.features.shape)))

    monkeypatch.setattr(g2, "head_features", rounded)
    advantages = trainer.measure(rollout, torch.ones(8)).geometry.advantages
    assert len(calls) == 4
    assert (advantages[:4] == 0).all()
    assert advantages[4:].abs().max() > 0.5


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    plain = gradients_of_a_step(make_trainer(tmp_path / "a", max_grad_norm=1e9))
    again = gradients_of_a_step(make_trainer(tmp_path / "b", max_grad_norm=1e9, gradient_checkpointing=True))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_changes_no_step(tmp_path: Path) -> None:
    """Generation above all, which in training mode would go without its cache."""
    keys: dict[str, Any] = {"mini_batch_size": 4, "beta": 0.1}
    runs = []
    for name, on in (("a", False), ("b", True)):
        trainer = make_trainer(tmp_path / name, gradient_checkpointing=on, **keys)
        runs.append([without_times(trainer.step()) for _ in range(4)])
        assert not any(module.training for module in trainer.model.modules())
    assert runs[0] == runs[1]


def _gpt2() -> Any:  # its dropouts are modules, in the layer
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(CHARACTERS) + 3, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1,
            bos_token_id=1, initializer_range=0.3,
        )
    )  # fmt: skip


def _opt() -> Any:  # its dropouts are functions, which heed the layer's own mode
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=len(CHARACTERS) + 3, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, dropout=0.3,
            eos_token_id=1, bos_token_id=1, pad_token_id=0, init_std=0.3,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [_gpt2, _opt])
def test_gradient_checkpointing_recomputes_and_switches_no_dropout_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    calls: list[bool] = []
    plain = checkpoint_utils.checkpoint

    def counted(*args: Any, **keywords: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return plain(*args, **keywords)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    found = []
    for name, on in (("a", False), ("b", True)):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / name, model=make(), gradient_checkpointing=on, lr=0.0, beta=0.1)
        metrics = trainer.step()
        assert (metrics["kl"], metrics["clip_fraction"]) == (0.0, 0.0)
        found.append(gradients_of_a_step(trainer))
    assert calls == [True] * 4  # two layers in each of the two updates, none of them in a measurement
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_against_autograd_on_logits(tmp_path: Path) -> None:
    """The update's gradient is that of -sum w A log pi through the model's own logits."""
    trainer = make_trainer(tmp_path, max_grad_norm=1e9)
    torch.manual_seed(1)
    rollout = trainer.sampler.sample()
    advantages = trainer.measure(rollout, trainer.verify(rollout)).geometry.advantages
    got = gradients_of_a_step(trainer, rollout)
    positions = (rollout.attention.cumsum(1) - 1).clamp(min=0)
    logits = trainer.model(rollout.ids, attention_mask=rollout.attention, position_ids=positions).logits
    length = rollout.mask.shape[1]
    logprobs = logits[:, -length - 1 : -1].log_softmax(-1).gather(2, rollout.ids[:, -length:, None])[..., 0]
    means = (logprobs * rollout.mask).sum(1) / rollout.mask.sum(1)
    (-(means * advantages).mean()).backward()
    assert advantages.abs().max() > 0.5
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_lam_0_is_grpo_to_the_bit(tmp_path: Path) -> None:
    runs = [
        make_trainer(tmp_path / name, **keys, steps=4, epochs=2)
        for name, keys in (
            ("grpo", {"algorithm": "grpo"}),
            ("zero", {"algorithm": "g2rl", "lam": 0.0}),
            ("g2rl", {"algorithm": "g2rl", "lam": 0.5}),
        )
    ]
    grpo, zero, g2rl = ([without_times(m) for m in run.train()] for run in runs)
    assert grpo == zero
    assert all(torch.equal(a, b) for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters()))
    assert grpo != g2rl  # so that the comparison means something
    assert any(m["grad_norm"] > 0 for m in grpo)


def test_kl_starts_at_zero_and_holds_the_policy_back(tmp_path: Path) -> None:
    keys = {"steps": 6, "lr": 3e-3, "uniform_groups": "skip"}  # right against wrong is all that pulls
    free = make_trainer(tmp_path / "free", beta=1e-9, **keys).train()
    held = make_trainer(tmp_path / "held", beta=10.0, **keys).train()
    for run in (free, held):
        assert run[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert all(m["kl"] >= -1e-6 for m in run)
    assert held[-1]["kl"] < 0.3 * free[-1]["kl"]
    assert make_trainer(tmp_path / "none").train()[0]["kl"] is None


def test_reference_stays_where_the_policy_started(tmp_path: Path) -> None:
    """In float32 and, with linear weights kept in bf16, under autocast: its log-probs are the policy's first
    ones."""
    for name, keys in (("f32", {}), ("bf16", {"autocast": "bfloat16"})):
        for tied in (True, False):
            model = make_model(tie_word_embeddings=tied)
            trainer = make_trainer(tmp_path / f"{name}{tied}", model=model, beta=0.1, lr=1e-2, **keys)
            rollout = trainer.sampler.sample()
            before = trainer.measure(rollout, trainer.verify(rollout))
            assert torch.equal(
                before.reference, trainer._logprobs(trainer.head, rollout, slice(0, 8))[0].detach()
            )
            trainer.train()
            after = trainer.measure(rollout, trainer.verify(rollout))
            assert torch.equal(after.reference, before.reference)
            assert not torch.allclose(after.logprobs, before.logprobs, atol=1e-3)


@pytest.mark.parametrize("algorithm", ["g2rl", "grpo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_learns(tmp_path: Path, algorithm: str, ratio: str) -> None:
    keys: dict[str, Any] = {"batch_size": 32, "group_size": 8, "mini_batch_size": 16, "max_new_tokens": 3}
    trainer = make_trainer(
        tmp_path, **keys, algorithm=algorithm, ratio=ratio, steps=25, lr=3e-3, checkpoint_every=0
    )
    metrics = trainer.train()
    first, last = (sum(m["accuracy"] for m in part) / 3 for part in (metrics[:3], metrics[-3:]))
    assert first < 0.5
    assert last > 0.85


# --- sampling -----------------------------------------------------------------------------------------------


def test_samples_come_from_the_scored_distribution(tmp_path: Path) -> None:
    """First tokens of many samples against softmax(z / T), though the model's own settings say top-k 1 and
    more."""
    model = make_model(initializer_range=0.15)
    model.generation_config.update(
        top_k=1, top_p=0.1, repetition_penalty=3.0, min_new_tokens=4, do_sample=False
    )
    keys: dict[str, Any] = {"batch_size": 3000, "group_size": 3000, "temperature": 1.5, "max_new_tokens": 1}
    trainer = make_trainer(tmp_path, model=model, **keys)
    rollout = trainer.sampler.sample()
    counts = torch.bincount(rollout.ids[:, -1], minlength=len(CHARACTERS) + 3).double()
    prompt = rollout.ids[:1, :-1]
    expected = 3000 * (model(prompt).logits[0, -1].double() / 1.5).softmax(-1)
    assert expected.max() < 2000
    common = expected > 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum()) - 1
    assert freedom > 8
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)
    assert trainer.model.generation_config.top_k != 1


def test_end_token_counts_and_nothing_after_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, batch_size=64, group_size=4, max_new_tokens=12, temperature=2.0)
    rollout = trainer.sampler.sample()
    length = rollout.mask.shape[1]
    response = rollout.ids[:, -length:]
    assert 0 < rollout.truncated.sum() < 64  # both kinds occur
    for row in range(64):
        tokens = response[row, rollout.mask[row]].tolist()
        assert rollout.mask[row, : len(tokens)].all()
        assert 1 not in tokens[:-1]
        assert (tokens[-1] == 1) == (not rollout.truncated[row])
        assert len(tokens) == 12 or tokens[-1] == 1
        assert rollout.completions[row] == trainer.tokenizer.decode(tokens, skip_special_tokens=True)


def test_generating_in_parts_fits_together(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, batch_size=16, generate_batch_size=4, max_new_tokens=12, temperature=2.0)
    for _ in range(5):
        rollout = trainer.sampler.sample()
        assert rollout.mask.any(1).all()
        assert torch.equal(rollout.attention[:, -rollout.mask.shape[1] :].bool(), rollout.mask)
        assert not (rollout.truncated & (rollout.mask.sum(1) < 12)).any()


def test_stop_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, stop_tokens=["a"], batch_size=32)
    rollout = trainer.sampler.sample()
    texts = rollout.completions
    assert any(text.endswith("a") for text in texts)
    assert not any("a" in text[:-1] for text in texts)


def test_dropped_responses_take_part_in_nothing(tmp_path: Path) -> None:
    """A group with two cut-off responses gives the others what a group without them would."""
    trainer = make_trainer(
        tmp_path, batch_size=64, group_size=8, truncated="drop", temperature=2.0, max_new_tokens=12
    )
    rollout = trainer.sampler.sample()
    scores = trainer.verify(rollout)
    measured = trainer.measure(rollout, scores)
    cut = rollout.truncated
    assert 0 < cut.sum() < 60
    for outcome in (measured.geometry.advantages, measured.geometry.shaped_rewards, measured.logprobs.sum(1)):
        assert (outcome[cut] == 0).all()
    rewards = measured.rewards.view(8, 8)
    for group in range(8):
        kept = ~cut.view(8, 8)[group]
        shaped = measured.geometry.shaped_rewards.view(8, 8)[group][kept]
        if kept.sum() > 1 and rewards[group][kept].unique().numel() > 1:
            expected = (shaped - shaped.mean()) / (shaped.var(unbiased=False) + 1e-6).sqrt()
            got = measured.geometry.advantages.view(8, 8)[group][kept]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert trainer._describe(rollout, measured)["length"] == rollout.mask.sum() / (64 - cut.sum())


def test_all_dropped_is_a_step_without_gradient(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, truncated="drop", max_new_tokens=1)
    trainer.sampler.end_tokens = []  # nothing ever ends
    before = [p.clone() for p in trainer.model.parameters()]
    metrics = trainer.step()
    assert (metrics["truncated"], metrics["length"], metrics["grad_norm"], metrics["entropy"]) == (1, 0, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_prompts_come_in_epochs_and_long_ones_are_passed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_prompt_tokens=8)  # "abc" + "+1" * 2 + "=" is 8 tokens
    seen = [item["question"] for _, item, _ in trainer.sampler.draw(20)]
    assert set(seen) == {"abc=", "abc+1=", "abc+1+1="}
    again = make_trainer(tmp_path, max_prompt_tokens=8)
    assert [item["question"] for _, item, _ in again.sampler.draw(20)] == seen
    again.sampler.position = 0
    assert len([again.sampler.draw(1) for _ in range(3)]) == 3
    with pytest.raises(TrainerError, match="every prompt is longer than max_prompt_tokens=3"):
        make_trainer(tmp_path, max_prompt_tokens=3)  # before work
    assert make_trainer(tmp_path).sampler.position == 0


def test_every_item_once_an_epoch_over_all_tasks(tmp_path: Path) -> None:
    class Other(LetterTask):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"question": f"{index}+1="}

    trainer = make_trainer(tmp_path, task=[LetterTask(), Other()])
    drawn = trainer.sampler.draw(21)
    assert sum(isinstance(task, Other) for task, _, _ in drawn) == 5
    assert {item["question"] for task, item, _ in drawn if isinstance(task, Other)} == {
        f"{i}+1=" for i in range(5)
    }


def test_chat_template_and_plain_prompts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    keys: dict[str, Any] = {"system_prompt": "be", "prompt_template": "{question} a"}
    plain = make_trainer(tmp_path, tokenizer=tokenizer, **keys).sampler
    ids = plain.encode({"question": "1+1"})
    assert ids == tokenizer("be\n\n1+1 a")["input_ids"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }} {% endfor %}{{ extra }}b="
    )
    chat = make_trainer(tmp_path, tokenizer=tokenizer, **keys, chat_template_args={"extra": "c"}).sampler
    text = chat.encode({"question": "1+1"})
    expected = tokenizer("s=be u=1+1 a cb=", add_special_tokens=False)["input_ids"]
    assert text == expected
    never = make_trainer(tmp_path, tokenizer=tokenizer, **keys, chat_template="never").sampler
    assert never.encode({"question": "1+1"}) == ids


def test_a_template_that_refuses_a_system_prompt_is_told(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}a"
    )
    with pytest.raises(ConfigError, match="no system role: drop system_prompt"):
        make_trainer(tmp_path, tokenizer=tokenizer, system_prompt="be")


# --- heads --------------------------------------------------------------------------------------------------

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


def test_unmerged_adapter_on_the_head_is_told(tmp_path: Path) -> None:
    class LoraLinear(nn.Module):
        def __init__(self, base_layer: nn.Linear):
            super().__init__()
            self.base_layer = base_layer
            self.weight = base_layer.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x)

    model = make_model(tie_word_embeddings=False)
    model.lm_head = LoraLinear(model.lm_head)
    with pytest.raises(TrainerError, match=r"unmerged adapter.*merge"):
        make_trainer(tmp_path, model=model)


def test_not_a_language_model(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="not a transformers causal language model"):
        make_trainer(tmp_path, model=nn.Linear(3, 3))


# --- errors before work, and nothing lost -------------------------------------------------------------------


def test_tokenizer_without_pad_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has no pad token; set pad_token: '</s>'"):
        make_trainer(tmp_path, tokenizer=make_tokenizer(pad=False))
    trainer = make_trainer(tmp_path, tokenizer=make_tokenizer(pad=False), pad_token="</s>")
    rollout = trainer.sampler.sample()  # padded with its own end token: only the first one counts
    assert (rollout.ids[:, -rollout.mask.shape[1] :][rollout.mask] == 1).sum() == (~rollout.truncated).sum()


def test_a_pad_token_that_the_model_has_not(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(
        ConfigError, match=r"'<new>' is number 25, .* embeds 25 tokens: set pad_token: '</s>', or"
    ):
        make_trainer(tmp_path, tokenizer=tokenizer)
    make_trainer(tmp_path, tokenizer=tokenizer, pad_token="</s>").step()
    model, tokenizer = make_model(), make_tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    model.resize_token_embeddings(len(tokenizer))
    make_trainer(tmp_path, model=model, tokenizer=tokenizer).step()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pad_token": "zzz"}, "pad_token: 'zzz' is not in the tokenizer's vocabulary"),
        ({"stop_tokens": ["zzz"]}, "stop_tokens: 'zzz' is not a token"),
        ({"chat_template": "always"}, "this tokenizer has none"),
        ({"max_new_tokens": 40}, "= 72: the model has 64 positions"),
        ({"output_dir": "/proc/nowhere"}, "cannot write there"),
        ({"group_size": 3}, "group_size=3 does not divide batch_size=8"),
        ({"backend": "foo"}, "backend: got 'foo', needs None or one of"),
    ],
)
def test_wrong_settings_before_work(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_trainer(tmp_path, **keys)
    assert "\n" not in str(caught.value)


def test_full_disk_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = trainer_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(trainer_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="GB are free: free some"):
        make_trainer(tmp_path)


@pytest.mark.parametrize("item", [{"prompt": "x"}, {"question": 3}, "x"])
def test_wrong_items_before_work(tmp_path: Path, item: Any) -> None:
    class Wrong(LetterTask):
        def __getitem__(self, index: int) -> Any:
            return item

    with pytest.raises(ConfigError, match="must be a dict with a text 'question'"):
        make_trainer(tmp_path, task=Wrong())


def test_a_backend_that_is_not_installed_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g2rl_kernels.arguments.HAS_TRITON", False)
    with pytest.raises(ConfigError, match="backend='triton' needs the package triton"):
        make_trainer(tmp_path, backend="triton")


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_seeds_of_64_bits(tmp_path: Path, seed: int) -> None:
    trainer = make_trainer(tmp_path, seed=seed)
    trainer.begin()
    trainer.sampler.draw(3 * 16)


def test_a_task_whose_items_raise_before_work(tmp_path: Path) -> None:
    class Raises(LetterTask):
        def __getitem__(self, index: int) -> Any:
            raise TypeError("can only\nconcatenate str")

    with pytest.raises(ConfigError, match=r"Raises\[0\] raised TypeError: can only conc") as caught:
        make_trainer(tmp_path, task=Raises())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt": "x"}, r"Later\[3\] must be a dict with a text 'question', got"),
        ({"question": None}, r"Later\[3\] must be a dict with a text 'question', got"),
        ("a\nb", r"Later\[3\] must be a dict with a text 'question', got"),
        ({"question": ""}, r"Later\[3\] is a prompt without tokens"),
    ],
)
def test_a_wrong_item_is_named_when_it_is_drawn(tmp_path: Path, item: Any, message: str) -> None:
    class Later(LetterTask):
        def __getitem__(self, index: int) -> Any:
            return item if index == 3 else super().__getitem__(index)

    trainer = make_trainer(tmp_path, task=[LetterTask(), Later()], shuffle=False)
    trainer.sampler.draw(16 + 3)
    with pytest.raises(TrainerError, match=message) as caught:
        trainer.sampler.draw(1)
    assert "\n" not in str(caught.value)


def test_no_items_before_work(tmp_path: Path) -> None:
    class Empty(LetterTask):
        def __len__(self) -> int:
            return 0

    with pytest.raises(ConfigError, match="Empty holds no items"):
        make_trainer(tmp_path, task=Empty())


@pytest.mark.parametrize("package", ["safetensors", "tqdm", "matplotlib"])
def test_missing_package_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(
        TrainerError, match=rf"{package} is not usable here .*pip install 'g2rl-kernels\[train\]'"
    ):
        make_trainer(tmp_path)


def test_frozen_model(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="no parameter requires a gradient"):
        make_trainer(tmp_path, model=make_model().requires_grad_(False))


@pytest.mark.parametrize("failure", ["raises", "nan"])
def test_a_broken_reward_stops_before_the_update(tmp_path: Path, failure: str) -> None:
    class Breaks(LetterTask):
        calls = 0

        def score(self, completion: str, item: dict[str, Any]) -> float:
            self.calls += 1
            if self.calls > 1 + 8 * 2 + 3:  # one check, two steps of 8, then in the third
                if failure == "raises":
                    raise KeyError("answer")
                return float("nan")
            return super().score(completion, item)

    trainer = make_trainer(tmp_path, task=Breaks(), checkpoint_every=1, steps=5)
    with pytest.raises(RewardError, match="prompt 'abc"):
        trainer.train()
    assert trainer.step_number == 2
    assert find_all(tmp_path)[-1].name == "checkpoint-000002"
    saved = make_trainer(tmp_path, checkpoint_every=1, steps=5)
    saved.begin()
    assert all(torch.equal(a, b) for a, b in zip(saved.model.parameters(), trainer.model.parameters()))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.trained[1].register_hook(lambda g: g * float("nan"))
    with pytest.raises(TrainerError, match="step 1: the gradient is not finite"):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


# --- the run ------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model()
    model.generation_config.update(do_sample=True, top_k=7)
    trainer = make_trainer(
        tmp_path, model=model, steps=4, report_every=2, samples_shown=4, checkpoint_every=1
    )
    metrics = trainer.train()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == metrics
    wanted = (
        "step reward accuracy shaped_reward length entropy cos_mean negative_pairs "
        "exploration_score_mean kl loss grad_norm lr tokens_per_second seconds feature_seconds"
    )
    assert set(wanted.split()) <= set(metrics[0])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [2] * 4 + [4] * 4
    assert (tmp_path / "samples.md").read_text().count("\n") == 8  # title, blank, head, rule, 4 rows
    assert [path.name for path in find_all(tmp_path)] == ["checkpoint-000003", "checkpoint-000004"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trainer.model.parameters()))
    assert again.generation_config.top_k == 7
    assert not list(tmp_path.glob(".*"))


def test_what_was_left_unset_is_kept_apart_from_what_is_used(tmp_path: Path) -> None:
    make_trainer(tmp_path, algorithm="entropy_bonus", mini_batch_size=4, steps=1).train()
    keys = ["mini_batch_size", "micro_batch_size", "generate_batch_size", "entropy_coef", "ratio_clip_high"]
    given = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert [given[key] for key in keys] == [4, 0, 0, None, None]
    used = json.loads((tmp_path / "checkpoint-000001" / "state.json").read_text())["config"]
    assert [used[key] for key in keys] == [4, 4, 8, 0.003, 0.2]
    asked = {"mini_batch_size": 4, "micro_batch_size": 4, "entropy_coef": 0.003, "ratio_clip_high": 0.2}
    make_trainer(tmp_path, algorithm="entropy_bonus", steps=2, **asked).train()  # the same, hence goes on
    with pytest.raises(ConfigError, match=r"has entropy_coef=0\.003 \(now 0\.01\)"):
        make_trainer(
            tmp_path, algorithm="entropy_bonus", mini_batch_size=4, entropy_coef=0.01, steps=2
        ).train()


def test_resume_in_one_process_and_more_steps(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", steps=6, epochs=2, beta=0.01).train()
    make_trainer(tmp_path / "parts", steps=2, epochs=2, beta=0.01).train()
    parts = make_trainer(tmp_path / "parts", steps=6, epochs=2, beta=0.01).train()
    assert [without_times(m) for m in parts] == [without_times(m) for m in whole]


def test_resume_with_other_settings(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2).train()
    with pytest.raises(
        ConfigError, match=r"has lr=0\.001 \(now 0\.1\): choose another output_dir, or resume=over"
    ):
        make_trainer(tmp_path, steps=4, lr=0.1).train()
    with pytest.raises(ConfigError, match="is past steps=1"):
        make_trainer(tmp_path, steps=1).train()
    metrics = make_trainer(tmp_path, steps=1, lr=0.1, resume="overwrite").train()
    assert [m["step"] for m in metrics] == [1]
    assert [path.name for path in find_all(tmp_path)] == ["checkpoint-000001"]


def test_learning_rate_schedules(tmp_path: Path) -> None:
    def rates(schedule: str) -> list[float]:
        trainer = make_trainer(tmp_path, steps=6, warmup_steps=2, lr=1.0, lr_schedule=schedule)
        found = []
        for step in range(6):
            trainer.step_number = step
            found.append(trainer.learning_rate())
        return found

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == pytest.approx([0.5, 1, 1, 0.8535534, 0.5, 0.1464466])


def test_epochs_and_mini_batches_count_updates(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=3, mini_batch_size=4)
    updates, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda: (updates.append(1), step())
    metrics = trainer.step()
    assert len(updates) == 3 * 2
    assert metrics["clip_fraction"] >= 0
    assert not any(p.grad is not None for p in trainer.model.parameters())


def test_trains_in_place_and_restores_nothing_else(tmp_path: Path) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    assert trainer.model is model
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
