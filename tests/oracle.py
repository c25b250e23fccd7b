"""What the tests hold the operators to: cases, an oracle in float64, torch's own error, and rounding.

A result passes when its error against float64 is at most a multiple of the error that plain PyTorch makes on
the same inputs in the same dtype (`torch_head`), plus a floor of the size of float32 rounding (`rounding`):
on tiny inputs torch's error can happen to be zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import g2rl_kernels as g2
from g2rl_kernels import _C, arguments
from g2rl_kernels.head import logprobs
from g2rl_kernels.head.lora import with_lora
from g2rl_kernels.head.spec import HeadSpec, Responses
from g2rl_kernels.head.support import ops as support_ops

# (backend, instruction set): all that this machine can run
CPU_BACKENDS = [("cpu", name) for name in _C.isa_names[: _C.isa_names.index(_C.best_isa()) + 1]]
TRITON = ("triton", None)
BACKENDS = [("reference", None), *CPU_BACKENDS, *([TRITON] if arguments.HAS_TRITON else [])]
BACKEND_IDS = [isa or backend for backend, isa in BACKENDS]
BEST = CPU_BACKENDS[-1]
# The kernels' device; without a GPU they are interpreted (conftest.py).
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    old = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if old is not None:
            os.environ[name] = old


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclasses.dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    cu_seqlens: Tensor
    bias: Tensor | None = None
    temperature: float | Tensor = 1.0  # or [N]
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    token_weights: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None
    support: tuple[Tensor, Tensor] | None = None

    @property
    def head(self) -> dict[str, Any]:
        """The options that head_features and linear_logprobs share."""
        return {
            "bias": self.bias,
            "temperature": self.temperature,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
            "lora": self.lora,
            **({} if self.support is None else {"support": self.support}),
        }

    @property
    def kept(self) -> Tensor:
        """[N, V] bool, the ids that each token is one of."""
        found = torch.zeros(len(self.tokens), len(self.weight), dtype=torch.bool)
        if self.support is None:
            return ~found
        ids, offsets = self.support
        found[torch.repeat_interleave(torch.arange(len(found)), offsets.long().diff()), ids.long()] = True
        return found

    @property
    def spec(self) -> HeadSpec:
        """The head as backends take it."""
        T, options = self.temperature, (self.logit_scale, self.logit_softcap or 0.0)
        one, each = (1.0, T) if isinstance(T, Tensor) else (T, None)
        head = HeadSpec(self.weight, self.bias, one, *options, each)
        return with_lora(head, self.hidden, self.lora).rounded()

    def lora_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
        """The low-rank part with A and B in `dtype`."""
        return None if self.lora is None else (self.lora[0].to(dtype), self.lora[1].to(dtype), self.lora[2])

    @property
    def double(self) -> Case:
        """In float64; the same numbers."""
        bias = None if self.bias is None else self.bias.double()
        matrices = {"hidden": self.hidden.double(), "weight": self.weight.double()}
        return self.replace(**matrices, bias=bias, lora=self.lora_in(torch.float64))

    @property
    def merged(self) -> Tensor:
        """W + scaling B A [V, d], in float64."""
        case = self.double
        if case.lora is None:
            return case.weight
        A, B, scaling = case.lora
        return case.weight + scaling * B @ A

    @property
    def T(self) -> Any:
        """What logits [N, V] are divided by."""
        return self.temperature[:, None] if isinstance(self.temperature, Tensor) else self.temperature

    @property
    def responses(self) -> Responses:
        return Responses(self.cu_seqlens, self.token_weights)

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    @property
    def segment(self) -> Tensor:
        """[N], the response of each token."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.cu_seqlens.diff())

    @property
    def token_share(self) -> Tensor:
        """[N] float64, a_t of eq. 8."""
        alpha = torch.ones(len(self.tokens)) if self.token_weights is None else self.token_weights
        alpha = alpha.double()
        total = torch.zeros(len(self.lengths), dtype=torch.float64).index_add(0, self.segment, alpha)
        return alpha / (total[self.segment] + 1e-8)

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device) -> Case:
        """With the same strides and offsets."""

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(move, value))
            if not isinstance(value, Tensor) or value.device == device:
                return value
            memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
            return memory.as_strided(value.shape, value.stride(), value.storage_offset())

        return Case(**{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})


def products_repeat(m: int, k: int, n: int) -> bool:
    """Whether torch's own product [m, k] x [k, n] has the same bits with one, two and three threads.

    The backend `reference` is made of such products; on CPUs with AMX some depend on the number of threads.
    """
    a, b, threads = torch.randn(m, k), torch.randn(k, n), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(a @ b)
    finally:
        torch.set_num_threads(threads)
    return all(map(found[0].equal, found))


