"""Tile shapes of the head's large kernels: shipped ones, and those that `g2rl tune` measured here.

A training step never tunes: it takes what a file holds for this GPU, dtype, V and d, else what is shipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._files import write_whole
from ...errors import CommandError


class CacheError(CommandError, ValueError):
    """The file of tuned tiles is damaged."""


@dataclass(frozen=True)
class Config:
    """Tiles of BM tokens x BN vocabulary entries, BK of the hidden size at a time."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1  # 2: one program's epilogue runs beside the other's products

    def launch(self) -> dict[str, int]:
        """Arguments of a kernel's launch."""
        return {
            "BM": self.BM,
            "BN": self.BN,
            "BK": self.BK,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def for_correction(self) -> Config:
        """A tile of at most 128 columns. A correction has few tokens, and two exponentials for each logit: at
        256 columns they do not fit the registers (Triton 3.9 spills 16 bytes)."""
        return replace(self, BN=min(self.BN, 128))

    def for_kept(self) -> Config:
        """A tile of logits that are read, not multiplied: small, as nothing is gained by more."""
        return replace(self, BM=min(self.BM, 64), BN=min(self.BN, 64))


# Of GPUs: the major compute capability of NVIDIA's data-centre GPUs, from which the others' follows
# (`family_of`), or "hip" for all of AMD's.
Family = int | str

# Which kernel: head_stats; head_residual with exact logsumexp, seeded, and over a list of tokens;
# head_gradient.
KINDS = ("stats", "residual", "seeded", "listed", "gradient")

INTERPRETER = Config(32, 128, 64, 4, 2)  # large: each step costs the interpreter alike

# Forms of a call, which differ in how many registers a tile needs. `softcap`: twice the arithmetic behind the
# product. `unaligned`: rows of hidden or weight that do not start at multiples of 16 bytes, or whose numbers
# are not adjacent; each number is then loaded by itself, through registers. `ieee` and `tf32x3`: float32
# products on the CUDA cores, and as three products on the tensor cores.
FORMS = ("plain", "softcap", "ieee", "tf32x3", "unaligned", "unaligned fp32")

# (family, form) -> the shipped choice first, then what `g2rl tune` tries beside it. The shipped one never
# spills, in any kind and with any bias, but for rare combinations of options, and a few bytes; the others in
# rare variants. Two programs fit where two are asked for. tools/kernel_resources.py compiles them
# (benchmarks/results/triton-resources.md).
CANDIDATES: dict[tuple[Family, str], tuple[Config, ...]] = {
    (10, "plain"): (Config(128, 128, 64, 8, 4), Config(128, 128, 64, 8, 3)),
    (9, "plain"): (
        Config(128, 256, 64, 8, 3),
        Config(128, 256, 64, 8, 4),
        Config(256, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 5),
        Config(128, 128, 64, 4, 3, 2),
        Config(128, 64, 64, 4, 4, 2),
    ),
    (8, "plain"): (Config(128, 128, 64, 8, 3), Config(128, 128, 32, 8, 4), Config(128, 64, 64, 4, 3, 2)),
    (10, "softcap"): (Config(128, 128, 64, 8, 3),),
    (9, "softcap"): (Config(128, 128, 64, 8, 4), Config(64, 256, 64, 8, 4)),
    (8, "softcap"): (Config(128, 64, 32, 8, 3),),
    (10, "ieee"): (Config(64, 64, 16, 8, 3),),
    (9, "ieee"): (Config(64, 32, 32, 8, 3), Config(32, 32, 32, 4, 3)),
    (8, "ieee"): (Config(64, 32, 16, 4, 2),),
    (10, "tf32x3"): (Config(128, 32, 32, 8, 3),),
    (9, "tf32x3"): (Config(128, 128, 32, 8, 3), Config(64, 128, 32, 8, 3)),
    (8, "tf32x3"): (Config(32, 64, 32, 8, 3),),
    (10, "unaligned"): (Config(64, 64, 32, 8, 3),),
    (10, "unaligned fp32"): (Config(64, 64, 16, 8, 3),),
    (9, "unaligned"): (Config(128, 64, 32, 8, 3),),
    (9, "unaligned fp32"): (Config(64, 64, 16, 8, 3),),
    (8, "unaligned"): (Config(128, 64, 32, 8, 3),),
    (8, "unaligned fp32"): (Config(32, 32, 16, 8, 3),),
    ("hip", "plain"): (Config(128, 128, 64, 8, 2),),
    ("hip", "softcap"): (Config(128, 64, 64, 8, 2),),
    ("hip", "ieee"): (Config(64, 64, 16, 8, 2),),
    ("hip", "unaligned"): (Config(128, 64, 32, 8, 2),),
    ("hip", "unaligned fp32"): (Config(64, 64, 16, 8, 2),),
}


def is_hip() -> bool:
    """Whether torch's GPUs are AMD's. They are called "cuda" too, and gfx942 has compute capability 9.4."""
    return torch.version.hip is not None


def family(device: torch.device) -> Family:
    """Which tiles of CANDIDATES a GPU takes."""
    return "hip" if is_hip() else family_of(torch.cuda.get_device_capability(device)[0])


def family_of(capability: int) -> Family:
    """Family of NVIDIA's GPUs of compute capability `capability`.x. Consumer GPUs of Blackwell (12) multiply
    as those of Ampere do and have no more shared memory; so may what comes after them."""
    return {9: 9, 10: 10, 11: 10}.get(capability, 8)


def products_on_tensor_cores() -> str:
    """The fastest precision of float32 products with about the error of IEEE's. AMD has no 3xTF32; its CDNA
    GPUs multiply float32 on their matrix cores. head/README.md compares bf16x6 and bf16x3."""
    return "ieee" if is_hip() else "tf32x3"


def precision() -> str:
    """Precision of float32 products: 3xTF32 where torch's own may be TF32, but not on AMD.

    Either torch.set_float32_matmul_precision or the setting below asks for it; only the latter's getter knows
    both."""
    return products_on_tensor_cores() if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def aligned(matrix: Tensor) -> bool:
    """Whether TMA and wide loads can address the matrix: rows of adjacent numbers that start at multiples of
    16 bytes and do not overlap (those of an expanded tensor do)."""
    row = matrix.stride(0) * matrix.element_size()
    overlap = matrix.stride(0) < matrix.shape[1] and matrix.shape[0] > 1
    return matrix.stride(1) == 1 and not overlap and row % 16 == 0 and matrix.data_ptr() % 16 == 0


def form(hidden: Tensor, weight: Tensor, softcap: bool) -> str:
    """The one of FORMS that a call has."""
    if not (aligned(hidden) and aligned(weight)):
        return "unaligned fp32" if hidden.dtype == torch.float32 else "unaligned"
    if hidden.dtype == torch.float32:
        return precision()
    return "softcap" if softcap else "plain"


def candidates(capability: int, form: str) -> tuple[Config, ...]:
    """Configurations for NVIDIA's GPUs of compute capability `capability`.x; the first is the shipped one."""
    return CANDIDATES[family_of(capability), form]


def candidates_on(device: torch.device, form: str) -> tuple[Config, ...]:
    """Configurations for this GPU; the first is the shipped one."""
    return CANDIDATES[family(device), form]


def cache_file() -> Path:
    """The file in which `g2rl tune` stores configurations; G2RL_CACHE names another folder."""
    folder = os.environ.get("G2RL_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME", "~/.cache"), "g2rl-kernels"
    )
    return Path(folder).expanduser() / "tuned.json"


