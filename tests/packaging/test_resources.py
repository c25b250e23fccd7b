"""Every kernel compiles for NVIDIA's and AMD's GPUs: nothing that is shipped spills, everything fits."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from g2rl_kernels.versions import minor

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "kernel_resources.py"
TESTED_TRITON = {(3, 6), (3, 7), (3, 8), (3, 9)}
RARE_MAY_SPILL = 64  # bytes, as in tools/kernel_case.py
COMMITTED = ROOT / "benchmarks" / "results" / "triton-resources.md"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("kernel_resources", TOOL)
    module = sys.modules["kernel_resources"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    # Not in this process: here the kernels are the interpreter's, as conftest.py chose where no GPU is.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, str(TOOL), "--check", "--jobs", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def committed(section):
    """(name of the columns, rows) of one table of the committed page: "Resources" or "AMD"."""
    text = next((part for part in COMMITTED.read_text().split("# ") if part.startswith(section)), "| |")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    columns, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return columns, rows


def compare(found, section):
    """Every kernel that was compiled has its numbers in the committed table, if it has this Triton."""
    columns, rows = committed(section)
    if found["triton"] not in columns:
        return
    column = columns.index(found["triton"])
    listed = {tuple(row[:5]): row[column] for row in rows}
    for one in found["found"]:
        name = (re.sub(r"^\w+\.(\w+)_kernel$", r"\1", one["name"][0]), *one["name"][1:])
        assert listed.get(name) == f"{one['registers']}/{one['spilled']}", f"{name}: write the table anew"


def test_every_kernel_compiles_fits_and_has_its_instructions(tmp_path):
    done = run("--json", str(tmp_path / "found.json"), "--shipped", "--arch", "80", "90", "100")
    assert done.returncode == 0, done.stderr[-4000:]
    compare(json.loads((tmp_path / "found.json").read_text()), "Resources")


def test_consumer_gpus_in_short(tmp_path):
    """One of each generation: RTX 40 and L40S, RTX 50."""
    done = run("--json", str(tmp_path / "found.json"), "--quick", "--arch", "89", "120")
    assert done.returncode == 0, done.stderr[-4000:]
    compare(json.loads((tmp_path / "found.json").read_text()), "Resources")


def test_amd_in_short(tmp_path):
    """The head's kernels: older Tritons cannot multiply float64 on AMD (group/triton.py)."""
    done = run("--json", str(tmp_path / "found.json"), "--quick", "--arch", "gfx942", "--kernel", "head")
    assert done.returncode == 0, done.stderr[-4000:]
    compare(json.loads((tmp_path / "found.json").read_text()), "AMD")


@pytest.mark.parametrize(
    ("section", "targets"),
    [
        ("Resources", {f"sm_{arch}" for arch in (80, 86, 89, 90, 100, 120, 121)}),
        ("AMD", {"gfx90a", "gfx942", "gfx950", "gfx1201"}),
    ],
)
def test_the_committed_table_shows_clean_kernels(section, targets):
    columns, rows = committed(section)
    versions = columns[7:]
    assert {minor(version) for version in versions} >= ({(3, 9)} if section == "AMD" else TESTED_TRITON)
    assert len(rows) > 50 * len(targets)
    for row in rows:
        rare = any(word in row[1] for word in ("low-rank", "temperatures", "more"))
        rare |= "bias, softcap" in row[1] and ("kept" in row[1] or "strides" in row[2] or "d = " in row[2])
        rare |= "bias, weights, softcap" in row[1] and ("strides" in row[2] or "d = " in row[2])
        most = RARE_MAY_SPILL if rare else 0
        assert all(cell == "" or int(cell.split("/")[1]) <= most for cell in row[7:]), row
        assert row[-1], "the newest version compiles everything"
    assert {row[3] for row in rows} == targets
    for target in targets:
        kernels = {row[0] for row in rows if row[3] == target}
        assert kernels >= {
            *("group", "batch_scale", "head_stats", "head_residual", "head_collect"),
            *("head_project", "head_gather", "head_gradient", "head_target", "head_skip"),
            *("head_support_dot", "head_support_sum"),
        }


@pytest.fixture
def case(tool):
    return tool.Case("stats.head_stats_kernel", "", "bf16", 90, "", {}, {}, (), 8, needs=("wgmma", "TMA"))


NONE = dict.fromkeys(("wgmma", "tcgen05", "mma", "mfma", "TMA", "cp.async"), 0)
GOOD = NONE | {"wgmma": 4, "TMA": 8}


