"""README.md: its code runs, and its numbers are those of the package."""

import importlib.util
import re
import types
from pathlib import Path

import pytest
import torch

from g2rl_kernels.group import reference

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_one_example():
    assert len(CODE) == 1


def test_the_example_runs_and_gives_the_shapes_in_its_comments():
    names: dict = {}
    exec(compile(CODE[0], "README.md", "exec"), names)
    head, group = names["head"], names["group"]
    assert head.features.shape == (4, 64)
    assert head.logprobs.shape == head.logsumexp.shape == head.entropy.shape == (96,)
    assert group.similarity.shape == (1, 4, 4)
    assert group.exploration_score.shape == group.shaped_rewards.shape == group.advantages.shape == (4,)
    torch.testing.assert_close(names["loss"], -names["advantage"].mean())  # one policy: every ratio is 1
    assert names["hidden"].grad.abs().max() > 0
    assert (group.shaped_rewards.sign() == names["rewards"].sign()).all()


def test_the_table_of_shaped_rewards():
    table = re.search(r"^\| reward r \|.*\n\|[-|]+\n(?:\| [+-]1 .*\n)+", TEXT, re.MULTILINE)
    assert table is not None
    head, _, *rows = table[0].splitlines()
    shapings = re.findall(r"`(\w+)`", head)
    assert {"intent", "equation"} <= set(shapings)
    assert len(rows) == 6
    for row in rows:
        reward, nubar, *values = map(float, row.strip("|").split("|"))
        for shaping, expected in zip(shapings, values, strict=True):
            shaped = reference.shaped_rewards(torch.tensor(reward), torch.tensor(nubar), 0.5, 3.0, shaping)
            assert shaped.item() == pytest.approx(expected)


def test_the_benchmark_tables_are_those_of_the_results():
    tool = load(ROOT / "tools" / "readme_table.py")
    found = [*tool.BLOCK.finditer(TEXT)]
    assert len(found) == TEXT.count("<!-- table: ") == TEXT.count("<!-- end -->")
    assert found[0].group(2, 3) == ("head", None)  # the CPU's
    for table in found:
        assert table[0] == tool.written(table), "tools/readme_table.py writes it anew"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^):]+)\)", TEXT))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
