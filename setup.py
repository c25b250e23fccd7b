"""Builds g2rl_kernels._C: a pybind11 module whose import also registers the torch ops (csrc/ops/).

One binary serves torch 2.11 and newer, with and without CUDA: the sources use PyTorch's stable ABI at its
2.11 level, link CUDA's runtime statically, and refer weakly to the one symbol that a CPU-only torch lacks.

    python setup.py build_ext --inplace      incremental, for work on the sources
    pip install .                            with or without --no-build-isolation

Environment: G2RL_CUDA=0 leaves the CUDA sources out; G2RL_CUDA_ARCHS="80 90a" picks architectures; CUDA_HOME
names the toolkit; MAX_JOBS bounds the compilers that run at once; G2RL_CXXFLAGS adds flags for the C++
compiler and the linker (-fsanitize=...); G2RL_GLIBC=2.28 links for systems with that glibc or a later one
(needs the package ziglang; tools/wheels.py).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"g2rl-kernels needs setuptools >= 77, found {setuptools.__version__}: pip install -U setuptools"
    )
try:
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"g2rl-kernels builds beside torch, pybind11 and ninja ({error}): pip install those, or pip install ."
    )

TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11, which later versions keep
# Code runs on later GPUs of its major version: one entry each keeps the binary small. 80: A100 and, as 86 and
# 89, RTX 30 and 40, A10, L4, L40S. 90a: H100, H200 (a: wgmma). 120: RTX 50, RTX PRO and, as 121, GB10. 100:
# B200, B300; it is last as its PTX serves all others from 100 on: Thor (110), and what comes later.
CUDA_ARCHS = ("80", "90a", "120", "100")


def say(line: str) -> None:
    print(f"g2rl-kernels: {line}", file=sys.stderr)


def find_nvcc() -> str | None:
    """Path of nvcc; None if CUDA is switched off or nvcc is not found."""
    if os.environ.get("G2RL_CUDA", "1") == "0":
        say("G2RL_CUDA=0: CUDA sources left out")
        return None
    # torch's own CUDA_HOME may name a folder without a compiler.
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (found := shutil.which("nvcc", path=os.path.join(home, "bin"))):
            return found
    found = shutil.which("nvcc")
    if not found:
        say("nvcc not found: CUDA sources left out; CPU kernels, PyTorch reference and Triton do not need it")
    return found


class Nvcc:
    """Compiles csrc/cuda/*.cu without torch: torch's CUDAExtension refuses to with a CPU-only torch."""

    def __init__(self, path: str) -> None:
        self.path = path
        known = set(re.findall(r"sm_(\w+)", self._output("--list-gpu-code")))
        wanted = os.environ.get("G2RL_CUDA_ARCHS", "").split() or [
            a for a in CUDA_ARCHS if a.rstrip("a") in known
        ]
        self.archs = wanted
        self.gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted[:-1]]
        last = wanted[-1]
        codes = f"sm_{last}" if last.endswith("a") else f"[sm_{last},compute_{last}]"
        self.gencode.append(f"-gencode=arch=compute_{last},code={codes}")

    def _output(self, *args: str) -> str:
        done = subprocess.run([self.path, *args], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    def version(self) -> str:
        found = re.search(r"release ([\d.]+)", self._output("--version"))
        return found.group(1) if found else "unknown"

    def link_args(self) -> list[str]:
        """Flags for the static CUDA runtime, from the folders that this nvcc links with."""
        dryrun = self._output("--dryrun", "-o", "a.out", "-x", "cu", os.devnull)
        line = next(line for line in dryrun.splitlines() if line.startswith("#$ LIBRARIES="))
        folders = [flag[2:] for flag in shlex.split(line.split("=", 1)[1]) if flag.startswith("-L")]
        folder = next((f for f in folders if os.path.exists(os.path.join(f, "libcudart_static.a"))), None)
        if folder is None:
            sys.exit(
                f"g2rl-kernels: no libcudart_static.a in {folders}; "
                "install the toolkit's runtime for development, or set G2RL_CUDA=0"
            )
        return [f"-L{folder}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]

    def compile(self, source: str, folder: Path, include: list[str]) -> str:
        """Object file for `source`, compiled if it, a header or the command changed."""
        out = folder / (Path(source).stem + ".cuda.o")
        command = [
            self.path,
            "-std=c++17",
            "-O3",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "--threads=2",
            *self.gencode,
        ]
        command += [*include, "-c", source, "-o", str(out)]
        stamp = out.with_suffix(".cmd")
        depends = [source, *HEADERS]
        fresh = (
            out.exists()
            and stamp.exists()
            and stamp.read_text() == shlex.join(command)
            and all(os.path.getmtime(d) < out.stat().st_mtime for d in depends)
        )
        if not fresh:
            print(shlex.join(command), flush=True)
            if subprocess.call(command):
                sys.exit(f"g2rl-kernels: nvcc failed on {source} (above); G2RL_CUDA=0 builds without CUDA")
            stamp.write_text(shlex.join(command))
        return str(out)


HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))


def zig_linker(glibc: str) -> list[str]:
    """Links for an older glibc than this system's: zig knows each one's symbols. It compiles nothing."""
    if importlib.util.find_spec("ziglang") is None:
        sys.exit(f"g2rl-kernels: G2RL_GLIBC={glibc} links with zig: pip install ziglang, or unset G2RL_GLIBC")
    target = f"{platform.machine()}-linux-gnu.{glibc}"
    return [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-Wl,--as-needed", "-s"]


def library_file(compiler: list[str], name: str) -> str:
    """Path of a library that the C++ compiler links with. compiler: its command, as in CXX="ccache g++"."""
    command = [*compiler, f"-print-file-name={name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = done.stdout.strip()
    if done.returncode or not os.path.isabs(found):  # the name alone where there is no such file
        said = f": {done.stderr.strip()[-200:]}" if done.returncode else ""
        sys.exit(f"g2rl-kernels: {compiler[0]} knows no {name}{said}; CXX names a g++ with its libraries")
    return found


class build_ext(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace:
            # pip install -e names a fresh temporary folder: everything would be compiled each time.
            self.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        version = self.distribution.get_version()
        defines = [f'-DG2RL_VERSION="{version}"', f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        if glibc := os.environ.get("G2RL_GLIBC"):
            self.link_for(glibc, extension)
        sources = sorted(glob("csrc/cuda/*.cu"))
        if sources and (path := find_nvcc()):
            nvcc = Nvcc(path)
            folder = Path(self.build_temp).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            include = ["-Icsrc"]
            extension.extra_objects += [nvcc.compile(source, folder, include) for source in sources]
            extension.extra_link_args += nvcc.link_args()
            defines += [
                "-DWITH_CUDA",
                f'-DG2RL_CUDA="{nvcc.version()}"',
                f'-DG2RL_CUDA_ARCHS="{" ".join(nvcc.archs)}"',
            ]
            say(f"CUDA {nvcc.version()} for sm_{', sm_'.join(nvcc.archs)}")
        extension.extra_compile_args["cxx"] += defines
        # Compile everything again after a build with other settings.
        settings = Path(self.build_temp) / "settings"
        if not settings.exists() or settings.read_text() != repr(vars(extension)):
            self.force = True
        super().build_extensions()
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(repr(vars(extension)))

    def link_for(self, glibc: str, extension: setuptools.Extension) -> None:
        """Links with zig, but with the C++ compiler's runtime: torch could not catch exceptions of zig's."""
        extension.language = "c"  # or the C++ compiler is asked to link
        self.compiler.set_executable("linker_so", zig_linker(glibc))
        extension.sources += glob("csrc/runtime/*.cpp")
        # Before torch's libraries, which export some of libstdc++ without versions for auditwheel to check.
        # libgcc.a: the CPU detection in zig 0.17's own runtime finds no instruction set at all.
        for name in ("libgcc.a", "libstdc++.so", "libgcc_s.so.1"):
            extension.extra_objects.append(library_file(self.compiler.compiler_cxx, name))


# Build the operators alone, in this namespace of torch.ops, without the Python module (tools/hub_kernel.py).
OPS = os.environ.get("G2RL_OPS")

# Folders of the checkout that are installed inside the package, for `g2rl bench` and `g2rl train`.
SHIPPED = {f"g2rl_kernels.{name}": name for name in ("benchmarks", "recipes") if os.path.isdir(name)}
FLAGS = shlex.split(os.environ.get("G2RL_CXXFLAGS", ""))
# Without alignment of inner loops the head kernel's time varied by 6 % from build to build.
ALIGNED = ["-falign-functions=64", "-falign-loops=64"]

setup(
    packages=[*find_packages(include=["g2rl_kernels", "g2rl_kernels.*"]), *SHIPPED],
    package_dir=SHIPPED,
    # MANIFEST.in is for the source archive alone: results of experiments are not installed.
    include_package_data=False,
    package_data={
        "g2rl_kernels": ["py.typed", "*.pyi", "head/*.md"],
        "g2rl_kernels.recipes": ["**/*"],
    },
    ext_modules=[
        CppExtension(
            f"g2rl_kernels.{OPS or '_C'}",
            sources=[
                path
                for path in sorted(glob("csrc/ops/*.cpp")) + sorted(glob("csrc/cpu/*.cpp"))
                if not (OPS and path.endswith("module.cpp"))
            ],
            depends=["setup.py", *HEADERS, *glob("csrc/cuda/*.cu")],
            # torch 2.11 forbids its copy of pybind11 together with the stable ABI.
            include_dirs=[str(Path("csrc").absolute()), pybind11.get_include()],
            # No -march: units under csrc/cpu name their instruction sets; the best is chosen at run time.
            # No -ffast-math: kernels rely on NaN and infinities.
            extra_compile_args={
                "cxx": ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", *ALIGNED, *FLAGS]
            },
            define_macros=[("G2RL_OPS", OPS)] if OPS else [],
            extra_link_args=FLAGS,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
