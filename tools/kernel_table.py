"""The table of kernel_resources.py: one row a kernel and GPU, one column a version of Triton."""

from __future__ import annotations

import re
import shutil
from importlib import util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "triton-resources.md"

HEADER = """\
# Resources of the kernels

Written by `python tools/kernel_resources.py {arguments}--with-triton ... --write`, which compiles without a
GPU. {scope}

Tiles are tokens x vocabulary x hidden size (head_project: responses x hidden size x columns). Where the
configuration says `2 programs`, two of them fit on a multiprocessor. Shared memory, of one program, and
instructions are those of Triton {own}, or of the newest where that does not compile the kernel. A column for
each version of Triton has registers/spilled bytes: stores and loads on NVIDIA, scratch memory on AMD.
Combinations of options that few calls have (temperatures, statistics, a low-rank part; a softcap with a bias
and kept logits or any strides) may spill up to 64 bytes, which ptxas likes to do near 128 registers.
"""
SCOPES = {
    "all": "It has all kernels, with what only `g2rl tune` tries.",
    "shipped": "It has the kernels that are launched, without what only `g2rl tune` tries.",
    "quick": "It has the shipped choice of each kind, in bfloat16.",
}
COLUMNS = ("kernel", "variant", "operands", "for", "configuration", "shared KiB", "instructions")
AMD = """
## AMD

Compiled, and never run on a GPU. Tensors are below 2 GiB.

"""


def faults(versions: list[dict[str, Any]]) -> list[str]:
    return [
        f"Triton {version['triton']}: {', '.join(filter(None, one['name']))}: {'; '.join(one['faults'])}"
        for version in versions
        for one in version["found"]
        if one["faults"]
    ]


def page(versions: list[dict[str, Any]], own: str, scope: str) -> str:
    """The whole page. `own` is the version whose shared memory and instructions are shown."""
    versions = sorted(versions, key=lambda version: [int(n) for n in re.findall(r"\d+", version["triton"])])
    arguments = "" if scope == "all" else f"--{scope} "
    text = HEADER.format(own=own, scope=SCOPES[scope], arguments=arguments) + "\n"
    nvidia = rows(versions, own, lambda arch: arch.startswith("sm_"))
    amd = rows(versions, own, lambda arch: arch.startswith("gfx"))
    return text + "\n".join(nvidia) + "\n" + (AMD + "\n".join(amd) + "\n" if amd[2:] else "")


def rows(versions: list[dict[str, Any]], own: str, wanted: Any) -> list[str]:
    """Lines of a table of the GPUs that are wanted."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    details: dict[tuple[str, ...], tuple[str, ...]] = {}
    for version in versions:
        for one in version["found"]:
            name = tuple(one["name"])
            if wanted(name[3]) and not one["error"]:
                cells.setdefault(name, {})[version["triton"]] = f"{one['registers']}/{one['spilled']}"
                if details.get(name, ("",))[0] != own:  # a later version otherwise
                    counts = ", ".join(f"{n} {what}" for what, n in one["counts"].items() if n)
                    details[name] = (version["triton"], f"{one['shared'] / 1024:.1f}", counts)
    names = [
        version["triton"] for version in versions if any(version["triton"] in row for row in cells.values())
    ]
    columns = (*COLUMNS, *names)
    lines = []
    for name, found in cells.items():
        short = (re.sub(r"^\w+\.(\w+)_kernel$", r"\1", name[0]), *name[1:])
        lines.append(f"| {' | '.join((*short, *details[name][1:], *(found.get(v, '') for v in names)))} |")
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *sorted(lines)]


def cuda_table() -> str:
    """Table of the kernels in csrc/cuda; empty without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or not (ROOT / "tools" / "cuda_resources.py").exists():
        return ""
    spec = util.spec_from_file_location("cuda_resources", ROOT / "tools" / "cuda_resources.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.resources(nvcc)
    if not found:
        return ""
    columns = list(found[0])
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += sorted(f"| {' | '.join(str(row[column]) for column in columns)} |" for row in found)
    return "\n## CUDA C++ (csrc/cuda)\n\n" + "\n".join(lines) + "\n"
