"""process_group: 2 and 4 ranks, each with rows of the vocabulary, against the whole of it in float64."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import ranks
import torch
import torch.distributed as dist
from oracle import Case, make_case
from test_linear_logprobs import assert_as_exact_as_torch, plain
from test_statistics import assert_exact as assert_statistics

import g2rl_kernels as g2
from benchmarks import scaling
from g2rl_kernels import arguments
from g2rl_kernels.head import logprobs, reference, vocab_parallel
from g2rl_kernels.head.backend import backend as implementation
from g2rl_kernels.head.spec import HeadSpec, Responses

TESTS = Path(__file__).resolve().parent
worlds = pytest.mark.parametrize("world", [2, 4])
names = pytest.mark.parametrize("name", [*ranks.cases(2), "all options, reference", "bf16, reference"])


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """What each of 4 ranks found; the last one kills itself in the end."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parents[1], TESTS.parent, TESTS))),
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "ranks.py"), str(rank), "4", str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running[:3], said):
        assert process.returncode == 0, text
    assert running[3].returncode == -signal.SIGKILL, said[3]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.fixture(scope="module")
def found(processes) -> dict[int, list[dict]]:
    """By the size of the group, what each of its ranks found."""
    return {2: [results[2] for results in processes[:2]], 4: [results[4] for results in processes]}


def joined(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of all ranks: the same bits everywhere, but for rows of weight, bias and B, which are put together."""
    whole = {}
    for name, value in results[0].items():
        if name in ("weight", "bias", "B"):
            whole[name] = torch.cat([other[name] for other in results])
        else:
            assert all(torch.equal(value, other[name]) for other in results), name
            whole[name] = value
    return whole


def split(results: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], g2.HeadFeatures]:
    """Of linear_logprobs and of head_features, without statistics."""
    head = {name[5:]: value for name, value in results.items() if name.startswith("head ")}
    linear = {name: value for name, value in results.items() if name.split()[0] not in ("head", "statistics")}
    return linear, g2.HeadFeatures(**head)


@worlds
@names
def test_any_case(found, world, name):
    case_name, _, other = name.partition(", ref")
    backend = ("reference", None) if other else oracle.BEST
    check(ranks.cases(world)[case_name], backend, [results[name] for results in found[world]])


@pytest.mark.skipif(not arguments.HAS_TRITON, reason="needs triton")
def test_triton(found):
    check(
        ranks.cases(2)["all options"], oracle.TRITON, [results["all options, triton"] for results in found[2]]
    )


def check(case: Case, backend: tuple[str, str | None], results: list[dict[str, torch.Tensor]]) -> None:
    whole = joined(results)
    linear, head = split(whole)
    asked = {name: whole[f"statistics {name}"] for name in ranks.ASKED}
    values = {name: linear[name] for name in ("logprobs", "entropy")}
    assert_statistics(case, g2.LinearLogprobsWithStatistics(**values, **asked))
    for name, value in asked.items():
        assert torch.equal(value, whole[f"statistics head {name}"])
    assert_as_exact_as_torch(case, backend, tuple(ranks.gradients(len(case.tokens))), linear)
    oracle.assert_as_exact_as_torch(case, head, backend)
    assert torch.equal(head.logprobs, linear["logprobs"])
    assert torch.equal(head.entropy, linear["entropy"])


@worlds
def test_the_gradient_of_hidden_is_rounded_once(found, world):
    """Each rank's part rounded to bfloat16 before the sum would be off by several times as much."""
    case = ranks.cases(world)["bf16"]
    exact = plain(case, tuple(ranks.gradients(len(case.tokens))), torch.float64)["hidden"]
    for results in found[world]:
        error = (results["bf16, reference"]["hidden"].double() - exact).abs()
        assert (error <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-5 * exact.abs().max()).all()


@worlds
def test_of_equal_logits_the_first_of_all_ranks(found, world):
    """Wherever the realised token lies."""
    for results in found[world]:
        for name in ("statistics top_token", "statistics head top_token"):
            assert not results["equal logits"][name].any()


@worlds
def test_near_certain_tokens_keep_their_digits(found, world):
    """The same rounding as on one rank, though 1 - p is 1e-11 and its token on one rank only."""
    case = ranks.cases(world)["near-certain tokens"]
    linear, head = split(joined([results["near-certain tokens"] for results in found[world]]))
    alone, _ = split(ranks.run(case, slice(None), None))
    double = HeadSpec(case.weight.double())
    doubles = case.hidden.double(), case.tokens, double, Responses(case.cu_seqlens)
    exact = g2.HeadFeatures(*reference.head_features(*doubles))
    for name, value in {**linear, "features": head.features, "head": head.logprobs}.items():
        expected = {**alone, "features": exact.features, "head": exact.logprobs}[name]
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-30)


@worlds
def test_exact_in_float64(found, world):
    case = ranks.cases(world)["all options"]
    case = case.replace(**{name: getattr(case, name).double() for name in ranks.TRAINED})
    alone = ranks.run(case, slice(None), None)
    for name, value in joined([results["float64"] for results in found[world]]).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-12, atol=1e-12)


