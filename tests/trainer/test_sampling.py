"""Sampling: the distribution of responses, end tokens, prompts and their order."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHARACTERS, LetterTask, make_model, make_tokenizer, make_trainer

from g2rl_kernels.trainer import ConfigError, TrainerError


def test_samples_come_from_the_scored_distribution(tmp_path: Path) -> None:
    """First tokens follow softmax(z / T), although the model's own settings ask for top-k 1 and more."""
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
        shown = [token for token in tokens if token not in (0, 1)]  # <pad>, </s>; <unk> stays
        assert rollout.completions[row] == trainer.tokenizer.decode(shown)


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
    """Responses that are not cut off get the advantages of a group without the others."""
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
