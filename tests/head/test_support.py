"""`support=`: heads restricted to some ids a token, against the masked softmax in float64 (oracle.logits)."""

import pytest
import torch
from examples import given, st
from marks import dtypes
from oracle import CPU_BACKENDS, Case, Sizes, make_case, run_head
from strategies import LAYOUTS, cases, low_rank, random_support, restricted, restride
from test_head import KINDS, hostile
from test_head import check as check_features
from test_linear_logprobs import check as check_logprobs
from test_linear_logprobs import ours, plain
from test_statistics import ALL, assert_exact, run_features, run_logprobs

import g2rl_kernels as g2
from g2rl_kernels import arguments
from g2rl_kernels._ops import ops
from g2rl_kernels.head.support.backend import BACKENDS, SupportBackend
from g2rl_kernels.head.support.backend import backend as implementation
from g2rl_kernels.head.support.spec import Support

NOT_TRITON = [("reference", None), *CPU_BACKENDS]
backends = pytest.mark.parametrize("backend", NOT_TRITON, ids=lambda backend: backend[1] or backend[0])


def check(case: Case, backend: tuple[str, str | None]) -> g2.HeadFeatures:
    check_logprobs(case, backend)
    return check_features(case, backend)


@st.composite
def restricted_cases(draw: st.DrawFn) -> Case:
    case = restricted(draw(cases()), draw(st.integers(0, 99)), draw(st.sampled_from((1, 3, 40, None))))
    dtype = st.sampled_from((torch.int32, torch.int64))
    ids, offsets = case.support
    return case.replace(support=(ids.to(draw(dtype)), offsets.to(draw(dtype))))


@backends
@given(restricted_cases())
def test_any_case(backend, case):
    check(case, backend)


@backends
@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_rows(backend, dtype, kind):
    """Peaked, flat, all negative, masked: the realised token is one of few or of many."""
    case = hostile(kind, dtype)
    lengths = torch.tensor([30, 2, 1, 5, 67, 12, 67, 3])  # of token 0, which may be masked, more than itself
    case = case.replace(support=random_support(case, lengths, torch.Generator().manual_seed(0)))
    out = check_features(case, backend)
    assert (out.logprobs <= 0).all()
    assert (out.entropy >= 0).all()
    if kind != "the realised masked":  # its gradient's oracle is NaN, as for the full head
        check_logprobs(case, backend)


@backends
@dtypes
def test_lists_longer_than_a_block_of_rows(backend, dtype):
    """csrc/cpu/support.cpp takes 512 KB of rows at a time; the largest logit may come in any block."""
    case = make_case([5, 0, 3], V=900, d=1500, dtype=dtype)
    case.weight[-1] = 4 * case.hidden[0].float().div(case.hidden[0].float().norm())
    case = case.replace(support=random_support(case, torch.tensor([900] * 8), torch.Generator()))
    case = case.replace(support=(torch.arange(900).repeat(8), case.support[1]))  # ascending: the last id last
    check(case.replace(lora=low_rank(case, 5, torch.float32)), backend)


@backends
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, dtype, layout):
    case = make_case([20], V=31, d=70, dtype=dtype, bias=torch.randn(62)[::2])
    case = restricted(
        case.replace(hidden=restride(case.hidden, layout), weight=restride(case.weight, layout))
    )
    check(case, backend)


@backends
@pytest.mark.parametrize("lengths", [[], [0, 0], [0, 5, 0, 3, 0]], ids=str)
def test_empty_responses(backend, lengths):
    out = check(restricted(make_case(lengths, V=19, d=5)), backend)
    for s, length in enumerate(lengths):
        assert length or not out.features[s].any()


@backends
def test_all_ids_are_the_full_head(backend):
    case = make_case([7, 2], V=310, d=16, bias=torch.randn(310), temperature=0.7)
    every = torch.arange(310).repeat(9), torch.arange(10) * 310
    full, mine = run_head(case, backend), run_head(case.replace(support=every), backend)
    for a, b in zip(full, mine):
        torch.testing.assert_close(a, b, rtol=1e-4 if backend[0] == "cpu" else 1e-5, atol=1e-5)


