"""What every kernel takes of a GPU: found by compiling for sm_80, sm_90 and sm_100, without a GPU.

    python tools/kernel_resources.py            all, into benchmarks/results/triton-resources.md; minutes
    python tools/kernel_resources.py --shipped  without what only `g2rl tune` tries; a test does this
    python tools/kernel_resources.py --quick    the shipped choice of each kind alone, in bfloat16
    python tools/kernel_resources.py --check    exits with 1 if one spills, does not fit or lacks instructions

Triton compiles ahead of time from a signature. Ours are put together as its launcher would from a call:
pointers aligned to 16 bytes, strides that are multiples of 16, and what is absent or 1 as a constant.
Registers and spills are what ptxas says, Triton's own, as Triton calls it.
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
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "triton-resources.md"
sys.path.insert(0, str(ROOT))  # the checkout's kernels, installed or not

ARCHITECTURES = (80, 90, 100)

# Bytes that a configuration may spill which only `g2rl tune` tries: it is not taken unless it is faster.
TRIED_MAY_SPILL = 32

# Of a multiprocessor, shared by the programs on it. Each program takes 1024 bytes of shared memory on top of
# its own, and registers in steps of 8 a thread.
SHARED_MEMORY = {80: 167936, 90: 233472, 100: 233472}
REGISTERS = 65536
TENSOR_MEMORY = 512  # columns, on Blackwell

# Types of arguments by name; what is neither here nor a constant is an int32.
TYPES = {
    "*fp32": "alpha coefficient entropy features kappa logprobs logsumexp lse2 mass numbers part partial "
    "rest seed shift skipped_mass slope slots sums target",
    "*i64": "cu_seqlens index skipped_tokens tokens",
    "*i32": "gate response",
    "*i8": "keep",
    "fp32": "factor most outside scale sign",
}
TYPE = {name: kind for kind, names in TYPES.items() for name in names.split()}
OPERANDS = ("hidden", "weight", "bias", "gradient")  # pointers to the model's dtype, or tensor descriptors
ROW_STRIDES, COLUMN_STRIDES = ("stride_hn", "stride_wv"), ("stride_hd", "stride_wd")
OWN = ("stride_gn", "n_columns")  # of buffers of ours, always multiples of 16

INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "TMA": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.c[ag]",
}


@dataclass(frozen=True)
class Case:
    """One kernel as one call has it compiled."""

    kernel: str  # file and function
    variant: str
    operands: str
    arch: int
    tiles: str
    signature: dict[str, str] = field(hash=False)
    constants: dict[str, Any] = field(hash=False)
    multiples_of_16: tuple[str, ...]
    num_warps: int
    num_stages: int = 3
    programs_per_sm: int = 1
    needs: tuple[str, ...] = ()  # instructions
    may_spill: int = 0  # bytes

    @property
    def name(self) -> tuple[str, ...]:
        config = f"{self.tiles}, {self.num_warps} warps, {self.num_stages} stages"
        if self.programs_per_sm > 1:
            config += f", {self.programs_per_sm} programs"
        return (self.kernel, self.variant, self.operands, f"sm_{self.arch}", config.removeprefix(", "))


@dataclass(frozen=True)
class Found:
    """What one compilation gave."""

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


# --- what is compiled ---------------------------------------------------------------------------------------


def function(kernel: str) -> Any:
    module, name = kernel.split(".")
    folder = "group.triton" if module == "group" else f"head.triton.{module.removeprefix('head_')}"
    return getattr(import_module(f"g2rl_kernels.{folder}"), name)


def made(
    kernel: str,
    arch: int,
    constants: dict[str, Any],
    *,
    variant: str = "",
    operands: str = "",
    dtype: str = "bf16",
    descriptors: Mapping[str, str] | None = None,
    strided: tuple[str, ...] = (),
    **launch: Any,
) -> Case:
    """A case of one of the head's kernels. `strided` operands have strides of no known divisor."""
    constants, signature, multiples = dict(constants), {}, []
    descriptors = descriptors or {}
    for name in function(kernel).arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in descriptors:
            signature[name] = descriptors[name]
        elif name in OPERANDS:
            signature[name] = f"*{dtype}"
        elif name in COLUMN_STRIDES and name not in strided:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = TYPE.get(name, "i32")
        if signature[name][0] == "*" or (name in (*ROW_STRIDES, *OWN) and name not in strided):
            multiples.append(name)
    launch = {"tiles": ""} | launch
    return Case(
        kernel=kernel, variant=variant, operands=operands, arch=arch, signature=signature,
        constants=constants, multiples_of_16=tuple(multiples), **launch,
    )  # fmt: skip


