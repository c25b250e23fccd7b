"""Runs the tests of the ops on pairs of Python and torch, and records what passed: `make matrix`.

For every pair of PAIRS, in a fresh environment:
  1. the wheel of this Python, built once against the oldest torch (2.11.0; the pair may name another);
  2. torch, its CPU build where the index has one, else the default build (gigabytes of CUDA, which load
     without a GPU), with the Triton that it asks for;
  3. TESTS, from a folder without the sources, so that the installed wheel is what runs;
  4. a hash of the compiled ops' outputs (tools/op_bits.py), compared with the pinned torch's.
Each row goes to benchmarks/results/compatibility.json as soon as it is finished: run the command again to go
on. What could not be had here becomes a row that says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from compatibility import ROOT, load, natural, store, today, write_page

OLDEST = "2.11.0"
Command = list[str | Path]


class Pair(NamedTuple):
    python: str  # as in the name of its command: 3.14t is free-threaded
    torch: str
    built: str = OLDEST  # the torch that the wheel is built against
    triton: str = ""  # where it is not that which torch asks for; a CPU build asks for no Triton

    @property
    def key(self) -> str:
        return f"{self.python} {self.torch}" + ("" if self.built == OLDEST else f" built {self.built}")


# The first is the pinned one, with which the bits of others are compared. Each Python and torch is in a pair.
PAIRS = [
    Pair("3.11", "2.13.0", triton="3.7.1"),
    Pair("3.14", "2.15.0"),
    Pair("3.10", "2.11.0"),
    Pair("3.13t", "2.12.0"),  # the last torch for free-threaded Python 3.13
    Pair("3.13", "2.14.1"),
    Pair("3.12", "2.12.1"),
    Pair("3.14", "2.11.0", built="2.15.0"),
    Pair("3.14t", "2.15.0"),
]
# Without the tests of the Triton kernels, which depend on Triton's version more than on torch's.
TESTS = ["tests/head", "tests/group", "tests/test_versions.py"]
LEFT_OUT = ["tests/head/kernels", "tests/group/test_group_kernel.py"]
# Triton 3.6, which comes with torch 2.11, interprets no kernel beside numpy 2.4.
NEEDED = ["numpy<2.4", "pytest>=8", "pytest-xdist", "hypothesis>=6.100"]
BUILD = ["setuptools>=77", "pybind11>=2.13", "ninja"]
SECTION = "torch"
TITLE = "Python and torch"


def listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


ABOUT = f"""\
One wheel for each Python, built against the torch of "built against", installed beside the torch of its row.
What a row ran: {listed(TESTS)}, without {listed(LEFT_OUT)}, on a CPU.
"Same bits": outputs of the compiled ops, forward and backward, in three dtypes, with every instruction set of
the machine, compared with those beside the pinned torch. Made by `make matrix`."""
EPILOG = """\
examples:
  make matrix                                      all pairs that are not recorded yet
  make matrix ARGS="--list"                        the pairs, and what is recorded
  make matrix ARGS="--only 3.14"                   pairs with 3.14 in their name, recorded or not
  make matrix ARGS="--python 3.14t=/opt/py/bin/python3.14t"
  make matrix ARGS="--document"                    only docs/compatibility.md from the record

Interpreters come from PATH and ~/.pyenv/versions. uv installs the packages, itself installed where
it is missing; UV_FIND_LINKS or UV_EXTRA_INDEX_URL may name an index with CPU builds of torch. A CUDA build
takes 4 to 6 GB of disk while its pair runs and up to 4 GB of downloads; uv keeps them (uv cache clean)."""


class Unavailable(Exception):
    """The reason why a pair cannot run here."""


def say(line: str) -> None:
    print(f"[matrix] {line}", flush=True)


def run(command: Command, log: Path, cwd: Path = ROOT, **environment: str) -> int:
    """Exit status of a command whose output goes to the end of a log."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "G2RL_CPU_ISA")}
    with log.open("a") as out:
        print("$", *command, file=out, flush=True)
        return subprocess.run(command, cwd=cwd, env=clean | environment, stdout=out, stderr=out).returncode


