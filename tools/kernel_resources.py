"""Registers, spills and shared memory of every kernel, compiled without a GPU for NVIDIA's and AMD's.

    python tools/kernel_resources.py             all; --shipped: without what only `g2rl tune` tries; --quick:
                                                 the shipped choice of each kind alone, in bfloat16
    ... --check                                  exits with 1 if one spills, does not fit, lacks instructions
    ... --with-triton DIR ...                    also with the Triton that each folder holds, from
                                                 pip install --no-deps --target DIR triton==3.9.0
    ... --write                                  into benchmarks/results/triton-resources.md

kernel_cases.py lists the kernels (kernel_case.py: one), kernel_table.py makes the table. Registers and spills
come from Triton's ptxas, and from its code for AMD. build/kernel-resources keeps results: what has not
changed is not compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "kernel-resources"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # the checkout's kernels, installed or not

from kernel_case import Case, function, is_amd  # noqa: E402
from kernel_cases import all_cases  # noqa: E402

NVIDIA: tuple[int, ...] = (80, 86, 89, 90, 100, 120, 121)
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1201")  # MI200, MI300, MI350; RDNA 4

AMD_SINCE = (3, 9)  # the oldest Triton that compiles all kernels for AMD; 3.7 aborts over float64 products

# Limits of a multiprocessor, shared by the programs on it. On NVIDIA's each program takes 1024 bytes of
# shared memory on top of its own, and registers in steps of 8 a thread. On AMD's each of four groups of lanes
# has its own registers, and a program's warps are dealt to them in turn.
KIB = 1024
SHARED_MEMORY: dict[int | str, int] = {
    **{80: 164 * KIB, 90: 228 * KIB, 100: 228 * KIB},
    **dict.fromkeys((86, 89, 120, 121), 100 * KIB),
    **dict.fromkeys(AMD, 64 * KIB),
    "gfx950": 160 * KIB,
}
REGISTERS = 65536
AMD_REGISTERS = {"gfx1201": 1536}  # of a lane; others 512
TENSOR_MEMORY = 512  # columns, on data-centre Blackwell

INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_w?mfma|\bv_wmma",
    "TMA": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.c[ag]",
}


@dataclass(frozen=True)
class Found:
    """The result of one compilation."""

    case: Case
    registers: int = 0
    spilled: int = 0  # bytes: stores and loads on NVIDIA, of a lane's scratch memory on AMD
    shared: int = 0
    tensor_memory: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def faults(self) -> list[str]:
        if self.error:
            return [self.error]
        case, found = self.case, []
        if self.spilled > case.may_spill:
            found.append(f"spills {self.spilled} bytes")
        n, registers = case.programs_per_sm, -(-self.registers // 8) * 8
        if is_amd(case.arch):
            limits = [
                ("shared memory", n * self.shared, SHARED_MEMORY[case.arch]),
                (
                    "registers",
                    n * -(-case.num_warps // 4) * registers,
                    AMD_REGISTERS.get(str(case.arch), 512),
                ),
            ]
        else:
            limits = [
                ("shared memory", n * (self.shared + KIB), SHARED_MEMORY[case.arch]),
                ("registers", n * case.num_warps * 32 * registers, REGISTERS),
                ("tensor memory", n * self.tensor_memory, TENSOR_MEMORY),
            ]
        found += [f"{what}: {taken} of {limit}" for what, taken, limit in limits if taken > limit]
        return found + [f"no {need}" for need in case.needs if not self.counts[need]]


# --- compilation --------------------------------------------------------------------------------------------


def compiled(case: Case) -> Found:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from g2rl_kernels.head.triton.launch import OPTIONS

    kernel = function(case.kernel)
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for name in case.multiples_of_16:
        attributes[place[name]] = [["tt.divisibility", 16]]
        if is_amd(case.arch) and case.signature[name][0] == "*":  # tensors below 2 GiB
            attributes[place[name]].append(["tt.pointer_range", 32])
    constants = {place[name]: value for name, value in case.constants.items()}
    source = ASTSource(kernel, signature=case.signature, constexprs=constants, attrs=attributes)
    if is_amd(case.arch):
        target = GPUTarget("hip", case.arch, 32 if str(case.arch).startswith("gfx1") else 64)
    else:
        target = GPUTarget("cuda", case.arch, 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **OPTIONS}
    key = hashlib.sha256(f"{source.hash()} {target} {options}".encode()).hexdigest()
    kept = KEPT / triton.__version__ / key
    if kept.exists():
        return Found(case, **json.loads(kept.read_text()))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):  # where Triton repeats what ptxas says, and complains
            binary = triton.compile(source, target=target, options=options)
    except Exception as error:  # of any kind: the other kernels are still compiled
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Found(case, error=f"does not compile: {type(error).__name__} {lines[-1] if lines else ''}")
    if is_amd(case.arch):
        code = binary.asm["amdgcn"]
        registers = re.findall(r"\.vgpr_count:\s+(\d+)", code)
        spilled = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", code)
    else:
        code = binary.asm["ptx"]
        registers = re.findall(r"Used (\d+) registers", said.getvalue())
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said.getvalue())
    if not registers or not spilled:
        return Found(case, error="the compiler said nothing of registers and spills")
    values = {
        "registers": max(map(int, registers)),
        "spilled": sum(map(int, spilled)),
        "shared": binary.metadata.shared,
        "tensor_memory": getattr(binary.metadata, "tmem_size", None) or 0,
        "counts": {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()},
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(values))
    return Found(case, **values)


def prepare() -> None:
    """Before Triton is imported: no cache, no interpreter, and ptxas prints what it found."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_ALWAYS_COMPILE"] = os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"