def key(device_name: str, kind: str, dtype: torch.dtype, V: int, D: int, form: str) -> str:
    return f"{device_name}, {kind}, {str(dtype).removeprefix('torch.')}, V={V}, d={D}, {form}"


@lru_cache
def tuned(path: Path) -> dict[str, Config]:
    """Stored configurations by `key`; empty without a file. Raises CacheError if the file is damaged."""
    if not path.exists():
        return {}
    try:
        found = {name: Config(**values) for name, values in json.loads(path.read_text()).items()}
        for name, config in found.items():
            if not all(type(value) is int and value > 0 for value in asdict(config).values()):
                raise ValueError(f"{name}: {config}")
    except (AttributeError, TypeError, ValueError) as error:
        raise CacheError(f"{path} is damaged ({error}); delete it, or run g2rl tune --clear") from error
    return found


def store(found: dict[str, Config]) -> Path:
    """Adds configurations to the file, which is replaced in one go. Returns its path."""
    path = cache_file()
    forget()
    content: dict[str, Any] = {name: asdict(config) for name, config in {**tuned(path), **found}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")
    forget()
    return path


def forget() -> None:
    """Makes the next choice read the file again."""
    tuned.cache_clear()
    chosen.cache_clear()


@lru_cache
def chosen(kind: str, device: torch.device, dtype: torch.dtype, V: int, D: int, form: str) -> Config:
    if device.type != "cuda":
        return INTERPRETER
    measured = tuned(cache_file()).get(key(torch.cuda.get_device_name(device), kind, dtype, V, D, form))
    return measured or candidates_on(device, form)[0]


on_trial: Config | None = None


def choose(
    kind: str, device: torch.device, dtype: torch.dtype, V: int, D: int, form: str | None = None
) -> Config:
    if form is None:
        form = precision() if dtype == torch.float32 else "plain"
    return on_trial or chosen(kind, device, dtype, V, D, form)


@contextmanager
def trial(config: Config) -> Iterator[None]:
    """Makes `choose` return `config`: how `g2rl tune` times it."""
    global on_trial
    on_trial = config
    try:
        yield
    finally:
        on_trial = None
