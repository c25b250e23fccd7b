"""head_features: every backend and instruction set against float64, on ordinary and on hostile inputs."""

import functools
import subprocess
import sys

import pytest
import torch
from examples import given
from marks import backends, dtypes
from oracle import (
    BACKEND_IDS,
    BACKENDS,
    BEST,
    CPU_BACKENDS,
    GPU,
    TRITON,
    Case,
    Sizes,
    allowed_errors,
    assert_as_exact_as_torch,
    autograd_head,
    errors,
    make_case,
    products_repeat,
    run_head,
)
from strategies import DTYPES, LAYOUTS, cases, restride

import g2rl_kernels as g2

NOT_TRITON = [("reference", None), *CPU_BACKENDS]


def check(case: Case, backend: tuple[str, str | None]) -> g2.HeadFeatures:
    out = run_head(case, backend)
    N, d = case.hidden.shape
    assert [tuple(t.shape) for t in out] == [(len(case.lengths), d), (N,), (N,), (N,)]
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in out)
    assert_as_exact_as_torch(case, out, backend)
    return out


def same(a: g2.HeadFeatures, b: g2.HeadFeatures) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize(
    "backend", BACKENDS[: 1 + len(CPU_BACKENDS)], ids=BACKEND_IDS[: 1 + len(CPU_BACKENDS)]
)
@given(cases())
def test_any_case(backend, case):
    check(case, backend)


@backends
@dtypes
def test_a_model_sized_case(backend, dtype):
    check(make_case([70, 0, 33, 1, 96], V=4999, d=192, dtype=dtype), backend)


@backends
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
def test_sixteen_bit_inputs_are_summed_in_float32(backend, dtype):
    """Their error is a small fraction of torch's, whose logits have 16 bits."""
    case = make_case([70, 33, 96], V=4999, d=192, dtype=dtype)
    assert_as_exact_as_torch(case, run_head(case, backend), backend, multiple=0.01)


@backends
@dtypes
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 5, 3], [5, 0, 0, 3], [5, 3, 0]], ids=str)
def test_empty_responses(backend, dtype, lengths):
    case = make_case(lengths, V=19, d=5, dtype=dtype)
    out = check(case, backend)
    for s, length in enumerate(lengths):
        assert length or not out.features[s].any()


@backends
@dtypes
@pytest.mark.parametrize("V", [1, 7])
def test_small_vocabularies(backend, dtype, V):
    out = check(make_case([3, 70], V=V, d=33, dtype=dtype), backend)
    if V == 1:  # the one token is certain
        assert not out.features.any()
        assert not out.logprobs.any()
        assert not out.entropy.any()


@backends
@dtypes
def test_a_real_vocabulary(backend, dtype):
    interpreted = backend == TRITON and GPU.type == "cpu"
    if interpreted and dtype != torch.bfloat16:
        pytest.skip("the interpreter takes long; one dtype and a small vocabulary have to do")
    check(make_case([3, 2], V=32_003 if interpreted else 151936, d=24, dtype=dtype), backend)


# Sizes at which the C++ kernel shares out its workspace in other ways (csrc/cpu/head.cpp, make_plan): many or
# few tokens in flight, shorter codes, few rows of A for many responses, a vocabulary in several spans.
PLANS = {
    "one response, real vocabulary": ((50,), 151936, 8),
    "several responses, real vocabulary": ((20, 0, 37, 1, 9), 151936, 8),
    "many responses": ((1,) * 40, 151936, 8),
    "vocabulary in spans": ((11, 0, 9), 700001, 4),
}


@functools.cache
def planned(plan: str, dtype: torch.dtype) -> tuple[Case, g2.HeadFeatures, g2.HeadFeatures]:
    lengths, V, d = PLANS[plan]
    case = make_case(list(lengths), V=V, d=d, dtype=dtype)
    return case, autograd_head(case), allowed_errors(case, ("cpu", None))


@dtypes
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=lambda backend: backend[1])
def test_every_plan(plan, dtype, backend):
    case, exact, allowed = planned(plan, dtype)
    for error, limit in zip(errors(run_head(case, backend), exact), allowed):
        assert (error <= limit).all()


# --- hostile rows -------------------------------------------------------------------------------------------


