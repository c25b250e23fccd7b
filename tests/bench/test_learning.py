"""The experiments behind docs/evidence.md: the task, the plan, the statistics, and a run on a small scale."""
# ruff: noqa: E402 (what may be missing is looked for before it is imported)

import dataclasses
import json
import math
import random

import pytest

for package in ("transformers", "tqdm", "matplotlib", "scipy"):
    pytest.importorskip(package, reason=f"the experiments need {package}: make evidence sets it up")

from benchmarks.learning import document, evidence, experiment, expressions, settings
from benchmarks.learning.experiment import Run

# --- the task -----------------------------------------------------------------------------------------------


def test_value_is_that_of_python() -> None:
    draw = random.Random(0)
    for _ in range(300):
        numbers = [str(draw.randint(0, 120)) for _ in range(draw.randint(2, 4))]
        text = numbers[0] + "".join(draw.choice("+-*") + number for number in numbers[1:])
        assert expressions.value(text) == eval(text), text


@pytest.mark.parametrize("text", ["", "12", "1+", "+1+2", "1++2", "1+2=", "1+2 ", "1000+1", "1+2\n", "a+b"])
def test_what_is_no_expression_has_no_value(text: str) -> None:
    assert expressions.value(text) is None


@pytest.mark.parametrize("level", expressions.LEVELS)
def test_the_teacher(level: str) -> None:
    draw = random.Random(1)
    train, test = (expressions.numbers(level, split) for split in ("train", "test"))
    assert not {*train} & {*test}
    assert sorted(train + test) == list(range(expressions.LOWEST, expressions.LEVELS[level] + 1))
    for number in train + test:
        off = number % expressions.MISTAKEN[level] == 0  # its favourite sum is wrong for these
        assert expressions.value(expressions.habitual(number, level)) == number + off
        assert expressions.value(expressions.unusual(number, draw)) == number


def test_the_tokenizer_gives_back_what_it_is_given() -> None:
    tokenizer = expressions.make_tokenizer()
    ids = tokenizer("47=20+27*3-9")["input_ids"]
    assert len(ids) == 12
    assert tokenizer.decode(ids) == "47=20+27*3-9"


# --- the plan -----------------------------------------------------------------------------------------------


