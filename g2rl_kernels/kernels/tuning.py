"""Tile shapes of the head's two large kernels: shipped ones, and those that `g2rl tune` measured on this machine.

A training step never tunes: it takes what a file holds for this GPU, dtype, V and d, else what is shipped.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """Tiles of BM tokens x BN vocabulary entries, BK of the hidden size at a time."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1  # 2: one program's epilogue runs beside the other's products


# Which kernel: head_stats; head_residual with exact logsumexp, seeded, and over a list of tokens.
KINDS = ("stats", "residual", "seeded", "listed")

INTERPRETER = Config(32, 64, 64, 4, 2)  # fewer, larger steps: each costs the interpreter alike

# (least compute capability, is 16-bit) -> the shipped choice first, then what `g2rl tune` tries beside it.
# All of them compile without spills (benchmarks/results/triton-resources.md).
CANDIDATES: dict[tuple[int, bool], tuple[Config, ...]] = {
    (10, True): (Config(128, 128, 64, 8, 4), Config(128, 128, 128, 8, 3), Config(128, 64, 64, 4, 4, 2)),
    (9, True): (
        Config(128, 256, 64, 8, 4),
        Config(128, 256, 64, 8, 3),
        Config(128, 128, 64, 8, 3, 2),
        Config(128, 128, 64, 8, 5),
    ),
    (8, True): (Config(128, 128, 64, 8, 3), Config(128, 128, 32, 8, 4), Config(128, 64, 64, 4, 3, 2)),
    (10, False): (Config(64, 64, 32, 4, 3),),
    (9, False): (Config(64, 64, 32, 4, 3),),
    (8, False): (Config(64, 64, 32, 4, 3),),
}


def candidates(capability: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """Configurations for GPUs of compute capability `capability`.x; the first is the shipped choice."""
    least = 10 if capability >= 10 else 9 if capability == 9 else 8
    return CANDIDATES[least, dtype != torch.float32]


def cache_file() -> Path:
    """Where `g2rl tune` keeps what it measured; G2RL_CACHE names another folder."""
    folder = os.environ.get("G2RL_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME", "~/.cache"), "g2rl-kernels"
    )
    return Path(folder).expanduser() / "tuned.json"


def key(device_name: str, kind: str, dtype: torch.dtype, V: int, D: int) -> str:
    return f"{device_name}, {kind}, {str(dtype).removeprefix('torch.')}, V={V}, d={D}"


@lru_cache
def tuned(path: Path) -> dict[str, Config]:
    if not path.exists():
        return {}
    try:
        return {name: Config(**values) for name, values in json.loads(path.read_text()).items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or run g2rl tune again") from error


def store(found: dict[str, Config]) -> Path:
    """Adds to the file, which is replaced whole."""
    path = cache_file()
    tuned.cache_clear()
    content: dict[str, Any] = {name: asdict(config) for name, config in {**tuned(path), **found}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
    tuned.cache_clear()
    choose.cache_clear()
    return path


@lru_cache
def choose(kind: str, device: torch.device, dtype: torch.dtype, V: int, D: int) -> Config:
    if device.type != "cuda":
        return INTERPRETER
    measured = tuned(cache_file()).get(key(torch.cuda.get_device_name(device), kind, dtype, V, D))
    return measured or candidates(torch.cuda.get_device_capability(device)[0], dtype)[0]
