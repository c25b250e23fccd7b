"""docs/topk.md: its table is the one that its result gives, and its first example runs as written."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import g2rl_kernels as g2

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "topk.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def benchmark() -> Any:
    sys.path.insert(0, str(ROOT))
    from benchmarks import topk_features

    return topk_features


def test_the_table_is_that_of_the_result(benchmark):
    rows = json.loads(benchmark.OUT.read_text(encoding="utf-8"))["rows"]
    assert benchmark.filled(PAGE, rows) == PAGE
    changed = [{**row, "cosine": row["cosine"] - 0.5} for row in rows]
    assert benchmark.filled(PAGE, changed) != PAGE


def test_every_estimate_keeps_its_bound(benchmark):
    rows = json.loads(benchmark.OUT.read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= 5 * len(benchmark.KS) * len(benchmark.ESTIMATES)
    assert all(row["bound_over_error_min"] >= 1 for row in rows)


def test_the_diameter_leaves_out_only_rows_that_cannot_matter(benchmark):
    weight = torch.randn(3000, 5) * (1 + torch.rand(3000, 1))
    assert benchmark.diameter(weight) == pytest.approx(float(torch.cdist(weight, weight).max()), rel=1e-5)
    round_ = torch.nn.functional.normalize(torch.randn(2500, 4), dim=1)  # all equally far from the middle
    assert benchmark.diameter(round_) == pytest.approx(float(torch.cdist(round_, round_).max()), rel=1e-5)


def test_the_example():
    code = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[0]
    assert len(code.splitlines()) <= 15
    space: dict[str, Any] = {}
    exec(code, space)
    weight = torch.randn(6, 4)
    steps = [
        {y: SimpleNamespace(logprob=math.log(0.5)), (y + 1) % 6: SimpleNamespace(logprob=math.log(0.25))}
        for y in range(4)
    ]
    outputs = [SimpleNamespace(token_ids=[y], logprobs=[step]) for y, step in enumerate(steps)]
    requests = [SimpleNamespace(outputs=outputs[:2]), SimpleNamespace(outputs=outputs[2:])]
    features, missing = space["features"](weight, requests)
    expected = torch.stack([(weight[y] - weight[y + 1]) / 3 for y in range(4)])
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(missing, torch.full((4,), 0.25))
    rewards = torch.tensor([1.0, -1.0, 1.0, 1.0])
    found = space["advantages"](weight, requests, rewards, 2)
    assert torch.equal(found, g2.group_geometry(features, rewards, group_size=2).advantages)