def reason(log: Path) -> str:
    """The last line of a log that looks like a reason, without this machine's paths."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"error|because|no matching|not found", line, re.IGNORECASE)]
    return re.sub(r"\S*/\S*/(\S+)", r"\1", (told or lines or ["no output"])[-1])[:240]


def find_python(name: str, given: dict[str, str]) -> str:
    versions = Path.home() / ".pyenv" / "versions"
    plain = name.rstrip("t")
    free = "t" if name.endswith("t") else ""
    candidates = [
        given.get(name),
        shutil.which(f"python{name}"),
        *sorted(map(str, versions.glob(f"{plain}.[0-9]*{free}/bin/python")), key=natural, reverse=True),
    ]
    code = "print(*sys.version_info[:2], bool(sysconfig.get_config_var('Py_GIL_DISABLED')))"
    for candidate in filter(None, candidates):
        command = [candidate, "-c", f"import sys, sysconfig; {code}"]
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.stdout.split() == [*plain.split("."), str(bool(free))]:
            return candidate
    raise Unavailable(f"no python{name} on this machine")


def source_digest() -> str:
    """Changes with the sources of the wheel: one that was built from others is not used again."""
    sha = hashlib.sha256()
    names = [
        ROOT / "setup.py",
        ROOT / "pyproject.toml",
        *ROOT.glob("csrc/**/*"),
        *ROOT.glob("g2rl_kernels/**/*.py"),
    ]
    for path in sorted(path for path in names if path.is_file()):
        sha.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return sha.hexdigest()[:12]


class Workshop:
    """The folder with environments, wheels and the tree that the tests run in."""

    def __init__(self, folder: Path, given: dict[str, str], workers: int) -> None:
        self.folder, self.given, self.workers = folder, given, workers
        for name in ("env", "wheels", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.uv = shutil.which("uv") or self.own_uv()
        self.tree = folder / "tree"
        self.copy_sources(self.tree, "g2rl_kernels")
        self.digest = source_digest()

    def own_uv(self) -> str:
        venv = self.folder / "uv"
        if not (venv / "bin" / "uv").exists():
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            subprocess.run([venv / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"], check=True)
        return str(venv / "bin" / "uv")

    def copy_sources(self, target: Path, *left_out: str) -> None:
        shutil.rmtree(target, ignore_errors=True)
        ignored = shutil.ignore_patterns("*.so", "__pycache__", ".*cache")
        for entry in ROOT.iterdir():
            if entry.name in ("build", "dist", "runs", "shared", *left_out) or entry.name.startswith("."):
                continue
            if entry.is_dir():
                shutil.copytree(entry, target / entry.name, ignore=ignored, symlinks=True)
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(entry, target)

    def environment(self, name: str, python: str, torch: str, packages: list[str], log: Path) -> Path:
        """Interpreter of a fresh environment with torch and packages."""
        folder = self.folder / "env" / name
        shutil.rmtree(folder, ignore_errors=True)
        interpreter = folder / "bin" / "python"
        if run([self.uv, "venv", "--quiet", "--python", self.python(python), folder], log):
            raise Unavailable(reason(log))
        # Wheels alone: without one for this Python, an older version is taken and none is compiled.
        install: Command = [self.uv, "pip", "install", "--quiet", "--only-binary", ":all:"]
        install += ["--python", interpreter]
        for requirement in (f"torch=={torch}+cpu", f"torch=={torch}"):
            if not run([*install, requirement, *packages], log):
                return interpreter
        raise Unavailable(reason(log))

    def python(self, name: str) -> str:
        return find_python(name, self.given)

    def wheel(self, pair: Pair, log: Path) -> Path:
        folder = self.folder / "wheels" / f"{pair.python}-{pair.built}-{self.digest}"
        if not list(folder.glob("*.whl")):
            name = f"build-{pair.python}-{pair.built}"
            say(f"  building the wheel of Python {pair.python} against torch {pair.built}")
            python = self.environment(name, pair.python, pair.built, [*BUILD, "pip", "wheel"], log)
            sources = self.folder / "sources"
            self.copy_sources(sources)
            command: Command = [
                python,
                "-m",
                "pip",
                "wheel",
                "--no-build-isolation",
                "--no-deps",
                "-w",
                folder,
                sources,
            ]
            failed = run(command, log)
            shutil.rmtree(self.folder / "env" / name)
            shutil.rmtree(sources)
            if failed:
                raise Unavailable(f"the wheel was not built: {reason(log)}")
        (found,) = folder.glob("*.whl")
        return found


VERSIONS = """
import json, platform, sys, sysconfig, importlib.metadata as metadata
import g2rl_kernels, torch
try: triton = metadata.version("triton")
except metadata.PackageNotFoundError: triton = "not installed"
free = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
print(json.dumps({"python": platform.python_version() + ("t" if free else ""), "torch": torch.__version__,
  "triton": triton, "file": g2rl_kernels.__file__, "gil": not free or sys._is_gil_enabled(),
  "built": g2rl_kernels._C.build_info()["torch_built_with"]}))
