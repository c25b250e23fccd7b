"""Truncated sampling in the trainer: the tokens that sampling kept are those of every log-prob."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import gradients_of_a_step, make_model, make_trainer, without_times

from g2rl_kernels.trainer import ConfigError, truncation
from g2rl_kernels.trainer.objective import policy_loss, token_weights
from g2rl_kernels.trainer.sampling import Rollout

SETTINGS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.4},
    "all": {"top_k": 6, "top_p": 0.9, "min_p": 0.1, "temperature": 1.7},
}
settings = pytest.mark.parametrize("keys", SETTINGS.values(), ids=SETTINGS)
ways = pytest.mark.parametrize("shares", [True, False], ids=["prefixes shared", "generate"])


def sampled(path: Path, shares: bool = True, **keys: Any) -> tuple[Any, Rollout]:
    """A trainer, with a policy that is neither flat nor peaked, and a rollout of it."""
    trainer = make_trainer(path, model=make_model(initializer_range=0.15), max_new_tokens=6, **keys)
    trainer.sampler.head = replace(trainer.head, shares=shares)
    torch.manual_seed(0)
    return trainer, trainer.sampler.sample()


def truncated_logits(trainer: Any, rollout: Rollout) -> torch.Tensor:
    """[S, L, V] by the model's own forward and transformers' warpers: temperature, top_k, top_p, min_p."""
    from transformers import GenerationConfig

    config = trainer.config
    own = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
    )
    warpers = trainer.model._get_logits_processor(own, 1, None, None, [])
    position_ids = (rollout.attention.cumsum(1) - 1).clamp(min=0)
    z = trainer.model(rollout.ids, attention_mask=rollout.attention, position_ids=position_ids).logits
    z = z[:, -rollout.mask.shape[1] - 1 : -1]
    return warpers(rollout.ids, z.flatten(0, 1).float()).view(z.shape)


@ways
@settings
def test_the_mask_is_the_samplers(tmp_path, keys, shares):
    """Each token's list is what transformers keeps of the model's logits there, and holds the token."""
    trainer, rollout = sampled(tmp_path, shares, batch_size=24, group_size=4, generate_batch_size=12, **keys)
    with torch.no_grad():
        kept = (truncated_logits(trainer, rollout) != -torch.inf)[rollout.mask]
    support = rollout.support(slice(0, 24))
    assert not support.whole.any()
    found = torch.zeros_like(kept)
    found[support.rows(), support.ids.long()] = True
    assert torch.equal(found, kept)
    assert 0.02 < found.float().mean() < 0.9
    tokens = rollout.ids[:, -rollout.mask.shape[1] :][rollout.mask]
    assert found[torch.arange(len(tokens)), tokens].all()
    # Some rows: the lists of those rows.
    part = rollout.support(slice(5, 9))
    count = int(rollout.mask[:5].sum())
    assert torch.equal(part.offsets.diff(), support.offsets.diff()[count : count + len(part.offsets) - 1])


@settings
def test_log_probs_are_those_of_the_truncated_softmax(tmp_path, keys):
    trainer, rollout = sampled(tmp_path, batch_size=16, group_size=4, micro_batch_size=8, beta=0.1, **keys)
    with torch.no_grad():
        log_p = truncated_logits(trainer, rollout).log_softmax(-1)
        measured = trainer.measure(rollout, trainer.verify(rollout))
    tokens = rollout.ids[:, -rollout.mask.shape[1] :]
    expected = log_p.gather(2, tokens[..., None])[..., 0].masked_fill(~rollout.mask, 0.0)
    torch.testing.assert_close(measured.logprobs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured.reference, expected, rtol=1e-4, atol=1e-5)  # the policy still is it
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)[rollout.mask].mean()
    assert measured.entropy == pytest.approx(float(entropy), rel=1e-4)
    full = trainer.measure(replace(rollout, kept=None), trainer.verify(rollout))
    assert (full.logprobs - measured.logprobs)[rollout.mask].max() < 0.01
    assert (full.logprobs - measured.logprobs)[rollout.mask].min() < -0.1  # the bias of the usual way


@settings
def test_an_update_is_that_of_the_truncated_softmax(tmp_path, keys):
    """Gradients of a step by autograd through the model's own logits, masked."""
    trainer, rollout = sampled(tmp_path, batch_size=16, group_size=4, max_grad_norm=1e9, **keys)
    found = gradients_of_a_step(trainer, rollout)
    config = trainer.config
    measured = trainer.measure(rollout, trainer.verify(rollout))
    log_p = truncated_logits(trainer, rollout).log_softmax(-1)
    logprobs = log_p.gather(2, rollout.ids[:, -rollout.mask.shape[1] :, None])[..., 0].masked_fill(
        ~rollout.mask, 0
    )
    loss, stats = policy_loss(
        logprobs, measured.logprobs, measured.geometry.advantages, rollout.mask,
        token_weights(rollout.mask, config.loss_mean), ratio="token", clip=(0.2, 0.2),
        reference=None, beta=0.0, entropy=None, entropy_coef=0.0,
    )  # fmt: skip
    trainer.model.zero_grad()
    loss.backward()
    assert stats["clip_fraction"] == 0  # the ratio is 1 before the first update
    names = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert names == set(found)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_without_the_mask_the_full_softmax_is_trained(tmp_path):
    trainer, rollout = sampled(tmp_path, top_p=0.7, keep_sampling_mask=False)
    assert rollout.kept is None
    same, kept = sampled(tmp_path, top_p=0.7)
    assert torch.equal(kept.ids, rollout.ids)  # the mask changes no sample
    assert "kept_ids" not in trainer.step()
    assert same.step()["kept_ids"] > 1


def test_long_lists_take_the_whole_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(truncation, "LIMIT", 11)
    trainer, rollout = sampled(tmp_path, batch_size=16, group_size=4, top_p=0.8)
    support = rollout.support(slice(0, 16))
    assert 0 < support.whole.float().mean() < 1
    assert support.offsets.diff().max() <= 11
    assert torch.equal(support.offsets.diff() == 0, support.whole)
    measured = trainer.measure(rollout, trainer.verify(rollout))
    full = trainer.measure(replace(rollout, kept=None), trainer.verify(rollout))
    whole = torch.zeros_like(rollout.mask).masked_scatter(rollout.mask, support.whole)
    torch.testing.assert_close(measured.logprobs[whole], full.logprobs[whole])
    assert 0 < trainer.step()["whole_tokens"] < 1


@pytest.mark.parametrize("algorithm", ["grpo", "g2rl", "gar", "repexp"])
def test_a_run_killed_and_resumed_gives_the_same_numbers(tmp_path, algorithm):
    keys: dict[str, Any] = {
        "top_p": 0.8,
        "algorithm": algorithm,
        "steps": 3,
        "checkpoint_every": 1,
        "epochs": 2,
    }
    whole = make_trainer(tmp_path / "a", **keys).train()
    first = make_trainer(tmp_path / "b", **keys)
    first.begin()
    first.report.log(first.step())
    first.save_checkpoint()
    again = make_trainer(tmp_path / "b", **keys).train()
    assert [without_times(row) for row in again] == [without_times(row) for row in whole]
    assert all(row["kept_ids"] > 1 for row in whole)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"top_k": -1}, "top_k=-1: must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5: must be above 0"),
        ({"min_p": -0.1}, "min_p=-0.1: must be from 0 to 1"),
        ({"min_p": 1.1}, "min_p=1.1: must be from 0 to 1"),
    ],
)
def test_settings_that_cannot_work(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, **keys)
