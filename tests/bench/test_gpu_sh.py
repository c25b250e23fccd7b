"""benchmarks/gpu.sh without a GPU, and the list of missing imports that it uses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from bench_helpers import ROOT, missing_imports


def gpu_sh(out: Path, **environment: str) -> subprocess.CompletedProcess:
    tiny = {
        "HEAD_ARGS": "--shapes tiny --N 16 --dtypes fp32 --rounds 1",
        "LOGPROBS_ARGS": "--shapes tiny --N 16 --dtypes fp32 --rounds 1",
        "GROUP_ARGS": "--sizes 2x4x64 --rounds 1",
        "TRAIN_ARGS": "--rounds 1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHON": sys.executable,
        "OUT": str(out),
    }
    command = [str(ROOT / "benchmarks" / "gpu.sh")]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | tiny | environment)


def statuses(out: Path) -> dict[str, str]:
    lines = (out / "summary.md").read_text().splitlines()
    return {cells[1].strip(): cells[2].strip() for line in lines if len(cells := line.split("|")) == 6}


def test_gpu_sh_runs_to_its_end_without_a_gpu(tmp_path):
    done = gpu_sh(
        tmp_path, PARTS="info tests sanitizers support bench"
    )  # no build: it would pull the rug from others
    assert done.returncode == 0, done.stdout
    found = statuses(tmp_path)
    for part in ("kernels", "suite", "memcheck", "racecheck", "support"):
        assert found[part].startswith("skipped: torch sees no GPU")
    for part in ("info", "head", "logprobs", "group"):
        assert found[part] == "ok"
    for part in ("train", "plots"):
        assert found[part] == "ok" or "is not installed" in found[part]
    assert "| 16 x 2048 x 64, fp32 |" in (tmp_path / "cpu.md").read_text()
    assert json.loads((tmp_path / "cpu-group.json").read_text())["op"] == "group"
    assert "== g2rl-kernels\n" in (tmp_path / "kernel-times.txt").read_text()


def test_gpu_sh_survives_a_failing_part_and_says_which(tmp_path):
    done = gpu_sh(tmp_path, PARTS="head group", HEAD_ARGS="--shapes gpt-9")
    assert done.returncode == 1
    found = statuses(tmp_path)
    assert found["head"] == "FAILED: exit status 2"
    assert found["group"] == "ok"
    assert "invalid choice: 'gpt-9'" in done.stdout  # the end of the failing part's log
    done = gpu_sh(tmp_path, PARTS="group", LIMIT_group="0.1")
    assert done.returncode == 1
    assert statuses(tmp_path)["group"] == "FAILED: out of time, 0.1 s"


def test_gpu_sh_refuses_parts_that_it_does_not_know(tmp_path):
    done = gpu_sh(tmp_path, PARTS="info dance")
    assert done.returncode == 2
    assert "no part 'dance'" in done.stderr


def test_gpu_sh_limits_add_up_to_less_than_ten_minutes():
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    whole = text[text.index("declare -A LIMITS=(") : text.index("LIMITS+=(")]
    limits = [int(number) for number in re.findall(r"\[\w+\]=(\d+)", whole)]
    assert len(limits) == 10
    assert sum(limits) <= 570  # half a minute is left for what happens between the parts


def test_missing_imports_are_found_through_the_modules_beside_a_test(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "helper.py").write_text("import json\nfrom no_such_a.b import c\n")
    (tmp_path / "test_well.py").write_text("import torch\n\ndef test():\n    import no_such_c\n")
    (tmp_path / "test_ill.py").write_text("import os.path, no_such_b\nfrom helper import x\n")
    (tmp_path / "sub" / "conftest.py").write_text("import helper\n")
    missing_imports.main(str(tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/sub/conftest.py: no_such_a",
        f"{tmp_path}/test_ill.py: no_such_a, no_such_b",
    ]


def test_no_module_of_the_tests_passes_for_a_missing_package(capsys):
    missing_imports.main(str(ROOT / "tests"))
    lines = capsys.readouterr().out.splitlines()
    named = {name for line in lines for name in line.rpartition(": ")[2].split(", ")}
    assert not named & {path.stem for path in (ROOT / "tests").rglob("*.py")}
