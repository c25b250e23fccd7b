"""The comparison of docs/methods.md: its plan, its intervals, its page."""
# ruff: noqa: E402 (what may be missing is looked for before it is imported)

import json
import math

import pytest
import torch

for package in ("transformers", "tqdm", "matplotlib", "scipy"):
    pytest.importorskip(package, reason=f"the experiments need {package}: make evidence sets it up")

from benchmarks.learning import (
    comparison,
    cost,
    document,
    evidence,
    experiment,
    expressions,
    sampling,
    settings,
)
from g2rl_kernels.group.methods import METHODS
from g2rl_kernels.trainer import TrainerConfig


def row(system: str, seed: int, score: float, seconds: float = 1.0) -> dict:
    return {
        "setting": "fluent",
        "system": system,
        "seed": seed,
        "keys": {},
        "curves": {key: [0.1, 0.2] for key in experiment.CURVES},
        "problems": {key: [score, score + 0.2] for key in ("pass@1", "maj@16", "pass@16", "distinct right")},
        "geometry": {"entropy": 0.5, "cos_mean": 0.0, "negative_pairs": 0.2},
        "seconds": 1.0,
        "step_cpu_seconds": seconds,
    }


def test_dirls_prompts_are_what_they_are_said_to_be() -> None:
    train = {*expressions.numbers("fluent", "train")}
    for name, wrong in (("reasoning", True), ("memory", False)):
        numbers = [int(prompt.removesuffix("=")) for prompt in settings.DIRECTION_PROMPTS[name]]
        assert len({*numbers}) == 12
        assert {*numbers} <= train
        assert {expressions.value(expressions.habitual(n, "fluent")) != n for n in numbers} == {wrong}


def test_every_method_is_tuned_as_much_as_g2rl_on_other_seeds() -> None:
    runs = evidence.plan("methods-tuning", {})
    each = {name: len([r for r in runs if r.system.rpartition(" ")[0] == name]) for name in settings.METHODS}
    assert set(each.values()) == {len(settings.GRIDS["g2rl"]) * len(settings.TUNING_SEEDS)}
    assert {r.seed for r in runs}.isdisjoint(settings.SEEDS)


def test_all_methods_are_compared_and_those_of_texts_both_ways() -> None:
    compared = {keys["algorithm"] for keys in settings.METHODS.values()}
    assert compared == METHODS.keys()
    texts = {k["algorithm"] for k in settings.METHODS.values() if k.get("similarity") == "text"}
    assert texts == {name for name, method in METHODS.items() if method.texts}


@pytest.mark.parametrize("stage", [f"methods-{level}" for level in settings.LEVELS])
def test_the_plan_takes_the_tuned_keys_and_every_run_is_a_configuration(stage) -> None:
    tuned = {name: grid[3] for name, grid in settings.METHOD_GRIDS.items()} | {"grpo": {"lr": 1e-4}}
    runs = evidence.plan(stage, tuned)
    assert len(runs) == 8 * len(settings.COMPARED)
    assert {r.setting for r in runs} == {stage.removeprefix("methods-")}
    keys = {run.system: dict(run.keys) for run in runs}
    assert keys["GRPO"]["lr"] == 1e-4
    assert keys["DRA, text"] == {"lr": 6e-5, "strength": 0.1, "algorithm": "dra", "similarity": "text"}
    for name, given in keys.items():
        base = settings.SETTINGS[stage.removeprefix("methods-")].base
        TrainerConfig.from_dict({**base, **given, "model": "x", "tasks": [{"kind": "python"}]}), name


def test_intervals_hold_together() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    mean, alone = document.interval(values)
    assert document.interval(values, 1) == (mean, alone)
    _, ten = document.interval(values, 10)
    assert ten / alone == pytest.approx(7.4533 / 3.1824, rel=1e-4)  # Student's t, 3 d.f.


