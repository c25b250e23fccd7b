"""What tools/kernel_resources.py compiles: every kernel in every variant that is launched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kernel_case import RARE_MAY_SPILL, ROW_STRIDES, STRIDED, TRIED_MAY_SPILL, Case, function, is_amd, made
from kernel_products import product_cases, project_cases, support_cases

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
