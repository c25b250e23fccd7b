"""benchmarks/builds.py: two builds turn by turn. Here both are this one, once without what is new."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIM = """
import g2rl_kernels as g2

original = g2.head_features


def head_features(*args, **options):  # an older one
    if "statistics" in options:
        raise TypeError("head_features() got an unexpected keyword argument 'statistics'")
    return original(*args, **options)


g2.head_features = head_features
"""


def run(*args, cwd=ROOT):
    command = [sys.executable, "-m", "benchmarks.builds", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def older(tmp_path):
    """A tree whose package is this one's, less an argument."""
    for source in ("g2rl_kernels", "benchmarks"):
        (tmp_path / source).symlink_to(ROOT / source)
    (tmp_path / "sitecustomize.py").write_text(SHIM)
    return tmp_path


def test_every_method_is_timed_in_both_builds_that_have_it(older, tmp_path):
    out = tmp_path / "builds.json"
    done = run(older, "--shapes", "tiny", "--dtypes", "fp32", "--rounds", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = {(row["op"], row["method"]): row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 11
    assert all(row["milliseconds"] > 0 and row["ratio_20_50_80"][1] > 0 for row in rows.values())
    alone = [name for name, row in rows.items() if "older_20_50_80" not in row]
    assert alone == [("head_features", "8 responses, statistics")]
    assert done.stdout.count("\n") == 2 + len(rows)


def test_a_tree_without_a_build_is_named(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1
    assert "no built checkout" in done.stderr
    assert str(tmp_path) in done.stderr
