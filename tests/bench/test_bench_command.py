"""`g2rl bench` runs to its end, writes and draws, and refuses wrong usage."""

import argparse
import importlib.util
import json
import re
import sys
import types
from typing import Any

import pytest
import torch
from bench_helpers import (
    METHODS,
    ROOT,
    TRAINING,
    Method,
    bench,
    group,
    head,
    logprobs,
    measure,
    run,
    torch_empty,
    train,
)

from g2rl_kernels.trainer import TrainerConfig
from g2rl_kernels.trainer.trainer import Verified


def test_head_measures_writes_and_draws(compiled, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot, kernels = (tmp_path / name for name in ("a.json", "a.png", "kernels.txt"))
    wanted = ["--shapes", "tiny", "--N", 8, 16, "--dtypes", "bf16", "--distributions", "0.5 nats"]
    wanted += ["--methods", "g2rl", "64", "CCE", "--rounds", 2]
    assert bench("head", "--device", "cpu", *wanted, "--out", out, "--plot", plot, "--profile", kernels) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    ours = [name for name in METHODS if name.startswith("g2rl") and METHODS[name].obstacle("cpu") is None]
    rows = result["rows"]
    assert [(row["N"], row["method"]) for row in rows] == [
        (N, name) for N in (8, 16) for name in [*ours, "torch, 64 tokens at a time"]
    ]
    for row in rows:
        assert (row["V"], row["d"], row["dtype"], row["distribution"]) == (2048, 64, "bf16", "0.5 nats")
        low, mid, high = row["ratio_20_50_80"]
        assert 0 < low <= mid <= high
        assert row["rounds"] == 2
        assert row["milliseconds"] > 0
        if METHODS[row["method"]].responses:
            assert row["error"] is None
        else:
            assert 0 < row["error"] < 0.1
            assert row["error"] == row["errors"]["features"]
    by_name = {row["method"]: row for row in rows}
    assert by_name["g2rl-kernels, 8 responses"]["responses"] == 8
    assert by_name["g2rl-kernels"]["error"] < by_name["torch, 64 tokens at a time"]["error"]
    left = {one["method"]: one["reason"] for one in result["left_out"]}
    assert left["g2rl-kernels, statistics"] == "runs on cuda only"
    assert "CCE" in left
    assert printed.count("| 16 x 2048 x 64, bf16, 0.5 nats |") == len(ours) + 1
    tflops = result["machine"]["ceilings"]["product_tflops"]["bf16"]
    assert f"products of {measure.PRODUCT_SIZE['cpu']} cubed at {tflops:.3g} (bf16)" in printed
    assert re.search(r"At the ceilings the product takes [\d.]+ ms \(8 x 2048 x 64, bf16\), ", printed)
    assert "- g2rl-kernels, certificate, all cases: runs on cuda only" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    for name in ("torch.mm(hidden, weight.T, out=logits)", *ours):
        assert f"== {name}\n" in kernels.read_text()
    assert "g2rl::head_features" in kernels.read_text()

    assert bench("table", out) == 0
    assert capsys.readouterr().out == printed
    again = tmp_path / "again.png"
    assert bench("plot", out, "--out", again) == 0
    assert again.read_bytes() == plot.read_bytes()


def test_logprobs_measures_writes_and_draws(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    out, plot, kernels = (tmp_path / name for name in ("a.json", "a.png", "kernels.txt"))
    wanted = ["--shapes", "tiny", "--N", 16, "--dtypes", "bf16", "fp32", "--distributions", "0.5 nats"]
    wanted += ["--methods", "g2rl", "64", "CCE", "--rounds", 6]  # one round after a move in memory
    assert (
        bench("logprobs", "--device", "cpu", *wanted, "--out", out, "--plot", plot, "--profile", kernels) == 0
    )
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    names = [name for name in TRAINING if name.startswith("g2rl") or "64" in name]
    rows = result["rows"]
    assert [(row["N"], row["dtype"], row["method"]) for row in rows] == [
        (16, dtype, name) for dtype in ("bf16", "fp32") for name in names
    ]
    for row in rows:
        low, mid, high = row["ratio_20_50_80"]
        assert 0 < low <= mid <= high
        assert row["rounds"] == 6
        assert 0 < row["forward_milliseconds"] < row["milliseconds"]
        assert 0 < row["backward_milliseconds"] < row["milliseconds"]
        frozen = "frozen" in row["method"]
        assert len(row["product_milliseconds"]) == (2 if frozen else 3)
        assert row["floor_milliseconds"] > max(row["product_milliseconds"])
        assert ("weight" in row["errors"]) != frozen
        assert ("entropy" in row["errors"]) == ("bonus" in row["method"])
        for name in ("hidden", "weight"):
            assert 0 <= row["errors"].get(name, 0) < (1e-4 if row["dtype"] == "fp32" else 0.02)
    by_name = {row["method"]: row for row in rows if row["dtype"] == "bf16"}
    ours, torchs = by_name["g2rl-kernels"]["errors"], by_name["torch, 64 tokens at a time"]["errors"]
    assert ours["hidden"] < torchs["hidden"]
    assert ours["logprobs"] < torchs["logprobs"]
    assert printed.count("| 16 x 2048 x 64, bf16, 0.5 nats |") == len(names)
    assert "time / bare products (20 to 80 %)" in printed
    assert "With a frozen weight they are two" in printed
    assert "- CCE, exact, all cases: " in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    for name in ("torch.mm, logits", "torch.mm, dX", "torch.mm, dW", *names):
        assert f"== {name}\n" in kernels.read_text()
    assert "g2rl::linear_logprobs_backward" in kernels.read_text()

    assert bench("table", out) == 0
    assert capsys.readouterr().out == printed
    other = tmp_path / "head.json"
    other.write_text(json.dumps({"op": "head", "machine": result["machine"], "rows": []}))
    assert bench("plot", out, other, "--out", plot) == 2
    assert "no plot of head and logprobs" in capsys.readouterr().err

    tool = readme_table()
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    text, count = tool.BLOCK.subn(tool.written, "<!-- table: g2rl bench logprobs a.json -->\n<!-- end -->\n")
    assert count == 1
    assert head.table is not logprobs.table
    assert logprobs.table(rows) in text
    assert re.search(
        r"In short: .* in fp32, .* in bf16 of the three products; .* MB beyond the gradients", text
    )
    with pytest.raises(SystemExit, match=r"the table of head names a\.json, a result of g2rl bench logprobs"):
        tool.block("head", "a.json")


def readme_table() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "tools" / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_method_that_fails_is_named_and_the_others_measured(monkeypatch, capsys):
    def broken(p: Any) -> Any:
        raise ValueError("no such luck")

    def too_large(p: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 40 GB")

    monkeypatch.setitem(METHODS, "a test: large", Method("a test: large", too_large))
    monkeypatch.setitem(METHODS, "a test: works", Method("a test: works", torch_empty, "all but zeros"))
    wanted = ["head", "--device", "cpu", "--shapes", "tiny", "--N", 8, "--dtypes", "fp32", "--rounds", 1]
    wanted += ["--methods", "a test"]
    assert bench(*wanted) == 0  # what does not fit is no fault
    printed = capsys.readouterr().out
    assert "- a test: large, tiny 8 fp32 2.3 sigma: out of memory" in printed
    assert "| a test: works |" in printed
    assert "all but zeros" in printed

    monkeypatch.setitem(METHODS, "a test: broken", Method("a test: broken", broken))
    assert bench(*wanted) == 1
    printed = capsys.readouterr().out
    assert "ValueError: no such luck" in printed
    assert "| a test: works |" in printed


def test_options_may_be_written_as_key_value(tmp_path):
    results = [tmp_path / "a.json", tmp_path / "b.json"]
    assert bench("group", "device=cpu", "sizes=2x4x64", "rounds=2", f"out={results[0]}") == 0
    assert bench("group", "--device", "cpu", "--sizes", "2x4x64", "--rounds", 2, "--out", results[1]) == 0
    one, other = (json.loads(path.read_text())["rows"] for path in results)
    for name in ("groups", "implementation", "rounds"):
        assert [row[name] for row in one] == [row[name] for row in other]


def test_group_measures_all_implementations(tmp_path, capsys):
    out = tmp_path / "group.json"
    sizes = ["2x4x64", "3x2x16"]
    assert bench("group", "--device", "cpu", "--sizes", *sizes, "--rounds", 2, "--out", out) == 0
    rows = json.loads(out.read_text())["rows"]
    names = ["one read of the features", *group.implementations(*group.inputs(2, 4, 64, "cpu"))]
    assert [(row["groups"], row["implementation"]) for row in rows] == [
        (B, name) for B in (2, 3) for name in names
    ]
    assert len(names) > 2
    for row in rows:
        assert (row["error"] is None) == (row["implementation"] == names[0])
        assert row["error"] is None or row["error"] < 1e-4
    printed = capsys.readouterr().out
    assert printed.count("| 2 x 4 x 64 |") == len(names)
    assert re.search(r"At the ceilings, out of cache: 2 x 4 x 64 takes [\d.]+ us, 3 x 2 x 16 takes", printed)


def test_train_measures_the_step_with_and_without(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "train.json"
    assert bench("train", "--device", "cpu", "--models", "tiny", "--rounds", 2, "--out", out) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["algorithm"] for row in rows] == ["grpo", "g2rl"]
    assert 0 < rows[1]["feature_seconds"] < rows[1]["seconds"]
    assert "| tiny, 8, " in capsys.readouterr().out


def test_the_step_without_g2rl_is_the_trainers_with_lam_0():
    pytest.importorskip("transformers")
    batch = train.Batch(responses=8, group=4, prompt=5, response=12, micro=4)
    keys = {"batch_size": 8, "group_size": 4, "micro_batch_size": 4, "lam": 0.0}
    step = train.Step(train.make_model("tiny", "cpu"), TrainerConfig.from_dict(keys))
    rollout, scores = train.make_rollout(batch, 2048, "cpu")
    assert 0 < scores.sum() < len(scores)
    grpo, g2rl = step.measure_grpo(rollout, scores), step.measure(rollout, Verified(scores))
    torch.testing.assert_close(grpo.logprobs, g2rl.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grpo.geometry.advantages, g2rl.geometry.advantages, atol=1e-4, rtol=1e-4)
    assert grpo.logprobs[rollout.mask].max() < 0
    before = step.trained[0].detach().clone()
    step.grpo(rollout, scores)
    assert not torch.equal(before, step.trained[0])


@pytest.mark.parametrize(
    ("argv", "needed"),
    [
        (["head", "--rounds", "0"], "--rounds is 0, needs 1 or more"),
        (["head", "--N", "0"], "--N: 0 tokens"),
        (["head", "--shapes", "gpt-9"], "invalid choice: 'gpt-9'"),
        (["head", "--methods", "magic"], "no name contains magic"),
        (["logprobs", "--N", "16", "0"], "--N: 0 tokens"),
        (["logprobs", "--methods", "certificate"], "no name contains certificate"),
        (["group", "--sizes", "3x4"], "--sizes: '3x4', needs BxMxD, e.g. 64x16x4096"),
        (["group", "--sizes", "3x4x0"], "--sizes: '3x4x0', needs BxMxD"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_wrong_usage(argv, needed, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(*argv)
    assert stop.value.code == 2
    assert needed in capsys.readouterr().err


def one_line(capsys: Any) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("g2rl bench: error: ")
    return line


@pytest.mark.parametrize("option", ["--out", "--plot", "--profile"])
def test_where_files_go_is_checked_before_anything_is_measured(option, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")

    def measured(*args: Any) -> None:
        raise AssertionError("measured something")

    monkeypatch.setattr(run, "Recorder", measured)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert bench("head", option, tmp_path / "file" / "x.png") == 2
    assert "file/x.png: " in one_line(capsys)
    assert bench("head", option, tmp_path / "folder.png") == 2
    assert "Is a directory" in one_line(capsys)
    with pytest.raises(AssertionError, match="measured something"):
        bench("head", option, tmp_path / "new" / "x.png")
    assert [*(tmp_path / "new").iterdir()] == []


def test_a_picture_is_one_that_can_be_drawn(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results = ROOT / "benchmarks" / "results" / "cpu-epyc-zen5-2cores.json"
    for words in (["head", "--plot"], ["plot", results, "--out"]):
        for name in ("a.docx", "a"):
            assert bench(*words, tmp_path / name) == 2
            assert f"{tmp_path / name}: the name must end in one of ." in one_line(capsys)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert bench("head", "--plot", tmp_path / "a.png") == 2
    assert "pip install matplotlib" in one_line(capsys)


@pytest.mark.parametrize("content", [None, "{", "[]", "7", "{}", '{"op": "dance", "rows": []}', "learning"])
def test_what_is_no_result_is_refused(content, tmp_path, capsys):
    file = tmp_path / "result.json"
    if content == "learning":
        file = ROOT / "benchmarks" / "results" / "learning" / "fluent.json"
    elif content is not None:
        file.write_text(content)
    for words in (["table", file], ["plot", file, "--out", tmp_path / "a.png"]):
        assert bench(*words) == 2
        assert str(file) in one_line(capsys)


def test_nothing_measured_is_2(monkeypatch, capsys):
    def missing(*args: Any) -> Any:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(train, "measure", missing)
    assert bench("train", "--device", "cpu") == 2
    printed = capsys.readouterr().out
    assert "nothing was measured" in printed
    assert "- the step, tiny: No module named 'transformers': pip install 'g2rl-kernels[train]'" in printed


def test_interrupted_says_what_is_kept(monkeypatch, tmp_path, capsys):
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(group, "measure", interrupted)
    assert bench("group", "--device", "cpu") == 130
    assert capsys.readouterr().err.strip() == "interrupted: nothing is kept"
    assert bench("group", "--device", "cpu", "--out", tmp_path / "a.json") == 130
    assert f"interrupted: {tmp_path / 'a.json'} is written after every case" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["", "head", "logprobs", "group", "train"])
def test_help_teaches(op, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(*op.split(), "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    needed = {
        "head": ["examples:", "qwen3-8b", "float64", "L2"],
        "logprobs": ["examples:", "dW = dz^T hidden", "fresh memory", "frozen", "beyond the gradients"],
        "group": ["CUDA graph"],
        "train": ["GRPO"],
    }
    for word in needed.get(op, ["bench head", "bench logprobs", "bench group", "bench train", "--out"]):
        assert word in text


def test_methods_are_chosen_by_words():
    assert run.chosen_methods(METHODS, ["certificate", "cce"], "cuda") == ["g2rl-kernels, certificate", "CCE"]
    on_gpu = run.chosen_methods(METHODS, None, "cuda")
    assert not {"g2rl-kernels", "torch, 64 tokens at a time"} & {*on_gpu}
    assert {"g2rl-kernels, statistics", "torch, all logits at once", "Liger"} <= {*on_gpu}
    trained = run.chosen_methods(TRAINING, None, "cpu")
    assert {"g2rl-kernels", "g2rl-kernels, frozen weight", "torch, 64 tokens at a time"} <= {*trained}
    assert "torch.compile, all logits at once" not in trained


def test_cases_are_the_product_of_what_is_named():
    args = argparse.Namespace(
        shapes=["tiny"], N=[8, 16], dtypes=["fp16"], distributions=["flat", "0.5 nats"], quick=False
    )
    cases = run.chosen_cases(args, gpu=True)
    assert [(c.N, c.distribution) for c in cases] == [
        (8, "flat"),
        (8, "0.5 nats"),
        (16, "flat"),
        (16, "0.5 nats"),
    ]