def test_faults_are_found(tool, case):
    def faults(**found):
        of = replace(case, **{key: found.pop(key) for key in ("arch", "programs_per_sm") if key in found})
        return tool.Found(of, **{"registers": 255, "shared": 232448, "counts": GOOD} | found).faults

    assert faults() == []
    assert faults(spilled=8) == ["spills 8 bytes"]
    assert faults(shared=232449) == ["shared memory: 233473 of 233472"]
    assert faults(arch=80, shared=166913) == ["shared memory: 167937 of 167936"]
    assert faults(programs_per_sm=2, registers=128, shared=115712) == []
    assert faults(programs_per_sm=2, registers=128, shared=115713) == ["shared memory: 233474 of 233472"]
    assert faults(programs_per_sm=2, registers=129, shared=0) == ["registers: 69632 of 65536"]
    assert faults(tensor_memory=513) == ["tensor memory: 513 of 512"]
    assert faults(counts=NONE | {"mma": 64, "cp.async": 9}) == ["no wgmma", "no TMA"]
    assert faults(error="does not compile") == ["does not compile"]
    small = {"arch": 120, "counts": GOOD | {"mma": 1}}
    assert faults(shared=101376, **small) == []
    assert faults(shared=101377, **small) == ["shared memory: 102401 of 102400"]
    assert faults(arch="gfx942", shared=65536) == []
    assert faults(arch="gfx942", shared=65537) == ["shared memory: 65537 of 65536"]
    assert faults(arch="gfx950", shared=163840) == []
    assert faults(arch="gfx942", registers=256, shared=0, programs_per_sm=2) == ["registers: 1024 of 512"]


def test_a_column_for_each_version(tool):
    import kernel_table

    def one(arch, registers, shared, error=""):
        name = ["stats.head_stats_kernel", "", "bf16", arch, "8 warps"]
        numbers = {"registers": registers, "spilled": 0, "shared": shared, "counts": {"mma": 8}}
        return {"name": name, "error": error, "faults": [error] * bool(error), **numbers}

    old = {"triton": "3.9.0", "found": [one("sm_90", 100, 1024), one("gfx942", 9, 0, "does not compile")]}
    new = {"triton": "3.10.0", "found": [one("sm_90", 101, 2048), one("gfx942", 90, 4096)]}
    text = kernel_table.page([new, old], "3.9.0", "shipped")
    assert "| head_stats |  | bf16 | sm_90 | 8 warps | 1.0 | 8 mma | 100/0 | 101/0 |" in text
    amd = text.split("## AMD")[1]
    assert "| 3.10.0 |" in amd
    assert "3.9.0" not in amd, "it compiled nothing there"
    assert "| head_stats |  | bf16 | gfx942 | 8 warps | 4.0 | 8 mma | 90/0 |" in amd
    assert kernel_table.faults([new]) == []
    assert kernel_table.faults([old]) == [
        "Triton 3.9.0: stats.head_stats_kernel, bf16, gfx942, 8 warps: does not compile"
    ]


def test_a_spilling_configuration_fails_the_check(tmp_path):
    """The whole way, with a tile that no GPU has registers for."""
    code = (
        "import sys; sys.path.insert(0, 'tools'); import kernel_cases, kernel_resources\n"
        "kernel_resources.prepare()\n"
        "from g2rl_kernels.head.triton import tuning\n"
        "tuning.CANDIDATES[9, 'plain'] = (tuning.Config(256, 256, 64, 8, 2),)\n"
        "kernel_cases.small_cases = kernel_cases.group_cases = lambda *_: ()\n"
        "sys.exit(kernel_resources.main())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-c", code, "--check", "--quick", "--arch", "90", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1
    assert re.search(r"head_stats_kernel, statistics, .*: .*spills \d+ bytes", done.stderr)


def test_types_are_those_that_triton_takes_from_a_call(tool):
    """The declared types against Triton's own reading of arguments like those that the driver passes."""
    import torch
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import MockTensor

    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this version of Triton reads arguments elsewhere")

    def read(value):
        return jit.native_specialize_impl(CUDABackend, value, False, True, True)

    dtypes = {"fp32": torch.float32, "fp64": torch.float64}
    dtypes |= {"i64": torch.int64, "i32": torch.int32, "i8": torch.int8}
    for name, kind in sys.modules["kernel_case"].TYPE.items():
        value = MockTensor(dtypes[kind[1:]]) if kind[0] == "*" else 1.5
        assert read(value) == (kind, "D" if kind[0] == "*" else None), name
    assert read(2048) == ("i32", "D"), "a stride that is a multiple of 16"
    assert read(2050)[0] == "i32"
    assert not read(2050)[1]
    assert read(1) == ("constexpr", 1)
    assert read(None) == ("constexpr", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--kernel head_stat --write", "--write: the committed table has all kernels and GPUs"),
        ("--arch 90 --write", "--write: the committed table has all kernels and GPUs"),
        ("--with-triton {}", "holds no triton"),
        ("--kernel no_such_kernel", "no kernel has 'no_such_kernel' in its name"),
    ],
)
def test_a_partial_table_and_an_empty_check_are_refused(tmp_path, arguments, said):
    done = run(*arguments.format(tmp_path).split())
    assert done.returncode == 2
    assert said in done.stderr