@worlds
@pytest.mark.parametrize("other", ["again", "after errors", "hidden alone", "weight alone"])
def test_same_bits_again(found, world, other):
    """Run after run, after calls that failed, and whatever else is trained."""
    for results in found[world]:
        trained = {"hidden alone": {"hidden"}, "weight alone": {"weight"}}.get(other, set(ranks.TRAINED))
        assert set(ranks.TRAINED) & set(results[other]) == trained
        for name, value in results[other].items():
            assert torch.equal(value, results["all options"][name]), name


@worlds
def test_chunks_change_only_the_rounding_of_sums(found, world):
    case = ranks.cases(world)["bf16"]
    chunks = joined([results["in chunks"] for results in found[world]])
    linear, _ = split(chunks)
    assert_as_exact_as_torch(case, oracle.BEST, tuple(ranks.gradients(len(case.tokens))), linear)
    for name, value in joined([results["bf16"] for results in found[world]]).items():
        if name != "bias":  # a sum over all tokens, chunk by chunk
            assert torch.equal(value, chunks[name]), name


@worlds
def test_compiled(found, world):
    """The same bits; a token of no rank, which is not checked then, is NaN on all ranks."""
    for results in found[world]:
        for name in ("logprobs", "entropy"):
            right, wrong = (results[f"compiled, {which}"][name] for which in ("right", "wrong"))
            assert torch.equal(right, results["all options"][name])
            assert torch.isnan(wrong[:2]).all()
            assert torch.equal(wrong[2:], right[2:])


def test_only_members_may_call(processes):
    for results in processes[2:]:
        assert results["no member"].startswith("ValueError: process_group: this process is no member of it")


# What all ranks say where rank 1 is wrong, or differs
ERRORS = {
    "temperature is negative": "ValueError: temperature: got -1.0",
    "hidden is missing": "TypeError: hidden: got NoneType",
    "weight has another dtype": "TypeError: weight: got torch.float16",
    "weight is empty": "ValueError: weight: got shape [0, 24]",
    "cu_seqlens falls": "ValueError: cu_seqlens: runs from 33 to 0",
    "cu_seqlens differs": "ValueError: cu_seqlens: rank 1",
    "tokens differ": "ValueError: tokens: rank 1",
    "tokens beyond all rows": "ValueError: tokens: got values from",
    "hidden has fewer rows": "ValueError: hidden: rank 1",
    "hidden requires grad": "ValueError: hidden: rank 1",
    "bias is missing": "ValueError: bias: rank 1",
    "token_weights differ": "ValueError: token_weights: rank 1",
    "logit_softcap differs": "ValueError: logit_softcap: rank 1",
    "A differs": "ValueError: lora: rank 1",
    "scaling differs": "ValueError: lora: rank 1",
    "A requires grad": "ValueError: lora: rank 1",
    "lora is missing": "ValueError: lora: rank 1",
    "B has too few rows": "ValueError: lora: B: got shape",
    "temperatures differ": "ValueError: temperature: rank 1",
    "statistics differ": "ValueError: statistics: rank 1",
    "support differs": "ValueError: support: ids: rank 1",
    "support is missing": "ValueError: support: ids: rank 1",
    "support on rank 1 alone": "ValueError: support: ids: rank 1",
    "support lacks a token": "ValueError: support: the list of token 0 lacks",
    "support beyond all rows": "ValueError: support: ids: entry 1 is 203",
    "backend differs": "ValueError: backend: rank 1",
    "function differs": "ValueError: function: rank 1",
}


@worlds
def test_an_error_on_one_rank_is_raised_by_all(found, world):
    for results in found[world]:
        assert set(results["errors"]) == set(ERRORS)
        for name, (said, seconds) in results["errors"].items():
            assert said.startswith(ERRORS[name]), said
            assert said == found[world][0]["errors"][name][0]
            assert name.endswith("beyond all rows") or "rank 1" in said
            assert seconds < 10


def test_a_killed_rank_ends_the_others(processes):
    for results in processes[:3]:
        said, seconds = results["a rank was killed"]
        assert said.startswith("RuntimeError"), said
        assert seconds < 10
    assert "a rank was killed" not in processes[3]


# --- in this process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [("reference", None), *oracle.CPU_BACKENDS, oracle.TRITON], ids=str)
@pytest.mark.parametrize("name", ["all options", "bf16", "fp16", "the first rank masked"])
def test_features_of_parts_add_up(backend, name):
    """Whatever the cuts; nothing of a token that lies elsewhere is read."""
    if backend == oracle.TRITON and not arguments.HAS_TRITON:
        pytest.skip("needs triton")
    whole = ranks.cases(2)[name]
    exact = oracle.autograd_head(whole)
    case = whole.to(oracle.GPU) if backend == oracle.TRITON else whole
    logsumexp, rest = (t.to(case.hidden.device) for t in (exact.logsumexp, -torch.expm1(exact.logprobs)))
    features = 0
    for rows in ranks.rows(len(case.weight), 4):
        local = torch.where(
            (rows.start <= case.tokens) & (case.tokens < rows.stop), case.tokens - rows.start, -1
        )
        bias = None if case.bias is None else case.bias[rows]
        head = case.spec._replace(weight=case.weight[rows], bias=bias)
        with oracle.environment("G2RL_CPU_ISA", backend[1]):
            features += implementation(backend[0]).features_of_part(
                case.hidden, local, head, case.responses, logsumexp, rest
            )
    assert features.dtype == torch.float32
    oracle.assert_as_exact_as_torch(whole, exact._replace(features=features.cpu()), backend)