def make_case(
    lengths: list[int], V: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> Case:
    """Logits of about unit size whatever d."""
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    return Case(
        hidden=torch.randn(N, d, generator=g).to(dtype),
        weight=(torch.randn(V, d, generator=g) * 2 / d**0.5).to(dtype),
        tokens=torch.randint(V, (N,), generator=g),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        **options,
    )


def run_head(case: Case, backend: tuple[str, str | None], **options: Any) -> g2.HeadFeatures:
    name, isa = backend
    if name == "triton":
        case = case.to(GPU)
        options = {key: value.to(GPU) for key, value in options.items()}
    with environment("G2RL_CPU_ISA", isa):
        out = g2.head_features(
            case.hidden,
            case.weight,
            case.tokens,
            case.cu_seqlens,
            token_weights=case.token_weights,
            backend=name,
            **case.head,
            **options,
        )
    return g2.HeadFeatures(*(t.cpu() for t in out))


def logits(case: Case, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """z / temperature [N, V], as a user would write it."""
    x = hidden @ weight.T
    if case.lora is not None:
        A, B, scaling = case.lora_in(hidden.dtype)
        x = x + (scaling * (hidden @ A.T)) @ B.T
    if bias is not None:
        x = x + bias
    x = case.logit_scale * x
    if case.logit_softcap is not None:
        x = case.logit_softcap * torch.tanh(x / case.logit_softcap)
        if bias is not None:
            x = x.masked_fill(bias == -torch.inf, -torch.inf)  # masked entries stay so
    if case.support is not None:
        x = x.masked_fill(~case.kept, -torch.inf)
    return x / case.T


def entropy(log_p: Tensor) -> Tensor:
    return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(1)


def autograd_head(case: Case) -> g2.HeadFeatures:
    """float64, by autograd: phi_t = temperature * d log p / d h_t. Independent of head/reference.py."""
    hidden = case.hidden.detach().double().requires_grad_()
    bias = None if case.bias is None else case.bias.double()
    z = logits(case.replace(lora=None), hidden, case.merged, bias)
    log_p = z.log_softmax(1)
    logprobs = log_p.gather(1, case.tokens[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    features = torch.zeros(len(case.lengths), hidden.shape[1], dtype=torch.float64)
    features = features.index_add(0, case.segment, case.token_share[:, None] * gradient * case.T)
    log_p = log_p.detach()
    return g2.HeadFeatures(features, logprobs.detach(), z.detach().logsumexp(1), entropy(log_p))


def torch_head(case: Case) -> g2.HeadFeatures:
    """Plain PyTorch in the dtype of the inputs: eqs. 5 to 8 with the logits in memory, softmax in float32."""
    dtype = case.hidden.dtype
    bias = None if case.bias is None else case.bias.to(dtype)
    z = logits(case, case.hidden, case.weight, bias).float()
    log_p = z.log_softmax(1)
    residual = -log_p.exp()
    residual[torch.arange(len(case.tokens)), case.tokens] += 1
    if case.logit_softcap is not None:
        residual *= (
            1
            - torch.tanh(
                case.logit_scale * logits(linear(case), case.hidden, case.weight, bias) / case.logit_softcap
            )
            ** 2
        )
    phi = residual.to(dtype) @ case.weight
    if case.lora is not None:
        A, B, scaling = case.lora_in(dtype)
        phi = phi + scaling * (residual.to(dtype) @ B) @ A
    phi = case.logit_scale * phi.float()
    features = torch.zeros(len(case.lengths), case.hidden.shape[1])
    features = features.index_add(0, case.segment, case.token_share.float()[:, None] * phi)
    logprobs = log_p.gather(1, case.tokens[:, None]).squeeze(1)
    return g2.HeadFeatures(features, logprobs, z.logsumexp(1), entropy(log_p))


def linear(case: Case) -> Case:
    return case.replace(temperature=1.0, logit_scale=1.0, logit_softcap=None)


def rounding(case: Case) -> g2.HeadFeatures:
    """What float32 rounding does to each output, to first order, signs at random: [S], [N], [N], [N].

    With u = 2^-24, a logit is off by u times the root of sum_k (h_k w_k)^2, and by u |z| as it is stored.
    That is the relative error of each p_v, so a feature is off by it times the root of sum_v (A_v W_v)^2.
    A_v holds 1 - p at the realised token, not 1: the floor shrinks with the feature of a near-certain
    response. A low-rank part in 16 bits rounds its two factors to them.
    """
    double = case.double
    w = double.merged
    z, size = logits(double, double.hidden, double.weight, double.bias), logit_size(case)
    relative = 2.0**-23 * (3 * size + 4)  # [N], generously; 4: exp, log, a division and the last rounding
    relative = relative + low_rounding(case)

    log_p = z.log_softmax(1)
    p = log_p.exp()
    index = case.tokens[:, None]
    residual = p.scatter(1, index, 0.0)
    residual = residual.scatter(1, index, residual.sum(1, keepdim=True))
    spread = case.logit_scale * (residual**2 @ w**2).amax(1).sqrt()
    off = relative * spread
    eps = torch.finfo(case.hidden.dtype).eps
    if double.lora is not None and eps > 1e-6:  # B itself
        A, B, scaling = double.lora
        off = off + eps * case.logit_scale * abs(scaling) * ((residual**2 @ B**2) @ A**2).amax(1).sqrt()
    features = torch.zeros(len(case.lengths), dtype=torch.float64)
    features = features.index_add(0, case.segment, case.token_share * off)
    logprobs = relative * residual.gather(1, index).squeeze(1) + 2.0**-24 * z.logsumexp(1).abs()
    H = entropy(log_p)
    return g2.HeadFeatures(features, logprobs, relative, relative * H)


def logit_size(case: Case) -> Tensor:
    """[N], of each token the largest logit, or the root of the squared terms that one is a sum of."""
    double = case.double
    h, w, bias = double.hidden, double.merged, double.bias
    z = logits(double, h, double.weight, bias)
    square = (h**2) @ (w**2).T + (0 if bias is None else bias.masked_fill(bias == -torch.inf, 0.0) ** 2)
    if double.lora is not None:
        A, B, scaling = double.lora
        square = square + ((scaling * h @ A.T) ** 2) @ (B**2).T
    size = (case.logit_scale / case.T) * square.amax(1, keepdim=True).sqrt()
    return torch.maximum(size.squeeze(1), z.masked_fill(z == -torch.inf, 0.0).abs().amax(1))


def low_rounding(case: Case) -> Tensor:
    """[N]: how far a logit is off as the two factors of a low-rank part are rounded to 16 bits."""
    eps, double = torch.finfo(case.hidden.dtype).eps, case.double
    if double.lora is None or eps < 1e-6:
        return torch.zeros(len(case.hidden), dtype=torch.float64)
    A, B, scaling = double.lora
    products = ((scaling * double.hidden @ A.T) ** 2) @ (B**2).T
    return (2 * eps * case.logit_scale / case.T * products.amax(1, keepdim=True).sqrt()).squeeze(1)


def errors(actual: g2.HeadFeatures, exact: g2.HeadFeatures) -> g2.HeadFeatures:
    """Largest error of each response's feature [S], error of each token [N]; equal infinities differ by 0."""

    def difference(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a.double() == b, 0.0, (a.double() - b).abs())

    features, *others = (difference(a, b) for a, b in zip(actual, exact))
    return g2.HeadFeatures(features.amax(1), *others)


def stored_exponentials(case: Case) -> Tensor:
    """[S]: what the C++ kernel adds to a feature's error by keeping exponentials in 16 bits (csrc/cpu).

    It stores round(65535 e^(1/4)), e relative to a maximum: off by at most 2^-15 e^(3/4), signs at random.
    Twice the root of the sum of squares is allowed.
    """
    double = case.double
    w, z = double.merged, logits(double, double.hidden, double.weight, double.bias)
    e = torch.exp(z - z.amax(1, keepdim=True))
    error = 2.0**-14 * e**0.75 / e.sum(1, keepdim=True)
    spread = case.logit_scale * (error**2 @ w**2).amax(1).sqrt()
    return torch.zeros(len(case.lengths), dtype=torch.float64).index_add(
        0, case.segment, case.token_share * spread
    )


def allowed_errors(case: Case, backend: tuple[str, str | None], multiple: float = 2.0) -> g2.HeadFeatures:
    """[S], [N], [N], [N]: multiple * (torch's largest error, in this dtype) + rounding."""
    torchs = errors(torch_head(case), autograd_head(case))
    features, *others = (
        multiple * (error.nan_to_num(0.0).max() if error.numel() else 0) + floor
        for error, floor in zip(torchs, rounding(case))
    )
    if backend[0] == "cpu" and case.support is None:
        features = features + stored_exponentials(case)
    return g2.HeadFeatures(features, *others)


def assert_as_exact_as_torch(
    case: Case, actual: g2.HeadFeatures, backend: tuple[str, str | None], multiple: float = 2.0
) -> None:
    ours, allowed = errors(actual, autograd_head(case)), allowed_errors(case, backend, multiple)
    for name, error, limit in zip(actual._fields, ours, allowed):
        excess = (error / limit).nan_to_num(torch.inf)
        assert (error <= limit).all(), (
            f"{name}: error {error.max():.3g}, at worst {excess.max():.3g} times what is allowed"
        )


class Sizes(TorchDispatchMode):
    """Collects dtype and element count of every tensor made, inside the operators of linear_logprobs too."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.dtype, int]] = []
        self.inside = {
            torch.ops.g2rl.linear_logprobs.default: logprobs._logprobs_op._init_fn,
            torch.ops.g2rl.linear_logprobs_backward.default: logprobs._backward_op._init_fn,
            torch.ops.g2rl.support_logprobs.default: support_ops.support_logprobs._init_fn,
            torch.ops.g2rl.support_logprobs_backward.default: support_ops._backward_op._init_fn,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.inside:
            with self:
                return self.inside[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.made.append((tensor.dtype, tensor.numel()))
        return out
