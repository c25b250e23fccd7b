"""Every kernel compiles for Ampere, Hopper and Blackwell: nothing that is shipped spills, everything fits."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "kernel_resources.py"
COMMITTED = ROOT / "benchmarks" / "results" / "triton-resources.md"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("kernel_resources", TOOL)
    module = sys.modules["kernel_resources"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(out, *arguments):
    # Not in this process: here the kernels are the interpreter's, as conftest.py chose where no GPU is.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, str(TOOL), "--check", "--jobs", "2", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def rows(text):
    return [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")][1:]


def version(text):
    return re.search(r"Triton (\S+)\.\s", text)[1]


def test_every_kernel_compiles_fits_and_has_its_instructions(tmp_path):
    done = run(tmp_path / "found.md", "--shipped")
    assert done.returncode == 0, done.stderr[-4000:]
    found, committed = (tmp_path / "found.md").read_text(), COMMITTED.read_text()
    if version(found) == version(committed):
        stale = set(rows(found)) - set(rows(committed))
        assert not stale, "python tools/kernel_resources.py writes the table anew"


def test_the_committed_table_shows_clean_kernels():
    text = COMMITTED.read_text()
    assert len(rows(text)) > 250
    columns = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows(text)]
    assert max(int(row[6]) for row in columns) <= 32  # and the shipped ones not at all: the test above
    assert {row[3] for row in columns} == {"sm_80", "sm_90", "sm_100"}
    for kernel in (
        "group",
        "head_stats",
        "head_residual",
        "head_collect",
        "head_project",
        "head_gather",
        "head_gradient",
    ):
        assert any(row[0] == kernel for row in columns)


@pytest.fixture
def case(tool):
    return tool.Case("stats.head_stats_kernel", "", "bf16", 90, "", {}, {}, (), 8, needs=("wgmma", "TMA"))


NONE = {"wgmma": 0, "tcgen05": 0, "mma": 0, "TMA": 0, "cp.async": 0}
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

    dtypes = {"fp32": torch.float32, "i64": torch.int64, "i32": torch.int32, "i8": torch.int8}
    for name, kind in sys.modules["kernel_cases"].TYPE.items():
        value = MockTensor(dtypes[kind[1:]]) if kind[0] == "*" else 1.5
        assert read(value) == (kind, "D" if kind[0] == "*" else None), name
    assert read(2048) == ("i32", "D"), "a stride that is a multiple of 16"
    assert read(2050)[0] == "i32"
    assert not read(2050)[1]
    assert read(1) == ("constexpr", 1)
    assert read(None) == ("constexpr", None)