# Variant -> the kind whose tiles it takes, the kernel, its constants.
NO_GATE = {"gate": None, "GATED": False}
EXACT = {"index": None, "sums": None, "seed": None, "kappa": None}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "statistics": ("head_stats.head_stats_kernel", NO_GATE),
    "statistics, gated": ("head_stats.head_stats_kernel", {"GATED": True}),
    "exact": (
        "head_residual.head_residual_kernel",
        {**EXACT, "LISTED": False, "SUMS": False, "CORRECT": False},
    ),
    "seeded": (
        "head_residual.head_residual_kernel",
        {"index": None, "seed": None, "kappa": None, "LISTED": False, "SUMS": True, "CORRECT": False},
    ),
    "listed": (
        "head_residual.head_residual_kernel",
        {"sums": None, "seed": None, "kappa": None, "LISTED": True, "SUMS": False, "CORRECT": False},
    ),
    "correction": (
        "head_residual.head_residual_kernel",
        {"sums": None, "LISTED": True, "SUMS": False, "CORRECT": True},
    ),
    "gradient": ("head_gradient.head_gradient_kernel", {}),
}
BOTH = ("hidden", "weight")
STRIDED = (*ROW_STRIDES, *COLUMN_STRIDES)


def large(
    variant: str,
    arch: int,
    config: Any,
    form: str,
    dtype: str,
    *,
    bias: bool = False,
    softcap: bool = False,
    precision: str = "ieee",
    by_pointer: tuple[str, ...] = (),
    strided: tuple[str, ...] = (),
    may_spill: int = 0,
) -> Case:
    """head_stats, head_residual or head_gradient. By pointer come all operands on sm_80, and elsewhere those
    named."""
    kernel, constants = VARIANTS[variant]
    if arch < 90:
        by_pointer = (*BOTH, "gradient")
    elif constants.get("LISTED"):
        by_pointer = (*by_pointer, "hidden")
    constants = constants | {
        "EVEN_D": strided != ROW_STRIDES,
        "BM": config.BM, "BN": config.BN, "BK": config.BK, "UPCAST": False,
        "H_TMA": "hidden" not in by_pointer, "W_TMA": "weight" not in by_pointer,
        "HAS_BIAS": bias, "SOFTCAP": softcap, "PRECISION": precision,
    }  # fmt: skip
    if not bias:
        constants["bias"] = None
    if "G_TMA" in function(kernel).arg_names:
        constants["G_TMA"] = "gradient" not in by_pointer
    if "WEIGHTED" in function(kernel).arg_names:  # tokens have weights where the head has a bias
        constants |= {"WEIGHTED": bias} | ({} if bias else {"alpha": None})
    needs = []
    if dtype != "fp32" or precision == "tf32x3":
        needs.append({80: "mma", 90: "wgmma", 100: "tcgen05"}[arch])
    if "unaligned" not in form:
        needs.append("cp.async" if "weight" in by_pointer else "TMA")
    extra = ["bias"] * bias + ["weights"] * ("WEIGHTED" in constants and bias) + ["softcap"] * softcap
    how = ", 3xTF32" if precision == "tf32x3" else ""
    if "unaligned" in form:
        how += ", d = 2050" if strided == ROW_STRIDES else ", any strides"
    blocks = {
        "hidden": (config.BM, config.BK),
        "weight": (config.BN, config.BK),
        "gradient": (config.BM, config.BN),
    }
    return made(
        kernel,
        arch,
        constants,
        variant=", ".join([variant, *extra]),
        operands=dtype + how,
        dtype=dtype,
        descriptors={
            name: f"tensordesc<{dtype}[{rows}, {columns}]>"
            for name, (rows, columns) in blocks.items()
            if name not in by_pointer and name in function(kernel).arg_names
        },
        strided=strided,
        tiles=f"{config.BM} x {config.BN} x {config.BK}",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        programs_per_sm=config.programs_per_sm,
        needs=tuple(needs),
        may_spill=may_spill,
    )


