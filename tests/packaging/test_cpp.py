"""The CPU kernels without torch (tests/cpp): under address and undefined behaviour sanitizers, and as built.

For the latter the objects of this checkout's extension are linked, where they are up to date; a $CXX compiles
all anew.
"""

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# test_head.cpp includes head.cpp
SOURCES = [path for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if path.name != "head.cpp"]
TESTS = ("main", "test_head", "test_gradients", "test_options", "test_support", "test_group")
SOURCES += [ROOT / f"tests/cpp/{name}.cpp" for name in TESTS]
SANITIZE = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
OPTIMIZE = "-O3 -ffp-contract=fast"  # as in setup.py


def built(source: Path) -> Path | None:
    """The object of a kernel's source in this checkout's build, unless a source is newer."""
    newest = max(path.stat().st_mtime for path in [*(ROOT / "csrc").rglob("*"), ROOT / "setup.py"])
    folders = ROOT.glob(f"build/temp.*-{sys.implementation.cache_tag}")  # of several Pythons, this one's
    for path in (folder / source.relative_to(ROOT).with_suffix(".o") for folder in folders):
        if path.exists() and path.stat().st_mtime > newest and "CXX" not in os.environ:
            return path
    return None


def run(command: list[str], folder: Path, may_fail: bool = False) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode and not may_fail:
        pytest.fail(f"{shlex.join(command)}: exit status {done.returncode}\n{done.stdout}", pytrace=False)
    return done


def compiler() -> list[str]:
    """$CXX, which may carry arguments, or c++ or g++."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler: neither $CXX nor c++ nor g++")
    return [found]


@pytest.mark.parametrize("flags", [SANITIZE, OPTIMIZE], ids=["sanitized", "optimized"])
def test_kernels(flags, tmp_path):
    cxx = [*compiler(), "-std=c++17", "-Wall", "-pthread", *flags.split()]
    if flags is SANITIZE:
        (tmp_path / "probe.cpp").write_text("int main() {}\n")
        command = [*cxx, "probe.cpp", "-o", "probe"]
        if run(command, tmp_path, may_fail=True).returncode or run(["./probe"], tmp_path, True).returncode:
            pytest.skip("the sanitizer runtime (libasan, libubsan) is missing or does not run here")

    def build(source: Path) -> str:
        if flags is OPTIMIZE and (found := built(source)) is not None:
            return str(found)
        run([*cxx, "-c", str(source), "-o", f"{source.stem}.o"], tmp_path)
        return f"{source.stem}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, SOURCES))
    run([*cxx, *objects, "-o", "test_kernels"], tmp_path)
    print(run(["./test_kernels"], tmp_path).stdout)
