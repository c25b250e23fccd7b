"""torch.library.opcheck for every operator; torch.compile(fullgraph=True) gives the same bits."""

import pytest
import torch
from oracle import make_case
from strategies import low_rank

import g2rl_kernels as g2
from g2rl_kernels.head.spec import HeadSpec

backends = pytest.mark.parametrize("backend", ["reference", "cpu"])
compiled = {"fullgraph": True, "backend": "aot_eager"}  # inductor's first compilation takes 20 s


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def head_args(dtype=torch.float32, **changes):
    case = make_case([3, 0, 5], V=67, d=16, dtype=dtype)
    args = {
        "hidden": case.hidden,
        "tokens": case.tokens,
        **case.spec._asdict(),
        **case.responses._asdict(),
        "known_logprobs": None,
        "statistics": False,
    }
    args.update(changes)
    return tuple(args.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_head_features(dtype):
    torch.library.opcheck(torch.ops.g2rl.head_features, head_args(dtype))
    full = head_args(
        dtype,
        bias=torch.randn(67),
        token_weights=torch.rand(8),
        known_logprobs=torch.zeros(8),
        temperature=0.7,
        logit_softcap=5.0,
        statistics=True,
    )
    torch.library.opcheck(torch.ops.g2rl.head_features, full)
    torch.library.opcheck(torch.ops.g2rl.features, (*full[:-1], None, "cpu", "", True))
    low = {"low_hidden": torch.randn(8, 3).to(dtype), "low_weight": torch.randn(67, 3).to(dtype)}
    torch.library.opcheck(torch.ops.g2rl.head_features, head_args(dtype, **low))
    torch.library.opcheck(torch.ops.g2rl.features, (*head_args(dtype, **low)[:-1], None, "cpu", "", True))
    torch.library.opcheck(
        torch.ops.g2rl.head_features, head_args(dtype, hidden=torch.randn(16, 8).to(dtype).T)
    )


@pytest.mark.parametrize(("shaping", "scale"), [(1, 0), (2, 1), (3, 2)])
def test_opcheck_group_geometry(shaping, scale):
    members = torch.tensor([[0, 1, 4], [2, 3, -1]])
    args = (torch.randn(6, 5), torch.randn(6).sign(), members, 0.5, 3.0, shaping, 0, scale, True, 1e-6)
    torch.library.opcheck(torch.ops.g2rl.group_geometry, args)


def test_opcheck_group_members():
    torch.library.opcheck(torch.ops.g2rl.group_members, (torch.tensor([3, 3, -1, 7, 3]),))


KEPT = 1 << 20  # room for all logits


@backends
@pytest.mark.parametrize("trained", [(), (0,), (2,), (0, 2, 3), (8, 9), (0, 2, 3, 8, 9)], ids=str)
def test_opcheck_linear_logprobs(trained, backend):
    case = make_case([8], V=67, d=16)
    head = HeadSpec(case.weight, torch.randn(67), 0.7, 1.3, 4.0)
    if 8 in trained:
        head = head._replace(low_hidden=torch.randn(8, 3), low_weight=torch.randn(67, 3))
    args = [case.hidden, case.tokens, *head, backend, "", KEPT]
    for i in trained:
        args[i].requires_grad_()
    for statistics in (False, True):
        torch.library.opcheck(torch.ops.g2rl.linear_logprobs, (*args, statistics))


@backends
def test_opcheck_linear_logprobs_backward(backend):
    case = make_case([8], V=67, d=16)
    case.lora = low_rank(case, 3)
    inputs = (case.hidden, case.tokens, *case.spec, backend, "")
    outputs = torch.ops.g2rl.linear_logprobs(*inputs, KEPT, False)[:4]
    assert bool(outputs[3].numel()) == (backend == "cpu")
    for needs in ((1, 1, 0, 1, 1), (0, 1, 0, 0, 0), (1, 0, 0, 1, 0), (0, 0, 0, 0, 1)):
        needs = map(bool, needs)
        args = (*torch.randn(2, 8), *inputs, *outputs, *needs)
        torch.library.opcheck(torch.ops.g2rl.linear_logprobs_backward, args)


@backends
def test_head_features_compiles_to_the_same_bits(backend):
    case = make_case([3, 0, 5], V=67, d=16, bias=torch.randn(67), token_weights=torch.rand(8))

    def function(case):
        return g2.head_features(
            case.hidden,
            case.weight,
            case.tokens,
            case.cu_seqlens,
            bias=case.bias,
            token_weights=case.token_weights,
            temperature=0.7,
            logit_softcap=4.0,
            backend=backend,
        )

    for eager, traced in zip(function(case), torch.compile(function, **compiled)(case)):
        assert torch.equal(eager, traced)


def test_dynamic_numbers_of_tokens():
    function = torch.compile(g2.head_features, dynamic=True, **compiled)
    for lengths in ([3, 5], [4, 0, 2], [9, 1, 1, 7]):
        case = make_case(lengths, V=67, d=16)
        args = (case.hidden, case.weight, case.tokens, case.cu_seqlens)
        for eager, traced in zip(g2.head_features(*args), function(*args)):
            assert torch.equal(eager, traced)


@pytest.mark.parametrize(
    "groups",
    [{"group_size": 3}, {"group_ids": torch.tensor([0, 0, 4, -1, 4, 0])}],
    ids=["blocks", "ids"],
)
def test_group_geometry_compiles_to_the_same_bits(groups):
    features, rewards = torch.randn(6, 5), torch.randn(6).sign()
    function = torch.compile(lambda *args: g2.group_geometry(*args, **groups, scale="batch"), **compiled)
    for eager, traced in zip(
        g2.group_geometry(features, rewards, **groups, scale="batch"),
        function(features, rewards),
    ):
        assert torch.equal(eager, traced)


def test_linear_logprobs_compiles_to_the_same_bits():
    case = make_case([9], V=67, d=16)
    results = []
    for function in (g2.linear_logprobs, torch.compile(g2.linear_logprobs, **compiled)):
        leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
        logprobs, entropy = function(*leaves, case.tokens, temperature=0.7)
        (logprobs * torch.arange(9) + entropy).sum().backward()
        results.append([logprobs, entropy, *(leaf.grad for leaf in leaves)])
    for eager, traced in zip(*results):
        assert torch.equal(eager, traced)


def test_opcheck_low_hidden():
    for dtype in (torch.float32, torch.bfloat16):
        hidden, A = torch.randn(8, 16).to(dtype).requires_grad_(), torch.randn(3, 16, requires_grad=True)
        torch.library.opcheck(torch.ops.g2rl.low_hidden, (hidden, A, 0.5))
        for needs in ((True, True), (False, True), (True, False)):
            args = (torch.randn(8, 3), hidden.detach(), A.detach(), 0.5, *needs)
            torch.library.opcheck(torch.ops.g2rl.low_hidden_backward, args)


@backends
def test_lora_compiles_to_the_same_bits(backend):
    case = make_case([4, 5], V=67, d=16)
    A, B, scaling = low_rank(case, 3)

    def step(hidden, weight, A, B):
        lora = (A, B, scaling)
        out = g2.linear_logprobs(hidden, weight, case.tokens, lora=lora, backend=backend)
        features = g2.head_features(
            hidden, weight, case.tokens, case.cu_seqlens, lora=lora, backend=backend
        ).features
        return out.logprobs, out.entropy, features

    results = []
    for function in (step, torch.compile(step, **compiled)):
        leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, A, B)]
        logprobs, entropy, features = function(*leaves)
        (logprobs * torch.arange(9) + entropy).sum().backward()
        results.append([logprobs, entropy, features, *(leaf.grad for leaf in leaves)])
    for eager, traced in zip(*results):
        assert torch.equal(eager, traced)


