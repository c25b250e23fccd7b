"""Cases of kernel_resources.py whose tiles a launch chooses: products over responses, tokens and ids."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from kernel_case import ROW_STRIDES, STRIDED, Case, is_amd, made


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