# A group of one.


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    store = tmp_path_factory.mktemp("alone") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("trained", [(), ranks.TRAINED], ids=str)
def test_opcheck(alone, trained):
    case = ranks.cases(2)["all options"]
    tokens = torch.where(case.tokens > 150, vocab_parallel.ELSEWHERE, case.tokens)
    group = alone.group_name
    inputs = {"hidden": case.hidden.clone(), "weight": case.weight.clone(), "bias": case.bias.clone()}
    for name in trained:
        inputs[name].requires_grad_()
    head = HeadSpec(inputs["weight"], inputs["bias"], 0.7, 1.3, 4.0)
    args = (inputs["hidden"], tokens, *head, "reference", group)
    torch.library.opcheck(torch.ops.g2rl.linear_logprobs, (*args, 1 << 20, True))
    torch.library.opcheck(torch.ops.g2rl.local_tokens, (case.tokens, 150, group))
    if not trained:
        features_args = (*args[:2], *head, *case.responses, None, None, *args[-2:], True)
        torch.library.opcheck(torch.ops.g2rl.features, features_args)
        outputs = torch.ops.g2rl.linear_logprobs(*args, 1 << 20, False)[:4]
        needs = (True, True, True, False, False)
        torch.library.opcheck(
            torch.ops.g2rl.linear_logprobs_backward,
            (*torch.randn(2, 33), *args, *outputs, *needs),
        )


def test_the_features_compile_to_the_same_bits(alone):
    case = ranks.cases(2)["all options"]

    def function(hidden):
        return g2.head_features(
            hidden, case.weight, case.tokens, case.cu_seqlens, process_group=alone, **case.head
        )

    torch._dynamo.reset()
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")(case.hidden)
    for eager, value in zip(function(case.hidden), traced):
        assert torch.equal(eager, value)


def test_the_certificate_refuses_a_group(alone):
    case = ranks.cases(2)["fp32"]
    with pytest.raises(NotImplementedError, match=r"process_group.*head_features"):
        g2.certified_head_features(
            case.hidden, case.weight, case.tokens, case.cu_seqlens, process_group=alone
        )


def test_a_sharded_dtensor_says_how_to_pass_the_shard(alone):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    case = ranks.cases(2)["fp32"]
    mesh = init_device_mesh("cpu", (1,))
    weight = distribute_tensor(case.weight, mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"weight\.full_tensor\(\).*weight\.to_local\(\) and process_group="):
        g2.linear_logprobs(case.hidden, weight, case.tokens)
    out = g2.linear_logprobs(
        case.hidden, weight.to_local(), case.tokens, process_group=weight.device_mesh.get_group()
    )
    torch.testing.assert_close(
        out.logprobs, g2.linear_logprobs(case.hidden, case.weight, case.tokens).logprobs
    )
    replicated = distribute_tensor(case.weight, mesh, [torch.distributed.tensor.Replicate()])
    with pytest.raises(TypeError, match=r"weight\.full_tensor\(\)$"):
        g2.linear_logprobs(case.hidden, replicated, case.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_messages_are_those_of_the_cost_model(alone, monkeypatch, dtype):
    """docs/scaling.md: their number, order and bytes, of what each rank holds in the end."""
    case = make_case([60, 40], 203, 24, dtype=dtype)
    sent = []
    for name in ("all_gather", "all_to_all_single"):
        call = getattr(dist, name)

        def counted(values, *args, name=name, call=call, **options):
            sent.append((name, sum(t.nbytes for t in values) if isinstance(values, list) else values.nbytes))
            return call(values, *args, **options)

        monkeypatch.setattr(dist, name, counted)
    before = [("all_gather", vocab_parallel.MESSAGE), ("all_gather", 8)]  # arguments; sizes of the shards
    before.append(("all_gather", scaling.statistics_bytes(100, ranks=1)))
    options = {"process_group": alone, "backend": "reference"}

    def summed(size):
        return [("all_to_all_single", size), ("all_gather", size)]

    g2.head_features(case.hidden, case.weight, case.tokens, case.cu_seqlens, **options)
    assert sent == [*before, *summed(scaling.feature_bytes(2, 24))]
    sent.clear()
    monkeypatch.setattr(logprobs, "SUMS", 4 * 24 * 64)
    hidden = case.hidden.requires_grad_()
    g2.linear_logprobs(hidden, case.weight, case.tokens, **options).logprobs.sum().backward()
    chunks = [100] if dtype == torch.float32 else [64, 36]
    assert sent == [*before, *(one for n in chunks for one in summed(scaling.gradient_bytes(n, 24)))]
