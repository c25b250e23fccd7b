"""csrc/cuda/group.cu without a GPU: the same source, run on host threads (tests/cpp/cuda_on_host.h)."""

import pytest
from test_cpp import ROOT, compiler, run

SOURCES = ["tests/cpp/test_group_on_host.cpp", "csrc/cpu/group.cpp"]


@pytest.mark.parametrize(
    ("sanitizer", "cases"), [("address,undefined", 36), ("thread", 12)], ids=["address", "thread"]
)
def test_the_cuda_kernel_on_the_host(sanitizer, cases, tmp_path):
    flags = f"-std=c++17 -Wall -Wno-unknown-pragmas -pthread -O1 -g -fsanitize={sanitizer}".split()
    cxx = [*compiler(), *flags, "-fno-sanitize-recover=all"]
    (tmp_path / "probe.cpp").write_text("int main() {}\n")
    command = [*cxx, "probe.cpp", "-o", "probe"]
    if run(command, tmp_path, may_fail=True).returncode or run(["./probe"], tmp_path, True).returncode:
        pytest.skip(f"the runtime of -fsanitize={sanitizer} is missing or does not run here")
    run([*cxx, *(str(ROOT / source) for source in SOURCES), "-o", "test_group"], tmp_path)
    print(run(["./test_group", str(cases)], tmp_path).stdout)