"""


def ask(python: Path, command: Command, cwd: Path, log: Path) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "G2RL_CPU_ISA")}
    done = subprocess.run([python, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    with log.open("a") as out:
        out.write(done.stdout + done.stderr)
    if done.returncode:
        raise Unavailable(reason(log))
    return json.loads(done.stdout.splitlines()[-1])


class Counts(NamedTuple):
    passed: int
    skipped: int
    failed: list[str]  # as in `outcomes`


def outcomes(report: Path) -> dict[str, str]:
    """ "passed", "skipped" or "failed" of each test, by its name as pytest takes it: file::test.

    A file that could not be imported is "failed" under its own name.
    """
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file, scope, name = (case.get(key, "") for key in ("file", "classname", "name"))
        classes = scope.removeprefix(file.removesuffix(".py").replace("/", ".")).strip(".")
        test = "::".join([file, *filter(None, classes.split(".")), name]) if scope else file
        failed = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        if found.get(test) != "failed":  # it is there twice where its teardown failed
            found[test] = "failed" if failed else "skipped" if skipped else "passed"
    return found


def counts(found: dict[str, str]) -> Counts:
    states = [*found.values()]
    failed = [test for test, state in found.items() if state == "failed"]
    return Counts(states.count("passed"), states.count("skipped"), failed)


def run_tests(python: Path, shop: Workshop, log: Path) -> tuple[Counts, str]:
    """What TESTS come to, and a note on those that passed only when they ran again, alone."""

    def pytest(*arguments: str) -> dict[str, str]:
        report = log.with_suffix(".xml")
        report.unlink(missing_ok=True)
        options = ("-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}")
        command: Command = [python, "-m", "pytest", "-q", *options]
        status = run([*command, *arguments], log, cwd=shop.tree, OMP_NUM_THREADS="1")
        found = outcomes(report) if report.exists() else {}
        if not found or (status and "failed" not in found.values()):
            raise Unavailable(f"the tests did not run: {reason(log)}")
        return found

    workers = ["-n", str(shop.workers)] if shop.workers > 1 else []
    found = pytest(*workers, *(f"--ignore={test}" for test in LEFT_OUT), *TESTS)
    failed = [test for test in counts(found).failed if "::" in test]  # an import fails again
    if not failed:
        return counts(found), ""
    say(f"  {len(failed)} failed: again, alone (a busy machine exceeds time limits)")
    again = pytest(*failed)
    late = [test for test in failed if again.get(test) == "passed"]
    found |= dict.fromkeys(late, "passed")
    return counts(found), f"{len(late)} passed only alone" if late else ""


def try_pair(pair: Pair, shop: Workshop) -> dict[str, object]:
    """The row of a pair; raises Unavailable."""
    name = pair.key.replace(" ", "-")
    log = shop.folder / "logs" / f"{name}.txt"
    log.unlink(missing_ok=True)
    wheel = shop.wheel(pair, log)
    triton = f"triton=={pair.triton}" if pair.triton else "triton"
    say(f"  installing torch {pair.torch}")
    python = shop.environment(name, pair.python, pair.torch, [*NEEDED, "setuptools", triton], log)
    if run([shop.uv, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel], log):
        raise Unavailable(reason(log))
    found = ask(python, ["-c", VERSIONS], shop.tree, log)
    if not Path(found["file"]).is_relative_to(shop.folder / "env"):
        raise AssertionError(f"{found['file']} is not the installed wheel")
    bits = ask(python, [ROOT / "tools" / "op_bits.py"], shop.tree, log)
    say(f"  tests, with torch {found['torch']} and Triton {found['triton']}; log: {log}")
    start = time.monotonic()
    result, late = run_tests(python, shop, log)
    notes = [late] if late else []
    if result.failed:
        notes.append(f"failed: {', '.join(result.failed)}")
    if pair.python.endswith("t"):
        notes.append("the GIL is on" if found["gil"] else "free-threaded, the GIL stays off")
    return {
        "Python": found["python"],
        "torch": found["torch"],
        "Triton": found["triton"],
        "built against": found["built"],
        "passed": result.passed,
        "failed": len(result.failed),
        "skipped": result.skipped,
        "seconds": round(time.monotonic() - start),
        "same bits": same_bits(pair, bits),
        "bits": bits,
        "date": today(),
        "note": "; ".join(notes),
    }


def same_bits(pair: Pair, bits: dict[str, str]) -> str:
    """Whether the outputs are those beside the pinned torch."""
    if pair == PAIRS[0]:
        return "compared with"
    pinned = load().get(SECTION, {}).get("rows", {}).get(PAIRS[0].key, {}).get("bits", {})
    shared = pinned.keys() & bits.keys()
    if not shared:
        return "not compared"
    return "yes" if all(pinned[isa] == bits[isa] for isa in shared) else "no"


def missing(pair: Pair, why: str) -> dict[str, object]:
    return {
        "Python": pair.python,
        "torch": pair.torch,
        "built against": pair.built,
        "date": today(),
        "note": f"not run: {why}",
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="matrix.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "matrix", help="default: build/matrix"
    )
    parser.add_argument("--only", metavar="TEXT", help="pairs with this in their name, recorded or not")
    parser.add_argument("--python", metavar="NAME=PATH", action="append", default=[], help="an interpreter")
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes of pytest"
    )
    parser.add_argument("--keep", action="store_true", help="keep each pair's environment")
    parser.add_argument("--list", action="store_true", help="show the pairs; run nothing")
    parser.add_argument("--document", action="store_true", help="write docs/compatibility.md; run nothing")
    args = parser.parse_args(argv)
    if args.document:
        write_page()
        return 0
    recorded = load().get(SECTION, {}).get("rows", {})
    if args.list:
        for pair in PAIRS:
            row = recorded.get(pair.key, {"note": "not recorded"})
            print(
                f"{pair.key:<24}", *(f"{row[k]} {k}" for k in ("passed", "failed") if k in row), row["note"]
            )
        return 0
    wanted = [p for p in PAIRS if (args.only in p.key if args.only else p.key not in recorded)]
    if not wanted:
        say(f"no pair has {args.only!r}" if args.only else f"all {len(PAIRS)} pairs are recorded")
        return 0
    named = re.compile(r"[\d.]+t?=(.+)").fullmatch
    if wrong := [given for given in args.python if not (at := named(given)) or not shutil.which(at[1])]:
        parser.error(f"--python: got {wrong[0]!r}, needs NAME=PATH, as in 3.14t=/opt/py/bin/python3.14t")
    shop = Workshop(args.folder.absolute(), dict(given.split("=", 1) for given in args.python), args.workers)
    failures = 0
    for number, pair in enumerate(wanted, 1):
        say(f"{number}/{len(wanted)} Python {pair.python}, torch {pair.torch}")
        try:
            row = try_pair(pair, shop)
        except Unavailable as why:
            row = missing(pair, str(why))
        finally:
            if not args.keep:
                shutil.rmtree(shop.folder / "env" / pair.key.replace(" ", "-"), ignore_errors=True)
        store(SECTION, pair.key, row, TITLE, ABOUT)
        say(f"  {row['note'] or 'all passed'}; passed {row.get('passed', 0)}")
        failures += bool(row.get("failed"))
    write_page()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
