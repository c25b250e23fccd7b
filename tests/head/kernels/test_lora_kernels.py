"""A low-rank part in linear_logprobs' Triton kernels, in many chunks and blocks."""

import pytest
import torch
from marks import dtypes
from oracle import make_case
from strategies import low_rank
from test_logprobs_kernels import _on_the_gpu, check, tiny_budgets, tiny_tiles  # noqa: F401 (fixtures)

from g2rl_kernels.head.triton import driver


@dtypes
@pytest.mark.parametrize("r", [3, 20])
def test_a_low_rank_part_in_many_chunks_and_blocks(tiny_budgets, monkeypatch, dtype, r):  # noqa: F811
    """Kept logits hold it already; without them it is multiplied again."""
    case = make_case([61], V=251, d=24, dtype=dtype, bias=torch.randn(251), logit_softcap=3.0)
    case.lora = low_rank(case, r, torch.float32)
    check(case)
    check(case.replace(bias=None, logit_softcap=None, temperature=0.6))
    monkeypatch.setattr(driver, "kept_bytes", lambda *_: 0)
    check(case.replace(logit_softcap=None))
