"""csrc/cuda compiles with nvcc alone, for every architecture, and keeps within its registers."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "tools/cuda_resources.py")
cuda_resources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_resources)


@pytest.fixture(scope="module")
def nvcc() -> str:
    folders = [
        os.path.join(os.environ[home], "bin") for home in ("CUDA_HOME", "CUDA_PATH") if home in os.environ
    ]
    found = shutil.which("nvcc", path=os.pathsep.join([*folders, "/usr/local/cuda/bin", os.environ["PATH"]]))
    if found is None:
        pytest.skip("nvcc is neither in CUDA_HOME nor in /usr/local/cuda nor on the PATH")
    return found


def test_every_kernel_without_spills(nvcc):
    rows = cuda_resources.resources(nvcc)
    print("\n" + cuda_resources.table(rows))
    source = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    kernels = set(re.findall(r"__global__[^(]*\([^)]*\)\s+(\w+)\(", source))
    assert kernels == {row["kernel"].split("<")[0] for row in rows}
    arches = {row["arch"] for row in rows}
    assert arches == {f"sm_{arch}" for arch in cuda_resources.architectures(nvcc)}
    assert len(rows) % len(arches) == 0
    threads = int(re.search(r"kWarps = (\d+), kThreads = kWarp \* kWarps", source)[1]) * 32
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["registers"] * threads <= 65536, row  # or the launch fails
        assert row["shared_bytes"] <= 48 * 1024, row  # a launch gets more only on request


def test_what_ptxas_prints_is_read_right():
    printed = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4g2rl40_GLOBAL__N__0baeb3f1_8_group_cu_c97c1c7112group_kernelILb1EEEvNS0_6DeviceE' for 'sm_90a'
ptxas info    : Function properties for _ZN4g2rl40_GLOBAL__N__0baeb3f1_8_group_cu_c97c1c7112group_kernelILb1EEEvNS0_6DeviceE
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 108 registers, used 1 barriers, 16 bytes cumulative stack size, 35328 bytes smem
ptxas info    : Compiling entry function '_Z4fillPf' for 'sm_80'
ptxas info    : Function properties for _Z4fillPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 360 bytes cmem[0]
"""  # noqa: E501
    keys = ("kernel", "arch", "registers", "spill_bytes", "shared_bytes")
    rows = [tuple(row[key] for key in keys) for row in cuda_resources.parse(printed)]
    assert rows == [("group_kernel<1>", "sm_90a", 108, 12, 35328), ("fill", "sm_80", 8, 0, 0)]
