"""topk_features: against its definition in float64, the exact feature that it estimates, and its bound."""

import re
from functools import partial

import pytest
import torch
from marks import dtypes
from oracle import Case, Sizes, autograd_head, logits, make_case

import g2rl_kernels as g2
from g2rl_kernels.head import spec, topk

LENGTHS = [5, 0, 1, 17, 9]
V, D = 60, 24
renormalised = pytest.mark.parametrize("renormalise", [True, False], ids=["renormalised", "as_reported"])


def case_of(kind: str, dtype: torch.dtype = torch.float32) -> Case:
    case = make_case(LENGTHS, V, D, dtype)
    if kind == "peaked":
        case.hidden = case.hidden * 8
    elif kind == "flat":
        case.hidden = case.hidden * 0.01
    elif kind == "all negative":
        case.bias = torch.full((V,), -50.0)
    elif kind == "masked":
        case.bias = torch.zeros(V).masked_fill(torch.arange(V) % 3 == 1, -torch.inf)
        case.tokens = case.tokens // 3 * 3
    return case


KINDS = ("plain", "peaked", "flat", "all negative", "masked")


def log_p(case: Case) -> torch.Tensor:
    """[N, V], in float64."""
    double = case.double.replace(lora=None)
    return logits(double, double.hidden, case.merged, double.bias).log_softmax(1)


