"""bfloat16 products of a CPU without them: as near to the truth as torch's own, values and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make_trainer
from torch import Tensor

from benchmarks.learning import bf16
from g2rl_kernels.trainer import TrainerConfig


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def under_autocast(function: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*inputs)
    assert out.dtype == torch.bfloat16
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.bfloat16())]


def truth(function: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    exact = [t.detach().bfloat16().double().requires_grad_() for t in inputs]
    out = function(*exact)
    return [out.detach(), *torch.autograd.grad(out, exact, grad.bfloat16().double())]


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)


@pytest.mark.parametrize(
    ("function", "shapes", "out"),
    [
        (F.linear, [(3, 40, 64), (96, 64)], (3, 40, 96)),
        (F.linear, [(40, 64), (96, 64), (96,)], (40, 96)),
        (causal, [(2, 3, 7, 16)] * 3, (2, 3, 7, 16)),
    ],
    ids=["linear", "with a bias", "attention"],
)
def test_values_and_gradients(function: Any, shapes: list[tuple[int, ...]], out: tuple[int, ...]) -> None:
    inputs, grad = leaves(*shapes), torch.randn(out)
    torchs = under_autocast(function, inputs, grad)
    with bf16.RoundedProducts():
        found = under_autocast(function, inputs, grad)
    for mine, theirs, right in zip(found, torchs, truth(function, inputs, grad), strict=True):
        assert mine.dtype == theirs.dtype
        assert 0 < (mine.double() - right).norm() <= 1.05 * (theirs.double() - right).norm()


@pytest.mark.parametrize("fused", [True, False])
def test_a_weight_that_an_optimizer_changed_is_rounded_anew(fused: bool) -> None:
    x, weight = torch.randn(4, 8), torch.nn.Parameter(torch.randn(6, 8))
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=fused)  # fused leaves weight._version as it was
    with bf16.RoundedProducts(), torch.autocast("cpu", torch.bfloat16):
        before = F.linear(x, weight)
        assert torch.equal(F.linear(x, weight), before)
        before.sum().backward()
        optimizer.step()
        after = F.linear(x, weight)
    assert torch.equal(after, bf16.linear(x, weight.detach().clone()))
    assert not torch.equal(after, before)


def test_a_run_trains_as_with_torchs_products(tmp_path: Path) -> None:
    """After four steps weights have moved by the same amount, up to what rounding does to AdamW's steps."""

    def moved(name: str) -> Tensor:
        trainer = make_trainer(tmp_path / name, autocast="bfloat16", steps=4)
        before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.begin()
        rollout = trainer.sampler.sample()
        for _ in range(4):
            trainer.update(rollout, trainer.measure(rollout, trainer.verify(rollout)))
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before

    theirs = moved("torch")
    with bf16.RoundedProducts():
        ours = moved("ours")
    assert theirs.norm() > 0
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9
    assert abs(ours.norm() / theirs.norm() - 1) < 0.1


def test_other_products_are_torchs() -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    plain = F.linear(x, weight)
    with bf16.RoundedProducts():
        assert torch.equal(F.linear(x, weight), plain)


@pytest.mark.parametrize(
    ("autocast", "fast", "emulated"),
    [("bfloat16", "none", True), ("bfloat16", "bfloat16", False), ("none", "none", False)],
)
def test_where_it_is_used(autocast: str, fast: str, emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "fast_autocast", lambda device: fast)
    config = TrainerConfig(model="m", tasks=[], autocast=autocast)
    with bf16.products_of(config) as products:
        assert isinstance(products, bf16.RoundedProducts) == emulated
