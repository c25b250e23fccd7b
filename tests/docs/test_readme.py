"""README.md: its code runs, and its numbers are those of the package and of the committed results."""

import importlib.util
import re
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 110


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


def test_the_diff_for_trl_changes_two_words_to_names_that_exist():
    (diff,) = re.findall(r"^```diff\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    lines = diff.splitlines()
    assert [line[0] for line in lines] == ["-", "+", "-", "+"]
    for line in lines:
        compile(line[1:], "README.md", "exec")
    assert lines[2][1:].replace("GRPO", "G2RL") == lines[3][1:]
    pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")
    exec(lines[1][1:], {})


def test_the_four_rows_are_those_of_the_results():
    tool = load(ROOT / "tools" / "readme_table.py")
    found = [*tool.SHORT_BLOCK.finditer(TEXT)]
    assert len(found) == 1
    assert found[0][0] == tool.short_written(found[0]), "tools/readme_table.py writes it anew"
    rows = re.findall(r"^\| `\w+`.*\| \*\*(\d\.\d\d)\*\* \|", found[0][0], re.MULTILINE)
    assert len(rows) == 4
    assert all(f"**{ratio}** (" in PERFORMANCE for ratio in rows)


def test_the_benchmark_tables_are_those_of_the_results():
    tool = load(ROOT / "tools" / "readme_table.py")
    found = [*tool.BLOCK.finditer(PERFORMANCE)]
    assert len(found) == PERFORMANCE.count("<!-- table: ") == PERFORMANCE.count("<!-- end -->")
    assert found[0].group(2, 3) == ("head", None)  # the CPU's
    for table in found:
        assert table[0] == tool.written(table), "tools/readme_table.py writes it anew"


def test_the_aims_are_compared_with_the_summaries_of_the_tables():
    head, logprobs, _ = re.findall(r"^In short: (.*)$", PERFORMANCE, re.MULTILINE)
    results = re.findall(r"^\| `(\w+)`(.*?)\| (?:met|\*\*missed\*\*): (.*?) \|$", PERFORMANCE, re.MULTILINE)
    assert len(results) == 7
    for op, aim, result in results:
        summary = head if op == "head_features" else logprobs
        dtype = next((f" in {dtype}" for dtype in ("fp32", "bf16") if dtype in aim), "")
        assert result + dtype in summary, (op, aim)


def test_the_evidence_is_that_of_the_page():
    evidence = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    fluent = evidence[evidence.index("<!-- results fluent -->") : evidence.index("<!-- results halting -->")]
    rows = {
        (number, line.split(" | ")[0]): line
        for number, table in enumerate(fluent.split("<!-- end -->"))
        for line in table.splitlines()
    }
    ours, difference = rows[0, "| G2RL right, shape, 0.5"], rows[1, "| G2RL right, shape, 0.5"]
    grpo = rows[0, "| GRPO"]
    found = re.search(
        r"rises from (\S+) \(GRPO\) to (\S+) \(G2RL\), (\S+ ± \S+) \(95 %, 8 paired seeds\), and\s"
        r"distinct right answers from (\S+) to (\S+)\. ",
        TEXT,
    )
    assert found is not None
    assert f"| {found[1]} ± " in grpo
    assert f"| {found[2]} ± " in ours
    assert f"| **{found[3]}** |" in difference
    assert f"| {found[4]} ± " in grpo
    assert f"| {found[5]} ± " in ours


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^):]+)\)", TEXT))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
