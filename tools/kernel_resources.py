"""Registers, spills and shared memory of every kernel, compiled for sm_80, sm_90 and sm_100 without a GPU.

    python tools/kernel_resources.py            all, into benchmarks/results/triton-resources.md; minutes
    python tools/kernel_resources.py --shipped  without what only `g2rl tune` tries; a test does this
    python tools/kernel_resources.py --quick    the shipped choice of each kind alone, in bfloat16
    python tools/kernel_resources.py --check    exits with 1 if one spills, does not fit or lacks instructions

kernel_cases.py lists the kernels. Registers and spills come from Triton's ptxas, called as Triton calls it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "triton-resources.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # the checkout's kernels, installed or not

from kernel_cases import Case, all_cases, function  # noqa: E402

ARCHITECTURES = (80, 90, 100)

# Limits of a multiprocessor, shared by the programs on it. Each program takes 1024 bytes of shared memory on
# top of its own, and registers in steps of 8 a thread.
SHARED_MEMORY = {80: 167936, 90: 233472, 100: 233472}
REGISTERS = 65536
TENSOR_MEMORY = 512  # columns, on Blackwell

INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "TMA": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.c[ag]",
}


@dataclass(frozen=True)
class Found:
    """The result of one compilation."""

    case: Case
    registers: int = 0
    spilled: int = 0  # bytes, stores and loads
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
        n = case.programs_per_sm
        for what, taken, limit in (
            ("shared memory", n * (self.shared + 1024), SHARED_MEMORY[case.arch]),
            ("registers", n * case.num_warps * 32 * -(-self.registers // 8) * 8, REGISTERS),
            ("tensor memory", n * self.tensor_memory, TENSOR_MEMORY),
        ):
            if taken > limit:
                found.append(f"{what}: {taken} of {limit}")
        for need in case.needs:
            if not self.counts[need]:
                found.append(f"no {need}")
        return found

    @property
    def row(self) -> str:
        instructions = ", ".join(f"{n} {name}" for name, n in self.counts.items() if n)
        shared = f"{self.shared / 1024:.1f}"
        columns = (*self.case.name, str(self.registers), str(self.spilled), shared, instructions)
        return f"| {' | '.join(columns)} |"


# --- compilation --------------------------------------------------------------------------------------------


def compiled(case: Case) -> Found:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = function(case.kernel)
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature=case.signature,
        constexprs={place[name]: value for name, value in case.constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in case.multiples_of_16},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):  # where Triton repeats what ptxas says, and complains
            binary = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    except Exception as error:  # of any kind: the other kernels are still compiled
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Found(case, error=f"does not compile: {type(error).__name__} {lines[-1] if lines else ''}")
    registers = re.findall(r"Used (\d+) registers", said.getvalue())
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said.getvalue())
    if not registers or not spilled:
        return Found(case, error="ptxas said nothing of registers and spills")
    ptx = binary.asm["ptx"]
    return Found(
        case,
        registers=max(map(int, registers)),
        spilled=sum(map(int, spilled)),
        shared=binary.metadata.shared,
        tensor_memory=getattr(binary.metadata, "tmem_size", None) or 0,
        counts={name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
    )


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


# --- the table ----------------------------------------------------------------------------------------------

HEADER = """\
# Resources of the kernels

Written by `python tools/kernel_resources.py`, which compiles without a GPU. Triton {triton}.

Tiles are tokens x vocabulary x hidden size (head_project: responses x hidden size x columns). Spilled bytes
are stores and loads, shared memory is of one program. Where the configuration says `2 programs`, two of them
fit on a multiprocessor. head_project is compiled with the hidden size as a constant, 2048; launches pass it
at run time.
"""
COLUMNS = ("kernel", "variant", "operands", "for", "configuration", "registers", "spilled", "shared KiB",
           "instructions")  # fmt: skip


def table(found: list[Found]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    short = [re.sub(r"^\| \w+\.(\w+)_kernel ", r"| \1 ", one.row) for one in found if not one.error]
    return "\n".join(lines + sorted(short))


def cuda_table() -> str:
    """Table of the kernels in csrc/cuda; empty without nvcc."""
    import shutil

    nvcc = shutil.which("nvcc")
    if nvcc is None or not (ROOT / "tools" / "cuda_resources.py").exists():
        return ""
    spec = util.spec_from_file_location("cuda_resources", ROOT / "tools" / "cuda_resources.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = module.resources(nvcc)
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += sorted(f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows)
    return "\n## CUDA C++ (csrc/cuda)\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if anything is wrong")
    scopes = parser.add_mutually_exclusive_group()
    scopes.add_argument("--shipped", action="store_true", help="leave out what only `g2rl tune` tries")
    scopes.add_argument("--quick", action="store_true", help="the shipped choice of each kind, bfloat16")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--out", type=Path, help=f"where the table goes (default: {TABLE.relative_to(ROOT)})")
    args = parser.parse_args()
    scope = "quick" if args.quick else "shipped" if args.shipped else "all"
    prepare()
    try:
        import triton
    except ImportError:
        print("kernel_resources: error: triton is not installed", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        found = compile_all(list(all_cases(tuple(args.arch), scope)), args.jobs)
    text = HEADER.format(triton=triton.__version__) + "\n" + table(found) + "\n"
    whole = scope == "all" and tuple(args.arch) == ARCHITECTURES
    if whole:
        text += cuda_table()
    print(text)
    out = args.out or (TABLE if whole else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    wrong = [
        f"{', '.join(filter(None, one.case.name))}: {'; '.join(one.faults)}" for one in found if one.faults
    ]
    print("\n".join(wrong) or "nothing that is shipped spills, everything fits", file=sys.stderr)
    return 1 if wrong and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
