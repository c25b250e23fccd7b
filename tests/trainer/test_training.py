"""The numbers of a training step on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kept import asked_memory, kept_logits
from tiny import CHARACTERS, gradients_of_a_step, make_model, make_trainer, without_times
from torch.utils import checkpoint as checkpoint_utils
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, modeling_utils

import g2rl_kernels as g2
from g2rl_kernels.head.logprobs import LOGITS_MEMORY
from g2rl_kernels.trainer.trainer import Verified


def test_ratio_is_one_at_the_first_update(tmp_path: Path) -> None:
    """Old log-probs, the policy's, and plain log_softmax of the model's own logits are the same numbers."""
    trainer = make_trainer(tmp_path, temperature=0.7)
    rollout = trainer.sampler.sample()
    assert rollout.attention[:, 0].min() == 0  # the prompts differ in length
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
    """Hidden states of each response alone, without padding, equal those in the padded batch."""
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


@pytest.mark.parametrize("checkpointed", [False, True])
def test_kept_logits_change_no_bit_in_float32(tmp_path: Path, checkpointed: bool) -> None:
    keys: dict[str, Any] = {"micro_batch_size": 4, "beta": 0.1, "algorithm": "entropy_bonus"}
    keys["gradient_checkpointing"] = checkpointed
    runs = []
    for memory in (0, 1 << 30):
        trainer = make_trainer(tmp_path / str(memory), logits_memory=memory, **keys)
        with kept_logits() as kept:
            runs.append((without_times(trainer.step()), [*trainer.model.parameters()]))
        assert len(kept) == 2  # micro-batches of the update; its reference and `measure` keep nothing
        assert (min(kept) > 0) == (max(kept) > 0) == (memory > 0)
    assert runs[0][0]["grad_norm"] > 0
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("keys", [{}, {"logits_memory": 12345}], ids=["default", "set"])
def test_the_update_asks_for_the_memory_that_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, int]
) -> None:
    trainer = make_trainer(tmp_path, micro_batch_size=4, **keys)
    asked = asked_memory(monkeypatch)
    trainer.step()
    assert asked == [keys.get("logits_memory", LOGITS_MEMORY)] * 2


def test_copies_of_a_response_are_not_told_apart_by_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like bf16 rounding, which depends on the width of the micro-batch."""
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
    advantages = trainer.measure(rollout, Verified(torch.ones(8))).geometry.advantages
    assert len(calls) == 4
    assert (advantages[:4] == 0).all()
    assert advantages[4:].abs().max() > 0.5


def test_sharing_changes_a_step_by_rounding_alone(tmp_path: Path) -> None:
    """Groups that micro-batches cut, a reference and an entropy bonus; the samples are the same."""
    keys: dict[str, Any] = {
        "algorithm": "entropy_bonus",
        "beta": 0.1,
        "batch_size": 24,
        "micro_batch_size": 6,
    }
    keys.update(group_size=8, mini_batch_size=12, epochs=2)
    runs = []
    for shares in (False, True):
        trainer = make_trainer(tmp_path / str(shares), **keys)
        assert trainer.head.shares
        for head in (trainer.head, trainer.sampler.head, trainer.reference):
            head.shares = shares
        torch.manual_seed(3)
        runs.append([without_times(trainer.step()) for _ in range(3)])
    assert runs[0] != runs[1]
    for plain, shared in zip(*runs):
        assert shared == pytest.approx(plain, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "keys", [{}, {"epochs": 2}, {"micro_batch_size": 4}, {"gradient_checkpointing": True}]
)
def test_the_update_of_one_micro_batch_takes_the_forward_of_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    """The same bits as from a forward of its own, and nothing is kept afterwards."""
    monkeypatch.setattr("g2rl_kernels.models.responses.PAYS", 0.0)  # one forward a micro-batch
    runs, forwards = [], [0, 0]
    for kept in (False, True):
        trainer = make_trainer(tmp_path / str(kept), **keys)
        torch.manual_seed(1)
        rollout = trainer.sampler.sample()

        def count(*_: Any, kept: bool = kept) -> None:
            forwards[kept] += 1

        trainer.model.model.register_forward_hook(count)
        measured = trainer.measure(rollout, trainer.verify(rollout), updates=kept)
        assert (measured.states is not None) == (kept and keys in ({}, {"epochs": 2}))
        runs.append((trainer.update(rollout, measured), [*trainer.model.parameters()]))
        assert measured.states is None
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert forwards[0] - forwards[1] == (keys in ({}, {"epochs": 2}))


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    plain = gradients_of_a_step(make_trainer(tmp_path / "a", max_grad_norm=1e9))
    again = gradients_of_a_step(make_trainer(tmp_path / "b", max_grad_norm=1e9, gradient_checkpointing=True))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_changes_no_step(tmp_path: Path) -> None:
    """Generation too, which would lose its cache in training mode. No rows share a prompt's states."""
    keys: dict[str, Any] = {"mini_batch_size": 4, "beta": 0.1}
    runs = []
    for name, on in (("a", False), ("b", True)):
        trainer = make_trainer(tmp_path / name, gradient_checkpointing=on, **keys)
        assert trainer.head.shares != on
        for head in (trainer.head, trainer.reference):
            head.shares = False
        runs.append([without_times(trainer.step()) for _ in range(4)])
        assert not any(module.training for module in trainer.model.modules())
    assert runs[0] == runs[1]


def _gpt2() -> Any:  # its dropouts are modules in the layer
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(CHARACTERS) + 3, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1,
            bos_token_id=1, initializer_range=0.3,
        )
    )  # fmt: skip


def _opt() -> Any:  # its dropouts are functions that follow the layer's mode
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
    assert calls == [True] * 4  # two layers in each of two updates, not in measurements
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_against_autograd_on_logits(tmp_path: Path) -> None:
    """The update's gradient equals that of -sum w A log pi through the model's own logits."""
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
    keys = {"steps": 6, "lr": 3e-3, "uniform_groups": "skip"}  # only right against wrong moves the policy
    free = make_trainer(tmp_path / "free", beta=1e-9, **keys).train()
    held = make_trainer(tmp_path / "held", beta=10.0, **keys).train()
    for run in (free, held):
        assert run[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert all(m["kl"] >= -1e-6 for m in run)
    assert held[-1]["kl"] < 0.3 * free[-1]["kl"]
    assert make_trainer(tmp_path / "none").train()[0]["kl"] is None


def test_reference_stays_where_the_policy_started(tmp_path: Path) -> None:
    """Its log-probs are the policy's first ones: in float32, and with bf16 linear weights under autocast."""
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
