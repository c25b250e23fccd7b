"""Wrong input: ValueError or TypeError that names the argument, what it got and what it needs, before any
work."""

import re

import pytest
import torch
import torch.distributed as dist
from oracle import environment, make_case

import g2rl_kernels as g2

N, V, D = 8, 20, 6


def head_arguments() -> dict:
    case = make_case([3, 0, 5], V=V, d=D)
    return {
        "hidden": case.hidden,
        "weight": case.weight,
        "tokens": case.tokens,
        "cu_seqlens": case.cu_seqlens,
    }


meta = torch.device("meta")
# argument, wrong value, error, what the message says
HEAD = [
    ("hidden", None, TypeError, "NoneType"),
    ("hidden", torch.zeros(N, D, dtype=torch.int64), TypeError, "int64"),
    ("hidden", torch.zeros(N, D, dtype=torch.float64), TypeError, "float64"),
    ("hidden", torch.zeros(2, 4, D), ValueError, "[2, 4, 6]"),
    ("hidden", torch.zeros(N, 0), ValueError, "[8, 0]"),
    ("weight", torch.zeros(V, D).bfloat16(), TypeError, "bfloat16"),
    ("weight", torch.zeros(V, D + 1), ValueError, "[20, 7]"),
    ("weight", torch.zeros(D, V), ValueError, "[6, 20]"),
    ("weight", torch.zeros(0, D), ValueError, "[0, 6]"),
    ("weight", torch.zeros(V, D, device=meta), ValueError, "meta"),
    ("tokens", torch.zeros(N, dtype=torch.int32), TypeError, "int32"),
    ("tokens", torch.zeros(N + 1, dtype=torch.int64), ValueError, "[9]"),
    ("tokens", torch.zeros(N, 1, dtype=torch.int64), ValueError, "[8, 1]"),
    ("tokens", [0] * N, TypeError, "list"),
    ("tokens", torch.full((N,), V), ValueError, "20"),
    ("tokens", torch.full((N,), -100), ValueError, "-100"),
    ("bias", torch.zeros(V + 1), ValueError, "[21]"),
    ("bias", torch.zeros(V, 1), ValueError, "[20, 1]"),
    ("bias", torch.zeros(V, dtype=torch.int64), TypeError, "int64"),
    ("temperature", 0.0, ValueError, "0.0"),
    ("temperature", -1.0, ValueError, "-1.0"),
    ("temperature", float("nan"), ValueError, "nan"),
    ("temperature", float("inf"), ValueError, "inf"),
    ("temperature", 1e-9, ValueError, "1e-09, needs a number from 1e-8 to 1e8"),
    ("temperature", 1e39, ValueError, "1e+39, needs a number"),
    ("logit_softcap", 1e-50, ValueError, "1e-50, needs a number from 1e-8 to 1e8; None for no softcap"),
    ("temperature", "1", TypeError, "str"),
    ("temperature", None, TypeError, "NoneType"),
    ("temperature", torch.ones(N - 1), ValueError, "[7]"),
    ("temperature", torch.tensor(1.0), ValueError, "[]"),
    ("temperature", torch.ones(N, dtype=torch.int64), TypeError, "int64"),
    ("temperature", torch.ones(N, device=meta), ValueError, "meta"),
    ("temperature", torch.ones(N, requires_grad=True), ValueError, "requires grad"),
    ("temperature", torch.tensor([1.0] * 7 + [0.0]), ValueError, "entry 7 is 0"),
    ("temperature", torch.tensor([1.0, torch.nan] + [1.0] * 6), ValueError, "entry 1 is nan"),
    ("temperature", torch.tensor([1e9] + [1.0] * 7), ValueError, "entry 0 is 1e+09"),
    ("logit_scale", 0.0, ValueError, "0.0"),
    ("logit_scale", float("nan"), ValueError, "nan"),
    ("logit_softcap", 0.0, ValueError, "None"),
    ("logit_softcap", -30.0, ValueError, "-30.0"),
    ("backend", "cuda", ValueError, "'cuda'"),
    ("statistics", "top_token", TypeError, "'top_token', needs a tuple"),
    ("statistics", None, TypeError, "None"),
    (
        "statistics",
        ("top_token", "top_k"),
        ValueError,
        "got 'top_k', needs any of 'sum_p_squared', 'top_token'",
    ),
    ("process_group", object(), TypeError, "object"),
    ("process_group", dist.GroupMember.NON_GROUP_MEMBER, ValueError, "no member"),
]
FEATURES_ONLY = [
    ("cu_seqlens", torch.tensor([0, 3, 3, 8.0]), TypeError, "float32"),
    ("cu_seqlens", torch.tensor([[0, 3], [3, 8]]), ValueError, "[2, 2]"),
    ("cu_seqlens", torch.tensor([], dtype=torch.int64), ValueError, "[0]"),
    ("cu_seqlens", torch.tensor([0, 3, 3, 7]), ValueError, "7"),
    ("cu_seqlens", torch.tensor([0, 3, 3, 9]), ValueError, "9"),
    ("cu_seqlens", torch.tensor([1, 3, 3, 8]), ValueError, "1"),
    ("cu_seqlens", torch.tensor([0, 5, 3, 8]), ValueError, "5 to 3"),
    ("cu_seqlens", torch.tensor([0, 12, 8]), ValueError, "12 to 8"),
    ("cu_seqlens", torch.tensor([0]), ValueError, "0"),
    ("token_weights", torch.ones(N + 1), ValueError, "[9]"),
    ("token_weights", torch.ones(N, dtype=torch.bool), TypeError, "bool"),
    ("token_weights", torch.tensor([1.0] * 7 + [-0.5]), ValueError, "-0.5"),
    ("token_weights", torch.tensor([1.0] * 7 + [torch.nan]), ValueError, "nan"),
    ("known_logprobs", torch.zeros(N - 1), ValueError, "[7]"),
    ("known_logprobs", torch.zeros(N, dtype=torch.int64), TypeError, "int64"),
]


