"""Registers, spills and shared memory of every kernel in csrc/cuda, from ptxas. Needs nvcc, no GPU.

python tools/cuda_resources.py [nvcc]    prints a table
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# What ptxas prints for one kernel.
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def architectures(nvcc: str) -> list[str]:
    """The architectures of setup.py that this nvcc knows."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CUDA_ARCHS":
            wanted = ast.literal_eval(node.value)
            known = subprocess.run(
                [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
            ).stdout
            return [arch for arch in wanted if f"sm_{arch.rstrip('a')}" in known.split()]
    raise LookupError("setup.py assigns no CUDA_ARCHS")


def short_name(mangled: str) -> str:
    """group_kernel<1> for _ZN4g2rl...12group_kernelILb1EEEvNS0_6DeviceE: the last part of the
    name, with template arguments that are numbers."""
    rest, name = mangled.removeprefix("_ZN").removeprefix("_Z"), mangled
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        name, rest = rest[match.end() : end], rest[end:]
    template = re.match(r"I((?:L\w\d+E)+)E", rest)
    arguments = re.findall(r"L[a-z](\d+)E", template[1]) if template else []
    return f"{name}<{', '.join(arguments)}>" if arguments else name


def parse(output: str) -> list[dict[str, Any]]:
    """One dictionary for each kernel and architecture, from the output of ptxas -v."""
    rows = []
    for match in ENTRY.finditer(output):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        rows.append(
            {
                "kernel": short_name(match["name"]),
                "arch": match["arch"],
                "registers": int(match["registers"]),
                "spill_bytes": int(match["stores"]) + int(match["loads"]),
                "shared_bytes": int(shared[1]) if shared else 0,
            }
        )
    return rows


def resources(nvcc: str) -> list[dict[str, Any]]:
    """Compiles every csrc/cuda/*.cu with `nvcc` for each of `architectures` and reads the output of ptxas."""
    rows = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        for arch in architectures(nvcc):
            with tempfile.TemporaryDirectory() as folder:
                command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas=-v"]
                command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", str(source)]
                done = subprocess.run([*command, "-o", f"{folder}/out.o"], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
            rows += parse(done.stdout + done.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = ("kernel", "arch", "registers", "spill_bytes", "shared_bytes")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows])


def main() -> None:
    nvcc = sys.argv[1] if len(sys.argv) > 1 else shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc not found")
    print(table(resources(nvcc)))


if __name__ == "__main__":
    main()
