"""A whole run: its files, resuming, schedules."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import make_model, make_trainer, without_times

from g2rl_kernels.trainer import ConfigError, Trainer
from g2rl_kernels.trainer.checkpoint import find_all


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


def test_the_file_of_a_run_that_overwrote_goes_on_with_it(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=1, resume="overwrite").train()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["resume"] == "auto"


def test_temporary_files_of_killed_runs_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".metrics.jsonl.1.tmp").write_text("x")
    (tmp_path / ".notes.tmp").write_text("a user's own")
    for name in (".checkpoint-000001.1.tmp", ".model.2.tmp", ".model.old.2.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".model.old.2.tmp" / "old").touch()  # killed between two renames
    make_trainer(tmp_path, steps=1).begin()
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".notes.tmp"]
    assert (tmp_path / "model" / "old").exists()


def test_resume_with_other_settings(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2).train()
    with pytest.raises(
        ConfigError, match=r"has lr=0\.001 \(now 0\.1\): choose another output_dir, or resume=over"
    ):
        make_trainer(tmp_path, steps=4, lr=0.1).train()
    with pytest.raises(ConfigError, match=r"has logits_memory=67108864 \(now 0\): choose another output_dir"):
        make_trainer(tmp_path, steps=4, logits_memory=0).train()
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


def test_autocast_auto_is_what_the_machine_is_fast_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run keeps the autocast of its checkpoint, also on a machine where auto means another."""

    def make(isa: str, name: str, **keys: Any) -> Trainer:
        monkeypatch.setattr("g2rl_kernels._C.best_isa", lambda: isa)
        trainer = make_trainer(tmp_path / name, autocast="auto", checkpoint_every=1, **keys)
        assert trainer.sampler.config.autocast == trainer.config.autocast
        return trainer

    for isa, expected in (("avx512", "none"), ("avx512bf16", "bfloat16")):
        trainer = make(isa, isa, steps=1)
        assert trainer.config.autocast == expected
        assert trainer.ops_dtype == (torch.bfloat16 if expected == "bfloat16" else torch.float32)
        trainer.train()
        state = json.loads((tmp_path / isa / "checkpoint-000001" / "state.json").read_text())
        assert state["config"]["autocast"] == expected
        assert yaml.safe_load((tmp_path / isa / "config.yaml").read_text())["autocast"] == "auto"
        other = "avx512bf16" if isa == "avx512" else "avx512"
        again = make(other, isa, steps=2)
        assert again.config.autocast == expected
        assert [m["step"] for m in again.train()] == [1, 2]
        assert make(other, isa, steps=2, resume="overwrite").config.autocast != expected


def test_a_collapse_is_told_once_and_at_the_same_step_after_resuming(tmp_path: Path, monkeypatch) -> None:
    describe = Trainer._describe

    def collapsing(self: Trainer, *measured: Any) -> dict[str, float]:
        share = self.step_number / 24
        return {**describe(self, *measured), "accuracy": 0.5 * (1 - share), "cos_mean": share}

    monkeypatch.setattr(Trainer, "_describe", collapsing)

    def train(name: str, steps: int) -> tuple[list[dict[str, Any]], list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            metrics = make_trainer(tmp_path / name, steps=steps, report_every=0).train()
        return metrics, [str(one.message) for one in caught if "g2rl: step" in str(one.message)]

    whole, told = train("whole", 24)
    assert len(told) == 1
    assert "answers become alike and wrong" in told[0]
    alarms = [m.get("alarm") for m in whole]
    at = alarms.index(1.0)
    assert told[0].startswith(f"g2rl: step {at + 1}: ")
    assert alarms == [None] * at + [1.0] * (24 - at)
    for steps in (4, at + 2):
        _, first = train(f"parts{steps}", steps)
        parts, second = train(f"parts{steps}", 24)
        assert first + second == told
        assert [without_times(m) for m in parts] == [without_times(m) for m in whole]
