"""Helpers of the benchmarks' tests: the modules as the command finds them, and small cases."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from g2rl_kernels.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]

# As the command finds them: in a checkout `benchmarks`, installed (editable too) in the package.
run: Any = cli._benchmarks()
floor, group, head, logprobs, measure, methods, missing_imports, registry, train = (
    import_module(f"{run.__package__}.{name}")
    for name in (
        "floor",
        "group",
        "head",
        "logprobs",
        "measure",
        "methods",
        "missing_imports",
        "registry",
        "train",
    )
)
METHODS, TRAINING, Method, Outputs, Unavailable = (
    getattr(methods, name) for name in ("METHODS", "TRAINING", "Method", "Outputs", "Unavailable")
)
Case, Shape, problem, Floor = registry.Case, registry.Shape, registry.problem, floor.Floor

HEAD = Shape("small", 4096, 256)
SOFTCAPPED = Shape("softcapped", 4096, 256, 30.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, Triton's interpreter runs its kernels


def bench(*argv: object) -> int:
    """Runs `g2rl bench`; returns its exit status."""
    return cli.main(["bench", *map(str, argv)])


def small(N: int = 64, shape: Any = HEAD, distribution: str = "1.5 nats", dtype: str = "fp32") -> Any:
    return Case(shape, N, dtype, distribution, 4)


def softmax(p: Any) -> torch.Tensor:
    """log p in float64."""
    z = p.hidden.double() @ p.weight.double().T
    if p.softcap is not None:
        z = p.softcap * torch.tanh(z / p.softcap)
    return z.log_softmax(1)


def torch_empty(p: Any) -> Any:
    """A method that takes no time and is wrong."""
    return Outputs(logprobs=torch.zeros(len(p.tokens)))