def identity(value) -> str | None:
    return re.sub(r"[^\w.,\[\] -]", "", str(value))[:20] if not isinstance(value, torch.Tensor) else "tensor"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("argument", "value", "error", "says"), HEAD + FEATURES_ONLY, ids=identity)
def test_head_features(backend, argument, value, error, says):
    arguments = {"backend": backend, **head_arguments(), argument: value}
    with pytest.raises(error, match=re.escape(argument)) as caught:
        g2.head_features(**arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["logit_scale", "logit_softcap"])
def test_scalars_are_bounded_together(name):
    """Beyond that a masked entry, at -1e30 in units of these, is no longer beyond all others."""
    for temperature, value in ((1e4, 1e-6), (1e-6, 1e4)):
        with pytest.raises(ValueError, match=f"{name} / temperature: got .* needs a number"):
            g2.head_features(**head_arguments(), **{name: value}, temperature=temperature)
        T = torch.ones(N)
        T[2] = temperature
        with pytest.raises(ValueError, match=f"{name} / temperature: entry 2 is .* needs a number"):
            g2.head_features(**head_arguments(), **{name: value}, temperature=T)


@pytest.mark.parametrize(("argument", "value", "error", "says"), HEAD, ids=identity)
def test_linear_logprobs(argument, value, error, says):
    arguments = {**head_arguments(), argument: value}
    del arguments["cu_seqlens"]
    if argument == "hidden" and error is TypeError and "float64" in says:
        arguments["weight"] = arguments["weight"].double()[:, :0]  # float64 itself is welcome here
        error, argument, says = ValueError, "weight", "[20, 0]"
    with pytest.raises(error, match=re.escape(argument)) as caught:
        g2.linear_logprobs(**arguments)
    assert says in str(caught.value)


def test_linear_logprobs_of_float64_has_one_backend():
    arguments = {
        name: value.double() if value.is_floating_point() else value
        for name, value in head_arguments().items()
    }
    del arguments["cu_seqlens"]
    with pytest.raises(TypeError, match=r"float64.*'cpu'"):
        g2.linear_logprobs(**arguments, backend="cpu")


def test_a_distributed_weight_is_refused():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise AssertionError

    arguments = head_arguments()
    arguments["weight"] = arguments["weight"].as_subclass(Sharded)
    with pytest.raises(TypeError, match=r"weight.full_tensor\(\)"):
        g2.head_features(**arguments)


GROUP = [
    ("features", torch.zeros(6), ValueError, "[6]"),
    ("features", torch.zeros(6, 4, dtype=torch.int64), TypeError, "int64"),
    ("features", [[1.0]], TypeError, "list"),
    ("rewards", torch.zeros(5), ValueError, "[5]"),
    ("rewards", torch.zeros(6, 1), ValueError, "[6, 1]"),
    ("rewards", torch.zeros(6, dtype=torch.int64), TypeError, "int64"),
    ("rewards", torch.zeros(6, device=meta), ValueError, "meta"),
    ("group_size", 4, ValueError, "S = 6"),
    ("group_size", 0, ValueError, "0"),
    ("group_size", -3, ValueError, "-3"),
    ("group_size", 3.0, TypeError, "float"),
    ("group_size", True, TypeError, "bool"),
    ("group_ids", torch.zeros(6), TypeError, "float32"),
    ("group_ids", torch.zeros(6, dtype=torch.int32), TypeError, "int32"),
    ("group_ids", torch.zeros(3, 2, dtype=torch.int64), ValueError, "[3, 2]"),
    ("lam", -0.5, ValueError, "-0.5"),
    ("lam", float("nan"), ValueError, "nan"),
    ("clip", 0.0, ValueError, "0.0"),
    ("eps", 0.0, ValueError, "0.0"),
    ("shaping", "intend", ValueError, "'intent'"),
    ("exploration_score", "square", ValueError, "'sqrt'"),
    ("scale", None, ValueError, "'none'"),
    ("uniform_groups", "keep", ValueError, "'skip'"),
]


