from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tiny import make_model, make_tokenizer

from g2rl_kernels._files import whole_directory
from g2rl_kernels.trainer import TrainerConfig, TrainerError, checkpoint
from g2rl_kernels.trainer.report import Report, table


def trained(seed: int = 0, steps: int = 2) -> tuple[Any, torch.optim.Optimizer]:
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        model(input_ids=torch.arange(6)[None]).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def draws() -> list[float]:
    return [random.random(), float(numpy.random.rand()), float(numpy.random.randn()), float(torch.rand(()))]


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model, optimizer = trained()
    numpy.random.randn()  # leaves half a Gaussian pair in the generator
    path = checkpoint.save(tmp_path, 7, model, make_tokenizer(), optimizer, {"position": 3}, keep=2)
    expected = draws()
    other, fresh = trained(seed=1, steps=0)
    state = checkpoint.load(path, other, fresh)
    assert (state["step"], state["position"]) == (7, 3)
    assert draws() == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    for m, o in ((model, optimizer), (other, fresh)):  # one more update: the moments must agree too
        m(input_ids=torch.arange(6)[None]).logits.square().mean().backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight  # still tied


def test_no_pickle_and_readable_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, model, make_tokenizer(), optimizer, {}, keep=2)
    assert {file.suffix for file in path.iterdir()} <= {".safetensors", ".json", ".jinja"}
    again = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert AutoTokenizer.from_pretrained(path)("1+2")["input_ids"] == make_tokenizer()("1+2")["input_ids"]


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, model, make_tokenizer(), optimizer, {}, keep=1)
    (tmp_path / "other").write_text("")
    modes = {file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert modes == {(tmp_path / "other").stat().st_mode & 0o777}


def test_keeps_the_newest(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (1, 2, 999_999, 1_000_000):
        checkpoint.save(tmp_path, step, model, make_tokenizer(), optimizer, {}, keep=2)
    assert [path.name for path in checkpoint.find_all(tmp_path)] == [
        "checkpoint-999999",
        "checkpoint-1000000",
    ]


def test_full_disk_leaves_the_last_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path, 1, model, make_tokenizer(), optimizer, {}, keep=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(TrainerError, match=r"No space left on device.*free some disk space") as caught:
        checkpoint.save(tmp_path, 2, model, make_tokenizer(), optimizer, {}, keep=1)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]
    assert checkpoint.load(checkpoint.find_all(tmp_path)[-1], *trained(1, 0))["step"] == 1


@pytest.mark.parametrize("fails", [1, 2])
def test_a_directory_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    target, rename, calls = tmp_path / "model", os.rename, []
    for text in ("old", "new"):
        with whole_directory(target) as folder:
            (folder / text).write_text(text)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]

    def renamed(*args: Any) -> None:
        calls.append(args)
        if len(calls) == fails:
            raise OSError(errno.EBUSY, "busy")
        rename(*args)

    monkeypatch.setattr(os, "rename", renamed)
    with pytest.raises(TrainerError, match=r"cannot write .*busy"), whole_directory(target) as folder:
        (folder / "newer").write_text("newer")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


@pytest.mark.parametrize("text", ["[]", "3", '{"config": 3, "step": 1}'])
def test_a_state_of_another_form_is_damage(tmp_path: Path, text: str) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, model, make_tokenizer(), optimizer, {}, keep=1)
    (path / "state.json").write_text(text)
    with pytest.raises(TrainerError, match=r"is damaged.*delete it"):
        checkpoint.newest(tmp_path, TrainerConfig(), [])


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
)
def test_damage_is_told(tmp_path: Path, file: str) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, model, make_tokenizer(), optimizer, {}, keep=1)
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainerError, match=r"is damaged.*delete it"):
        checkpoint.load(path, model, optimizer)


def test_another_model_is_told(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, model, make_tokenizer(), optimizer, {}, keep=1)
    wider = make_model(hidden_size=48)
    with pytest.raises(TrainerError, match="of another model"):
        checkpoint.load(path, wider, torch.optim.AdamW(wider.parameters(), fused=True))


def test_each_of_many_gpus_gets_its_own_generator_back() -> None:
    states = {f"cuda.{gpu}": torch.tensor(gpu) for gpu in range(12)}
    saved = {"cpu": torch.tensor(-1), **{name: states[name] for name in sorted(states)}}
    assert torch.stack(checkpoint.cuda_states(saved)).tolist() == list(range(12))


def test_metrics_are_rewound(tmp_path: Path) -> None:
    """Removes lines after the checkpoint and a line cut off when the run was killed."""
    lines = [json.dumps({"step": step, "reward": step / 7}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "rew')
    report = Report(tmp_path, "title")
    report.begin(2)
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:2]) + "\n"
    assert [m["step"] for m in report.metrics] == [1, 2]
    report.log({"step": 3, "reward": 0.0})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    rows = [
        {"step": step, "completion": text}
        for step, text in enumerate(["a\u2028b", "a\u2029b", "a\x85b", "a"], 1)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(lines, encoding="utf-8")
    report = Report(tmp_path, "title")
    report.begin(4)
    assert report.samples == rows
    assert (tmp_path / "samples.jsonl").read_text(encoding="utf-8") == lines


def test_a_run_killed_within_a_character_is_rewound(tmp_path: Path) -> None:
    line = json.dumps({"step": 1, "completion": "é"}, ensure_ascii=False).encode()
    (tmp_path / "samples.jsonl").write_bytes(line + b"\n" + line[:-3])
    report = Report(tmp_path, "title")
    report.begin(1)
    assert report.samples == [{"step": 1, "completion": "é"}]


def test_table_shows_both_ends_of_a_question() -> None:
    row = {"step": 3, "completion": "a | b\nc", "score": 1.0, "reward": 1.0, "exploration_score": 0.5}
    row |= {
        "question": "What, in all honesty, is the sum of 9 + 4 ?",
        "shaped_reward": 1.25,
        "advantage": -0.5,
    }
    line = table([row], width=20).splitlines()[2]
    assert "What, in …of 9 + 4 ?" in line
    assert "a \\| b c" in line
    assert "+1.250" in line