@backends
def test_a_token_alone_in_its_list_is_certain(backend):
    case = make_case([6], V=40, d=8)
    case = case.replace(support=(case.tokens, torch.arange(7)))
    out = run_head(case, backend)
    assert not out.logprobs.any()
    assert not out.entropy.any()
    assert not out.features.any()
    results = ours(case, (torch.randn(6), torch.randn(6)), backend)
    assert not results["hidden"].any()
    assert not results["weight"].any()


@backends
def test_near_certain_tokens_keep_their_digits(backend):
    """z = (30, 0, 0, 0): 1 - p = 3 e^-30, of which p - 1 in float32 has no digit left."""
    weight = torch.zeros(67, 2)
    weight[5, 0] = 30.0
    hidden = torch.tensor([[1.0, 0.0]])
    case = Case(hidden, weight, torch.tensor([5]), torch.tensor([0, 1]))
    case = case.replace(support=(torch.tensor([60, 5, 3, 0]), torch.tensor([0, 4])))
    tail = 3 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    close = {"rtol": 1e-5, "atol": 0.0}
    results = ours(case, (torch.ones(1), torch.zeros(1)), backend)
    torch.testing.assert_close(-results["logprobs"][0].double(), tail, **close)
    torch.testing.assert_close(results["entropy"][0].double(), 31 * tail, **close)
    torch.testing.assert_close(results["hidden"][0, 0].double(), 30 * tail, **close)
    torch.testing.assert_close(results["weight"][5, 0].double(), tail, **close)
    torch.testing.assert_close(run_head(case, backend).features[0, 0].double(), 30 * tail, **close)


@backends
@given(restricted_cases())
def test_statistics(backend, case):
    found = run_features(case, backend, statistics=ALL), run_logprobs(case, backend, statistics=ALL)
    assert_exact(case, *found)


@backends
def test_of_equal_logits_the_first_id(backend):
    case = make_case([2], V=30, d=4).replace(hidden=torch.zeros(2, 4), tokens=torch.tensor([7, 20]))
    case = case.replace(support=(torch.tensor([9, 7, 8, 20, 4, 11]), torch.tensor([0, 3, 6])))
    for out in (run_features(case, backend, statistics=ALL), run_logprobs(case, backend, statistics=ALL)):
        assert out.top_token.tolist() == [7, 4]


def test_exact_in_float64():
    case = make_case([30], V=201, d=8, dtype=torch.float64, bias=torch.randn(201, dtype=torch.float64))
    case = restricted(case.replace(temperature=0.6, logit_scale=1.5, logit_softcap=4.0))
    grads = (torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64))
    exact, actual = plain(case, grads, torch.float64), ours(case, grads)
    for name, value in actual.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 3), (7, 3), (7,))]
    support = torch.tensor([0, 4, 6, 2, 3, 1, 5]), torch.tensor([0, 2, 6, 7])

    def function(hidden, weight, bias):
        options = {"bias": bias, "temperature": 0.7, "logit_scale": 1.3, "logit_softcap": softcap}
        return tuple(g2.linear_logprobs(hidden, weight, torch.tensor([0, 3, 5]), support=support, **options))

    assert torch.autograd.gradcheck(function, inputs)


# --- the same bits ------------------------------------------------------------------------------------------