def reports(case: Case, k: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """What a sampler reports: top_ids [N, k], top_logprobs [N, k] and token_logprobs [N]."""
    values = log_p(case)
    top = values.topk(k)
    own = values.gather(1, case.tokens[:, None])[:, 0]
    return top.indices, top.values.to(dtype), own.to(dtype)


def estimate(case: Case, reported: tuple[torch.Tensor, ...], **options) -> g2.TopkFeatures:
    return g2.topk_features(
        case.weight,
        case.tokens,
        *reported,
        case.cu_seqlens,
        logit_scale=case.logit_scale,
        lora=case.lora,
        token_weights=case.token_weights,
        **options,
    )


def definition(
    case: Case, reported: tuple[torch.Tensor, ...], renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """features [S, d] and missing_mass [S] in float64, over a dense q [N, V]."""
    top_ids, top_logprobs, own = reported
    q = torch.zeros(len(case.tokens), V, dtype=torch.float64)
    for t, row in enumerate(top_ids.tolist()):
        for v, value in zip(row, top_logprobs[t].double()):
            if v >= 0:
                q[t, v] = value.exp()
        q[t, case.tokens[t]] = own[t].double().exp()
    mass = 1 - q.sum(1)
    if renormalise:
        q = q / q.sum(1, keepdim=True)
    phi = case.logit_scale * (case.merged[case.tokens] - q @ case.merged)
    return sum_responses(case, phi), sum_responses(case, mass[:, None])[:, 0]


def sum_responses(case: Case, values: torch.Tensor) -> torch.Tensor:
    """[S, ...], the weighted means of eq. 8."""
    sums = torch.zeros(len(case.lengths), values.shape[1], dtype=torch.float64)
    return sums.index_add(0, case.segment, case.token_share[:, None] * values)


def radius(case: Case) -> float:
    return case.logit_scale * float(case.merged.norm(dim=1).max())


def diameter(case: Case) -> float:
    return case.logit_scale * float(torch.cdist(case.merged, case.merged).max())


def assert_by_definition(case: Case, reported: tuple[torch.Tensor, ...], renormalise: bool) -> None:
    out = estimate(case, reported, renormalise=renormalise)
    features, mass = definition(case, reported, renormalise)
    assert out.features.dtype == out.missing_mass.dtype == torch.float32
    torch.testing.assert_close(out.features.double(), features, rtol=0, atol=2e-6 * radius(case))
    torch.testing.assert_close(out.missing_mass.double(), mass.clamp(min=0), rtol=1e-6, atol=1e-7)
    assert (out.missing_mass >= 0).all()


@renormalised
@pytest.mark.parametrize("k", [1, 7, V])
@pytest.mark.parametrize("kind", KINDS)
def test_by_definition(kind, k, renormalise):
    case = case_of(kind)
    assert_by_definition(case, reports(case, k), renormalise)


@dtypes
@renormalised
def test_every_dtype_with_options(dtype, renormalise):
    """A low-rank part, a scale, temperatures and weights; log-probs in 16 bits count as they are."""
    case = case_of("plain", dtype)
    g = torch.Generator().manual_seed(3)
    A, B = torch.randn(4, D, generator=g), torch.randn(V, 4, generator=g).to(dtype)
    N = len(case.tokens)
    case.lora, case.logit_scale, case.temperature = (A, B, 0.3), 0.7, 0.5 + torch.rand(N, generator=g)
    case.token_weights = torch.rand(N, generator=g).to(dtype) * (torch.arange(N) % 4 > 0)
    case.token_weights[:5] = 0
    reported = reports(case, 7, dtype)
    assert_by_definition(case, reported, renormalise)
    out = estimate(case, reported, renormalise=renormalise)
    assert not out.features[0].any()
    assert not out.missing_mass[0]
    narrow = estimate(
        case.replace(tokens=case.tokens.int(), cu_seqlens=case.cu_seqlens.int()),
        (reported[0].int(), *reported[1:]),
        renormalise=renormalise,
    )
    assert torch.equal(narrow.features, out.features)


@renormalised
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_vocabulary_gives_head_features(kind, renormalise):
    case = case_of(kind)
    case.temperature = 0.7
    out = estimate(case, reports(case, V), renormalise=renormalise)
    exact = g2.head_features(case.hidden, case.weight, case.tokens, case.cu_seqlens, **case.head)
    torch.testing.assert_close(out.features, exact.features, rtol=0, atol=2e-5 * radius(case))
    assert (out.missing_mass < 2e-6).all()
    if kind != "flat":
        case.temperature = 1.0
        assert (out.features - autograd_head(case).features).abs().max() > 1e-3 * radius(case)


@renormalised
@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound(kind, k, renormalise):
    """It holds against the exact feature, and says something: within a factor of 50 of the error."""
    case = case_of(kind)
    case.token_weights = torch.rand(len(case.tokens))
    reported = reports(case, k)
    out = estimate(case, reported, renormalise=renormalise)
    error = (out.features.double() - autograd_head(case).features).norm(dim=1)
    bound = out.missing_mass.double() * (diameter(case) if renormalise else radius(case))
    assert (error <= bound + 1e-5 * radius(case)).all()
    if kind != "peaked":  # little is missing there
        full = torch.tensor(case.lengths) > 0
        assert (error[full] > 0.02 * bound[full]).all()


@renormalised
def test_the_bound_is_attained(renormalise):
    """Reported rows at one end of the diameter, missing ones at the other: no smaller constant will do."""
    case = case_of("plain")
    reported = reports(case, 9)
    case.weight = case.weight * 0 + torch.eye(D)[0]  # hidden states do not matter: the p are given
    seen = torch.zeros(V, dtype=torch.bool)
    seen[reported[0][0]] = seen[case.tokens[0]] = True
    case.weight[~seen] = -case.weight[0]
    one = Case(case.hidden[:1], case.weight, case.tokens[:1], torch.tensor([0, 1]))
    ids, logprobs, own = (part[:1] for part in reported)
    out = estimate(one, (ids, logprobs, own), renormalise=renormalise)
    p = log_p(case_of("plain"))[0].exp()
    exact = one.weight[one.tokens[0]].double() - p @ one.weight.double()
    error = float((out.features[0].double() - exact).norm())
    constant = diameter(one) if renormalise else radius(one)
    assert constant == pytest.approx(2 if renormalise else 1)
    assert error == pytest.approx(float(out.missing_mass[0]) * constant, rel=1e-5)
    assert out.missing_mass[0] > 0.1


@renormalised
def test_the_realised_token_counts_once(renormalise):
    """In the list or not, whatever stands there for it: token_logprobs say what its probability is."""
    case = case_of("plain")
    ids, logprobs, own = reports(case, 9)
    inside = ids.clone()
    inside[:, 4] = torch.where((ids == case.tokens[:, None]).any(1), ids[:, 4], case.tokens)
    assert (inside == case.tokens[:, None]).any(1).all()
    here = inside == case.tokens[:, None]
    removed = torch.where(here, -1, inside)
    expected = estimate(case, (removed, logprobs, own), renormalise=renormalise)
    for value in (own[:, None], -20.0, -torch.inf, torch.nan, 7.0):
        listed = torch.where(here, torch.as_tensor(value), logprobs)
        out = estimate(case, (inside, listed, own), renormalise=renormalise)
        assert all(map(torch.equal, out, expected))
    assert_by_definition(case, (removed, logprobs, own), renormalise)


@renormalised
def test_padding_counts_for_nothing(renormalise):
    case = case_of("plain")
    case.weight[0] = torch.inf  # a row that no token refers to
    case.tokens = case.tokens.clamp(min=1)
    ids, logprobs, own = reports(case_of("plain"), 9)
    ids = torch.where((ids == 0) | (torch.arange(9) > 5), -1, ids)
    reported = ids, logprobs.masked_fill(ids < 0, -torch.inf), own
    out = estimate(case, reported, renormalise=renormalise)
    assert torch.isfinite(out.features).all()
    for anything in (torch.nan, 7.0):
        other = ids[:, :6], torch.where(ids < 0, anything, logprobs)[:, :6], own
        assert torch.equal(estimate(case, other, renormalise=renormalise).features, out.features)
    case.weight[0] = 0.0
    assert_by_definition(case, reported, renormalise)


@renormalised
def test_nothing_reported_and_nothing_to_report(renormalise):
    case = case_of("plain")
    none = torch.full((len(case.tokens), 3), -1)
    own = reports(case, 1)[2]
    out = estimate(case, (none, torch.zeros(none.shape), own), renormalise=renormalise)
    p = own.double().exp()
    torch.testing.assert_close(out.token_missing_mass.double(), 1 - p)
    phi = 0 * p if renormalise else 1 - p
    expected = sum_responses(case, phi[:, None] * case.weight[case.tokens].double())
    torch.testing.assert_close(out.features.double(), expected, rtol=1e-5, atol=1e-6)
    no_columns = estimate(case, (none[:, :0], none[:, :0].float(), own), renormalise=renormalise)
    assert torch.equal(no_columns.features, out.features)
    lost = estimate(case, (none, none.float(), own - torch.inf), renormalise=renormalise)
    assert torch.isfinite(lost.features).all()
    assert (lost.token_missing_mass == 1).all()
    for lengths, rows in (([], 0), ([0, 0], 2)):
        empty = make_case(lengths, V, D)
        empty.cu_seqlens = torch.zeros(rows + 1, dtype=torch.int64)
        out = estimate(empty, (none[:0], none[:0].float(), own[:0]), renormalise=renormalise)
        assert [list(part.shape) for part in out] == [[rows, D], [rows], [0]]
        assert not out.features.any()


def test_the_mass_of_a_sampler_that_rounds_up_is_not_negative():
    case = case_of("peaked")
    ids, logprobs, own = reports(case, 9)
    out = estimate(case, (ids, (logprobs + 0.004).clamp(max=0), own))
    exact = 1 - log_p(case).gather(1, ids).exp().sum(1)
    assert (exact < 0.003).any()  # the list adds up to more than 1
    assert (out.token_missing_mass >= 0).all()
    assert (out.missing_mass >= 0).all()


@renormalised
def test_a_token_that_is_nearly_certain(renormalise):
    """Its feature is 1e-14 of a row in size, to all digits."""
    case = make_case([1], V, D)
    y, v = int(case.tokens[0]), (int(case.tokens[0]) + 1) % V
    own, other = torch.tensor([-1e-14]), torch.tensor([[torch.tensor(6e-15).log()]])
    out = estimate(case, (torch.tensor([[v]]), other, own), renormalise=renormalise)
    w = case.weight.double()
    expected = 6e-15 * (w[y] - w[v]) if renormalise else 1e-14 * w[y] - 6e-15 * w[v]
    torch.testing.assert_close(out.features[0].double(), expected, rtol=1e-4, atol=1e-20)
    torch.testing.assert_close(out.missing_mass[0].double().item(), 4e-15, rtol=1e-4, atol=0.0)


# --- bits, memory, wrong input ------------------------------------------------------------------------------


@dtypes
def test_the_same_bits_in_any_batch_and_layout(dtype, monkeypatch):
    case = case_of("plain", dtype)
    reported = reports(case, 9)
    out = estimate(case, reported)
    for s, (start, stop) in enumerate(zip(case.cu_seqlens[:-1].tolist(), case.cu_seqlens[1:].tolist())):
        alone = Case(
            case.hidden[start:stop], case.weight, case.tokens[start:stop], torch.tensor([0, stop - start])
        )
        found = estimate(alone, tuple(part[start:stop] for part in reported))
        assert torch.equal(found.features[0], out.features[s])
        assert torch.equal(found.missing_mass[0], out.missing_mass[s])
    strided = case.replace(weight=case.weight.T.contiguous().T)
    spread = tuple(torch.stack([part, part], dim=-1)[..., 0] for part in reported)
    torch.testing.assert_close(estimate(strided, spread).features, out.features, rtol=0, atol=1e-6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(estimate(case, reported).features, out.features)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(topk, "elements", lambda _: 3 * 10 * D)  # chunks of three tokens
    assert torch.equal(estimate(case, reported).features, out.features)
    monkeypatch.setattr(topk, "elements", lambda _: 4 * D)  # a token in three parts
    torch.testing.assert_close(estimate(case, reported).features, out.features, rtol=0, atol=1e-6)


@dtypes
def test_memory_is_bounded(dtype):
    N, k, d = 700, 64, 256
    case = make_case([N], 100, d, dtype)
    ids = torch.stack([torch.randperm(100)[:k] for _ in range(N)])
    reported = ids, torch.full((N, k), -5.0), torch.full((N,), -2.0)
    with Sizes() as sizes:
        estimate(case, reported)
    assert N * k * d > 10 * 2**20
    assert max(count for _, count in sizes.made) <= 2**20


def test_many_responses_cost_no_more_than_their_tokens(monkeypatch):
    """A chunk of tokens adds to its own responses: [S, d] is not walked once a chunk."""
    case = make_case([1, 0] * 150, V, D)
    reported = reports(case, 9)
    expected = estimate(case, reported)
    monkeypatch.setattr(topk, "elements", lambda _: 2 * 10 * D)
    with Sizes() as sizes:
        out = estimate(case, reported)
    assert torch.equal(out.features, expected.features)
    assert sum(count >= 300 * D for _, count in sizes.made) < 10  # of 75 chunks
    monkeypatch.setattr(topk, "may_read_values", lambda _: False)
    assert torch.equal(estimate(case, reported).features, expected.features)


def test_nan_stays_in_its_response():
    case = case_of("plain")
    ids, logprobs, own = reports(case, 9)
    logprobs[7, 3] = torch.nan
    ids[7, 3] = next(v for v in range(V) if v not in ids[7] and v != case.tokens[7])
    own[-1] = torch.nan
    out = estimate(case, (ids, logprobs, own))
    assert out.features.isnan().all(1).tolist() == [False, False, False, True, True]
    assert out.missing_mass.isnan().tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("wrong", [-2, V, 2**40, -(2**40)])
@pytest.mark.parametrize("where", ["top_ids", "tokens"])
def test_unchecked_ids_read_nothing_out_of_bounds(monkeypatch, where, wrong):
    case = case_of("plain")
    reported = reports(case, 9)
    expected = estimate(case, reported).features
    monkeypatch.setattr(topk, "may_read_values", lambda _: False)
    (reported[0][7] if where == "top_ids" else case.tokens[7:])[0] = wrong
    out = estimate(case, reported)
    assert out.features[3].isnan().all()
    assert out.missing_mass[3].isnan()
    rest = [0, 1, 2, 4]
    assert torch.equal(out.features[rest], expected[rest])


@pytest.mark.parametrize("offsets", [[5, 0, 20, 32], [0, 40, 3, 32], [-9, 3, 3, 50], [2**40, 0, -(2**40)]])
def test_unchecked_offsets_read_nothing_out_of_bounds(monkeypatch, offsets):
    """Whatever they give, it is made of the tokens there are: every feature is a mean of theirs."""
    case = case_of("plain")
    reported = reports(case, 9)
    bounds = []
    whole = topk.segment_sum
    monkeypatch.setattr(topk, "segment_sum", lambda *args: bounds.append(args[1]) or whole(*args))
    for module in (topk, spec):
        monkeypatch.setattr(module, "may_read_values", lambda _: False)
    out = estimate(case.replace(cu_seqlens=torch.tensor(offsets)), reported)
    assert all((one.diff() >= 0).all() and one[0] >= 0 and one[-1] <= len(case.tokens) for one in bounds)
    assert bounds
    assert (out.features.norm(dim=1) <= diameter(case)).all()


def test_no_gradients_and_no_autocast():
    case = case_of("plain", torch.bfloat16)
    case.lora = (torch.randn(2, D), torch.randn(V, 2), 1.0)
    reported = reports(case, 9)
    expected = estimate(case, reported).features
    case.weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = estimate(case, reported)
    assert torch.equal(out.features, expected)
    assert not out.features.requires_grad


ids = torch.tensor([[0, 1], [2, 3], [-1, -1]])
RIGHT = {
    "weight": torch.ones(V, D),
    "tokens": torch.tensor([0, 1, 2]),
    "top_ids": ids,
    "top_logprobs": torch.full((3, 2), -1.0),
    "token_logprobs": torch.full((3,), -1.0),
    "cu_seqlens": torch.tensor([0, 3]),
}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("weight", torch.ones(V), ValueError, "needs [V, d]"),
        ("weight", torch.ones(V, D).double(), TypeError, "torch.float64"),
        ("weight", None, TypeError, "NoneType"),
        ("tokens", torch.tensor([0, 1]), ValueError, "[2, k]"),
        ("tokens", torch.tensor([[0, 1, 2]]), ValueError, "needs [N]"),
        ("tokens", torch.tensor([0.0, 1, 2]), TypeError, "torch.int64 or torch.int32"),
        ("tokens", torch.tensor([0, 1, V]), ValueError, f"to {V}"),
        ("tokens", torch.tensor([0, 1, 2], device="meta"), ValueError, "device meta"),
        ("top_ids", ids.float(), TypeError, "torch.int64 or torch.int32"),
        ("top_ids", ids[0], ValueError, "a row for each token"),
        ("top_ids", torch.tensor([[0, 1], [2, V], [-1, -1]]), ValueError, f"row 1 has {V}"),
        ("top_ids", torch.tensor([[0, 1], [2, 3], [-1, -2]]), ValueError, "row 2 has -2"),
        ("top_ids", torch.tensor([[0, 1], [3, 3], [-1, -1]]), ValueError, "row 1 has 3 twice"),
        ("top_logprobs", torch.ones(3, 2).long(), TypeError, "floating-point"),
        ("top_logprobs", -torch.ones(3, 1), ValueError, "[N, k]"),
        ("top_logprobs", torch.full((3, 2), 0.5), ValueError, "got 0.5"),
        ("top_logprobs", torch.tensor([[torch.nan, 5.0], [-1, -1], [0, 0]]), ValueError, "got 5"),
        ("token_logprobs", torch.tensor([torch.nan, 0.25, -1.0]), ValueError, "got 0.25"),
        ("token_logprobs", -torch.ones(2), ValueError, "[N], one for each token"),
        ("token_logprobs", torch.tensor([-1.0, 0.25, -1.0]), ValueError, "got 0.25"),
        ("cu_seqlens", torch.tensor([0, 4]), ValueError, "the number of tokens"),
        ("cu_seqlens", torch.tensor([0, 2, 1, 3]), ValueError, "falls from 2 to 1"),
        ("token_weights", torch.ones(2), ValueError, "[N], one for each token"),
        ("token_weights", torch.tensor([1.0, -1.0, 0.0]), ValueError, "entry 1"),
        ("renormalise", 1, TypeError, "needs True or False"),
        ("logit_scale", 0.0, ValueError, "positive"),
        ("lora", (torch.ones(2, D), torch.ones(V - 1, 2), 1.0), ValueError, "B: got shape"),
    ],
)
def test_wrong_input_is_named(name, value, error, message):
    """One error each time, which begins with the argument's name or that of the one that it does not fit."""
    call = partial(g2.topk_features, **RIGHT)
    call()
    expected = "top_ids" if message == "[2, k]" else name
    with pytest.raises(error, match=f"^{expected}: .*{re.escape(message)}"):
        call(**{name: value})


def test_ids_that_are_checked_in_parts_name_their_row(monkeypatch):
    monkeypatch.setattr(topk, "elements", lambda _: 0)
    with pytest.raises(ValueError, match="row 2 has 5 twice"):
        g2.topk_features(**{**RIGHT, "top_ids": torch.tensor([[0, 1], [2, 3], [5, 5]])})
