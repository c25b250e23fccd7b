"""One kernel in one variant, as kernel_resources.py compiles it: `Case`, and how its signature is `made`.

Triton compiles ahead of time from a signature. These are put together as its launcher would from a call:
pointers aligned to 16 bytes, strides that are multiples of 16, and arguments that are None or 1 as constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
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
STRIDED = (*ROW_STRIDES, *COLUMN_STRIDES)
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
