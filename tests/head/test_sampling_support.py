"""`sampling_support`: against what transformers keeps, and against vLLM's rule written out with all logits.

Each rule keeps the first n entries of a row sorted by logit, so lists are compared by n and by their logits.
Where a cut lies within rounding, n may lie between those for settings a little lower and higher (slack).
"""

import math
import re

import pytest
import torch
from examples import given, settings, st
from oracle import Case, Sizes, logit_size, logits, low_rounding, make_case
from strategies import cases, low_rank

import g2rl_kernels as g2
from g2rl_kernels.head import sampling_support, tiled

SETTINGS = [
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.83},
    {"top_p": 0.9, "min_p": 0.05},
    {"top_k": 50, "min_p": 0.2},
    {"top_k": 50, "top_p": 0.945, "min_p": 0.02},
]
RULES = ("transformers", "vllm")
KINDS = ("random", "peaked", "flat", "equal", "tied", "masked")
NAMES = [" ".join(f"{key}={value}" for key, value in options.items()) for options in SETTINGS]
by_settings = pytest.mark.parametrize("options", SETTINGS, ids=NAMES)
kinds = pytest.mark.parametrize("kind", KINDS)
rules = pytest.mark.parametrize("rules", RULES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def given_logits(z: torch.Tensor, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A head whose logits are exactly z [N, V], rounded to dtype: hidden states that pick a column each."""
    bias = torch.zeros(z.shape[1]).masked_fill((z == -torch.inf).all(0), -torch.inf)
    weight = z.masked_fill(z == -torch.inf, 0.0).T.to(dtype).contiguous()
    return {"hidden": torch.eye(len(z), dtype=dtype), "weight": weight, "bias": bias}


def example(kind: str, dtype: torch.dtype = torch.float32, N: int = 40, V: int = 701) -> torch.Tensor:
    """[N, V], exact in dtype."""
    z = 2 * torch.randn(N, V)
    if kind == "peaked":
        z[torch.arange(N), torch.randint(V, (N,))] += 12
    if kind == "flat":
        z = 0.01 * z
    if kind == "equal":
        z = torch.zeros(N, V)
    if kind == "tied":
        z = z.round()
    if kind == "masked":
        z[:, torch.rand(V) < 0.95] = -torch.inf
    return z.to(dtype).float()


def lists(found: g2.SamplingSupport) -> list[list[int]]:
    """The lists, if all has the documented form."""
    ids, offsets, whole, added = found
    assert (ids.dtype, offsets.dtype) == (torch.int32, torch.int64)
    assert whole.dtype == added.dtype == torch.bool
    assert len(whole) == len(added) == len(offsets) - 1
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    cut = [part.tolist() for part in ids.split(offsets.diff().tolist())] if len(whole) else []
    for entries, all_of_them, one_more in zip(cut, whole.tolist(), added.tolist()):
        assert entries == sorted(set(entries))
        assert all_of_them == (entries == [])
        assert not (all_of_them and one_more)
    return cut


def count(
    z: torch.Tensor, rules: str, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, slack: float = 0.0
) -> int:
    """How many of the entries z [V] stay, in float64, with thresholds that are lower by slack."""
    z = z.double().sort(descending=True).values
    z = z[z > -torch.inf]
    slack_of_log = slack if min_p < 1 else 0.0  # log 1 is exact
    likely = int((z >= z[0] + (math.log(min_p) if min_p else -math.inf) - slack_of_log).sum())
    left = z[:likely] if rules == "vllm" else z
    if 0 < top_k < len(left):
        left = left[:top_k] if rules == "vllm" else left[left >= left[top_k - 1]]
    p = left.softmax(0)
    if top_p < 1:
        left = left[p.cumsum(0) - p < top_p + slack]
    return max(1, min(likely, len(left)))


def bounds(z: torch.Tensor, rules: str, slack: float, **options: float) -> list[tuple[int, int]]:
    return [tuple(count(row, rules, **options, slack=s) for s in (-slack, slack)) for row in z]


def float32_slack(z: torch.Tensor) -> float:
    """What float32 sums of V probabilities, and logits of this size, may differ by."""
    return 2.0**-23 * (z.shape[1] + 4 * float(z.masked_fill(z == -torch.inf, 0.0).abs().max()))


def transformers_keeps(z: torch.Tensor, temperature: float = 1.0, **options: float) -> list[list[int]]:
    """By the processors that `generate` makes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(vocab_size=z.shape[1], num_attention_heads=1, num_key_value_heads=1, **sizes)
    )
    how = transformers.GenerationConfig(do_sample=True, temperature=temperature, **options)
    processors = model._get_logits_processor(generation_config=how, input_ids_seq_length=1)
    assert len(processors) == len(options) + (temperature != 1.0)
    left = processors(torch.zeros(len(z), 1, dtype=torch.int64), z.clone())
    return [row.nonzero().flatten().tolist() for row in left > -torch.inf]


def vllm_keeps(z: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[list[int]]:
    """vLLM 0.32, vllm/v1/worker/gpu/sample/{min_p,states}.py and vllm/v1/sample/ops/topk_topp_triton.py,
    written out with a sort: min_p, the first k, then top_p over what is left; of equals the lowest ids."""
    kept = []
    for row in z.clone():
        if min_p:
            row[row < row.max() + math.log(min_p)] = -torch.inf
        order = row.sort(descending=True, stable=True).indices
        if top_k:
            row[order[top_k:]] = -torch.inf
        p = row[order].softmax(0)
        row[order[p.cumsum(0) - p >= top_p]] = -torch.inf
        kept.append((row > -torch.inf).nonzero().flatten().tolist())
    return kept


# --- against the samplers -----------------------------------------------------------------------------------


@by_settings
@kinds
@dtypes
def test_what_transformers_keeps(options, kind, dtype):
    z = example(kind, dtype)
    theirs = transformers_keeps(z, **options)
    tokens = torch.tensor([entries[-1] for entries in theirs])
    found = g2.sampling_support(**given_logits(z, dtype), tokens=tokens, limit=701, **options)
    limits, exact = bounds(z, "transformers", float32_slack(z), **options), 0
    for row, ours, entries, token, (low, high) in zip(z, lists(found), theirs, tokens.tolist(), limits):
        assert low <= len(entries) <= high, "the test's own rule"
        assert low <= len(ours) <= high
        best = row.sort(descending=True).values
        assert torch.equal(row[ours].sort(descending=True).values, best[: len(ours)])
        assert token in ours
        if "top_p" not in options and low == high:  # top_p: which of equals stay is torch.sort's choice
            assert ours == entries
        exact += low == high
    assert not found.added.any()
    assert exact >= len(z) // 2


@by_settings
@kinds
@dtypes
def test_what_vllm_keeps(options, kind, dtype):
    z = example(kind, dtype)
    theirs, tokens = vllm_keeps(z, **options), z.argmax(1)  # of equals the first, as it keeps them
    found = g2.sampling_support(**given_logits(z, dtype), tokens=tokens, limit=701, rules="vllm", **options)
    limits, exact = bounds(z, "vllm", float32_slack(z), **options), 0
    for ours, entries, (low, high) in zip(lists(found), theirs, limits):
        assert low <= len(entries) <= high, "the test's own rule"
        assert low <= len(ours) <= high
        assert set(ours) <= set(entries) or set(entries) <= set(ours)
        if low == high:
            assert ours == entries
        exact += low == high
    assert not found.added.any()
    assert exact >= len(z) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_responses_of_generate(dtype):
    """Hidden states of a forward over prompt and response; the model's logits are rounded to its dtype."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=300, **sizes, **heads))
    model = model.to(dtype).eval()
    how = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    out = model.generate(
        torch.randint(300, (12, 3)), max_new_tokens=20, min_new_tokens=20, **how, use_cache=False,
        return_dict_in_generate=True, output_scores=True, pad_token_id=0,
    )  # fmt: skip
    with torch.no_grad():
        hidden = model.model(out.sequences[:, :-1]).last_hidden_state[:, 2:].flatten(0, 1)
    theirs = (torch.stack(out.scores, 1) > -torch.inf).flatten(0, 1)
    tokens = out.sequences[:, 3:].flatten()
    del how["do_sample"]
    rounded = None if dtype == torch.float32 else dtype
    found = g2.sampling_support(hidden, model.lm_head.weight, tokens, **how, logits_dtype=rounded)
    # Among rounded logits top_p cuts through equals, of which torch.sort chooses: as many are compared.
    what = set if rounded is None else len
    same = sum(
        what(ours) == what(row.nonzero().flatten().tolist()) for ours, row in zip(lists(found), theirs)
    )
    assert theirs.sum(1).float().mean() > 3
    assert same >= 0.95 * len(tokens)
    assert found.added.sum() <= 0.01 * len(tokens)
    assert not found.whole.any()


# --- against all logits in float64 --------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    cases(),
    st.sampled_from(RULES),
    st.sampled_from((0, 1, 2, 7, 64, 1000)),
    st.sampled_from((1.0, 0.97, 0.5, 0.01)),
    st.sampled_from((0.0, 0.02, 0.3)),
    st.sampled_from((1, 5, 30, 10**6)),
)
def test_any_case(case, rules, top_k, top_p, min_p, limit):
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    found = g2.sampling_support(
        case.hidden, case.weight, case.tokens, **case.head, **options, limit=limit, rules=rules
    )
    N, V = len(case.tokens), len(case.weight)
    if top_k in (0, *range(V, 1001)) and top_p == 1 and min_p == 0:
        assert found.whole.all()
        assert lists(found) == [[]] * N
        return
    if N:
        check(case, found, rules, limit, **options)


def check(case: Case, found: g2.SamplingSupport, rules: str, limit: int = 1024, **options: float) -> None:
    """Against float64: each list as long as thresholds within rounding allow, and its logits the largest."""
    bias = None if case.bias is None else case.bias.double()
    z = logits(case, case.hidden.double(), case.weight.double(), bias)
    slack = 4 * 2.0**-23 * (3 * logit_size(case) + 4) + 2 * low_rounding(case) + 2.0**-23 * z.shape[1]
    for row, ours, token, whole, added, off in zip(
        z, lists(found), case.tokens.tolist(), found.whole.tolist(), found.added.tolist(), slack.tolist()
    ):
        low, high = (count(row, rules, **options, slack=s) for s in (-off, off))
        if options.get("top_k") and rules == "transformers":  # ties that rounding makes, or breaks
            best = row.sort(descending=True).values
            k = min(options["top_k"], len(row))
            low, high = min(low, k), max(high, int((row >= best[k - 1] - 2 * off).sum()))
        if whole:
            assert high + 1 > limit
            continue
        assert low <= limit
        assert token in ours
        assert low <= len(ours) - added <= high
        decided = row.sort(descending=True).values[len(ours) - added - 1]
        for entry in ours:
            assert row[entry] >= decided - 2 * off or (added and entry == token)
        assert all(entry in ours for entry in (row > decided + 2 * off).nonzero().flatten().tolist())


@rules
@by_settings
def test_tiles_make_no_difference(rules, options, monkeypatch):
    """Whole numbers, so that every sum is exact."""
    hidden, weight = torch.randint(-2, 3, (9, 8)).float(), torch.randint(-2, 3, (201, 8)).float()
    arguments = {"hidden": hidden, "weight": weight, "tokens": torch.randint(201, (9,)), "temperature": 2.0}
    expected = g2.sampling_support(**arguments, **options, rules=rules)
    for size, tokens in ((80, 4), (600, 512), (9000, 2)):
        for module in (tiled, sampling_support):
            monkeypatch.setattr(module, "elements", lambda _, size=size: size)
            monkeypatch.setattr(module, "TOKENS", tokens)
        found = g2.sampling_support(**arguments, **options, rules=rules)
        for a, b in zip(found, expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize("limit", [3, 64, 10**6])
def test_no_tensor_of_tokens_and_vocabulary(limit, monkeypatch):
    for module in (tiled, sampling_support):
        monkeypatch.setattr(module, "elements", lambda _: 2**13)
    case = make_case([70], V=1001, d=16)
    with Sizes() as seen:
        for rules in RULES:
            g2.sampling_support(
                case.hidden, case.weight, case.tokens, top_p=0.9, min_p=0.05, limit=limit, rules=rules
            )
    assert max(size for _, size in seen.made) <= max(2 * 2**13, case.weight.numel())


def test_a_temperature_of_each_token_and_a_low_rank_part():
    case = make_case([30], V=401, d=24, bias=torch.randn(401), logit_softcap=4.0)
    case.temperature, case.lora = 0.3 + torch.rand(30), low_rank(case, 3)
    arguments = case.hidden, case.weight, case.tokens
    found = g2.sampling_support(*arguments, **case.head, top_k=30, top_p=0.8)
    check(case, found, "transformers", top_k=30, top_p=0.8)
    for name in ("temperature", "lora", "bias", "logit_softcap"):
        without = {**case.head, name: 1.0 if name == "temperature" else None}
        assert lists(g2.sampling_support(*arguments, **without, top_k=30, top_p=0.8)) != lists(found)


@dtypes
def test_float64_and_16_bits(dtype):
    case = make_case([30], V=401, d=24, dtype=dtype)
    check(
        case, g2.sampling_support(case.hidden, case.weight, case.tokens, top_p=0.6), "transformers", top_p=0.6
    )
    double = g2.sampling_support(case.hidden.double(), case.weight.double(), case.tokens, top_p=0.6)
    check(case, double, "transformers", top_p=0.6)


# --- corners ------------------------------------------------------------------------------------------------


def support_of(z: list[list[float]], tokens: list[int], **options: object) -> g2.SamplingSupport:
    found = g2.sampling_support(**given_logits(torch.tensor(z)), tokens=torch.tensor(tokens), **options)
    lists(found)
    return found


def test_equal_logits_at_the_cut():
    row = [0.0, 2.0, 3.0, 2.0, 3.0, 2.0, 0.0]
    cases = [
        ({"top_k": 3}, [1, 2, 3, 4, 5], [1, 2, 4]),  # all of equals; or k, the lowest ids first
        ({"top_k": 1}, [2, 4], [2]),
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.7}, [2, 4, 5], [1, 2, 4]),  # the highest ids, or the lowest
        ({"min_p": 0.36}, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ({"top_k": 3, "top_p": 0.85}, [2, 3, 4, 5], [1, 2, 4]),  # 0.85 of five, or of three
    ]
    for options, transformers, vllm in cases:
        for rules, expected in (("transformers", transformers), ("vllm", vllm)):
            assert lists(support_of([row], [2], rules=rules, **options)) == [expected], (options, rules)


def test_0_and_minus_0_are_equal():
    found = support_of([[-1e-9, 1e-9, 3.0]], [2], top_k=2, logits_dtype=torch.float16, rules="vllm")
    assert lists(found) == [[0, 2]]


@rules
def test_of_equals_the_realised_token_stays(rules):
    """It takes the place of one of its equals, so the list keeps the sampler's probability mass."""
    row = [0.0, 2.0, 3.0, 2.0, 3.0, 2.0]
    for token in (1, 3, 5):
        found = support_of([row], [token], top_p=0.7, rules=rules)
        assert lists(found) == [[*sorted((2, 4, token))]]
        assert not found.added.any()


@rules
def test_a_realised_token_that_the_rules_leave_out_is_added(rules):
    rows = [[3.0, 2.0, 1.0, 0.0, -9.0]] * 3
    found = support_of(rows, [3, 1, 4], top_k=2, rules=rules)
    assert lists(found) == [[0, 1, 3], [0, 1], [0, 1, 4]]
    assert found.added.tolist() == [True, False, True]
    found = support_of(rows, [3, 1, 4], top_k=2, rules=rules, limit=2)
    assert lists(found) == [[], [0, 1], []]
    assert not found.added.any()


@rules
@pytest.mark.parametrize("limit", [1, 9, 10, 11, 63, 64, 10**6])
def test_the_limit_is_the_longest_list(rules, limit):
    z = example("random", N=5, V=64)
    found = g2.sampling_support(
        **given_logits(z), tokens=z.argmax(1), top_k=10, min_p=1e-9, limit=limit, rules=rules
    )
    assert found.whole.tolist() == [limit < 10] * 5
    if limit >= 10:
        assert lists(found) == [sorted(row.topk(10).indices.tolist()) for row in z]


def test_top_p_over_more_entries_than_are_looked_at():
    """Their sum is taken in a second pass: over ties with the k-th, or over what min_p leaves."""
    z = example("tied", N=20, V=3000)
    for options, rules in (
        ({"top_k": 40, "top_p": 0.5}, "transformers"),
        ({"min_p": 0.001, "top_p": 0.01}, "vllm"),
        ({"top_k": 2000, "top_p": 0.01}, "vllm"),
        ({"top_k": 2000, "top_p": 0.01, "min_p": 0.001}, "transformers"),
    ):
        expected = [count(row, rules, **options) for row in z]
        limits = bounds(z, rules, float32_slack(z), **options)
        for limit in (max(expected), sorted(expected)[10]):
            found = g2.sampling_support(
                **given_logits(z), tokens=z.argmax(1), limit=limit, rules=rules, **options
            )
            sizes = [len(entries) or limit + 1 for entries in lists(found)]
            assert all(min(low, limit + 1) <= n <= high for n, (low, high) in zip(sizes, limits))


def test_more_ties_with_the_kth_than_are_looked_at_first():
    z = torch.zeros(2, 500)
    z[:, :3] = 2.0
    z[1, 100:] = -1.0
    found = g2.sampling_support(**given_logits(z), tokens=torch.tensor([0, 0]), top_k=5, limit=400)
    assert lists(found) == [[], [*range(100)]]
    found = g2.sampling_support(**given_logits(z), tokens=torch.tensor([0, 0]), top_k=5, limit=500)
    assert lists(found) == [[*range(500)], [*range(100)]]


@rules
def test_rows_without_a_softmax_are_whole(rules):
    case = make_case([6], V=300, d=8)
    expected = lists(g2.sampling_support(case.hidden, case.weight, case.tokens, top_k=9, rules=rules))
    case.hidden[1, 3], case.hidden[4, 0] = torch.nan, torch.inf
    found = g2.sampling_support(case.hidden, case.weight, case.tokens, top_k=9, rules=rules)
    assert found.whole.tolist() == [False, True, False, False, True, False]
    assert all(ours in ([], theirs) for ours, theirs in zip(lists(found), expected))
    none = torch.full((300,), -torch.inf)
    found = g2.sampling_support(
        case.hidden, case.weight, case.tokens, bias=none, top_p=0.5, min_p=0.1, rules=rules
    )
    assert found.whole.all()


@rules
def test_masked_entries_are_never_listed(rules):
    bias = torch.full((300,), -torch.inf)
    bias[[7, 250, 290]] = torch.tensor([0.0, 1.0, 2.0])
    case = make_case([4], V=300, d=8)
    tokens = torch.tensor([7, 250, 290, 7])
    for options in ({"top_k": 100}, {"top_p": 0.999999}, {"min_p": 1e-9}):
        found = g2.sampling_support(case.hidden, case.weight, tokens, bias=bias, rules=rules, **options)
        assert lists(found) == [[7, 250, 290]] * 4
    tokens[0] = 8  # but for one that the policy cannot have drawn
    found = g2.sampling_support(case.hidden, case.weight, tokens, bias=bias, top_k=3, rules=rules)
    assert lists(found)[0] == [7, 8, 250, 290]
    assert found.added.tolist() == [True, False, False, False]


def test_settings_that_leave_out_nothing():
    case = make_case([5], V=40, d=8)
    for options in ({}, {"top_k": 40}, {"top_k": 41, "min_p": 0}, {"top_p": 1}):
        found = g2.sampling_support(case.hidden, case.weight, case.tokens, **options)
        assert found.whole.all()
        assert lists(found) == [[]] * 5


@rules
def test_no_tokens(rules):
    empty = make_case([], V=40, d=8)
    for options in ({}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}):
        assert (
            lists(g2.sampling_support(empty.hidden, empty.weight, empty.tokens, **options, rules=rules)) == []
        )


def test_rounded_logits_have_ties():
    """A 16-bit model's sampler sees equal logits where products differ; top_k then keeps more than k."""
    case = make_case([200], V=2000, d=64, dtype=torch.bfloat16)
    theirs = (case.hidden @ case.weight.T).float()
    kept = transformers_keeps(theirs, temperature=0.7, top_k=30)
    arguments = {"hidden": case.hidden, "weight": case.weight, "tokens": theirs.argmax(1)}
    plain, rounded = (
        lists(g2.sampling_support(**arguments, temperature=0.7, top_k=30, logits_dtype=dtype))
        for dtype in (None, torch.bfloat16)
    )
    assert sum(map(len, plain)) <= 30 * 200 + 5
    assert sum(map(len, kept)) >= 30 * 200 + 50
    assert sum(a == b for a, b in zip(rounded, kept)) >= 190


def test_no_gradient():
    case = make_case([5], V=40, d=8)
    for t in (case.hidden, case.weight):
        t.requires_grad_()
    found = g2.sampling_support(case.hidden, case.weight, case.tokens, top_k=3, lora=low_rank(case, 2))
    assert not any(t.requires_grad for t in found)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("top_k", -1, ValueError, "got -1, needs 0 or more"),
        ("top_k", 2.0, TypeError, "float"),
        ("top_k", True, TypeError, "bool"),
        ("top_p", 0.0, ValueError, "got 0.0, needs a share in (0, 1]"),
        ("top_p", 1.5, ValueError, "1.5"),
        ("top_p", float("nan"), ValueError, "nan"),
        ("top_p", None, TypeError, "NoneType"),
        ("min_p", -0.1, ValueError, "got -0.1, needs a share in [0, 1]"),
        ("min_p", 1.1, ValueError, "1.1"),
        ("min_p", "0.1", TypeError, "str"),
        ("limit", 0, ValueError, "got 0, needs 1 or more"),
        ("limit", None, TypeError, "NoneType"),
        ("rules", "sglang", ValueError, "got 'sglang', needs one of 'transformers', 'vllm'"),
        ("logits_dtype", torch.float32, ValueError, "torch.float32, needs torch.bfloat16"),
        ("tokens", torch.full((5,), 40), ValueError, "needs 0 to V - 1 = 39"),
        ("weight", torch.zeros(40, 9), ValueError, "[40, 9]"),
        ("temperature", torch.ones(4), ValueError, "[4]"),
        ("lora", (1, 2), TypeError, "needs a tuple of three"),
    ],
)
def test_wrong_input(name, value, error, text):
    case = make_case([5], V=40, d=8)
    arguments = {"hidden": case.hidden, "weight": case.weight, "tokens": case.tokens, name: value}
    with pytest.raises(error, match=re.escape(name)) as caught:
        g2.sampling_support(**arguments)
    assert text in str(caught.value)
