"""Makes a kernel repository in the format of the Hugging Face package `kernels` (0.17 or newer).

    make hub-kernel                              builds build/hub-kernel, loads it with `kernels`, compares
    python tools/hub_kernel.py --out FOLDER      builds only

The variants hold the ops of this package and `find_head`, with relative imports only:

    torch-stable-abi211-cpu-x86_64-linux      the C++ kernels, for every torch from 2.11 on and every Python
    torch-cuda, torch-rocm                    the Triton kernels; CPU tensors take the PyTorch reference
    torch-cpu                                 the PyTorch reference, for other CPUs and free-threaded Python

`kernels` may load several builds in one process. The operators of each therefore have a namespace of their
own, the build's id with a digest of its sources. A variant without C++ defines their schemas in Python.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "g2rl_kernels"
NAME = "g2rl-kernels"
VERSION = 0  # the Hub's number for kernels whose API may still change
OLDEST_KERNELS = "0.17.0"
ABI = "torch-stable-abi211"  # setup.py: TORCH_TARGET
# Architectures that tools/kernel_resources.py compiles the Triton kernels for.
ARCHS = {"cpu": None, "cuda": ["8.0+PTX"], "rocm": ["gfx90a", "gfx942", "gfx950", "gfx1201"]}
GLIBC = "2.28"  # what the Hub asks for is manylinux_2_28
NEWEST = {"GLIBC": [2, 28], "GLIBCXX": [3, 4, 24], "CXXABI": [1, 3, 11], "GCC": [7, 0, 0]}
UNVERSIONED = re.compile(r"aoti_torch_|torch_")
IMPORTS_C = re.compile(r"^from \. import _C\b.*\n", re.MULTILINE)

INIT = '''"""{docstring}"""

{imports}

__version__ = "{version}"
__all__ = {names}
'''
# Older versions of `kernels` look for a folder with the package's name.
NESTED = '''"""The same names as the folder above, for older versions of `kernels`."""

import importlib.util
import sys
from pathlib import Path

_name = "{id}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parent.parent / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({{name: getattr(sys.modules[_name], name) for name in sys.modules[_name].__all__}})
__all__ = sys.modules[_name].__all__
'''


# --- which files --------------------------------------------------------------------------------------------


def public() -> dict[str, list[str]]:
    """Module -> names that g2rl_kernels exports from it."""
    import g2rl_kernels

    found: dict[str, list[str]] = {}
    for name in g2rl_kernels.__all__:
        module = getattr(getattr(g2rl_kernels, name), "__module__", None)
        if module:
            found.setdefault(module.removeprefix("g2rl_kernels."), []).append(name)
    return dict(sorted(found.items()))


def imported(module: str) -> Iterator[str]:
    """Modules of the package that one imports, at its top or later; names as in "head.spec"."""
    folder = module.split(".")[:-1]
    for node in ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            base = [*above, *(node.module.split(".") if node.module else [])]
            for name in (base, *([*base, alias.name] for alias in node.names)):
                if name and name != ["_C"] and file_of(".".join(name)).exists():
                    yield ".".join(name)


def file_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def modules() -> list[str]:
    """What the public names need, by its imports; backends are imported by name."""
    waiting = [*public(), "head.tiled", "head.cpu", "head.triton.driver"]
    waiting += ["head.support.cpu", "head.support.triton"]
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting.extend(imported(module))
    return sorted(found)


def sources() -> list[Path]:
    files = [file_of(module) for module in modules()]
    folders = {file.parent for file in files} - {PACKAGE}
    return sorted([*files, *(folder / "__init__.py" for folder in folders)])


def digest() -> str:
    """Of everything that a build is made of."""
    found = hashlib.sha256()
    for file in [*sources(), *sorted(ROOT.glob("csrc/**/*.*")), Path(__file__), ROOT / "setup.py"]:
        found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:10]


# --- one variant --------------------------------------------------------------------------------------------


def schemas() -> dict[str, str]:
    """Name -> schema, without namespace, of the operators that csrc/ops registers."""
    import torch

    import g2rl_kernels  # noqa: F401  (registers them)

    defined = [
        name
        for file in sorted(ROOT.glob("csrc/ops/*.cpp"))
        for name in re.findall(r'm\.def\("(\w+)\(', file.read_text(encoding="utf-8"))
    ]
    found = {name: str(getattr(torch.ops.g2rl, name).default._schema) for name in defined}
    return {name: schema[schema.index("(") :] for name, schema in found.items()}


def ops_file(id: str, library: str | None) -> str:
    """_ops.py with the build's namespace; `library` is the file of the C++ operators, if there is one."""
    text = (PACKAGE / "_ops.py").read_text(encoding="utf-8")
    if library:
        instead = (
            "from pathlib import Path\n\n"
            f'torch.ops.load_library(str(Path(__file__).with_name("{library}")))  # the compiled operators\n'
        )
    else:
        lines = "".join(
            f'torch.library.define("{id}::{name}", "{schema}")\n' for name, schema in schemas().items()
        )
        instead = f"# Operators of the compiled part, which this build lacks: schemas alone.\n{lines}"
    text, count = IMPORTS_C.subn(lambda _: instead, text)
    text, renamed = re.subn(r'^NAMESPACE = "g2rl"$', f'NAMESPACE = "{id}"', text, flags=re.MULTILINE)
    if (count, renamed) != (1, 1):
        sys.exit("hub_kernel: g2rl_kernels/_ops.py has changed: it needs one import of _C and one NAMESPACE")
    return text


