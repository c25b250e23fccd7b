"""Logits that Triton's kernels keep for the backward pass, in tiles, chunks and blocks of every kind.

tests/head/test_logits_memory.py has what every backend promises."""

import pytest
import torch
from oracle import GPU, make_case

import g2rl_kernels as g2

pytest.importorskip("triton", reason="pip install triton")

import triton
import triton.language as tl

from g2rl_kernels.head import logprobs
from g2rl_kernels.head.triton import kept, tile, tuning
from g2rl_kernels.head.triton import logprobs as kernels

ALL = 1 << 40


@pytest.fixture
def several_of_each(monkeypatch):
    """Tiles of 16 x 32, chunks of 64 and 32 tokens, blocks of one tile or two, sums in the weight's gradient.
    The forward pass has twice as wide a tile as the backward pass."""
    small = tuning.Config(16, 32, 32, 4, 2)
    wide = tuning.Config(16, 64, 32, 4, 2)
    monkeypatch.setattr(tile, "choose", lambda kind, *_: wide if kind == "stats" else small)
    monkeypatch.setattr(kernels, "CHUNK", 40)
    monkeypatch.setattr(kernels, "TOKENS", 32)
    monkeypatch.setattr(kernels, "GRADIENT", 2 * 32 * 64)
    monkeypatch.setattr(kernels, "SUMS", 4 * 24 * 32)
    monkeypatch.setattr(logprobs, "SUMS", 4 * 24 * 64)


def gradients(case, memory):
    case = case.to(GPU)
    incoming = torch.randn(2, len(case.tokens), generator=torch.Generator().manual_seed(0)).to(GPU)
    leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight)]
    found = g2.linear_logprobs(*leaves, case.tokens, **case.head, logits_memory=memory, backend="triton")
    return torch.autograd.grad((torch.stack(found) * incoming).sum(), leaves)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float32_logits_change_no_bit(several_of_each, sums_of_one_order, dtype, softcap):
    """Part of them or all; a bias in float32 keeps float32 logits of a bfloat16 head too."""
    for N, V, bias in ((61, 700, True), (70, 600, False)):
        if not bias and softcap is None and dtype == torch.bfloat16:
            continue
        case = make_case([N], V=V, d=24, dtype=dtype, logit_softcap=softcap)
        case.bias = torch.randn(V).masked_fill(torch.arange(V) % 5 == 3, -torch.inf) if bias else None
        case.tokens = torch.where(case.tokens % 5 == 3, case.tokens - 1, case.tokens)
        expected = gradients(case, 0)
        for memory in (N * 256 * 4, ALL):
            assert kept.kept_bytes(case.hidden, case.spec, memory) > 0
            for found, right in zip(gradients(case, memory), expected, strict=True):
                assert torch.equal(found, right)


@pytest.mark.parametrize("memory", [70 * 256 * 3, ALL])
def test_codes_in_tiles_of_two_widths(several_of_each, memory):
    """Against float64, beside the error of logits that are computed again."""
    case = make_case([70], V=1300, d=24, dtype=torch.bfloat16)
    case.bias = torch.zeros(1300).masked_fill((torch.arange(1300) // 64) % 3 == 1, -torch.inf).bfloat16()
    case.tokens = torch.where((case.tokens // 64) % 3 == 1, case.tokens % 64, case.tokens)
    assert case.spec.bytes_of_logit(torch.bfloat16) == 2
    w = case.weight.double().requires_grad_()
    h = case.hidden.double().requires_grad_()
    incoming = torch.randn(2, 70, generator=torch.Generator().manual_seed(0)).double()
    z = h @ w.T + case.bias.double()
    log_p = torch.log_softmax(z, 1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
    ours = log_p.gather(1, case.tokens[:, None]).squeeze(1)
    truth = torch.autograd.grad((torch.stack([ours, entropy]) * incoming).sum(), (h, w))
    for right, found, anew in zip(truth, gradients(case, memory), gradients(case, 0), strict=True):
        mine, theirs = found.cpu().double() - right, anew.cpu().double() - right
        assert mine.norm() <= 1.03 * theirs.norm()
        assert mine.abs().max() <= 1.2 * theirs.abs().max()


@triton.jit
def there_and_back_kernel(distance, back, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(back + o_n, kept.distance_of(kept.code_of(tl.load(distance + o_n))))


def test_codes_come_back_as_near_as_documented():
    """The exponential's relative error is at most 1.1e-4 sqrt(-y), and it is 0 far below."""
    y = torch.cat([-torch.linspace(0, 100, 8188), torch.tensor([-100.01, -1e4, -1e30, torch.nan])]).to(GPU)
    back = torch.empty_like(y)
    there_and_back_kernel[(1,)](y, back, N=len(y))
    error = (torch.exp2(back.double() - y.double()) - 1).abs()[:-4]
    assert (error <= 1.1e-4 * (-y[:-4].double()).sqrt() + 1e-6).all()
    assert back[0] == 0
    assert (back[-4:] == -1e30).all()


def test_every_tile_holds_whole_groups():
    """All that is launched: a tile's columns share one largest logit, and units hold whole tiles."""
    for configs in tuning.CANDIDATES.values():
        for config in configs:
            for one in (config, config.for_correction(), config.for_kept()):
                assert kept.UNIT % one.BN == 0
                assert one.BN % kept.LARGEST == 0