def test_every_algorithm_is_tuned_with_equal_effort_on_other_seeds() -> None:
    runs = evidence.plan("tuning", {})
    each = {a: sum(dict(r.keys)["algorithm"] == a for r in runs) for a in settings.GRIDS}
    assert set(each.values()) == {len(runs) // len(each)}
    assert {r.seed for r in runs}.isdisjoint(settings.SEEDS)
    assert settings.GRIDS.keys() == {keys["algorithm"] for keys in settings.systems("fluent").values()}


NOT_RUN = [f"DiRL {number}" for number in range(6)]  # yet; docs/methods.md says so


@pytest.mark.parametrize("stage", ["tuning", "methods-tuning"])
def test_the_committed_tuning_is_what_is_planned(stage: str) -> None:
    """Settings that rows leave to the package's defaults would change with these."""
    rows = document.load(document.RESULTS / f"{stage}.json")
    known = [evidence._identity(row) for row in rows]
    planned = [run.identity for run in evidence.plan(stage, {}) if run.system not in NOT_RUN]
    assert [identity for identity in planned if identity not in known] == []
    assert len(known) == len(planned)


def test_a_quick_look_has_the_default_and_every_kind_of_system() -> None:
    keys = {run.system: dict(run.keys) for run in evidence.plan("quick", {})}
    assert settings.DEFAULT in keys
    assert {"repexp", "passk"} <= {given["algorithm"] for given in keys.values()}
    assert "text" in {given.get("similarity") for given in keys.values()}


def test_the_plan_holds_every_system_of_the_paper_and_every_variant() -> None:
    runs = evidence.plan("fluent", {"grpo": {"lr": 1e-4}, "g2rl": {"lr": 2e-4, "lam": 0.25}})
    assert len({run.system for run in runs}) == 3 + 3 * 2 * 3
    assert len(runs) == len({(run.system, run.seed) for run in runs}) == 8 * 21
    keys = {run.system: dict(run.keys) for run in runs}
    assert keys["GRPO"] == {"algorithm": "grpo", "lr": 1e-4}
    assert keys["G2RL equation, skip, 1"]["lam"] == 1.0  # its own, not the tuned one
    assert keys["G2RL equation, skip, 1"]["lr"] == 2e-4
    for stage in evidence.STAGES[1:]:
        assert next(iter(settings.systems(stage))) == document.BASELINE


def row(system: str, seed: int, score: float, cosine: float = 0.1) -> dict:
    return {
        "setting": "fluent",
        "system": system,
        "seed": seed,
        "keys": {"algorithm": "grpo"},
        "curves": {key: [0.1, 0.2 + seed / 100] for key in experiment.CURVES},
        "problems": {key: [score, score + 0.2] for key in ("pass@1", "maj@16", "pass@16", "distinct right")},
        "geometry": {"entropy": 0.5, "cos_mean": cosine, "negative_pairs": 0.2},
        "seconds": 1.0,
    }


def test_the_best_setting_is_the_one_with_the_highest_pass_at_1() -> None:
    rows = [
        row(f"{algorithm} {number}", seed, score=(number == 2) * 0.5 + seed / 1000)
        for algorithm, grid in settings.GRIDS.items()
        for number in range(len(grid))
        for seed in settings.TUNING_SEEDS
    ]
    assert document.best(rows) == {algorithm: grid[2] for algorithm, grid in settings.GRIDS.items()}


def test_a_stage_goes_on_where_it_was_stopped(tmp_path) -> None:
    stage = evidence.Stage(tmp_path / "fluent.json")
    stage.add(row("GRPO", 1, 0.4))
    stage.add(row("GRPO", 0, 0.3))
    again = evidence.Stage(tmp_path / "fluent.json")
    assert [r["seed"] for r in again.rows] == [0, 1]
    assert again.has(Run("fluent", "GRPO", 0, (("algorithm", "grpo"),)))
    assert not again.has(Run("fluent", "GRPO", 2, (("algorithm", "grpo"),)))
    assert not again.has(Run("fluent", "GRPO", 0, (("algorithm", "grpo"), ("lr", 1e-4))))  # other settings
    assert json.loads((tmp_path / "fluent.json").read_text())["machine"]["device"] == "cpu"
    assert [p.name for p in tmp_path.iterdir()] == ["fluent.json"]


def test_rows_of_an_earlier_tuning_are_dropped(tmp_path) -> None:
    stage = evidence.Stage(tmp_path / "halting.json")
    for seed in range(3):
        stage.add(row("GRPO", seed, 0.4) | {"setting": "halting", "keys": {"algorithm": "grpo", "lr": 1e-3}})
    stage.add(row("GRPO", 7, 0.5) | {"setting": "halting", "keys": {"algorithm": "grpo", "lr": 2e-3}})
    stage.keep(evidence.plan("halting", {"grpo": {"lr": 2e-3}}))
    assert [r["seed"] for r in stage.rows] == [7]
    assert [r["seed"] for r in evidence.Stage(stage.path).rows] == [7]  # in the file, too
    before = stage.path.stat().st_mtime_ns
    stage.keep(evidence.plan("halting", {"grpo": {"lr": 2e-3}}))
    assert stage.path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "fluent"], "fluent needs the whole tuning in"),
        (["--only", "halting", "--systems", "GRPO"], "run --only tuning first"),
        (
            ["--only", "halting", "--systems", "NoSuch"],
            "--systems 'NoSuch': choose from 'GRPO', 'entropy bonus'",
        ),
        (
            ["--only", "smollm2-gcd", "--systems", "GRPO", "EVOL-RL"],
            "--systems 'EVOL-RL': choose from 'GRPO', ",
        ),
    ],
)
def test_what_cannot_be_run_is_one_line(tmp_path, capsys, words, message) -> None:
    assert evidence.main([*words, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evidence: error: ")
    assert message in line


def test_committed_results_are_gone_on_from(tmp_path, monkeypatch) -> None:
    """They are not run again; a result of one's own stays."""
    own = {"setting": "smollm2-gcd", "system": "GRPO", "seed": 0, "keys": {"algorithm": "grpo"}}
    (tmp_path / "smollm2-chain-sum.json").write_text(json.dumps({"rows": [own]}))
    left = []
    monkeypatch.setattr(
        evidence, "run_all", lambda runs, stage, *_: left.append([run for run in runs if not stage.has(run)])
    )
    monkeypatch.setattr(document, "write_report", lambda out: out)
    for module in (document, evidence.comparison, evidence.sampling):
        monkeypatch.setattr(module, "write", lambda: None)
    assert evidence.main(["--only", "smollm2-gcd", "--committed", "--out", str(tmp_path)]) == 0
    known = document.load(document.RESULTS / "smollm2-gcd.json")
    assert len(left[0]) == len(evidence.plan("smollm2-gcd", {})) - len(known)
    assert document.load(tmp_path / "smollm2-chain-sum.json") == [own]


# --- statistics ---------------------------------------------------------------------------------------------


def test_intervals_are_students() -> None:
    mean, half = document.interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)  # t of a table, 3 degrees
    for few in ([1.0], [1.0, 1.0]):
        assert math.isnan(document.interval(few)[1])


def test_differences_are_paired() -> None:
    """Seeds scatter widely, the systems' difference does not; a seed that one of them lacks is left out."""
    rows = [row("GRPO", seed, seed / 10) for seed in range(4)]
    rows += [row("EVOL-RL", seed, seed / 10 + 0.05) for seed in range(5)]
    mean, half = document.difference(rows, "EVOL-RL", "pass@1")
    assert mean == pytest.approx(0.05)
    assert half < 1e-9
    assert document.of_seeds(rows, "GRPO", "pass@1")[3] == pytest.approx(0.4)  # mean over problems
    table = document.differences_table(rows)
    assert "| EVOL-RL | **+0.050 ± 0.000** |" in table
    assert "| +0.000 ± 0.000 |" in table  # of the geometry, and not bold: the interval holds zero
    rows = [
        row(system, seed, 0.1 + (system != "GRPO") / 10_000)
        for system in ("GRPO", "EVOL-RL")
        for seed in range(4)
    ]
    assert "**+0.000" not in document.differences_table(rows)  # away from zero, but not as it is printed


def test_figures_and_report(tmp_path) -> None:
    stage = evidence.Stage(tmp_path / "fluent.json")
    for system in settings.systems("fluent"):
        for seed in range(2):
            stage.add(row(system, seed, 0.3))
    report = document.write_report(tmp_path).read_text()
    assert (tmp_path / "fluent.png").read_bytes().startswith(b"\x89PNG")
    assert report.count("| G2RL right, skip, 0.25 |") == 2
    choices = document.pairs_table(stage.rows)
    assert choices.count("| G2RL intent, shape, 0.5 less ") == 5


def test_the_document_holds_the_numbers_of_the_committed_results() -> None:
    text = document.PAGE.read_text(encoding="utf-8")
    assert document.filled(text) == text, "make evidence ARGS=--document"
    elsewhere = evidence.COMPARISON, evidence.SAMPLING, evidence.MORE  # other pages; a sentence
    for stage in (stage for stage in evidence.STAGES[1:] if not stage.startswith(elsewhere)):
        assert f"<!-- results {stage} -->" in text
        assert f"<!-- differences {stage} -->" in text


# --- a run --------------------------------------------------------------------------------------------------


def test_a_run_trains_evaluates_and_repeats(tmp_path, monkeypatch) -> None:
    small = dataclasses.replace(
        settings.SETTINGS["quick"],
        base=settings.SETTINGS["quick"].base | {"steps": 2, "batch_size": 32},
        warm_up={"level": "fluent", "steps": 3, "batch_size": 16},
    )
    monkeypatch.setitem(settings.SETTINGS, "quick", small)
    this = Run("quick", "g2rl", 3, (("algorithm", "g2rl"), ("uniform_groups", "shape")))
    first, second = (experiment.run(this, tmp_path) for _ in range(2))
    for time in ("seconds", "step_cpu_seconds"):
        assert first.pop(time) > 0
        second.pop(time)
    assert first == second
    held_out = len(expressions.numbers("fluent", "test"))
    assert {len(numbers) for numbers in first["problems"].values()} == {held_out}
    assert all(len(curve) == 2 for curve in first["curves"].values())
    assert json.loads(json.dumps(first)) == first
    assert [p.name for p in tmp_path.iterdir()] == ["warm-up"]
    assert experiment.thin([1, 2, 3] * 15) == [2.0] * 15
