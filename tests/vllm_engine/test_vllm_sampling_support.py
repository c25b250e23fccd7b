"""`sampling_support` against vLLM's own functions, as its CPU sampler applies them."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

import g2rl_kernels as g2

N, V = 60, 3000


def vllm_keeps(z: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[list[int]]:
    z = z.clone()
    processor = object.__new__(MinPLogitsProcessor)  # without an engine's configuration
    processor.min_p_count, processor.min_p = int(min_p > 0), torch.full((N, 1), min_p)
    k, p = torch.full((N,), top_k, dtype=torch.int32), torch.full((N,), top_p)
    z = apply_top_k_top_p_pytorch(
        processor.apply(z), k if top_k else None, p if top_p < 1 else None, allow_cpu_sync=True
    )
    return [row.nonzero().flatten().tolist() for row in z > -torch.inf]


def ours(z: torch.Tensor, rules: str, **options: float) -> list[list[int]]:
    found = g2.sampling_support(torch.eye(N), z.T.contiguous(), z.argmax(1), limit=V, rules=rules, **options)
    return [part.tolist() for part in found.ids.split(found.offsets.diff().tolist())]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 20},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
        {"top_p": 0.5, "min_p": 0.1},
    ],
    ids=str,
)
def test_without_equal_logits(options):
    """A cut may lie within rounding in a few rows."""
    z = 2.5 * torch.randn(N, V)
    theirs = vllm_keeps(z, **options)
    same = sum(a == b for a, b in zip(ours(z, "vllm", **options), theirs))
    assert same >= (N if set(options) == {"top_k"} else 0.95 * N)
    other = sum(a == b for a, b in zip(ours(z, "transformers", **options), theirs))
    assert (other < 0.9 * N) == ("top_p" in options and "min_p" in options)


def test_equal_logits_on_the_cpu():
    """All entries equal to the k-th stay, as in transformers; vLLM's GPU kernel keeps k."""
    z = (10 * torch.randn(N, V)).round() / 4
    theirs = vllm_keeps(z, top_k=20)
    assert ours(z, "transformers", top_k=20) == theirs
    assert sum(map(len, theirs)) > 21 * N
    assert {len(entries) for entries in ours(z, "vllm", top_k=20)} == {20}
