"""What tools/kernel_resources.py compiles: every kernel in every variant that is launched.

Triton compiles ahead of time from a signature. These are put together as its launcher would from a call:
pointers aligned to 16 bytes, strides that are multiples of 16, and arguments that are None or 1 as constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

# Bytes that a configuration may spill which only `g2rl tune` tries: it is not taken unless it is faster.
TRIED_MAY_SPILL = 32
# And combinations of options that are too rare for tiles of their own (`rare`).
RARE_MAY_SPILL = 64

# Types of arguments by name. Others are constants, OPERANDS or int32.
TYPES = {
    "*fp32": "alpha coefficient entropy factors features kappa largest logprobs logsumexp lse2 mass numbers "
    "out partial rest seed shift skipped_mass slope slots sum_p_squared sums target top_logprob",
    "*fp64": "totals",
    "*i64": "cu_seqlens first index offsets rows skipped_tokens tokens top_token",
    "*i32": "gate response top",
    "*i8": "keep",
    "fp32": "factor most outside scale sign",
}
TYPE = {name: kind for kind, names in TYPES.items() for name in names.split()}
OPERANDS = (
    "hidden",
    "weight",
    "low_hidden",
    "low_weight",
    "bias",
    "gradient",
)  # pointers to the model's dtype, or tensor descriptors
ROW_STRIDES, COLUMN_STRIDES = ("stride_hn", "stride_wv"), ("stride_hd", "stride_wd")
OWN = ("stride_gn", "stride_kn", "n_columns")  # sizes of our own buffers, always multiples of 16


@dataclass(frozen=True)
class Case:
    """One kernel, as Triton compiles it for one call."""

    kernel: str  # file and function
    variant: str
    operands: str
    arch: int | str  # 90; "gfx942"
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
        arch = self.arch if is_amd(self.arch) else f"sm_{self.arch}"
        return (self.kernel, self.variant, self.operands, str(arch), config.removeprefix(", "))


def is_amd(arch: int | str) -> bool:
    return isinstance(arch, str)


def function(kernel: str) -> Any:
    """The compiled function of `file.function`, without the heuristics around it."""
    module, name = kernel.split(".")
    folder = "group.triton" if module == "group" else f"head.triton.{module}"
    found = getattr(import_module(f"g2rl_kernels.{folder}"), name)
    return found.fn if hasattr(found, "values") else found


def made(
    kernel: str,
    arch: int | str,
    constants: dict[str, Any],
    *,
    variant: str = "",
    operands: str = "",
    dtype: str = "bf16",
    descriptors: Mapping[str, str] | None = None,
    types: Mapping[str, str] | None = None,
    strided: tuple[str, ...] = (),
    even: tuple[str, ...] = (),
    **launch: Any,
) -> Case:
    """A case of one of the head's kernels. `strided` operands have strides of no known divisor; `even`
    numbers are multiples of 16, as some always are."""
    constants, signature, multiples = dict(constants), {}, []
    descriptors = {**(descriptors or {}), **(types or {})}
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
        if signature[name][0] == "*" or (name in (*ROW_STRIDES, *OWN, *even) and name not in strided):
            multiples.append(name)
    launch = {"tiles": ""} | launch
    return Case(
        kernel=kernel, variant=variant, operands=operands, arch=arch, signature=signature,
        constants=constants, multiples_of_16=tuple(multiples), **launch,
    )  # fmt: skip


# Variant -> the kernel and its constants.
NO_GATE = {"gate": None, "GATED": False}
NO_LOW = {"low_hidden": None, "low_weight": None, "R": None, "LOW": False}
# What linear_logprobs and head_features call statistics: sum p^2 and the likeliest token.
NO_MORE = {"top": None, "MORE": False}
NONE_KEPT = {"kept": None, "largest": None, "KEPT": 0}
EXACT = {"index": None, "sums": None, "seed": None, "kappa": None}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "statistics": ("stats.head_stats_kernel", {**NO_GATE, **NO_MORE, **NONE_KEPT}),
    "statistics, more": ("stats.head_stats_kernel", {**NO_GATE, "MORE": True, **NONE_KEPT}),
    "statistics, gated": ("stats.head_stats_kernel", {"GATED": True, **NO_MORE, **NONE_KEPT}),
    "statistics, kept": ("stats.head_stats_kernel", {**NO_GATE, **NO_MORE}),
    "statistics, kept, more": ("stats.head_stats_kernel", {**NO_GATE, "MORE": True}),
    "exact": (
        "residual.head_residual_kernel",
        {**EXACT, "LISTED": False, "SUMS": False, "CORRECT": False},
    ),
    "seeded": (
        "residual.head_residual_kernel",
        {"index": None, "seed": None, "kappa": None, "LISTED": False, "SUMS": True, "CORRECT": False},
    ),
    "listed": (
        "residual.head_residual_kernel",
        {"sums": None, "seed": None, "kappa": None, "LISTED": True, "SUMS": False, "CORRECT": False},
    ),
    "correction": (
        "residual.head_residual_kernel",
        {"sums": None, "LISTED": True, "SUMS": False, "CORRECT": True},
    ),
    "gradient": ("gradient.head_gradient_kernel", NONE_KEPT),
    "gradient, kept": ("gradient.head_gradient_kernel", {}),
}
BOTH = ("hidden", "weight")
FLAGS = ("HAS_BIAS", "SOFTCAP", "LOW")  # of head_target
STRIDED = (*ROW_STRIDES, *COLUMN_STRIDES)


def large(
    variant: str,
    arch: int | str,
    config: Any,
    form: str,
    dtype: str,
    *,
    bias: bool = False,
    softcap: bool = False,
    low: bool = False,
    tempered: bool = False,
    precision: str = "ieee",
    by_pointer: tuple[str, ...] = (),
    strided: tuple[str, ...] = (),
    may_spill: int = 0,
) -> Case:
    """head_stats, head_residual or head_gradient. `by_pointer` names operands that come without a tensor
    descriptor; before sm_90 and on AMD all do."""
    rare = low or tempered or "more" in variant
    rare |= bias and softcap and (bool(strided) or "kept" in variant)
    may_spill = max(may_spill, RARE_MAY_SPILL if rare else 0)
    kernel, constants = VARIANTS[variant]
    if constants.get("CORRECT"):
        config = config.for_correction()
    if variant == "gradient, kept":
        config = config.for_kept()
    if isinstance(arch, str) or arch < 90:
        by_pointer = (*BOTH, "gradient")
    elif constants.get("LISTED"):
        by_pointer = (*by_pointer, "hidden")
    constants = constants | {
        "EVEN_D": strided != ROW_STRIDES,
        "BM": config.BM, "BN": config.BN, "BK": config.BK, "UPCAST": False,
        "H_TMA": "hidden" not in by_pointer, "W_TMA": "weight" not in by_pointer,
        "HAS_BIAS": bias, "SOFTCAP": softcap, "TEMPERED": tempered, "PRECISION": precision,
    }  # fmt: skip
    if not bias:
        constants["bias"] = None
    constants |= {"LOW": True} if low else NO_LOW
    if not tempered:
        constants["factors"] = None
    if "G_TMA" in function(kernel).arg_names:
        constants["G_TMA"] = "gradient" not in by_pointer
    if "WEIGHTED" in function(kernel).arg_names:  # tokens have weights where the head has a bias
        constants |= {"WEIGHTED": bias} | ({} if bias else {"alpha": None})
    types: dict[str, str] = {}
    if "KEPT" in function(kernel).arg_names:
        constants |= of_kept(kernel, constants, coded=dtype == "bf16" and not softcap)
        element = "i16" if constants["KEPT"] == 2 else "fp32"
        constants["K_TMA"] = constants["KEPT"] > 0 and "gradient" not in by_pointer
        if constants["K_TMA"]:
            types["kept"] = f"tensordesc<{element}[{config.BM}, {config.BN}]>"
        elif constants["KEPT"]:
            types["kept"] = f"*{element}"
    needs = []
    if variant == "gradient, kept":  # multiplies nothing
        pass
    elif dtype != "fp32" or precision == "tf32x3":
        needs.append({90: "wgmma", 100: "tcgen05"}.get(arch, "mma") if isinstance(arch, int) else "mfma")
    if "unaligned" not in form and not is_amd(arch) and variant != "gradient, kept":
        needs.append("cp.async" if "weight" in by_pointer else "TMA")
    extra = ["bias"] * bias + ["weights"] * ("WEIGHTED" in constants and bias) + ["softcap"] * softcap
    extra += ["low-rank part"] * low
    extra += ["temperatures"] * tempered
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
        types=types,
        strided=strided,
        tiles=f"{config.BM} x {config.BN} x {config.BK}",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        programs_per_sm=config.programs_per_sm,
        needs=tuple(needs),
        may_spill=may_spill,
    )


def of_kept(kernel: str, constants: dict[str, Any], coded: bool) -> dict[str, Any]:
    """Constants of a kernel that keeps logits or takes them: as codes, or in float32."""
    from g2rl_kernels.head.triton import kept, stats

    found: dict[str, Any] = (
        {} if "KEPT" in constants else {"KEPT": 2} if coded else {"KEPT": 4, "largest": None}
    )
    if "BLOCKS" in function(kernel).arg_names:
        found["BLOCKS"] = stats.BLOCKS
    return {"LARGEST": kept.LARGEST, **found}


def large_cases(arch: int | str, scope: str) -> Iterator[Case]:
    from g2rl_kernels.head.triton.tuning import CANDIDATES, family_of

    family = family_of(arch // 10) if isinstance(arch, int) else "hip"

    def of(form: str) -> tuple[Any, list[Any]]:
        shipped, *others = CANDIDATES[family, form]
        return shipped, others if scope == "all" else []

    def plain(variant: str, **options: bool) -> Case:
        """With the tiles that HeadOperands.config takes."""
        bias, tempered, low = (options.get(name, False) for name in ("bias", "tempered", "low"))
        crowded = bias and (tempered or variant.startswith("statistics"))
        crowded |= variant.endswith("more") or (low and family == "hip")
        form = "softcap" if crowded else "plain"
        return large(variant, arch, of(form)[0], form, "bf16", bias=bias, tempered=tempered, low=low)

    usual = [name for name in VARIANTS if name != "statistics, gated"]
    for variant in usual:
        yield plain(variant)
        yield plain(variant, tempered=True)
    for variant in usual if scope != "quick" else ("statistics", "gradient"):
        yield plain(variant, low=True)
    if scope == "quick":
        return
    yield plain("statistics, gated")
    for variant in usual:
        yield plain(variant, bias=True)
        yield plain(variant, bias=True, tempered=True)
        for config in of("plain")[1]:
            yield large(variant, arch, config, "plain", "bf16", may_spill=TRIED_MAY_SPILL)
    for form, dtype in (("softcap", "bf16"), ("ieee", "fp32"), ("tf32x3", "fp32")):
        if (family, form) not in CANDIDATES:
            continue
        shipped, others = of(form)
        precision, softcap = "ieee" if form == "softcap" else form, form == "softcap"
        for variant in usual:
            yield large(variant, arch, shipped, form, dtype, precision=precision, bias=True, softcap=True)
            yield large(
                variant, arch, shipped, form, dtype, precision=precision, bias=True, softcap=True,
                tempered=True, low=True,
            )  # fmt: skip
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
        if (family, precision) == ("hip", "tf32x3"):
            continue
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


def small_cases(arch: int | str, scope: str) -> Iterator[Case]:
    from g2rl_kernels.head.triton import collect, gather, join, project, reduce, skip, target, total
    from g2rl_kernels.head.triton.tile import LN2

    joined = {"LN2": LN2, "BT": join.BT}
    realised = {"BT": target.BT, "BD": target.BD}
    plain = {"bias": None, "slope": None, "HAS_BIAS": False, "SOFTCAP": False, **NO_LOW}
    plain |= {"factors": None, "TEMPERED": False}
    no_statistics = dict.fromkeys(("tokens", "sum_p_squared", "top_token", "top_logprob")) | NO_MORE
    single: tuple[tuple[str, str, dict[str, Any], int], ...] = (
        ("collect", "", {"BM": 128, "BC": collect.BC}, 4),
        ("finish", "", joined | NO_GATE | no_statistics, 4),
        ("finish", "more", joined | NO_GATE | {"MORE": True}, 4),
        ("finish", "gated", joined | {"GATED": True} | no_statistics, 4),
        ("gather", "", {"BT": gather.BT, "BD": gather.BD}, 4),
        ("join", "", joined | NO_MORE | {"first": None}, 4),
        ("join", "more", joined | {"MORE": True}, 4),
        ("reduce", "", {"BD": reduce.BD, "kappa": None, "HAS_KAPPA": False}, 4),
        ("reduce", "kappa", {"BD": reduce.BD, "HAS_KAPPA": True}, 4),
        ("skip", "", {"BT": skip.BT}, 8),
        ("total", "", {"BT": total.BT}, 4),
        ("target", "", realised | plain, 4),
        (
            "target",
            "bias, softcap, temperatures",
            realised | {"HAS_BIAS": True, "SOFTCAP": True, "TEMPERED": True, **NO_LOW},
            4,
        ),
        (
            "target",
            "bias, softcap, low-rank part",
            realised | {**dict.fromkeys(FLAGS, True), "factors": None, "TEMPERED": False},
            4,
        ),
    )
    for name, variant, constants, num_warps in single:
        yield made(f"{name}.head_{name}_kernel", arch, constants, variant=variant, num_warps=num_warps)
    yield from project_cases(arch, scope, project)
    yield from product_cases(arch, scope)
    yield from support_cases(arch, scope)


class Recorder:
    """Stands in for a kernel and keeps the keyword arguments of its last launch."""

    launched: dict[str, Any]

    def __getitem__(self, grid: object) -> Recorder:
        return self

    def __call__(self, *args: object, **launched: Any) -> None:
        self.launched = launched


def project_cases(arch: int | str, scope: str, module: ModuleType) -> Iterator[Case]:
    """head_project chooses its tiles by itself: what it launches for some numbers of responses."""
    seen = set()
    for dtype, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32x3")):
        if is_amd(arch) and precision == "tf32x3":
            continue
        for S in (16, 32, 64):
            if scope == "quick" and (dtype, S) != ("bf16", 16):
                continue
            constants, num_warps, num_stages = launched_project(module, arch, dtype, precision, S)
            variants: list[tuple[str, tuple[str, ...]]] = [("", ())]
            if dtype == "bf16" and S == 16 and scope != "quick":
                variants.append(("any strides", STRIDED))
            for variant, strided in variants:
                case = made(
                    "project.head_project_kernel",
                    arch,
                    constants,
                    variant=variant,
                    operands=dtype + ", 3xTF32" * (constants["PRECISION"] == "tf32x3"),
                    dtype=dtype,
                    strided=strided,
                    num_warps=num_warps,
                    num_stages=num_stages,
                    tiles=f"{constants['BS']} x {constants['BD']} x {constants['BK']}",
                )
                if case.name not in seen:
                    seen.add(case.name)
                    yield case


def product_cases(arch: int | str, scope: str) -> Iterator[Case]:
    """head_product, with the tiles that it chooses."""
    import torch

    from g2rl_kernels.head.spec import HeadSpec
    from g2rl_kernels.head.triton import product
    from g2rl_kernels.head.triton.tile import HeadOperands
    from g2rl_kernels.head.triton.tuning import family_of

    family, tma = (family_of(arch // 10), arch >= 90) if isinstance(arch, int) else ("hip", False)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    kinds = [("bf16", "ieee", True), ("bf16", "ieee", False)]
    kinds += [("fp32", precision, True) for precision in ("ieee", "tf32x3")]
    for dtype, precision, aligned in kinds[:1] if scope == "quick" else kinds:
        if is_amd(arch) and precision == "tf32x3":
            continue
        weight = torch.empty(256, 2048 if aligned else 2050, device="meta", dtype=dtypes[dtype])
        head = HeadOperands.of(HeadSpec(weight))._replace(precision=precision)
        config = product.tile(dtypes[dtype].itemsize, head, family)
        blocks = {"gradient": (config.BM, config.BK)} if tma else {}
        blocks |= {"weight": (config.BK, config.BN)} if tma and aligned else {}
        constants: dict[str, Any] = {"BM": config.BM, "BD": config.BN, "BK": config.BK, "UPCAST": False}
        constants |= {"G_TMA": tma, "W_TMA": tma and aligned, "PRECISION": precision}
        constants["BV"] = 256 if dtype == "fp32" else 0
        yield made(
            "product.head_product_kernel",
            arch,
            constants,
            variant="" if aligned else "d = 2050",
            operands=dtype + ", 3xTF32" * (precision == "tf32x3"),
            dtype=dtype,
            descriptors={name: f"tensordesc<{dtype}[{m}, {n}]>" for name, (m, n) in blocks.items()},
            strided=() if aligned else ROW_STRIDES,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            tiles=f"{config.BM} x {config.BN} x {config.BK}",
        )


def support_cases(arch: int | str, scope: str) -> Iterator[Case]:
    """The products of a restricted head. A wide matrix's tile is for hidden and weight, a narrow one's for a
    low-rank part; sums are stored in float32 or in the dtype of the matrix."""
    from g2rl_kernels.head.triton import support_dot, support_sum

    dot = {"BT": support_dot.BT, "BD": support_dot.BD}
    for dtype in ("bf16", "fp32") if scope != "quick" else ("bf16",):
        found = [("dot", "", "fp32", dot, 8)]
        for tile, (BK, BD) in (("wide", support_sum.WIDE), ("narrow", support_sum.NARROW)):
            constants = {"BK": BK, "BD": BD, "STRIP": support_sum.STRIP}
            found += [("sum", f"{tile}, ", out, constants, 4) for out in dict.fromkeys(("fp32", dtype))]
        for name, tile, out, constants, num_warps in found:
            for strided in ((), STRIDED) if scope != "quick" else ((),):
                yield made(
                    f"support_{name}.head_support_{name}_kernel",
                    arch,
                    constants,
                    variant=f"{tile}into {out}" + ", any strides" * bool(strided),
                    operands=dtype,
                    dtype=dtype,
                    types={"out": f"*{out}"},
                    strided=strided,
                    even=() if strided else ("D", "stride_on"),
                    num_warps=num_warps,
                    tiles=" x ".join(str(constants[key]) for key in ("BT", "BK", "BD") if key in constants),
                )


def launched_project(
    module: Any, arch: int | str, dtype: str, precision: str, S: int
) -> tuple[dict[str, Any], int, int]:
    """Constants, warps and stages of head_project's launch for S responses."""
    import torch

    from g2rl_kernels.head.spec import HeadSpec
    from g2rl_kernels.head.triton.tile import HeadOperands

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    weight = torch.empty(256, 2048, device="meta", dtype=dtypes[dtype])
    head = HeadOperands.of(HeadSpec(weight))._replace(precision=precision)
    partial = torch.empty(S, 256, device="meta")
    cu_seqlens = torch.empty(S + 1, device="meta", dtype=torch.int64)
    kernel, recorder = module.head_project_kernel, Recorder()
    module.head_project_kernel, hip = recorder, torch.version.hip
    torch.version.hip = "any" if is_amd(arch) else None
    try:
        module.head_project(partial, head, cu_seqlens, range(S), range(256), 1, 128, 8)
    finally:
        module.head_project_kernel, torch.version.hip = kernel, hip
    launched = recorder.launched
    launched |= {flag: value(launched) for flag, value in kernel.values.items()}
    constants = {p.name: launched[p.name] for p in kernel.fn.params if p.is_constexpr}
    return constants, launched["num_warps"], launched["num_stages"]


def group_cases(arch: int | str, scope: str) -> Iterator[Case]:
    from g2rl_kernels.group import triton as group

    cases = group.aot_cases(group.HIP_CONFIGS if is_amd(arch) else group.configs_of(int(arch) // 10))
    for number, (kernel, signature, constants, num_warps, num_stages, label) in enumerate(cases):
        if scope == "quick" and number:
            return
        multiples = [name for name, kind in signature.items() if kind[0] == "*"]
        yield Case(
            f"group.{kernel.__name__}", label.removeprefix("group "), "", arch, "", signature, constants,
            tuple(multiples), num_warps, num_stages,
        )  # fmt: skip


def all_cases(architectures: Iterable[int | str], scope: str) -> Iterator[Case]:
    for arch in architectures:
        yield from large_cases(arch, scope)
        yield from small_cases(arch, scope)
        yield from group_cases(arch, scope)
