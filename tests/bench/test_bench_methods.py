"""The methods compared: their results and gradients agree with float64."""

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from bench_helpers import (
    DEVICE,
    HEAD,
    METHODS,
    SOFTCAPPED,
    TRAINING,
    Method,
    Outputs,
    Unavailable,
    head,
    logprobs,
    methods,
    problem,
    small,
    softmax,
    torch_empty,
)


@pytest.mark.parametrize("shape", [HEAD, SOFTCAPPED], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.package])
def test_methods_agree_with_float64(name, shape):
    if reason := METHODS[name].obstacle(DEVICE):
        pytest.skip(reason)
    if (METHODS[name].device or DEVICE) != DEVICE:  # interpreted, which is slow
        shape = dataclasses.replace(shape, V=700, d=48)
    p = problem(small(48, shape), DEVICE).cut(3)
    out = METHODS[name].call(p)
    errors = head.errors(out, head.exact(p))
    given = {"features", "logprobs", "logsumexp", "entropy"} - {METHODS[name].leaves_out}
    assert {*errors} == given
    # The certificate leaves out a hundredth of the residual mass, and "rounded" has 16-bit logits corrected.
    loose = {"g2rl-kernels, certificate": 0.1, "g2rl-kernels, known_logprobs rounded": 1e-2}
    assert errors.pop("features", 0) < loose.get(name, 1e-3)
    assert max(errors.values()) < 1e-4
    if name == "g2rl-kernels, certificate":
        assert 0 < out.skipped_tokens.sum() < 48
        assert 0 < out.skipped_mass.max() < 0.01
    elif out.features is not None:  # errors() looks at the first response only
        alone = METHODS[name].call(tail(p))
        torch.testing.assert_close(out.features[2], alone.features[0], atol=1e-4, rtol=2e-3)


def tail(p: Any) -> Any:
    """The last response alone."""
    start, n = p.cuts[-2], p.cuts[-1] - p.cuts[-2]
    names = ("hidden", "tokens", "logprobs", "rounded_logprobs")
    rows = {name: getattr(p, name)[start:] for name in names}
    return dataclasses.replace(p, **rows, cuts=(0, n), cu_seqlens=torch.tensor([0, n], device=DEVICE))