def hostile(kind: str, dtype: torch.dtype) -> Case:
    """hidden selects rows of logits: the first coordinate of weight is what `kind` asks for."""
    case = make_case([5, 0, 3], V=67, d=16, dtype=dtype)
    V = len(case.weight)
    if kind == "peaked":  # p(token) = 1 - 1e-7, the others alike: z_y - z = log((1 - 1e-7) (V - 1) / 1e-7)
        case.tokens = torch.arange(8)
        case.hidden = torch.nn.functional.pad(torch.eye(8), (0, 8)).to(dtype)
        peak = 20.375  # with 8 significant bits; the oracle sees the same
        case.weight[:, :8] = 0.0
        case.weight[torch.arange(8), torch.arange(8)] = torch.tensor(peak, dtype=dtype)
    elif kind == "peaked on another token":
        case = hostile("peaked", dtype)
        case.tokens = case.tokens + 20
    elif kind == "flat":
        case.hidden = torch.zeros_like(case.hidden)
    elif kind == "all at -1e4":
        case.hidden[:, 0] = 100.0
        case.weight[:, 0] = -100.0
    elif kind == "up to 1e4":
        case.hidden *= (
            torch.tensor(1e4, dtype=dtype) / (case.hidden.double() @ case.weight.double().T).abs().max()
        )
    elif kind == "one masked":
        case.tokens = case.tokens.clamp(max=V - 2)
        case.bias = torch.zeros(V)
        case.bias[-1] = -torch.inf
    elif kind == "the largest masked":
        case.bias = torch.zeros(V)
        case.bias[V // 2] = -torch.inf
        case.weight[V // 2] = 10 * case.hidden[0]
        case.tokens = case.tokens.clamp(max=V // 2 - 1)
    elif kind == "masked behind a softcap":
        case = hostile("one masked", dtype).replace(logit_softcap=2.0)
    elif kind == "the realised masked":
        case = hostile("one masked", dtype)
        case.tokens[0] = V - 1
    elif kind == "saturated softcap":
        case.weight *= 8
        case.logit_softcap = 1.0
    return case


KINDS = (
    "peaked",
    "peaked on another token",
    "flat",
    "all at -1e4",
    "up to 1e4",
    "one masked",
    "the largest masked",
    "masked behind a softcap",
    "the realised masked",
    "saturated softcap",
)


@backends
@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_rows(backend, dtype, kind):
    case = hostile(kind, dtype)
    out = check(case, backend)
    assert (out.logprobs <= 0).all()
    assert (out.entropy >= 0).all()
    if kind == "the realised masked":
        assert out.logprobs[0] == -torch.inf
        assert torch.isfinite(out.features).all()


@backends
@dtypes
def test_near_certain_tokens_keep_their_digits(backend, dtype):
    """1 - p = 1e-7 and all that hangs on it, to rounding, where torch's own float32 has no digit left."""
    case = hostile("peaked", dtype)
    exact, out = autograd_head(case), run_head(case, backend)
    p = exact.logprobs.exp()
    assert ((1 - p - 1e-7).abs() < 5e-8).all()
    # 16-bit backends may keep exponentials in 11 bits: 2^-11 of each term.
    relative = 1e-5 if dtype == torch.float32 else 2.0**-10
    scale = exact.features.abs().amax(1)
    error = errors(out, exact)
    assert (error.features <= relative * scale).all()
    assert (error.logprobs <= 1e-5 * exact.logprobs.abs()).all()
    assert (error.entropy <= 1e-5 * exact.entropy).all()


@backends
def test_a_masked_entry_is_as_good_as_absent(backend):
    case = hostile("the largest masked", torch.float32)
    kept = torch.arange(len(case.weight)) != len(case.weight) // 2
    without = case.replace(weight=case.weight[kept], bias=None)
    masked, absent = run_head(case, backend), run_head(without, backend)
    for difference, limit in zip(errors(masked, absent), allowed_errors(case, backend)):
        assert (difference <= 2 * limit).all()


@backends
@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nonfinite_hidden_stays_in_its_response(backend, dtype, value):
    case = make_case([70, 3, 5, 66], V=131, d=20, dtype=dtype)
    clean = run_head(case, backend)
    case.hidden[71, 4] = value
    out = run_head(case, backend)
    assert torch.isnan(out.features[1]).all()
    assert torch.isnan(out.logprobs[71])
    assert torch.isnan(out.entropy[71])
    assert not torch.isfinite(out.logsumexp[71])
    others = torch.arange(len(case.tokens)) != 71
    assert torch.equal(out.features[[0, 2, 3]], clean.features[[0, 2, 3]])
    for now, before in zip(out[1:], clean[1:]):
        assert torch.equal(now[others], before[others])


@backends
@dtypes
def test_nan_in_weight_reaches_every_response_and_ends(backend, dtype):
    case = make_case([3, 0, 4], V=131, d=20, dtype=dtype)
    case.weight[100, 3] = torch.nan
    out = run_head(case, backend)
    assert torch.isnan(out.features[[0, 2]]).all()
    assert not out.features[1].any()
    for tensor in out[1:]:
        assert torch.isnan(tensor).all()


@backends
def test_everything_masked(backend):
    case = make_case([2], V=9, d=4, bias=torch.full((9,), -torch.inf))
    assert torch.isnan(run_head(case, backend).features).all()


# --- layouts, order, threads --------------------------------------------------------------------------------


@backends
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_changes_no_bit(backend, dtype, layout):
    case = make_case([70, 9], V=203, d=37, dtype=dtype, bias=torch.randn(203))
    moved = case.replace(
        hidden=restride(case.hidden, layout),
        weight=restride(case.weight, layout),
        bias=case.bias.repeat_interleave(3)[1::3],
        tokens=case.tokens.repeat_interleave(2)[::2],
    )
    out = check(moved, backend)
    # Strides may choose another algorithm of torch.mm, which the reference uses, and, where Triton is
    # compiled, the order of a sum: a warp's threads lie along what is contiguous.
    if backend[0] != "reference" and (backend != TRITON or GPU.type == "cpu"):
        assert same(out, run_head(case, backend))


@backends
@dtypes
def test_expanded_inputs(backend, dtype):
    """Rows with stride 0."""
    case = make_case([3, 4], V=50, d=12, dtype=dtype)
    check(case.replace(hidden=case.hidden[:1].expand(7, 12)), backend)
    check(case.replace(weight=case.weight[:1].expand(50, 12)), backend)


@backends
@dtypes
def test_threads_and_runs_change_no_bit(backend, dtype):
    if backend == TRITON:
        pytest.skip("tests/kernels has one of its own size")
    case = make_case([100, 30, 0, 257], V=3001, d=65, dtype=dtype, bias=torch.randn(3001))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            results.append([run_head(case, backend), run_head(case, backend)])
    finally:
        torch.set_num_threads(threads)
    assert all(same(first, second) for first, second in results)
    assert same(results[0][0], results[-1][0])
    if backend[0] == "reference" and not products_repeat(387, 3001, 65):
        pytest.skip("torch's own products depend on the number of threads on this CPU")
    assert all(same(results[0][0], result) for result, _ in results)


@backends
@dtypes
def test_permuting_responses_permutes_results(backend, dtype):
    case = make_case([30, 1, 64, 0, 7, 65], V=301, d=24, dtype=dtype, token_weights=torch.rand(167))
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    rows = [torch.arange(case.cu_seqlens[s], case.cu_seqlens[s + 1]) for s in order]
    index = torch.cat(rows)
    permuted = case.replace(
        hidden=case.hidden[index],
        tokens=case.tokens[index],
        token_weights=case.token_weights[index],
        cu_seqlens=torch.tensor([0, *map(len, rows)]).cumsum(0),
    )
    out, moved = run_head(case, backend), run_head(permuted, backend)
    expected = g2.HeadFeatures(out.features[order], *(t[index] for t in out[1:]))
    for difference, limit in zip(errors(moved, expected), allowed_errors(case, backend)):
        assert (difference <= 2 * limit.max()).all()


@backends
@dtypes
def test_token_weights(backend, dtype):
    case = make_case([4, 4, 3], V=50, d=12, dtype=dtype)
    case.token_weights = torch.tensor([1.0, 0, 2, 0.5, 0, 0, 0, 0, 1, 1, 1])
    out = check(case, backend)
    assert not out.features[1].any()
    # 64-bit and 16-bit weights are the same numbers
    for other in (torch.float64, torch.float16):
        assert same(out, run_head(case.replace(token_weights=case.token_weights.to(other)), backend))


@backends
@dtypes
def test_known_logprobs_are_a_hint_only(backend, dtype):
    if backend[0] != "reference":
        pytest.skip("uses them: kernels/test_known_logprobs.py")
    case = make_case([60, 9], V=307, d=24, dtype=dtype)
    exact = autograd_head(case).logprobs
    for known in (exact.float(), exact.bfloat16(), exact.float() + 0.3 * torch.randn(69)):
        assert_as_exact_as_torch(case, run_head(case, backend, known_logprobs=known), backend)


@backends
def test_autocast_and_grad_mode_change_no_bit(backend):
    case = make_case([3, 4], V=50, d=12)
    expected = run_head(case, backend)
    case.hidden.requires_grad_()
    case.weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(expected, run_head(case, backend))


def test_default_backend_is_the_kernel():
    case = make_case([3, 4], V=50, d=12)
    default = g2.head_features(case.hidden, case.weight, case.tokens, case.cu_seqlens)
    assert same(default, run_head(case, ("cpu", None)))


# --- size ---------------------------------------------------------------------------------------------------


def test_beyond_two_to_the_31_logits():
    """N x V > 2^31. The last response alone has to give what it gives at the end of all."""
    V, N, last = 151936, 14200, 40
    assert N * V > 2**31
    case = make_case([N - last, last], V=V, d=2, dtype=torch.bfloat16)
    out = run_head(case, BEST)
    tail = case.replace(
        hidden=case.hidden[-last:], tokens=case.tokens[-last:], cu_seqlens=torch.tensor([0, last])
    )
    assert_as_exact_as_torch(
        tail,
        g2.HeadFeatures(out.features[1:], *(t[-last:] for t in out[1:])),
        BEST,
    )


@backends
def test_strides_beyond_two_to_the_31(backend):
    """Rows 2^28 elements apart, the last beyond 2^31; only their pages are ever touched."""
    case = make_case([2, 3], V=10, d=8, dtype=torch.bfloat16)
    far = torch.empty(9 * 2**28 + 8, dtype=torch.bfloat16).as_strided((10, 8), (2**28, 1))
    far.copy_(case.weight)
    assert same(run_head(case, backend), run_head(case.replace(weight=far), backend))


def test_the_reference_backend_makes_no_tensor_of_tokens_times_vocabulary():
    case = make_case([900, 600], V=20011, d=32, dtype=torch.bfloat16)
    with Sizes() as sizes:
        run_head(case, ("reference", None))
    assert max(size for _, size in sizes.made) <= 2**20


MEMORY = """
import torch, g2rl_kernels as g2

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

def case(N, V, d, S, dtype):
    hidden = torch.randn(N, d).to(dtype)
    weight = torch.empty(V, d, dtype=dtype).uniform_(-0.05, 0.05)
    tokens = torch.randint(V, (N,))
    return hidden, weight, tokens, torch.linspace(0, N, S + 1).long()

g2.head_features(*case(64, 1000, {d}, 2, torch.{dtype}))  # threads and their stacks exist
args = case({N}, {V}, {d}, {S}, torch.{dtype})
known = torch.linspace(-20, 0, {N})
before = kilobytes("VmRSS:")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")  # the peak starts anew
out = g2.head_features(*args, known_logprobs={known})
print(kilobytes("VmHWM:") - before - sum(t.nbytes for t in out) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("known", [None, "known"], ids=["two passes", "one pass"])
@pytest.mark.parametrize(
    ("N", "V", "d", "S", "dtype"),
    [
        (256, 151936, 2048, 1, "bfloat16"),
        (256, 151936, 512, 64, "float32"),
        (2048, 151936, 64, 300, "bfloat16"),
        (5000, 20000, 64, 7, "float32"),
    ],
)
def test_extra_memory_stays_below_16_MB(N, V, d, S, dtype, known):
    script = MEMORY.format(N=N, V=V, d=d, S=S, dtype=dtype, known=known)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 16 * 1024, f"{int(done.stdout) / 1024:.1f} MB"