@pytest.mark.parametrize(("argument", "value", "error", "says"), GROUP, ids=identity)
def test_group_geometry(argument, value, error, says):
    arguments = {"features": torch.randn(6, 4), "rewards": torch.ones(6), "group_size": 3}
    if argument == "group_ids":
        del arguments["group_size"]
    with pytest.raises(error, match=argument) as caught:
        g2.group_geometry(**{**arguments, argument: value})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("hidden", torch.zeros(2, 3), ValueError),
        ("hidden", torch.zeros(2, 3, 4, dtype=torch.int64), TypeError),
        ("tokens", torch.zeros(2, 3), TypeError),
        ("tokens", torch.zeros(2, 2, dtype=torch.int64), ValueError),
        ("mask", torch.ones(2, 3), TypeError),
        ("mask", torch.ones(3, 2, dtype=torch.bool), ValueError),
    ],
    ids=identity,
)
def test_pack_responses(argument, value, error):
    arguments = {
        "hidden": torch.zeros(2, 3, 4),
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(error, match=argument):
        g2.pack_responses(**{**arguments, argument: value})


# The operators guard memory themselves: torch.compile skips the checks of values, and they can be called
# directly.
OPERATOR = [
    ("tokens", torch.full((N,), V)),
    ("tokens", torch.full((N,), -1)),
    ("tokens", torch.zeros(N - 1, dtype=torch.int64)),
    ("cu_seqlens", torch.tensor([0, 9])),
    ("cu_seqlens", torch.tensor([0, 2**40, 8])),
    ("cu_seqlens", torch.tensor([-5, 8])),
    ("weight", torch.zeros(V, D - 1)),
    ("weight", torch.zeros(V, D).half()),
    ("bias", torch.zeros(V - 1)),
    ("token_weights", torch.zeros(N - 1)),
    ("temperatures", torch.ones(N - 1)),
    ("temperatures", torch.zeros(N)),
]


@pytest.mark.parametrize(("argument", "value"), OPERATOR, ids=identity)
def test_operator_head_features(argument, value):
    arguments = {
        **head_arguments(),
        **dict.fromkeys(
            ("bias", "temperatures", "low_hidden", "low_weight", "token_weights", "known_logprobs")
        ),
        **{"temperature": 1.0, "logit_scale": 1.0, "logit_softcap": 0.0, "statistics": False},
        argument: value,
    }
    with pytest.raises((ValueError, RuntimeError), match=argument) as caught:
        torch.ops.g2rl.head_features(**arguments)
    assert "missing value" not in str(caught.value)


@pytest.mark.parametrize(
    "members", [[[0, 6]], [[0, 2**40]], [[0, 1], [1, 2]]], ids=["beyond", "far beyond", "twice"]
)
def test_operator_group_geometry(members):
    args = (torch.tensor(members), 0.5, 3.0, 1, 0, 1, True, 1e-6)
    with pytest.raises((ValueError, RuntimeError), match="members"):
        torch.ops.g2rl.group_geometry(torch.randn(6, 4), torch.ones(6), *args)


@pytest.mark.parametrize("name", ["avx1024", "best"])
def test_unknown_instruction_set(name):
    with environment("G2RL_CPU_ISA", name), pytest.raises((ValueError, RuntimeError), match="G2RL_CPU_ISA"):
        g2.head_features(**head_arguments())


def test_a_double_bias_needs_a_double_hidden():
    case = make_case([3], V=V, d=D)
    bias = torch.zeros(V, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"bias: got torch\.float64"):
        g2.linear_logprobs(case.hidden, case.weight, case.tokens, bias=bias)
    g2.linear_logprobs(case.hidden.double(), case.weight.double(), case.tokens, bias=bias)


@pytest.mark.parametrize("backend", [["cpu"], {}, 3], ids=repr)
def test_a_backend_that_is_not_a_name(backend):
    case = make_case([3], V=V, d=D)
    with pytest.raises(ValueError, match="backend: got"):
        g2.linear_logprobs(case.hidden, case.weight, case.tokens, backend=backend)