def test_the_table_and_the_page(tmp_path) -> None:
    scores = {"GRPO": 0.4, "DQO": 0.6, "DRA": 0.4}
    noise = [0.0, 0.01, 0.02, 0.015]
    rows = [
        row(name, seed, score + noise[seed] * (1 + (name == "DRA")))
        for name, score in scores.items()
        for seed in range(4)
    ]
    seconds = {"GRPO": [1.0, 2.0, 4.0], "DQO": [1.5, 3.0, 5.0]}
    measured = [{"system": system, "seconds": spent} for system, spent in seconds.items()]
    (tmp_path / cost.COST).write_text(json.dumps({"rows": measured}))
    costs = cost.ratios(tmp_path)
    assert costs == {"GRPO": 1.0, "DQO": 1.5}  # of each round, not of sums
    assert cost.ratios(tmp_path / "nowhere") == {}
    results = tmp_path / "learning"
    results.mkdir()
    text = comparison.methods_table(rows, costs)
    lines = [line.split(" | ") for line in text.splitlines()[2:]]
    assert [line[0] for line in lines[2:]] == ["| GRPO", "| DQO", "| DRA"]
    assert "2 differences together" in text
    dqo, dra = lines[3], lines[4]
    assert dqo[2] == "**+0.200 ± 0.000**"
    mean, half = document.difference(rows, "DRA", "pass@1", comparisons=2)
    assert dra[2] == f"{mean:+.3f} ± {half:.3f}"  # not bold: zero is inside
    assert mean < half
    assert (dqo[-1], dra[-1]) == ("1.50 |", " |")
    assert lines[2][2] == ""
    assert not math.isnan(half)
    (results / "methods-fluent.json").write_text(json.dumps({"rows": rows}))
    page = comparison.filled(comparison.PAGE.read_text(encoding="utf-8"), results)
    assert text in page
    assert page.count("Not run yet.") == 3
    assert comparison.draw(results, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 10_000


def test_the_page_is_that_of_the_results() -> None:
    page = comparison.PAGE.read_text(encoding="utf-8")
    assert comparison.filled(page) == page, "python -m benchmarks.learning.comparison writes it anew"


# --- what the sampler's mask changes ------------------------------------------------------------------------


def test_the_mask_is_all_that_differs() -> None:
    runs = evidence.plan("sampling", {"grpo": {"lr": 1e-4}, "g2rl": {"lr": 3e-5, "lam": 1.0}})
    keys = {run.system: dict(run.keys) for run in runs}
    assert len(runs) == 8 * len(keys) == 48
    for algorithm in ("GRPO", settings.DEFAULT):
        kept, whole = keys[f"{algorithm}, {settings.KEPT}"], keys[f"{algorithm}, {settings.WHOLE}"]
        assert kept["top_p"] == whole["top_p"] == 0.9
        assert (kept.pop("keep_sampling_mask"), whole.pop("keep_sampling_mask")) == (True, False)
        assert kept == whole == {**keys[algorithm], "top_p": 0.9}
        base = settings.SETTINGS["fluent"].base
        TrainerConfig.from_dict({**base, **kept, "model": "x", "tasks": [{"kind": "python"}]})


def test_the_page_has_paired_differences(tmp_path) -> None:
    page = "<!-- what the mask changes -->\nold\n<!-- end -->\n"
    assert "Not run yet." in sampling.filled(page, tmp_path)
    scores = {settings.KEPT: (0.5, 0.6, 0.7), settings.WHOLE: (0.4, 0.5, 0.6)}
    rows = [
        row(system if how is None else f"{system}, {how}", seed, scores.get(how, (0.3, 0.4, 0.5))[seed])
        for system in ("GRPO", settings.DEFAULT)
        for how in (None, *scores)
        for seed in range(3)
    ]
    (tmp_path / "sampling.json").write_text(json.dumps({"rows": rows}))
    made = sampling.filled(page, tmp_path)
    assert "| GRPO, top_p 0.9, mask kept | " in made
    assert "**+0.100 ± 0.000**" in made
    assert "old" not in made


def test_the_page_of_sampling_is_that_of_the_results() -> None:
    page = sampling.PAGE.read_text(encoding="utf-8")
    assert sampling.filled(page) == page, "python -m benchmarks.learning.sampling writes it anew"
    assert sampling.BLOCK.search(page)


def test_a_stage_takes_over_runs_that_another_has(tmp_path) -> None:
    runs = evidence.plan("sampling", {"grpo": {"lr": 1e-4}})
    mine = {**row("GRPO", 3, 0.5), "keys": {"lr": 1e-4, "algorithm": "grpo"}}
    other, without_cost = {**mine, "keys": {"algorithm": "grpo"}}, {**mine, "seed": 4}
    del without_cost["step_cpu_seconds"]
    known = evidence.Stage(tmp_path / "methods-fluent.json")
    known.add(mine, other, without_cost)
    stage = evidence.Stage(tmp_path / "sampling.json")
    stage.adopt(runs, known)
    stage.adopt(runs, known)
    assert stage.rows == [mine]


def test_runs_share_an_encoder_and_count_its_cost_alone() -> None:
    asked = []

    def encoder(texts):
        asked.append(texts)
        return torch.tensor([[float(len(text))] for text in texts])

    vectors: dict = {}
    first, second = (experiment.SharedEncoder(encoder, vectors) for _ in range(2))
    assert first(["a", "bb", "a"]).tolist() == [[1.0], [2.0], [1.0]]
    assert first.spared == 0
    second(["ccc"])
    second.seconds = 2.0  # that it took
    assert second(["bb", "ccc", "a", "bb"]).tolist() == [[2.0], [3.0], [1.0], [2.0]]
    assert asked == [["a", "bb"], ["ccc"]]
    assert second.spared == pytest.approx(4.0, rel=1e-3)  # two texts that it would have encoded
    second(["a", "bb"])
    assert second.spared == pytest.approx(4.0, rel=1e-3)


def test_a_report_of_stages_without_rows_or_without_grpo(tmp_path) -> None:
    evidence.Stage(tmp_path / "methods-fluent.json").save()
    stage = evidence.Stage(tmp_path / f"{settings.MORE}.json")
    stage.add(*(row(settings.DEFAULT, seed, 0.5) for seed in range(3)))
    report = document.write_report(tmp_path).read_text()
    assert f"## {settings.MORE}" in report
    assert "methods-fluent" not in report
    assert "less GRPO" not in report