def test_the_whole_step_in_one_graph():
    case = make_case([3, 4, 5, 1], V=67, d=16)

    def step(hidden, weight, tokens, cu_seqlens, rewards):
        features = g2.head_features(hidden, weight, tokens, cu_seqlens).features
        advantages = g2.group_geometry(features, rewards, group_size=2).advantages
        return (g2.linear_logprobs(hidden, weight, tokens).logprobs.sum() * advantages).sum()

    args = (case.hidden, case.weight, case.tokens, case.cu_seqlens, torch.tensor([1.0, -1, 1, 1]))
    assert torch.equal(step(*args), torch.compile(step, **compiled)(*args))


def test_packing_compiles_with_the_head():
    def function(hidden, tokens, mask, weight):
        packed, ids, cu_seqlens = g2.pack_responses(hidden, tokens, mask)
        return (*g2.head_features(packed, weight, ids, cu_seqlens), cu_seqlens)

    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    args = (torch.randn(3, 3, 4), torch.arange(9).view(3, 3), mask, torch.randn(11, 4))
    for eager, traced in zip(function(*args), torch.compile(function, **compiled)(*args)):
        assert torch.equal(eager, traced)


def test_out_of_range_values_are_refused_while_compiled_too():
    """The Python checks are skipped then; the operator's own remain."""
    case = make_case([3, 5], V=67, d=16)
    function = torch.compile(g2.head_features, **compiled)
    with pytest.raises(Exception, match="tokens"):
        function(case.hidden, case.weight, case.tokens + 67, case.cu_seqlens)
    with pytest.raises(Exception, match="cu_seqlens"):
        function(case.hidden, case.weight, case.tokens, case.cu_seqlens + 1)


def test_a_token_that_is_none_gives_nan_where_values_are_not_looked_at():
    case = make_case([4], V=11, d=8)
    hidden = case.hidden.requires_grad_()
    tokens = torch.tensor([1, -100, 2, 11])
    out = torch.compile(lambda h, y: g2.linear_logprobs(h, case.weight, y), **compiled)(hidden, tokens)
    good = torch.tensor([True, False, True, False])
    for values in out:
        assert torch.equal(values.isfinite(), good)
        assert torch.equal(values.isnan(), ~good)
    torch.where(good, out.logprobs, 0.0).sum().backward()  # what is masked out does no harm
    assert hidden.grad.isfinite().all()
    assert torch.equal(hidden.grad.any(1), good)


def test_another_scaling_compiles_too():
    """Dynamo makes a number that changes symbolic, which not every check of it survives."""
    case = make_case([6], V=67, d=16)
    A, B = torch.randn(2, 16), torch.randn(67, 2)

    def logprobs(scaling):
        return g2.linear_logprobs(case.hidden, case.weight, case.tokens, lora=(A, B, scaling)).logprobs

    traced = torch.compile(logprobs, **compiled)
    for scaling in (0.5, 0.7, 3.0):
        assert torch.equal(traced(scaling), logprobs(scaling))
