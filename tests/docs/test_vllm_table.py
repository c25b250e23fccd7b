"""docs/evaluation.md's table of vLLM's log-probabilities holds the numbers of benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks/results/vllm-logprobs.json").read_text())["results"]


@pytest.mark.parametrize("name", RESULTS)
def test_a_row_has_the_numbers_of_the_run(name):
    row = next(
        line
        for line in PAGE.splitlines()
        if line.startswith(f"| {name}".replace("head in", "vLLM's head in"))
    )
    shown = [
        float(number) for number in re.findall(r"\d[\d.e-]*", row.partition("| ")[2].partition(" | ")[2])
    ]
    found = RESULTS[name]
    logprob, feature = found["logprob_difference"], found["feature_error_with_known_logprobs"]
    wanted = [logprob["median"], logprob["p99"], logprob["max"]]
    wanted += [100 * found["share_within_known_tolerance"], feature["median"], feature["max"]]
    assert shown == [float(f"{value:.2g}") for value in wanted[:3]] + [round(wanted[3])] + [
        float(f"{value:.2g}") for value in wanted[4:]
    ]