def test_the_chunk_of_plain_torch_may_end_anywhere():
    p = problem(small(50, SOFTCAPPED)).cut(7)
    whole = METHODS["torch, all logits at once"].call(p)
    for chunk in (1, 9, 64):
        for got, right in zip(methods.torch_chunked(p, chunk)[:4], whole[:4]):
            torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for other packages, with their interfaces."""

    def losses(hidden, weight, tokens, softcap, reduction):
        z = hidden @ weight.T
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.nn.functional.cross_entropy(z, tokens, reduction=reduction)

    def cce(e, c, targets, softcap=None, reduction="mean", impl="cce"):
        assert impl in ("cce", "cce_exact")
        return losses(e, c, targets, softcap, reduction)

    class Liger:
        @staticmethod
        def apply(
            _input, weight, target, bias, ce_weight, ignore_index, z_loss, smoothing, reduction, softcap
        ):
            assert (bias, ce_weight, ignore_index, z_loss, smoothing) == (None, None, -100, 0.0, 0.0)
            return losses(_input, weight, target, softcap, reduction), None

    def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True):
        return losses(x, weight, target, None, reduction)

    def module(name: str, **members: object) -> None:
        for i in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:i])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        found = types.ModuleType(name)
        vars(found).update(members)
        monkeypatch.setitem(sys.modules, name, found)

    module("cut_cross_entropy", linear_cross_entropy=cce)
    module("liger_kernel.ops.fused_linear_cross_entropy", LigerFusedLinearCrossEntropyFunction=Liger)
    module("quack.linear_cross_entropy", chunked_linear_cross_entropy=quack)


def test_other_packages_are_called_for_log_probabilities(packages):
    p = problem(small(48, SOFTCAPPED)).cut(3)
    for name in ("CCE", "Liger"):
        errors = head.errors(METHODS[name].call(p), head.exact(p))
        assert {*errors} == {"logprobs"}
        assert errors["logprobs"] < 1e-4
    with pytest.raises(Unavailable, match="softcap"):
        METHODS["quack"].call(p)


def trained(method: Any, p: Any) -> Any:
    """log-probs and gradients of a method in TRAINING, and their errors."""
    training = logprobs.Training(method, p)
    out, grads = training()
    return out, grads, logprobs.Exact(p).errors(out, grads, training.incoming)


@pytest.mark.parametrize("shape", [HEAD, SOFTCAPPED], ids=lambda shape: shape.name)
def test_the_truth_about_gradients_is_that_of_autograd(shape):
    p = problem(small(40, shape))
    exact = logprobs.Exact(p)
    hidden, weight = p.hidden.double().requires_grad_(), p.weight.double().requires_grad_()
    log_p = softmax(dataclasses.replace(p, hidden=hidden, weight=weight))
    entropy = -(log_p.exp() * log_p).sum(1)
    chosen = log_p.gather(1, p.tokens[:, None])[:, 0]
    torch.testing.assert_close(exact.logprobs, chosen.detach())
    torch.testing.assert_close(exact.entropy, entropy.detach())
    assert len(exact.rows) > 20
    incoming = torch.randn(2, 40)
    for out, grads_in in (
        (Outputs(logprobs=chosen), (incoming[0], 0 * incoming[1])),
        (Outputs(logprobs=chosen, entropy=entropy), incoming),
        (Outputs(total=chosen.sum()), (torch.ones(40), torch.zeros(40))),
    ):
        loss = (chosen * grads_in[0] + entropy * grads_in[1]).sum()
        grads = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        errors = exact.errors(out, grads, incoming)
        assert {"hidden", "weight"} <= {*errors}
        assert max(errors.values()) < 1e-12
        wrong = (grads[0], grads[1] * (1 + 1e-3))
        assert exact.errors(out, wrong, incoming)["weight"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name, method in TRAINING.items()
        for shape in (HEAD, SOFTCAPPED)
        if method.package in ("", "trl")
        and ("compile" not in name or shape is SOFTCAPPED)  # compiling takes seconds
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_gradients_of_methods_agree_with_float64(name, shape):
    method, p = TRAINING[name], problem(small(70, shape), DEVICE)
    try:
        out, grads, errors = trained(method, p)
    except Unavailable as reason:  # an older TRL or torch; torch's own has no softcap
        pytest.skip(str(reason))
    given = {"hidden", "logprobs"} | ({"weight"} if not method.frozen else set())
    assert {*errors} == given | ({"entropy"} if "bonus" in name else set())
    assert max(errors.values()) < 1e-4
    assert [grad.shape for grad in grads] == [p.hidden.shape, p.weight.shape][: len(grads)]
    assert out.logprobs.shape == p.tokens.shape


def test_other_packages_are_called_for_gradients(packages):
    p = problem(small(48, SOFTCAPPED))
    for name in ("CCE", "CCE, exact", "Liger"):
        _, _, errors = trained(TRAINING[name], p)
        assert {"hidden", "weight"} <= {*errors}, name
        assert max(errors.values()) < 1e-4, name
    with pytest.raises(Unavailable, match="softcap"):
        trained(TRAINING["quack"], p)
    _, _, errors = trained(TRAINING["quack"], problem(small(48)))
    assert {*errors} == {"hidden", "weight"}
    assert max(errors.values()) < 1e-4


def test_obstacles(compiled):
    assert Method("a", torch_empty, package="no_such_package").obstacle("cpu") == (
        "no_such_package is not installed"
    )
    assert Method("a", torch_empty, device="cuda").obstacle("cpu") == "runs on cuda only"
    assert Method("a", torch_empty, device="cuda").obstacle("cuda") is None
