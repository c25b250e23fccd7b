"""The modes of the head's Triton kernels, as their tests call them, and what is allowed.

Without a GPU the kernels are interpreted (tests/conftest.py), which is slow: shapes are small, and tiles too.
"""

from typing import Any

import pytest
import torch
from examples import settings
from oracle import GPU, TRITON, Case, allowed_errors, autograd_head, run_head

import g2rl_kernels as g2

pytest.importorskip("triton", reason="pip install triton")

from g2rl_kernels.head.backend import FeatureOutputs, Hints
from g2rl_kernels.head.triton import driver, tuning

HAS_GPU = GPU.type == "cuda"
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
modes = pytest.mark.parametrize("mode", ["two passes", "one pass", "certificate"])
examples = settings(max_examples=40 if HAS_GPU else 8)  # most compile a kernel of their own

TINY = tuning.Config(16, 16, 16, 4, 2)


def plain_features(case: Case, more: bool = False, **options: Any) -> FeatureOutputs:
    """By the backend itself, which checks no values."""
    return driver.features(case.hidden, case.tokens, case.spec, case.responses, Hints(**options), more)


def mode_options(mode: str, known: torch.Tensor) -> dict[str, Any]:
    """What makes a call of the backend one of `modes`."""
    options = {"one pass": {"known_logprobs": known}, "certificate": {"max_skipped": 0.1}}
    return {**options, "statistics": {"more": True}}.get(mode, {})


def known_mode(case: Case, known: torch.Tensor) -> g2.HeadFeatures:
    return run_head(case, TRITON, known_logprobs=known)


def certified(case: Case, max_skipped: float) -> g2.CertifiedHeadFeatures:
    there = case.to(GPU)
    out = g2.certified_head_features(
        there.hidden,
        there.weight,
        there.tokens,
        there.cu_seqlens,
        max_skipped=max_skipped,
        token_weights=there.token_weights,
        backend="triton",
        **there.head,
    )
    return g2.CertifiedHeadFeatures(*(t.cpu() for t in out))


def with_weights(case: Case, factor: torch.Tensor) -> torch.Tensor:
    """Exact features [S, d] in which token t counts factor_t alpha_t, over the sum of alpha."""
    exact = autograd_head(case.replace(token_weights=torch.ones(len(case.tokens), dtype=torch.float64)))
    assert len(exact.features) == len(case.lengths)
    single = case.replace(cu_seqlens=torch.arange(len(case.tokens) + 1), token_weights=None)
    phi = autograd_head(single).features  # [N, d]: every token a response of its own
    weighted = (case.token_share * factor.double())[:, None] * phi
    return torch.zeros_like(exact.features).index_add(0, case.segment, weighted)


def assert_features(
    actual: torch.Tensor,
    exact: torch.Tensor,
    case: Case,
    slack: float = 1.0,
    backend: tuple[str, str | None] = TRITON,
) -> None:
    limit = slack * allowed_errors(case, backend).features
    error = (actual.double() - exact).abs().amax(1)
    assert (error <= limit).all(), f"at worst {(error / limit).nan_to_num(torch.inf).max():.3g} times allowed"
