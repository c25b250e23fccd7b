"""Errors come before work, and an update that fails loses nothing."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LetterTask, make_model, make_tokenizer, make_trainer

from g2rl_kernels.trainer import ConfigError, RewardError, TrainerError
from g2rl_kernels.trainer.checkpoint import find_all


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
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
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