def large_cases(arch: int, scope: str) -> Iterator[Case]:
    from g2rl_kernels.head.triton.tuning import candidates

    def of(form: str) -> tuple[Any, list[Any]]:
        shipped, *others = candidates(arch // 10, form)
        return shipped, others if scope == "all" else []

    usual = [name for name in VARIANTS if name != "statistics, gated"]
    shipped, others = of("plain")
    for variant in usual:
        yield large(variant, arch, shipped, "plain", "bf16")
    if scope == "quick":
        return
    yield large("statistics, gated", arch, shipped, "plain", "bf16")
    for variant in usual:
        yield large(variant, arch, shipped, "plain", "bf16", bias=True)
        for config in others:
            yield large(variant, arch, config, "plain", "bf16", may_spill=TRIED_MAY_SPILL)
    for form, dtype in (("softcap", "bf16"), ("ieee", "fp32"), ("tf32x3", "fp32")):
        shipped, others = of(form)
        precision, softcap = "ieee" if form == "softcap" else form, form == "softcap"
        for variant in usual:
            yield large(variant, arch, shipped, form, dtype, precision=precision, bias=True, softcap=True)
            if scope == "all":
                for config in (shipped, *others):
                    yield large(variant, arch, config, form, dtype, precision=precision, softcap=softcap)
    for variant in ("statistics", "exact"):  # float16 differs from bfloat16 by the instructions' names
        for form in ("plain", "softcap"):
            yield large(variant, arch, of(form)[0], form, "fp16", softcap=form == "softcap")
    for form, dtype, precision in (
        ("unaligned", "bf16", "ieee"),
        ("unaligned fp32", "fp32", "ieee"),
        ("unaligned fp32", "fp32", "tf32x3"),
    ):
        shipped, others = of(form)
        for variant in usual if scope == "all" or dtype == "bf16" else ("statistics", "exact"):
            for config in (shipped, *others):
                for strided in (
                    (ROW_STRIDES, STRIDED) if (dtype, variant) == ("bf16", "exact") else (STRIDED,)
                ):
                    yield large(
                        variant, arch, config, form, dtype, precision=precision, by_pointer=BOTH,
                        strided=strided, bias=True, softcap=True,
                    )  # fmt: skip


def small_cases(arch: int, scope: str) -> Iterator[Case]:
    from g2rl_kernels.head.triton import collect as head_collect
    from g2rl_kernels.head.triton import gather as head_gather
    from g2rl_kernels.head.triton import join as head_join
    from g2rl_kernels.head.triton import project as head_project
    from g2rl_kernels.head.triton import reduce as head_reduce
    from g2rl_kernels.head.triton import skip as head_skip
    from g2rl_kernels.head.triton import target as head_target
    from g2rl_kernels.head.triton.tile import LN2

    join = {"LN2": LN2, "BT": head_join.BT}
    target = {"BT": head_target.BT, "BD": head_target.BD}
    gather = {"BT": head_gather.BT, "BD": head_gather.BD}
    reduce = {"BD": head_reduce.BD}
    single: tuple[tuple[str, str, dict[str, Any], int], ...] = (
        ("head_collect", "", {"BM": 128, "BC": head_collect.BC}, 4),
        ("head_finish", "", join | NO_GATE, 4),
        ("head_finish", "gated", join | {"GATED": True}, 4),
        ("head_gather", "", gather, 4),
        ("head_join", "", join, 4),
        ("head_reduce", "", reduce | {"kappa": None, "HAS_KAPPA": False}, 4),
        ("head_reduce", "kappa", reduce | {"HAS_KAPPA": True}, 4),
        ("head_skip", "", {"BT": head_skip.BT}, 8),
        ("head_target", "", target | {"bias": None, "slope": None, "HAS_BIAS": False, "SOFTCAP": False}, 4),
        ("head_target", "bias, softcap", target | {"HAS_BIAS": True, "SOFTCAP": True}, 4),
    )
    for name, variant, constants, num_warps in single:
        kernel = f"{name}.{name}_kernel"
        yield made(kernel, arch, constants, variant=variant, num_warps=num_warps)
    yield from project_cases(arch, scope, head_project)


class Recorder:
    """Stands in for a kernel: keeps the keyword arguments of its last launch."""

    launched: dict[str, Any]

    def __getitem__(self, grid: object) -> Recorder:
        return self

    def __call__(self, *args: object, **launched: Any) -> None:
        self.launched = launched


def project_cases(arch: int, scope: str, module: Any) -> Iterator[Case]:
    """head_project chooses its tiles by itself: what it launches for some numbers of responses."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    kernel, recorder, seen = module.head_project_kernel, Recorder(), set()
    for dtype, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32x3")):
        for S in (16, 32, 64):
            if scope == "quick" and (dtype, S) != ("bf16", 16):
                continue
            weight = torch.empty(256, 2048, device="meta", dtype=dtypes[dtype])
            partial = torch.empty(S, 256, device="meta")
            cu_seqlens = torch.empty(S + 1, device="meta", dtype=torch.int64)
            module.head_project_kernel = recorder
            try:
                module.head_project(partial, weight, cu_seqlens, range(S), range(256), 1, 128, precision, 8)
            finally:
                module.head_project_kernel = kernel
            launched = recorder.launched
            num_warps, num_stages = launched.pop("num_warps", 4), launched.pop("num_stages", 3)
            variants: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [("", {}, ())]
            if dtype == "bf16" and S == 16 and scope != "quick":
                variants.append(("any strides", {}, STRIDED))
            for variant, constants, strided in variants:
                case = made(
                    "head_project.head_project_kernel", arch, launched | constants, variant=variant,
                    operands=dtype + ", 3xTF32" * (launched["PRECISION"] == "tf32x3"), dtype=dtype,
                    strided=strided, num_warps=num_warps, num_stages=num_stages,
                    tiles=f"{launched['BS']} x {launched['BD']} x {launched['BK']}",
                )  # fmt: skip
                if case.name not in seen:
                    seen.add(case.name)
                    yield case


def group_cases(arch: int, scope: str) -> Iterator[Case]:
    from g2rl_kernels.group import triton as group

    for number, (kernel, signature, constants, num_warps, num_stages, label) in enumerate(group.aot_cases()):
        if scope == "quick" and number:
            return
        multiples = [name for name, kind in signature.items() if kind[0] == "*" or name in ("S", "d")]
        yield Case(
            f"group.{kernel.__name__}", label.removeprefix("group "), "", arch, "", signature, constants,
            tuple(multiples), num_warps, num_stages,
        )  # fmt: skip


def all_cases(architectures: tuple[int, ...], scope: str) -> Iterator[Case]:
    for arch in architectures:
        yield from large_cases(arch, scope)
        yield from small_cases(arch, scope)
        yield from group_cases(arch, scope)


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
    except Exception as error:  # of whatever kind: the other kernels are looked at nevertheless
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
    """Before Triton is imported: nothing comes from a cache, ptxas talks, nothing is interpreted."""
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
fit on a multiprocessor.
"""
COLUMNS = ("kernel", "variant", "operands", "for", "configuration", "registers", "spilled", "shared KiB",
           "instructions")  # fmt: skip


def table(found: list[Found]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    short = [re.sub(r"^\| \w+\.(\w+)_kernel ", r"| \1 ", one.row) for one in found if not one.error]
    return "\n".join(lines + sorted(short))


def cuda_table() -> str:
    """Of the kernels in csrc/cuda, where there is nvcc."""
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