@backends
@dtypes
def test_threads_and_runs_change_no_bit(backend, dtype):
    case = restricted(make_case([300, 200], V=2001, d=70, dtype=dtype, bias=torch.randn(2001)), most=60)
    grads = torch.randn(500), torch.randn(500)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append([*ours(case, grads, backend).values(), *run_head(case, backend)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=lambda backend: backend[1])
@dtypes
def test_a_token_or_response_alone_has_the_same_bits(backend, dtype):
    case = restricted(make_case([9, 30, 11], V=301, d=70, dtype=dtype, temperature=0.3 + torch.rand(50)))
    grads = torch.randn(50), torch.randn(50)
    whole, features = ours(case, grads, backend), run_head(case, backend)
    support = Support(*case.support)
    for s, (begin, end) in enumerate(((0, 9), (9, 39), (39, 50))):
        rows = torch.arange(begin, end)
        part = case.replace(
            hidden=case.hidden[rows],
            tokens=case.tokens[rows],
            temperature=case.temperature[rows],
            cu_seqlens=torch.tensor([0, end - begin]),
            support=support.of(rows)[:2],
        )
        found = ours(part, (grads[0][rows], grads[1][rows]), backend)
        for name in ("logprobs", "entropy", "hidden"):
            assert torch.equal(found[name], whole[name][rows]), name
        assert torch.equal(run_head(part, backend).features[0], features.features[s])


# --- memory, gradients, compilers ---------------------------------------------------------------------------


@backends
def test_memory_is_bounded_by_the_kept_ids(backend):
    N, V, d, kept = 3000, 20011, 32, 5
    hidden, weight = torch.randn(N, d).bfloat16().requires_grad_(), torch.randn(V, d).bfloat16()
    tokens = torch.randint(V // kept, (N,))
    ids = (tokens[:, None] + torch.arange(kept) * (V // kept)).flatten()
    with Sizes() as sizes:
        out = g2.linear_logprobs(
            hidden, weight, tokens, support=(ids, torch.arange(N + 1) * kept), backend=backend[0]
        )
        (out.logprobs.sum() + out.entropy.sum()).backward()
        cu_seqlens = torch.tensor([0, N])
        g2.head_features(
            hidden.detach(), weight, tokens, cu_seqlens, support=(ids, torch.arange(N + 1) * kept),
            backend=backend[0],
        )  # fmt: skip
    assert len(sizes.made) > 20  # it did look inside
    assert max(size for _, size in sizes.made) <= 2**20  # N V is 60 million, K d half a million


def test_only_kept_rows_get_a_gradient():
    case = make_case([6], V=50, d=8, bias=torch.randn(50))
    case = case.replace(support=random_support(case, torch.full((6,), 4), torch.Generator().manual_seed(0)))
    results = ours(case, (torch.randn(6), torch.randn(6)))
    kept = case.kept.any(0)
    for name in ("weight", "bias"):
        assert (results[name].flatten(1).abs().sum(1) if name == "weight" else results[name].abs())[
            kept
        ].all()
        assert not results[name][~kept].any()


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained):
    case = restricted(make_case([5], V=11, d=4, bias=torch.randn(11)))
    full = ours(case, (torch.ones(5), torch.ones(5)))
    leaves = {name: getattr(case, name).clone() for name in ("hidden", "weight", "bias")}
    leaves[trained].requires_grad_()
    options = {"bias": leaves["bias"], "support": case.support}
    out = g2.linear_logprobs(leaves["hidden"], leaves["weight"], case.tokens, **options)
    (out.logprobs + out.entropy).sum().backward()
    torch.testing.assert_close(leaves[trained].grad, full[trained])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != trained)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled(backend):
    """The same bits; a token that is not in its own list, which is not checked then, is NaN, and no other."""
    torch._dynamo.reset()
    case = restricted(make_case([9, 4], V=70, d=16, bias=torch.randn(70)), most=20)

    def step(hidden, tokens, ids, offsets):
        options = {"bias": case.bias, "support": (ids, offsets), "backend": backend}
        out = g2.linear_logprobs(hidden, case.weight, tokens, **options)
        features = g2.head_features(hidden.detach(), case.weight, tokens, case.cu_seqlens, **options)
        return out.logprobs.nansum() + out.entropy.nansum(), out.logprobs.detach(), features.features

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        hidden = case.hidden.clone().requires_grad_()
        loss, *found = function(hidden, case.tokens, *case.support)
        loss.backward()
        results.append([*found, hidden.grad])
    assert all(map(torch.equal, *results))
    ids, offsets = case.support
    wrong = ids.clone()
    mine = slice(int(offsets[8]), int(offsets[9]))
    wrong[mine] = torch.where(wrong[mine] == case.tokens[8], 69 - wrong[mine], wrong[mine])
    _, logprobs, features = compiled(case.hidden.clone().requires_grad_(), case.tokens, wrong, offsets)
    assert logprobs.isnan().nonzero().tolist() == [[8]]
    assert features.isnan().all(1).tolist() == [True, False]
    assert torch.equal(features[1], results[0][1][1])


# --- tokens that take the whole vocabulary ------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("which", ["some", "all", "none"])
def test_whole(backend, which):
    """Empty lists marked `whole` have the full softmax; each gets its own."""
    case = make_case([9, 0, 8, 4], V=70, d=16, bias=torch.randn(70), token_weights=torch.rand(21))
    case = case.replace(lora=low_rank(case, 3, torch.float32), temperature=0.5 + torch.rand(21))
    case = restricted(case, most=20)
    whole = {"some": torch.arange(21) % 3 == 1, "all": torch.ones(21).bool(), "none": torch.zeros(21).bool()}[
        which
    ]
    whole[9:17] = which != "none"  # a response without a list
    lists = Support(*case.support)
    kept = lists.of((~whole).nonzero().squeeze(1))
    lengths = lists.offsets.diff().masked_fill(whole, 0)
    mixed = (kept.ids, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), whole)
    every = case.replace(support=None)
    # The oracle: all ids written out.
    ids = [
        torch.arange(70) if full else lists.ids[lists.offsets[t] : lists.offsets[t + 1]]
        for t, full in enumerate(whole.tolist())
    ]
    oracle = case.replace(support=(torch.cat(ids), torch.tensor([0, *map(len, ids)]).cumsum(0)))
    grads = torch.randn(21), torch.randn(21)
    for case_ in (oracle, every.replace(support=mixed)):
        out = run_head(
            case_,
            (backend, None),
        )
        stats = g2.head_features(
            case_.hidden, case_.weight, case_.tokens, case_.cu_seqlens, backend=backend, statistics=ALL,
            token_weights=case_.token_weights, **case_.head,
        )  # fmt: skip
        found = [*out, *stats, *ours(case_, grads, (backend, None)).values()]
        if case_ is oracle:
            expected = found
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


WHOLE = {"none": lambda t: t < 0, "all": lambda t: t >= 0, "some": lambda t: t % 3 == 1}


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float32), ("cpu", torch.bfloat16)])
def test_whole_compiled(backend, dtype):
    """One graph, whatever values say; the same bits, forward and backward, with the logits that are kept."""
    torch._dynamo.reset()
    case = make_case([9, 4], V=700, d=16, dtype=dtype, bias=torch.randn(700).to(dtype))
    case.temperature = 0.5 + torch.rand(13)
    kept = Support(*restricted(case, most=20).support)
    A, B = torch.randn(3, 16), torch.randn(700, 3)

    def step(leaves, support):
        hidden, weight, bias, A, B = leaves
        options = {"temperature": case.temperature, "bias": bias, "lora": (A, B, 0.5), "backend": backend}
        options |= {"support": support, "statistics": ALL}
        out = g2.linear_logprobs(hidden, weight, case.tokens, logits_memory=20_000, **options)
        features = g2.head_features(hidden, weight, case.tokens, case.cu_seqlens, **options)
        return out, features, (out.logprobs + 2 * out.entropy).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for which in WHOLE.values():
        whole = which(torch.arange(13))
        listed = kept.of((~whole).nonzero().squeeze(1))
        lengths = kept.offsets.diff().masked_fill(whole, 0)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        support = g2.SamplingSupport(listed.ids, offsets, whole, torch.zeros(13).bool())
        results = []
        for function in (step, compiled):
            leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias, A, B)]
            out, features, loss = function(leaves, support)
            loss.backward()
            results.append([*out, *features, *(leaf.grad for leaf in leaves)])
        assert all(map(torch.equal, *results))
    arguments = case.hidden, case.tokens, *case.spec, *support[:3]
    torch.library.opcheck(ops.mixed_features.default, (*arguments, case.cu_seqlens, None, backend, "", True))
    # Room for logits that no token needs has no value to compare: 0 bytes.
    torch.library.opcheck(ops.mixed_logprobs.default, (*arguments, backend, "", 13, 0, False))


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_what_the_protocol_asks_for(name):
    if name == "triton" and not arguments.HAS_TRITON:
        pytest.skip("needs triton")
    asked = [key for key in vars(SupportBackend) if not key.startswith("_")]
    assert len(asked) == 6
    assert all(callable(getattr(implementation(name), key)) for key in asked)


