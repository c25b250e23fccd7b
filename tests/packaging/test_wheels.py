"""Wheels for older systems: tools/wheels.py, and what csrc/runtime adds to binaries built with G2RL_GLIBC."""

import contextlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tool import load_tool

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")

USES_OF_THE_RUNTIME = r"""
#include <exception>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

namespace std { [[noreturn]] void __throw_bad_array_new_length(); }

int alive = 0;
struct Counted : std::runtime_error {
  Counted() : std::runtime_error("counted") { ++alive; }
  Counted(const Counted& other) : std::runtime_error(other) { ++alive; }
  ~Counted() { --alive; }
};

int main() {
  {
    std::exception_ptr first;
    try { throw Counted(); } catch (...) { first = std::current_exception(); }
    std::exception_ptr second = first;
    first = nullptr;
    if (alive != 1) return 1;  // freed too early
    try { std::rethrow_exception(second); }
    catch (const Counted& e) { if (std::string(e.what()) != "counted") return 2; }
  }
  if (alive != 0) return 3;  // never freed
  std::ostringstream out;
  out << "row " << 12 << ' ' << 0.5;
  if (out.str() != "row 12 0.5" || std::move(out).str() != "row 12 0.5") return 4;
  std::stringstream both;
  both << 7;
  int read = 0;
  if (!(both >> read) || read != 7) return 5;
  try { std::__throw_bad_array_new_length(); } catch (const std::bad_array_new_length&) { return 0; }
  return 6;
}
"""


def compiler() -> str:
    found = shutil.which("g++")
    if found is None or sys.platform != "linux":
        pytest.skip("needs g++")
    return found


@pytest.fixture
def wheels():
    return load_tool("wheels")


@pytest.mark.parametrize("optimisation", ["-O0", "-O3"])
def test_the_older_runtime_does_what_the_newer_does(tmp_path, optimisation):
    program = tmp_path / "program"
    command = [
        compiler(),
        optimisation,
        "-std=c++20",
        "-x",
        "c++",
        "-",
        str(ROOT / "csrc" / "runtime" / "old_runtime.cpp"),
    ]
    subprocess.run([*command, "-o", str(program)], input=USES_OF_THE_RUNTIME, text=True, check=True)
    symbols = subprocess.run(["nm", str(program)], capture_output=True, text=True, check=True).stdout
    for name in ("_M_addrefEv", "_M_releaseEv", "bad_array_new_lengthv", "19basic_ostringstream.*C1Ev"):
        assert re.search(rf" [tT] \S*{name}$", symbols, re.MULTILINE), name  # not the system's
    assert subprocess.run([str(program)]).returncode == 0


@pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is not None, reason="needs an environment without zig"
)
def test_a_missing_linker_is_named(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"G2RL_GLIBC": "2.28"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "G2RL_GLIBC=2.28 links with zig: pip install ziglang" in done.stderr


def test_libraries_are_those_of_the_whole_command(monkeypatch):
    """CXX may begin with ccache, and flags may follow."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    library_file = runpy.run_path("setup.py")["library_file"]
    found = library_file(["env", compiler(), "-O3", "-Wall"], "libgcc.a")
    assert Path(found).is_file()
    with pytest.raises(SystemExit, match=r"knows no libnothing\.so; CXX names a g"):
        library_file([compiler()], "libnothing.so")
    with pytest.raises(SystemExit, match=r"env knows no libgcc\.a: env: "):
        library_file(["env"], "libgcc.a")


def wheel_with(folder: Path, sources: dict[str, str]) -> Path:
    """A zip of shared libraries made from C."""
    path = folder / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, source in sources.items():
            command = [
                compiler(),
                "-x",
                "c",
                "-shared",
                "-fPIC",
                "-nostdlib",
                "-o",
                str(folder / "made.so"),
                "-",
            ]
            subprocess.run(command, input=source, text=True, check=True)
            archive.write(folder / "made.so", name)
    return path


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"p/_C.so": "", "p.libs/libgomp.so.1": ""},
            r"holds \['p.libs/libgomp.so.1', 'p/_C.so'\], needs the extension",
        ),
        (
            {"p/_C.so": "void __isoc23_strtol(void); void f(void) { __isoc23_strtol(); }"},
            "symbols newer .*__isoc23_strtol",
        ),
    ],
)
def test_a_wheel_that_is_not_portable_is_refused(wheels, tmp_path, sources, message):
    with pytest.raises(SystemExit, match=message):
        wheels.look_inside(wheel_with(tmp_path, sources), tmp_path / "inside")


def test_symbols_of_python_and_torch_need_no_version(wheels, tmp_path):
    calls = ("PyLong_AsLong", "_Py_Dealloc", "aoti_torch_get_dim", "torch_parallel_for")
    declared = " ".join(f"void {name}(void);" for name in calls)
    called = " ".join(f"{name}();" for name in calls)
    wheel = wheel_with(tmp_path, {"p/_C.so": f"{declared} void f(void) {{ {called} }}"})
    wheels.look_inside(wheel, tmp_path / "inside")


def test_pythons_are_found_once_a_version_where_they_run(wheels, tmp_path, monkeypatch):
    def script(path: str, code: int) -> str:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\nexit {code}\n")
        file.chmod(0o755)
        return str(file)

    script("bin/python3.9", 0)
    script("bin/python3.11", 127)  # a shim of a version that is not chosen
    expected = [script("bin/python3.10", 0), script("home/.pyenv/versions/3.11.4/bin/python3", 0)]
    script("home/.pyenv/versions/3.10.2/bin/python3", 0)
    script("home/.pyenv/versions/3.12.1/bin/python3", 1)
    script("home/.pyenv/versions/3.13.0t/bin/python3", 0)  # free-threaded: another wheel
    expected.append(script("home/.pyenv/versions/3.13.5/bin/python3", 0))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    assert wheels.found_pythons() == expected


@pytest.mark.parametrize("passes", [True, False])
def test_dist_gets_only_a_wheel_whose_tests_passed(wheels, tmp_path, monkeypatch, passes):
    def build(_environment, work):
        for name in ("some.whl", "some.tar.gz"):
            (work / name).write_text("made")
        return work / "some.whl", work / "some.tar.gz"

    def check(*_):
        if not passes:
            sys.exit("[wheels] failed with 1: pytest")
        return "tests: 1 passed"

    monkeypatch.setattr(wheels.Environment, "create", lambda self: self.folder.mkdir())
    monkeypatch.setattr(wheels, "build", build)
    monkeypatch.setattr(wheels, "check", check)
    dist = tmp_path / "new" / "dist"
    with contextlib.nullcontext() if passes else pytest.raises(SystemExit):
        wheels.make_wheel(dist, quick=True)
    assert sorted(file.name for file in dist.glob("*")) == (["some.tar.gz", "some.whl"] if passes else [])


def test_a_missing_interpreter_is_told_before_work(wheels, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wheels.py", sys.executable, "python3.99"])
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(SystemExit, match=r"no such interpreter: python3\.99"):
        wheels.main()


def test_the_example_is_readmes_op(wheels):
    code = wheels.readme_example()
    assert all(name in code for name in ("g2.head_features(", "g2.group_geometry(", "g2.linear_logprobs("))
    compile(code, "README.md", "exec")


def test_a_release_has_every_python(wheels):
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    pythons = [f"3.{minor}" for minor in wheels.MINORS]
    assert re.findall(r"^ +(3\.\d+)$", text, re.MULTILINE) == pythons
    assert f'PYTHONS="{" ".join(f"python{version}" for version in pythons)}"' in text


@pytest.mark.parametrize(
    ("tag", "released"), [("v0.2.0", True), ("v0.2", False), ("v0.1.0", False), ("v0.2.0rc1", False)]
)
def test_a_release_checks_its_tag_before_it_builds(tmp_path, tag, released):
    """The tag is the version of the sources, and the changelog has its section."""
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    commands = re.findall(r"^ +- run: (.+)$", text, re.MULTILINE)
    checks = commands[: next(i for i, command in enumerate(commands) if "make wheels" in command)]
    (tmp_path / "g2rl_kernels").mkdir()
    (tmp_path / "g2rl_kernels" / "__init__.py").write_text('import torch\n__version__ = "0.2.0"\n')
    log = "# Changes\n\n## 0.2.0, 2027-01-01\n\nnew\n\n## 0.1.0\n\nold\n"
    (tmp_path / "CHANGELOG.md").write_text(log)
    environment = os.environ | {"GITHUB_REF_NAME": tag}
    failed = subprocess.run(["bash", "-ec", "\n".join(checks)], cwd=tmp_path, env=environment).returncode
    assert (failed == 0) == released
    if released:
        assert (tmp_path / "notes.md").read_text() == "## 0.2.0, 2027-01-01\n\nnew\n\n"