def compile_ops(id: str, target: Path) -> None:
    """The operators in C++ as one library without Python, linked for older systems as the wheels are."""
    temporary = ROOT / "build" / "hub-objects"
    out, log = temporary / "out", temporary / "build.log"
    shutil.rmtree(out, ignore_errors=True)
    temporary.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"G2RL_OPS": id, "G2RL_CUDA": "0", "G2RL_GLIBC": GLIBC}
    folders = ["--build-temp", str(temporary), "--build-lib", str(out)]
    command = [str(environment()), "setup.py", "-q", "build_ext", *folders]
    with log.open("w") as file:
        failed = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT).returncode
    if failed:
        sys.exit(f"hub_kernel: the build failed:\n{log.read_text()[-4000:]}")
    (built,) = out.rglob("*.so")
    if newer := newer_symbols(built):
        sys.exit(f"hub_kernel: the library needs symbols of newer systems: {' '.join(newer)}")
    shutil.copyfile(built, target)


def newer_symbols(library: Path) -> list[str]:
    """Symbols that systems of `NEWEST` lack, or that no library's version covers."""
    lines = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = []
    for name in (line.split()[1] for line in lines if line.split()[0] == "U"):
        version = re.search(r"@(\w+?)_([\d.]+)$", name)
        if version is None:
            if not UNVERSIONED.match(name):
                found.append(name)
        elif [int(n) for n in version[2].split(".")] > NEWEST.get(version[1], [0]):
            found.append(name)
    return found


def write_variant(folder: Path, backend: str, sha: str, compiled: bool) -> None:
    import g2rl_kernels

    id = f"_g2rl_kernels_{backend}_{'native' if compiled else 'python'}_{sha}"
    library = f"{id}.abi3.so" if compiled else None
    folder.mkdir(parents=True)
    for file in sources():
        copy = folder / file.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    (folder / "_ops.py").write_text(ops_file(id, library), encoding="utf-8")
    if library:
        compile_ops(id, folder / library)
    exported = public()
    init = INIT.format(
        docstring=g2rl_kernels.__doc__,
        imports="\n".join(f"from .{module} import {', '.join(names)}" for module, names in exported.items()),
        version=g2rl_kernels.__version__,
        names=json.dumps(sorted(name for names in exported.values() for name in names)),
    )
    (folder / "__init__.py").write_text(init, encoding="utf-8")
    nested = folder / NAME.replace("-", "_")
    nested.mkdir()
    (nested / "__init__.py").write_text(NESTED.format(id=id), encoding="utf-8")
    write_metadata(folder, id, backend)


def write_metadata(folder: Path, id: str, backend: str) -> None:
    files = {
        str(file.relative_to(folder)): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    metadata = {
        "name": NAME,
        "id": id,
        "version": VERSION,
        "kernels-minver": OLDEST_KERNELS,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend} | ({"archs": archs} if (archs := ARCHS[backend]) else {}),
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


# --- the repository -----------------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """Ends the program if `out` is there and holds anything but an earlier build."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    builds = {path.name for path in (out / "build").glob("*") if not path.name.startswith("torch-")}
    if foreign := sorted((names - {"build", "README.md"}) | builds):
        sys.exit(
            f"hub_kernel: --out: {out} holds {foreign[0]}, which a build would delete: name a new folder, or "
            "one with an earlier build alone"
        )


def build(out: Path, native: bool = True) -> list[str]:
    """Writes the repository to `out`, in place of an earlier one; returns the variants.

    native: with the variant in C++.
    """
    check_out(out)
    sha = digest()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    variants = {f"torch-{backend}": (backend, False) for backend in ARCHS}
    if native:
        variants = {f"{ABI}-cpu-{platform.machine()}-linux": ("cpu", True)} | variants
    for number, (variant, (backend, compiled)) in enumerate(variants.items(), 1):
        print(f"[{number} of {len(variants)}] {variant}", flush=True)
        write_variant(partial / "build" / variant, backend, sha, compiled)
    page = (ROOT / "tools" / "hub" / "README.md").read_text(encoding="utf-8")
    (partial / "README.md").write_text(page, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return list(variants)


def environment() -> Path:
    """The Python of an environment with `kernels` and zig, which sees this one's torch."""
    folder = ROOT / "build" / "hub-env"
    python = folder / "bin" / "python"
    requirements = ROOT / "tools" / "hub" / "requirements.txt"
    done = folder / "requirements.txt"
    if not done.exists() or done.read_text() != requirements.read_text():
        venv.create(folder, with_pip=True, symlinks=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(requirements)], check=True)
        purelib = next(folder.glob("lib/python*/site-packages"))
        (purelib / "reused.pth").write_text(sysconfig.get_path("purelib") + "\n")
        shutil.copyfile(requirements, done)
    return python


def check(out: Path) -> None:
    """Runs hub/check.py in that environment."""
    env = os.environ | {
        "LOCAL_KERNELS": f"owner/{NAME}={out}",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",  # files that the repository's digests do not know
        "TRITON_INTERPRET": "1",
    }
    script = [
        str(environment()),
        "-W",
        "ignore::RuntimeWarning",
        str(ROOT / "tools" / "hub" / "check.py"),
        str(out),
    ]
    if subprocess.run(script, env=env, cwd=tempfile.gettempdir()).returncode:
        sys.exit("hub_kernel: the check failed (reason above)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "hub-kernel",
        help="a new folder, or one with an earlier build, which it replaces (build/hub-kernel)",
    )
    parser.add_argument("--no-native", action="store_true", help="leave out the variant in C++")
    parser.add_argument(
        "--check", action="store_true", help="then load it with `kernels` and compare results"
    )
    args = parser.parse_args()
    args.out = args.out.absolute()
    build(args.out, native=not args.no_native)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB", flush=True)
    if args.check:
        check(args.out)


if __name__ == "__main__":
    main()