# --- errors -------------------------------------------------------------------------------------------------

GOOD = torch.tensor([3, 1, 2, 0, 4]), torch.tensor([0, 2, 4, 5])  # of tokens 1, 2, 4; V = 6
WRONG = {
    "a list of one tensor": ((GOOD[0],), "support: got 1 values, needs .ids .K., offsets"),
    "a tensor": (GOOD[0], "support: got Tensor, needs"),
    "ids of floats": ((GOOD[0].float(), GOOD[1]), "support: ids: got torch.float32"),
    "ids of two dimensions": ((GOOD[0][None], GOOD[1]), r"support: ids: got shape \[1, 5\], needs \[K\]"),
    "offsets of another N": ((GOOD[0], GOOD[1][:3]), r"support: offsets: got shape \[3\]"),
    "offsets that begin late": ((GOOD[0], torch.tensor([1, 2, 4, 5])), "offsets: got 1 to 5, needs 0 to 5"),
    "offsets that end early": ((GOOD[0], torch.tensor([0, 2, 4, 4])), "offsets: got 0 to 4, needs 0 to 5"),
    "offsets that fall": ((GOOD[0], torch.tensor([0, 4, 2, 5])), "offsets: entry 2 is below entry 1"),
    "an empty list": ((GOOD[0], torch.tensor([0, 2, 2, 5])), "token 1 has an empty list"),
    "without the token": ((torch.tensor([3, 1, 5, 0, 4]), GOOD[1]), "the list of token 1 lacks .* token, 2"),
    "an id twice": ((torch.tensor([3, 1, 2, 2, 4]), GOOD[1]), "list of token 1 has id 2 twice"),
    "twice, apart": (
        (torch.tensor([3, 1, 2, 4, 3, 4]), torch.tensor([0, 2, 3, 6])),
        "token 2 has id 4 twice",
    ),
    "an id beyond V": (
        (torch.tensor([3, 1, 2, 6, 4]), GOOD[1]),
        r"ids: entry 3 is 6, needs to be in \[0, 6\)",
    ),
    "an id below 0": ((torch.tensor([3, 1, 2, -1, 4]), GOOD[1]), "ids: entry 3 is -1"),
    "whole of a list": (
        (*GOOD, torch.tensor([True, False, False])),
        "whole: entry 0 is True, but its list has 2",
    ),
    "whole of integers": ((*GOOD, torch.tensor([1, 0, 0])), "support: whole: got torch.int64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_support(name):
    support, message = WRONG[name]
    tokens, hidden, weight = torch.tensor([1, 2, 4]), torch.randn(3, 4), torch.randn(6, 4)
    g2.linear_logprobs(hidden, weight, tokens, support=GOOD)
    for call in (
        lambda: g2.linear_logprobs(hidden, weight, tokens, support=support),
        lambda: g2.head_features(hidden, weight, tokens, torch.tensor([0, 3]), support=support),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