def compile_all(cases: list[Case], jobs: int) -> list[Found]:
    started, found = time.perf_counter(), []
    context = multiprocessing.get_context("fork")  # the imports are shared
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for number, one in enumerate(pool.map(compiled, cases), 1):
            found.append(one)
            if sys.stderr.isatty():
                now = time.perf_counter() - started
                print(f"\r\x1b[K{now:5.0f} s  {number} of {len(cases)}", end="", file=sys.stderr, flush=True)
    print(f"\r{len(cases)} kernels in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return found


def as_json(version: str, found: list[Found]) -> dict[str, Any]:
    """What kernel_table.py reads. Kernels without faults need no more than their numbers."""
    rows = []
    for one in found:
        numbers = {name: value for name, value in asdict(one).items() if name not in ("case", "error")}
        rows.append({"name": one.case.name, "faults": one.faults, "error": one.error, **numbers})
    return {"triton": version, "found": rows}


def with_triton(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """The same with the Triton of another folder, in another process."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "found.json"
        command = [sys.executable, __file__, *arguments, "--json", str(out)]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=True)
        content: dict[str, Any] = json.loads(out.read_text())
    return content


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scopes = found.add_mutually_exclusive_group()
    scopes.add_argument("--shipped", action="store_true", help="leave out what only `g2rl tune` tries")
    scopes.add_argument("--quick", action="store_true", help="the shipped choice of each kind, bfloat16")
    every = (*map(str, NVIDIA), *AMD)
    found.add_argument(
        "--arch", nargs="+", choices=every, help="GPUs (default: all; AMD's from Triton 3.9 on)"
    )
    found.add_argument("--kernel", default="", metavar="NAME", help="kernels whose name contains this alone")
    found.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    found.add_argument(
        "--with-triton", type=Path, nargs="+", default=[], metavar="DIR", help="other versions"
    )
    found.add_argument("--check", action="store_true", help="exit with 1 if anything is wrong")
    found.add_argument("--write", action="store_true", help="write the committed table")
    found.add_argument("--json", type=Path, metavar="FILE", help="what was found, for this Triton alone")
    return found


def arguments() -> argparse.Namespace:
    """The command line; ends the program where a table would lack what it says, or a column."""
    command = parser()
    args = command.parse_args()
    if args.write and (args.kernel or args.arch):
        command.error("--write: the committed table has all kernels and GPUs: leave --kernel and --arch out")
    for folder in args.with_triton:
        if not (folder / "triton" / "__init__.py").is_file():
            command.error(f"--with-triton: {folder} holds no triton: pip install --no-deps --target it")
    return args


def main() -> int:
    args = arguments()
    scope = "quick" if args.quick else "shipped" if args.shipped else "all"
    prepare()
    try:
        import triton
    except ImportError:
        print("kernel_resources: error: triton is not installed", file=sys.stderr)
        return 2
    import kernel_table

    from g2rl_kernels._files import write_whole
    from g2rl_kernels.versions import minor  # after prepare(): importing the package imports Triton

    known = (*NVIDIA, *(AMD if minor(triton.__version__) >= AMD_SINCE else ()))
    architectures = [int(arch) if arch.isdigit() else arch for arch in args.arch or map(str, known)]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        cases = [case for case in all_cases(architectures, scope) if args.kernel in case.kernel]
        if not cases:
            print(f"kernel_resources: error: no kernel has {args.kernel!r} in its name", file=sys.stderr)
            return 2
        found = as_json(triton.__version__, compile_all(cases, args.jobs))
    if args.json is not None:
        args.json.write_text(json.dumps(found))
        versions = [found]
    else:
        same = [f"--{scope}"] * (scope != "all") + ["--jobs", str(args.jobs), "--kernel", args.kernel]
        same += ["--arch", *args.arch] if args.arch else []
        versions = [found, *(with_triton(folder, same) for folder in args.with_triton)]
        text = kernel_table.page(versions, found["triton"], scope)
        if args.write:
            write_whole(kernel_table.TABLE, text + kernel_table.cuda_table())
        print(text)
    wrong = kernel_table.faults(versions)
    print("\n".join(wrong) or "nothing that is shipped spills, everything fits", file=sys.stderr)
    return 1 if wrong and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
