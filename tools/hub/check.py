"""Loads a kernel repository with the package `kernels`, offline, and compares it with g2rl_kernels.

LOCAL_KERNELS=owner/g2rl-kernels=build/hub-kernel HF_HUB_OFFLINE=1 python tools/hub/check.py build/hub-kernel
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from kernels import get_kernel, get_loaded_kernels, get_local_kernel
from kernels._rust import Digest, DigestAlgorithm, Metadata

import g2rl_kernels as g2


def inputs() -> dict[str, Any]:
    """Ragged responses, one of them empty, with a masked vocabulary entry."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(503, generator=generator)
    bias[7] = -torch.inf
    return {
        "hidden": torch.randn(61, 40, generator=generator),
        "weight": torch.randn(503, 40, generator=generator) / 4,
        "tokens": torch.randint(8, 503, (61,), generator=generator),
        "cu_seqlens": torch.tensor([0, 17, 17, 40, 61]),
        "bias": bias,
    }


def results(module: Any, backend: str | None) -> list[torch.Tensor]:
    """Outputs and gradients of each op."""
    given = inputs()
    hidden, weight = (given[name].requires_grad_() for name in ("hidden", "weight"))
    options = {"bias": given["bias"], "temperature": 0.7, "logit_softcap": 20.0, "backend": backend}
    out = module.head_features(hidden, weight, given["tokens"], given["cu_seqlens"], **options)
    fused = module.linear_logprobs(hidden, weight, given["tokens"], **options)
    # One of three ids a token, the realised one among them.
    ids = torch.stack([given["tokens"] - 8, given["tokens"], given["tokens"] - 1], dim=1).flatten()
    options["support"] = ids, torch.arange(62) * 3
    few = module.linear_logprobs(hidden, weight, given["tokens"], **options)
    some = module.head_features(hidden, weight, given["tokens"], given["cu_seqlens"], **options)
    grads = [torch.linspace(-1, 2, 61), torch.linspace(1, -3, 61)] * 2
    torch.autograd.backward([fused.logprobs, fused.entropy, few.logprobs, few.entropy], grads)
    group = module.group_geometry(out.features, torch.tensor([1.0, 0.0, 0.0, 1.0]), group_size=4)
    found = [*out[:4], *fused, *some[:4], *few, hidden.grad, weight.grad, *group]
    return [tensor.detach() for tensor in found]


def compare(name: str, module: ModuleType, backend: str | None = None, exact: bool = False) -> None:
    ours, theirs = results(g2, None), results(module, backend)
    errors = [
        ((other.double() - mine.double()).abs().max() / mine.double().abs().max()).item()
        for mine, other in zip(ours, theirs)
    ]
    if exact:
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs)), (name, errors)
    assert max(errors) < 1e-5, (name, errors)
    print(
        f"{name}: {'the same bits' if exact else f'within {max(errors):.0e} of the largest value'}",
        flush=True,
    )


def main(folder: Path) -> None:
    variants = sorted((folder / "build").iterdir())
    for variant in variants:
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    chosen = get_kernel("owner/g2rl-kernels", version=0)
    native = any(variant.name.startswith("torch-stable-abi") for variant in variants)
    compare("get_kernel", chosen, exact=native)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for variant in variants:
        if not variant.name.startswith("torch-stable-abi"):
            module = get_local_kernel(variant)
            compare(variant.name, module)
            if interpreted and variant.name != "torch-cpu":
                compare(f"{variant.name}, interpreted", module, backend="triton")
    fullgraph = torch.compile(chosen.linear_logprobs, fullgraph=True, backend="aot_eager")
    given = inputs()
    arguments = (given["hidden"], given["weight"], given["tokens"])
    torch.testing.assert_close(fullgraph(*arguments).logprobs, g2.linear_logprobs(*arguments).logprobs)
    namespaces = {loaded.metadata.id for loaded in get_loaded_kernels()}
    assert len(namespaces) == len(variants), namespaces
    print(f"{len(namespaces)} builds in one process: {', '.join(sorted(namespaces))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
