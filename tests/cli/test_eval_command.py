"""`g2rl eval` from the command line, its numbers by hand, comparisons and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_model, make_tokenizer

from g2rl_kernels.cli import main as cli
from g2rl_kernels.evaluation import results
from g2rl_kernels.evaluation.metrics import bootstrap_interval
from g2rl_kernels.evaluation.samples import read_samples, write_samples

pytest.importorskip("math_verify", reason="needs math-verify: pip install 'g2rl-kernels[train]'")


def row(problem: str, sample: int, answer: str | None, right: bool, **others: Any) -> dict[str, Any]:
    data = problem.partition("/")[0]
    base = {
        "problem": problem,
        "sample": sample,
        "data": data,
        "question": problem,
        "completion": str(answer),
    }
    return {**base, "tokens": [1, 2], "truncated": False, "score": float(right), "answer": answer, **others}


def rows_of(data: str, problems: list[str]) -> list[dict[str, Any]]:
    """Problems as texts: each letter is a sample, upper case is right, - is a sample without an answer."""
    return [
        row(f"{data}/{i}", j, None if letter == "-" else letter, letter.isupper())
        for i, letters in enumerate(problems)
        for j, letter in enumerate(letters)
    ]


def test_numbers_by_hand():
    summary = results.summarise(rows_of("x", ["ABcd", "aaB-"]))
    one = summary["x"]
    assert (one["problems"], one["samples"]) == (2, 4)
    means = {name: value["mean"] for name, value in one["metrics"].items()}
    assert means["pass@1"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert means["pass@2"] == pytest.approx(((1 - 1 / 6) + 1 / 2) / 2)
    assert means["pass@4"] == 1
    assert means["maj@4"] == pytest.approx((1 / 2 + 0) / 2)
    # of the pairs of aaB-: aa 1, aB 2 (a draw), a- 2, B- 1 (right)
    assert means["maj@2"] == pytest.approx((1 / 2 + 2 / 6) / 2)
    assert means["distinct_right"] == 1.5
    assert means["length"] == 2
    assert (one["metrics"]["pass@1"]["low"], one["metrics"]["pass@1"]["high"]) == (0.25, 0.5)
    text = results.table(summary)
    assert "| pass@1 " in text
    assert "37.5 (25.0 to 50.0)" in text
    assert text.count("maj@") == 1


def test_16_is_the_vote_of_the_table():
    summary = results.summarise(rows_of("x", ["A" * 20 + "b" * 12]))
    assert [line.split("|")[1].strip() for line in results.table(summary).splitlines()[3:11]] == [
        "pass@1", "maj@16", "pass@2", "pass@4", "pass@8", "pass@16", "pass@32", "distinct right answers"
    ]  # fmt: skip


def test_votes_go_up_to_64_unless_others_are_asked_for():
    rows = rows_of("x", ["Ab" * 64])
    metrics = results.summarise(rows)["x"]["metrics"]
    assert [name for name in metrics if name.startswith("maj@")] == [f"maj@{1 << i}" for i in range(7)]
    assert "pass@128" in metrics
    assert "maj@128" in results.summarise(rows, ks=[128])["x"]["metrics"]


def test_a_single_problem_has_no_interval(tmp_path):
    summary = results.summarise(rows_of("x", ["Ab"]))
    value = summary["x"]["metrics"]["pass@1"]
    assert (value["mean"], value["low"], value["high"]) == (0.5, None, None)
    assert "| 50.0 " in results.table(summary)
    results.draw({"x": summary["x"]["metrics"]}, "x", tmp_path / "x.png")
    compared = results.compare({"base": rows_of("x", ["ab"]), "other": rows_of("x", ["AB"])})
    text = results.comparison_table("base", compared)
    assert "| +100.0 " in text
    assert "**" not in text


def test_metrics_come_in_one_order():
    rows = rows_of("x", ["Ab", "AB"])
    (one,) = results.compare({"base": rows, "other": rows})["other"].values()
    assert list(one["metrics"]) == list(results.summarise(rows)["x"]["metrics"])


def test_the_gate_decides_what_is_right():
    rows = [row("x/0", 0, "a", False, score=0.5), row("x/0", 1, "b", True)]
    assert results.summarise(rows)["x"]["metrics"]["pass@1"]["mean"] == 0.5
    assert results.summarise(rows, gate=0.5)["x"]["metrics"]["pass@1"]["mean"] == 1


def test_paired_differences():
    base = rows_of("x", ["Ab", "ab", "AB", "ab"])
    other = rows_of("x", ["AB", "aB", "AB", "ab", "AB"])  # one problem more, which does not count
    one = results.compare({"base": base, "other": other})["other"]["x"]
    assert one["problems"] == 4
    difference = np.array([0.5, 0.5, 0, 0])
    metric = one["metrics"]["pass@1"]
    assert metric["base"] == pytest.approx(3 / 8)
    assert metric["value"] == pytest.approx(5 / 8)
    assert metric["mean"] == pytest.approx(0.25)
    assert (metric["low"], metric["high"]) == bootstrap_interval(difference)
    text = results.comparison_table("base", {"other": {"x": one}})
    assert "+25.0" in text
    same = results.compare({"base": base, "other": base})["other"]["x"]["metrics"]["pass@1"]
    assert same["mean"] == same["low"] == same["high"] == 0


def test_what_cannot_be_compared():
    base = rows_of("x", ["Ab"])
    with pytest.raises(ValueError, match="share no problem"):
        results.compare({"base": base, "other": rows_of("y", ["Ab"])})
    renamed = [{**one, "question": "another"} for one in base]
    with pytest.raises(ValueError, match="x/0 is another problem in other than in base"):
        results.compare({"base": base, "other": renamed})
    with pytest.raises(RuntimeError, match="not finished"):
        results.summarise([*base, row("x/1", 0, "a", True)])
    more = results.compare({"base": base, "other": rows_of("x", ["ABCd"])})["other"]["x"]
    assert more["samples"] == 2
    assert "distinct_right" not in more["metrics"]


def save_model(path: Path) -> str:
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def write_problems(path: Path) -> str:
    rows = [{"id": str(i), "problem": "1" + "+1" * i + "=", "answer": str(i + 1)} for i in range(3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_from_model_to_comparison(tmp_path, capsys):
    model, problems = save_model(tmp_path / "model"), write_problems(tmp_path / "aime.jsonl")
    out = tmp_path / "run"
    words = ["eval", model, "--data", f"aime25={problems}", "-n", "4", "--max-new-tokens", "4"]
    # the data set's own template has more characters than the tiny model has positions
    words += ["prompt_template=a{question}", "--out", str(out), "--batch-size", "4"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "| pass@1" in text
    assert "3 x 4" in text
    found = json.loads((out / "results.json").read_text())
    rows = read_samples(out)
    assert rows[4]["prompt"] == "a1+1="
    share = np.mean([one["score"] for one in rows])
    assert found["results"]["aime25"]["metrics"]["pass@1"]["mean"] == pytest.approx(share)
    assert found["settings"]["model"] == model
    assert (out / "pass_at_k.png").read_bytes()[:4] == b"\x89PNG"

    before = (out / "samples.jsonl").read_bytes()
    assert cli.main(words) == 0  # continues: nothing is left to do
    assert (out / "samples.jsonl").read_bytes() == before
    assert cli.main([*words, "--seed", "1"]) == 2
    assert "seed=0 (now 1)" in capsys.readouterr().err

    assert cli.main([*words, "--seed", "1", "--overwrite", "--out", str(tmp_path / "run2")]) == 0
    capsys.readouterr()
    assert (
        cli.main(["eval", "--compare", str(out), str(tmp_path / "run2"), "--out", str(tmp_path / "c")]) == 0
    )
    assert "difference" in capsys.readouterr().out
    compared = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert compared["runs"][str(tmp_path / "run2")]["aime25"]["problems"] == 3

    # stored samples: counted as they are, and verified by other gold answers
    assert cli.main(["eval", "--samples", str(out), "-k", "1,3"]) == 0
    assert "pass@3" in capsys.readouterr().out
    altered = [{**one, "completion": "\\boxed{2}"} for one in rows]
    write_samples(tmp_path / "other", altered, {"settings": {"model": "m"}})
    again = ["eval", "--samples", str(tmp_path / "other" / "samples.jsonl"), "--data", f"aime25={problems}"]
    assert cli.main([*again, "--out", str(tmp_path / "again")]) == 0
    assert [one["score"] for one in read_samples(tmp_path / "again")] == [0.0] * 4 + [1.0] * 4 + [0.0] * 4
    assert [one["score"] for one in read_samples(tmp_path / "other")] == [one["score"] for one in rows]
    assert f"samples   {tmp_path / 'again' / 'samples.jsonl'}" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "again" / "results.json").read_text())
    assert recorded["settings"] == {"model": "m"}
    assert recorded["data"]["aime25"]["problems"] == 3


def test_a_model_retrained_in_place_is_another_one(tmp_path, capsys):
    model, problems = save_model(tmp_path / "model"), write_problems(tmp_path / "aime.jsonl")
    words = ["eval", model, "--data", f"aime25={problems}", "-n", "2", "--max-new-tokens", "4"]
    words += ["prompt_template=a{question}", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    assert cli.main(words) == 0
    before = read_samples(tmp_path / "run")
    make_model(7).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert f"of another model: the files in {model} have changed since: choose another --out, or --o" in err
    assert cli.main([*words, "--overwrite"]) == 0
    after = read_samples(tmp_path / "run")
    assert [one["completion"] for one in after] != [one["completion"] for one in before]
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert cli.main(words) == 2


def test_results_beside_a_model_are_no_part_of_it(tmp_path):
    model, problems = save_model(tmp_path / "model"), write_problems(tmp_path / "aime.jsonl")
    words = ["eval", model, "--data", f"aime25={problems}", "-n", "2", "--max-new-tokens", "4"]
    for _ in range(2):
        assert cli.main([*words, "prompt_template=a{question}", "--out", model]) == 0


def test_samples_of_a_killed_run_are_counted_with_a_warning(tmp_path, capsys):
    header = {"settings": {"n": 2}, "data": {"x": {"problems": 4}, "y": {"problems": 1}}}
    write_samples(tmp_path / "part", rows_of("x", ["Ab", "AB", "ab"]), header)
    write_samples(tmp_path / "whole", [*rows_of("x", ["Ab"] * 4), *rows_of("y", ["ab"])], header)
    assert cli.main(["eval", "--samples", str(tmp_path / "part")]) == 0
    err = capsys.readouterr().err
    warning = f"{tmp_path / 'part'} holds 3 of 4 problems of x, 0 of 1 problems of y: its run is not finished"
    assert f"g2rl eval: warning: {warning}" in err
    assert cli.main(["eval", "--samples", str(tmp_path / "whole")]) == 0
    assert "warning" not in capsys.readouterr().err
    assert cli.main(["eval", "--compare", str(tmp_path / "whole"), str(tmp_path / "part")]) == 0
    assert capsys.readouterr().err.count(warning) == 1


HEADERS = ("[]", "7", "{}", '{"settings": 3, "data": {}}', '{"settings": {}, "data": {"x": 4}}')


@pytest.mark.parametrize("header", HEADERS)
def test_another_programs_samples_json_is_ignored(header, tmp_path, capsys):
    write_samples(tmp_path, rows_of("x", ["Ab"]), {})
    (tmp_path / "samples.json").write_text(header)
    assert cli.main(["eval", "--samples", str(tmp_path)]) == 0
    assert "| pass@1 " in capsys.readouterr().out


def test_another_file_beside_a_run_leaves_it_alone(tmp_path, capsys):
    run, problems = tmp_path / "run", write_problems(tmp_path / "aime.jsonl")
    rows = [
        row(f"aime25/{i}", 0, "2", False, question=q, completion="\\boxed{2}")
        for i, q in enumerate(("1=", "1+1="))
    ]
    write_samples(run, rows, {})
    other = run / "other.jsonl"
    other.write_text(json.dumps(rows[0]) + "\n")
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    for words in ([], ["--data", f"aime25={problems}"]):
        assert cli.main(["eval", "--samples", str(other), *words]) == 2
        assert "other.jsonl is not named samples.jsonl: give --out" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    assert cli.main(["eval", "--samples", str(other), *words, "--out", str(tmp_path / "new")]) == 0
    assert len(read_samples(tmp_path / "new")) == 1


def test_samples_of_another_run_are_replaced_only_when_told(tmp_path, capsys):
    problems = write_problems(tmp_path / "aime.jsonl")
    rows = [row("aime25/0", 0, "1", False, question="1=", completion="\\boxed{1}")]
    write_samples(tmp_path / "a", rows, {})
    write_samples(tmp_path / "b", [{**rows[0], "completion": "mine"}], {})
    before = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    onto = ["eval", "--samples", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    for words in ([], ["--data", f"aime25={problems}"]):
        assert cli.main([*onto, *words]) == 2
        assert "b has samples of its own: choose another --out, or --overwrite" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()} == before
    assert cli.main([*onto, *words, "--overwrite"]) == 0
    assert read_samples(tmp_path / "b") == [{**rows[0], "score": 1.0}]
    for place in ("a", "a/samples.jsonl"):  # its own folder
        assert (
            cli.main(["eval", "--samples", str(tmp_path / place), *words, "--out", str(tmp_path / "a")]) == 0
        )


def test_interrupted_with_overwrite_the_same_command_would_start_over(monkeypatch, capsys):
    from g2rl_kernels.cli import eval as command

    def interrupted(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_evaluate", interrupted)
    for words, said in (
        ([], "the same command continues"),
        (["--overwrite"], "without --overwrite continues"),
    ):
        assert cli.main(["eval", "m", *words]) == 130
        assert said in capsys.readouterr().err


def test_a_sample_without_a_score_must_be_verified(tmp_path, capsys):
    write_samples(tmp_path, [row("x/0", 0, "a", True, score=None)], {})
    assert cli.main(["eval", "--samples", str(tmp_path)]) == 2
    assert "problem x/0, sample 0 has no score: give its --data" in capsys.readouterr().err


@pytest.mark.parametrize(("isa", "expected"), [("avx2", "none"), ("avx512bf16", "bfloat16")])
def test_autocast_auto_of_a_recipe_is_stored_resolved(isa, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("g2rl_kernels._C.best_isa", lambda: isa)
    problems = write_problems(tmp_path / "aime.jsonl")
    words = ["eval", save_model(tmp_path / "m"), "--data", f"aime25={problems}", "-n", "1", "--limit", "1"]
    words += ["prompt_template=a{question}", "autocast=auto", "device=cpu", "--max-new-tokens", "2"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "samples.json").read_text())["settings"]
    assert settings["autocast"] == expected


def test_a_recipe_gives_tasks_and_prompts(tmp_path, capsys):
    problems = write_problems(tmp_path / "sums.jsonl")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"tasks: {{kind: jsonl, path: {problems}, question: problem, extract: last_number}}\n"
        "prompt_template: 'a={question}'\nmax_new_tokens: 3\ntruncated: drop\n"
        "batch_size: 8\nlr: 1e-5\nseed: 7\n"
    )
    words = ["eval", save_model(tmp_path / "m"), "--recipe", str(recipe), "-n", "2", "--limit", "2"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    rows = read_samples(tmp_path / "run")
    assert [one["problem"] for one in rows] == ["sums/0", "sums/0", "sums/1", "sums/1"]
    assert rows[2]["prompt"] == "a=1+1="
    assert max(len(one["tokens"]) for one in rows) == 3
    settings = json.loads((tmp_path / "run" / "results.json").read_text())["settings"]
    assert (settings["seed"], settings["max_new_tokens"]) == (7, 3)
    assert cli.main([*words, "tasks.0.question=id", "--seed", "8", "--out", str(tmp_path / "b")]) == 0
    assert read_samples(tmp_path / "b")[2]["prompt"] == "a=1"
    capsys.readouterr()
    assert cli.main([*words, "--max-new-tokens", "63", "--out", str(tmp_path / "c")]) == 2
    assert "the model has 64 positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model"),
        (["m"], "no data"),
        (["m", "--data", "math50"], "did you mean 'math500'"),
        (["m", "--data", "math500", "-n", "4", "-k", "8"], "k=8: must be from 1 to n=4"),
        (["m", "--data", "math500", "-k", "two"], "k='two'"),
        (["m", "--data", "math500", "-n", "2", "--temperature", "0"], "temperature=0"),
        (["m", "--data", "math500", "--engine", "x"], "engine='x'"),
        (["m", "--data", "math500", "sead=1"], "did you mean 'seed'"),
        (["m", "--data", "math500", "temperature=2"], "use --temperature"),
        (["m", "--data", "math500", "lam=2"], "has no effect here"),
        (["./none", "--data", "reasoning_gym:chain_sum"], "no model in ./none"),
        (["--samples", "none.jsonl"], "none.jsonl: No such file"),
        (["--compare", "a"], "needs two runs"),
        (["--samples", "none", "--gate", "nan"], "gate=nan"),
        (["--samples", "none", "--gate", "2"], "gate=2.0: must be above 0 and at most 1"),
        (["m", "--data", "math500", "--gate", "0"], "gate=0.0"),
        (["m", "--data", "math500", "--temperature", "nan"], "temperature=nan"),
    ],
)
def test_errors_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", *words]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("g2rl eval: error: ")
    assert len(err.splitlines()) == 1
    assert message in err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for needed in ("usage: g2rl eval", "--data math500", "--compare", "mmlu_pro"):
        assert needed in text
