"""The benchmark: what it measures is what it says, and its commands run to their end. No figures of time."""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from g2rl_kernels import cli
from g2rl_kernels.trainer import TrainerConfig

ROOT = Path(__file__).resolve().parent.parent

# As the command finds them: in a checkout `benchmarks`, installed (editable too) a part of the package.
run: Any = cli._benchmarks()
group, head, measure, methods, missing_imports, registry, train = (
    import_module(f"{run.__package__}.{name}")
    for name in ("group", "head", "measure", "methods", "missing_imports", "registry", "train")
)
METHODS, Method, Outputs, Unavailable = (
    getattr(methods, name) for name in ("METHODS", "Method", "Outputs", "Unavailable")
)
Case, Shape, problem = registry.Case, registry.Shape, registry.problem

HEAD = Shape("small", 4096, 256)
SOFTCAPPED = Shape("softcapped", 4096, 256, 30.0)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # here Triton's kernels run in its interpreter


@pytest.fixture
def compiled(monkeypatch):
    """As on a user's machine, where Triton's interpreter is off."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def bench(*argv: object) -> int:
    return cli.main(["bench", *map(str, argv)])


def small(N: int = 64, shape: Any = HEAD, distribution: str = "1.5 nats", dtype: str = "fp32") -> Any:
    return Case(shape, N, dtype, distribution, 4)


def softmax(p: Any) -> torch.Tensor:
    """log p in float64."""
    z = p.hidden.double() @ p.weight.double().T
    if p.softcap is not None:
        z = p.softcap * torch.tanh(z / p.softcap)
    return z.log_softmax(1)


# The registry


@pytest.mark.parametrize(
    ("name", "V", "d", "softcap"),
    [
        ("qwen3-0.6b", 151936, 1024, None),
        ("qwen3-4b", 151936, 2560, None),
        ("qwen3-32b", 151936, 5120, None),
        ("llama3-70b", 128256, 8192, None),
        ("gemma2-2b", 256000, 2304, 30.0),
        ("gemma2-27b", 256000, 4608, 30.0),
        ("gemma3-1b", 262144, 1152, None),
        ("gemma3-27b", 262208, 5376, None),
        ("smollm2-135m", 49152, 576, None),
        ("smollm2-1.7b", 49152, 2048, None),
    ],
)
def test_heads_are_those_of_the_models(name, V, d, softcap):
    shape = registry.SHAPES[name]
    assert (shape.V, shape.d, shape.softcap) == (V, d, softcap)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_default_cases_are_distinct_and_in_the_registry(gpu, quick):
    cases = registry.default_cases(gpu, quick)
    assert len({*cases}) == len(cases) > 0
    for case in cases:
        assert registry.SHAPES[case.shape.name] is case.shape
        assert case.distribution in registry.DISTRIBUTIONS
        assert 1 <= case.responses <= case.N


@pytest.mark.parametrize("shape", [HEAD, SOFTCAPPED], ids=lambda shape: shape.name)
@pytest.mark.parametrize(("distribution", "nats"), registry.NATS.items())
def test_peaked_distributions_have_their_entropy(shape, distribution, nats):
    p = problem(small(1024, shape, distribution))
    log_p = softmax(p)
    entropy = -(log_p.exp() * log_p).sum(1).mean().item()
    assert entropy == pytest.approx(nats, rel=0.15)
    assert p.entropy == pytest.approx(entropy, rel=1e-3)


def test_flat_and_random_logits_have_the_entropy_of_theory():
    for distribution, sigma in registry.SIGMAS.items():
        p = problem(small(256, Shape("wide", 65536, 64), distribution))
        assert p.entropy == pytest.approx(math.log(65536) - sigma**2 / 2, abs=0.15)


def test_a_peaked_model_is_sure_of_most_tokens_and_a_chat_model_of_few():
    sure = {}
    for distribution in registry.NATS:
        p = problem(small(1024, HEAD, distribution))
        sure[distribution] = (1 - p.logprobs.exp() < 0.01).float().mean().item()
    assert sure["0.15 nats"] > 0.5
    assert sure["1.5 nats"] < 0.2
    assert sure["1.5 nats"] < sure["0.5 nats"] < sure["0.15 nats"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tokens_are_sampled_from_the_softmax_and_their_logprobs_are_right(dtype):
    p = problem(small(2048, SOFTCAPPED, "1.5 nats", dtype))
    right = softmax(p).gather(1, p.tokens[:, None])[:, 0]
    torch.testing.assert_close(p.logprobs.double(), right, atol=2e-4, rtol=0)
    assert -right.mean().item() == pytest.approx(p.entropy, rel=0.1)  # what sampling gives on average
    assert len({*p.tokens.tolist()}) > 500
    rounding = (p.rounded_logprobs - p.logprobs).abs().max()
    assert rounding == 0 if dtype == "fp32" else 1e-3 < rounding < 0.3


def test_the_same_seed_gives_the_same_problem():
    one, same, other = (problem(small(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.hidden, same.hidden)
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("distribution", ["flat", "0.5 nats"])
def test_no_tensor_of_tokens_times_vocabulary_is_made(distribution):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    N, V = 512, 65536
    with Largest() as largest:
        problem(small(N, Shape("wide", V, 16), distribution))
    assert V * 16 <= largest.numbers <= N * V // 2


def test_cuts_are_the_same_tokens_in_other_responses():
    p = problem(small(10))
    assert p.cuts == (0, 2, 5, 7, 10)
    cut = p.cut(3)
    assert cut.cu_seqlens.tolist() == [*cut.cuts] == [0, 3, 6, 10]
    assert cut.hidden is p.hidden
    moved = p.moved()
    assert torch.equal(moved.weight, p.weight)
    assert moved.weight.data_ptr() != p.weight.data_ptr()


# The methods


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


def test_other_packages_are_called_for_log_probabilities(monkeypatch):
    p = problem(small(48, SOFTCAPPED)).cut(3)

    def losses(hidden, weight, tokens, softcap):
        z = softcap * torch.tanh(hidden @ weight.T / softcap)
        return torch.nn.functional.cross_entropy(z, tokens, reduction="none")

    def cce(e, c, targets, softcap=None, reduction="mean"):
        assert reduction == "none"
        return losses(e, c, targets, softcap)

    class Liger:
        @staticmethod
        def apply(
            _input, weight, target, bias, ce_weight, ignore_index, z_loss, smoothing, reduction, softcap
        ):
            assert (bias, ce_weight, ignore_index, z_loss, smoothing) == (None, None, -100, 0.0, 0.0)
            assert reduction == "none"
            return losses(_input, weight, target, softcap), None

    def module(name: str, **members: object) -> None:
        for i in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:i])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        found = types.ModuleType(name)
        vars(found).update(members)
        monkeypatch.setitem(sys.modules, name, found)

    module("cut_cross_entropy", linear_cross_entropy=cce)
    module("liger_kernel.ops.fused_linear_cross_entropy", LigerFusedLinearCrossEntropyFunction=Liger)
    for name in ("CCE", "Liger"):
        errors = head.errors(METHODS[name].call(p), head.exact(p))
        assert {*errors} == {"logprobs"}
        assert errors["logprobs"] < 1e-4
    module("quack.linear_cross_entropy", chunked_linear_cross_entropy=None)
    with pytest.raises(Unavailable, match="softcap"):
        METHODS["quack"].call(p)


def test_obstacles(compiled):
    assert Method("a", torch_empty, package="no_such_package").obstacle("cpu") == (
        "no_such_package is not installed"
    )
    assert Method("a", torch_empty, device="cuda").obstacle("cpu") == "runs on cuda only"
    assert Method("a", torch_empty, device="cuda").obstacle("cuda") is None


def torch_empty(p: Any) -> Any:
    return Outputs(logprobs=torch.zeros(len(p.tokens)))


# The parts of a measurement


@pytest.mark.parametrize(("limit", "rows", "chunks"), [(None, 10, 1), (4 * 4096 * 4, 4, 3), (1, 1, 10)])
def test_the_floor_is_the_whole_product_in_chunks_that_fit(limit, rows, chunks):
    p = problem(small(10))
    floor = head.Floor(p, limit)
    assert (floor.rows, floor.chunks) == (rows, chunks)
    seen = []
    real = torch.mm

    def spy(hidden, weight, out):
        seen.append(real(hidden, weight, out=out).clone())

    torch.mm = spy
    try:
        floor(p)
    finally:
        torch.mm = real
    torch.testing.assert_close(torch.cat(seen), p.hidden @ p.weight.T)


def test_quantiles():
    assert measure.quantiles([5.0, 1, 2, 4, 3, 6, 7, 8, 9, 10, 11]) == [3, 6, 9]
    assert measure.quantiles([2.0]) == [2, 2, 2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark to reset")
def test_extra_memory_counts_what_the_call_holds_at_its_peak():
    def call() -> torch.Tensor:
        torch.ones(48 << 20, dtype=torch.uint8)  # gone before the next
        return torch.ones(16 << 20, dtype=torch.uint8)

    extra, out = measure.extra_memory("cpu", call)
    assert out.numel() == 16 << 20
    assert 47 << 20 <= extra <= 60 << 20  # what the process let go elsewhere counts too


def test_reasons_tell_faults_from_absence_and_name_no_paths():
    assert head.why_not(Unavailable("x is not there")) == {"reason": "x is not there", "fault": False}
    assert head.why_not(torch.OutOfMemoryError("Tried to allocate")) == {
        "reason": "out of memory",
        "fault": False,
    }
    assert not head.why_not(ModuleNotFoundError("no quack", name="quack"))["fault"]
    assert head.why_not(ModuleNotFoundError("gone", name="g2rl_kernels.kernels.head"))["fault"]
    found = head.why_not(RuntimeError("in /home/me/lib/file.py:3: bad"))
    assert found == {"reason": "RuntimeError: in file.py:3: bad", "fault": True}


def test_a_run_out_of_time_says_what_it_did_not_begin(monkeypatch, tmp_path):
    clock = iter([0, 0, 40, 40, 50, 50, 90, 90])  # of 40, 10 and 40 seconds
    monkeypatch.setattr(run, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    out = tmp_path / "result.json"
    result = run.Result("head", "cpu", out)
    begun = []

    def measured(case):
        begun.append(case)
        return [], []

    run.within_budget(100, [(name, name) for name in "abcd"], measured, result)
    assert begun == ["a", "b", "c"]
    left = json.loads(out.read_text())["left_out"]
    assert [(one["case"], one["reason"]) for one in left] == [("d", "no time left (--budget)")]


# The command


def test_head_measures_writes_and_draws(compiled, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot, kernels = (tmp_path / name for name in ("a.json", "a.png", "kernels.txt"))
    wanted = ["--shapes", "tiny", "--N", 8, 16, "--dtypes", "bf16", "--distributions", "0.5 nats"]
    wanted += ["--methods", "g2rl", "64", "CCE", "--rounds", 2]
    assert bench("head", "--device", "cpu", *wanted, "--out", out, "--plot", plot, "--profile", kernels) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    ours = [name for name in METHODS if METHODS[name].device == "cpu"]
    rows = result["rows"]
    assert [(row["N"], row["method"]) for row in rows] == [
        (N, name) for N in (8, 16) for name in [*ours, "torch, 64 tokens at a time"]
    ]
    for row in rows:
        assert (row["V"], row["d"], row["dtype"], row["distribution"]) == (2048, 64, "bf16", "0.5 nats")
        low, mid, high = row["ratio_20_50_80"]
        assert 0 < low <= mid <= high
        assert row["rounds"] == 2
        assert row["milliseconds"] > 0
        if METHODS[row["method"]].responses:
            assert row["error"] is None
        else:
            assert 0 < row["error"] < 0.1
            assert row["error"] == row["errors"]["features"]
    by_name = {row["method"]: row for row in rows}
    assert by_name["g2rl-kernels, 8 responses"]["responses"] == 8
    assert by_name["g2rl-kernels"]["error"] < by_name["torch, 64 tokens at a time"]["error"]
    left = {one["method"]: one["reason"] for one in result["left_out"]}
    assert left["g2rl-kernels, statistics"] == "runs on cuda only"
    assert "CCE" in left
    assert printed.count("| 16 x 2048 x 64, bf16, 0.5 nats |") == 4
    assert "- g2rl-kernels, certificate, all cases: runs on cuda only" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    for name in ("torch.mm(hidden, weight.T, out=logits)", *ours):
        assert f"== {name}\n" in kernels.read_text()
    assert "g2rl::head_features" in kernels.read_text()

    assert bench("table", out) == 0
    assert capsys.readouterr().out == printed
    again = tmp_path / "again.png"
    assert bench("plot", out, "--out", again) == 0
    assert again.read_bytes() == plot.read_bytes()


def test_a_method_that_fails_is_named_and_the_others_measured(monkeypatch, capsys):
    def broken(p: Any) -> Any:
        raise ValueError("no such luck")

    def too_large(p: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 40 GB")

    monkeypatch.setitem(METHODS, "a test: large", Method("a test: large", too_large))
    monkeypatch.setitem(METHODS, "a test: works", Method("a test: works", torch_empty, "all but zeros"))
    wanted = ["head", "--device", "cpu", "--shapes", "tiny", "--N", 8, "--dtypes", "fp32", "--rounds", 1]
    wanted += ["--methods", "a test"]
    assert bench(*wanted) == 0  # what does not fit is no fault
    printed = capsys.readouterr().out
    assert "- a test: large, tiny 8 fp32 2.3 sigma: out of memory" in printed
    assert "| a test: works |" in printed
    assert "all but zeros" in printed

    monkeypatch.setitem(METHODS, "a test: broken", Method("a test: broken", broken))
    assert bench(*wanted) == 1
    printed = capsys.readouterr().out
    assert "ValueError: no such luck" in printed
    assert "| a test: works |" in printed


def test_group_measures_all_implementations(tmp_path, capsys):
    out = tmp_path / "group.json"
    sizes = ["2x4x64", "3x2x16"]
    assert bench("group", "--device", "cpu", "--sizes", *sizes, "--rounds", 2, "--out", out) == 0
    rows = json.loads(out.read_text())["rows"]
    names = ["one read of the features", *group.implementations(*group.inputs(2, 4, 64, "cpu"))]
    assert [(row["groups"], row["implementation"]) for row in rows] == [
        (B, name) for B in (2, 3) for name in names
    ]
    assert len(names) > 2
    for row in rows:
        assert (row["error"] is None) == (row["implementation"] == names[0])
        assert row["error"] is None or row["error"] < 1e-4
    assert capsys.readouterr().out.count("| 2 x 4 x 64 |") == len(names)


def test_train_measures_the_step_with_and_without(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "train.json"
    assert bench("train", "--device", "cpu", "--models", "tiny", "--rounds", 2, "--out", out) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["algorithm"] for row in rows] == ["grpo", "g2rl"]
    assert 0 < rows[1]["feature_seconds"] < rows[1]["seconds"]
    assert "| tiny, 8, " in capsys.readouterr().out


def test_the_step_without_g2rl_is_the_trainers_with_lam_0():
    pytest.importorskip("transformers")
    batch = train.Batch(responses=8, group=4, prompt=5, response=12, micro=4)
    keys = {"batch_size": 8, "group_size": 4, "micro_batch_size": 4, "lam": 0.0}
    step = train.Step(train.make_model("tiny", "cpu"), TrainerConfig.from_dict(keys))
    rollout, scores = train.make_rollout(batch, 2048, "cpu")
    assert 0 < scores.sum() < len(scores)
    grpo, g2rl = step.measure_grpo(rollout, scores), step.measure(rollout, scores)
    torch.testing.assert_close(grpo.logprobs, g2rl.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grpo.geometry.advantages, g2rl.geometry.advantages, atol=1e-4, rtol=1e-4)
    assert grpo.logprobs[rollout.mask].max() < 0
    before = step.trained[0].detach().clone()
    step.grpo(rollout, scores)
    assert not torch.equal(before, step.trained[0])


@pytest.mark.parametrize(
    ("argv", "needed"),
    [
        (["head", "--rounds", "0"], "--rounds is 0, needs 1 or more"),
        (["head", "--N", "0"], "--N: 0 tokens"),
        (["head", "--shapes", "gpt-9"], "invalid choice: 'gpt-9'"),
        (["head", "--methods", "magic"], "no name contains magic"),
        (["group", "--sizes", "3x4"], "--sizes: invalid"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_wrong_usage(argv, needed, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(*argv)
    assert stop.value.code == 2
    assert needed in capsys.readouterr().err


@pytest.mark.parametrize("op", ["", "head", "group", "train"])
def test_help_teaches(op, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(*op.split(), "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    needed = {"head": ["examples:", "qwen3-8b", "float64", "L2"], "group": ["CUDA graph"], "train": ["GRPO"]}
    for word in needed.get(op, ["bench head", "bench group", "bench train", "--out"]):
        assert word in text


def test_methods_are_chosen_by_words():
    assert run.chosen_methods(["certificate", "cce"], "cuda") == ["g2rl-kernels, certificate", "CCE"]
    on_gpu = run.chosen_methods(None, "cuda")
    assert not {"g2rl-kernels", "torch, 64 tokens at a time"} & {*on_gpu}
    assert {"g2rl-kernels, statistics", "torch, all logits at once", "Liger"} <= {*on_gpu}


def test_cases_are_the_product_of_what_is_named():
    args = argparse.Namespace(
        shapes=["tiny"], N=[8, 16], dtypes=["fp16"], distributions=["flat", "0.5 nats"], quick=False
    )
    cases = run.chosen_cases(args, gpu=True)
    assert [(c.N, c.distribution) for c in cases] == [
        (8, "flat"),
        (8, "0.5 nats"),
        (16, "flat"),
        (16, "0.5 nats"),
    ]


# gpu.sh


def gpu_sh(out: Path, **environment: str) -> subprocess.CompletedProcess:
    tiny = {
        "HEAD_ARGS": "--shapes tiny --N 16 --dtypes fp32 --rounds 1",
        "GROUP_ARGS": "--sizes 2x4x64 --rounds 1",
        "TRAIN_ARGS": "--rounds 1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHON": sys.executable,
        "OUT": str(out),
    }
    command = [str(ROOT / "benchmarks" / "gpu.sh")]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | tiny | environment)


def statuses(out: Path) -> dict[str, str]:
    lines = (out / "summary.md").read_text().splitlines()
    return {cells[1].strip(): cells[2].strip() for line in lines if len(cells := line.split("|")) == 6}


def test_gpu_sh_runs_to_its_end_without_a_gpu(tmp_path):
    done = gpu_sh(
        tmp_path, PARTS="info tests sanitizers bench"
    )  # no build: it would pull the rug from others
    assert done.returncode == 0, done.stdout
    found = statuses(tmp_path)
    for part in ("kernels", "suite", "memcheck", "racecheck"):
        assert found[part].startswith("skipped: torch sees no GPU")
    for part in ("info", "head", "group"):
        assert found[part] == "ok"
    for part in ("train", "plots"):
        assert found[part] == "ok" or "is not installed" in found[part]
    assert "| 16 x 2048 x 64, fp32 |" in (tmp_path / "cpu.md").read_text()
    assert json.loads((tmp_path / "cpu-group.json").read_text())["op"] == "group"
    assert "== g2rl-kernels\n" in (tmp_path / "kernel-times.txt").read_text()


def test_gpu_sh_survives_a_failing_part_and_says_which(tmp_path):
    done = gpu_sh(tmp_path, PARTS="head group", HEAD_ARGS="--shapes gpt-9")
    assert done.returncode == 1
    found = statuses(tmp_path)
    assert found["head"] == "FAILED: exit status 2"
    assert found["group"] == "ok"
    assert "invalid choice: 'gpt-9'" in done.stdout  # the end of the failing part's log
    done = gpu_sh(tmp_path, PARTS="group", LIMIT_group="0.1")
    assert done.returncode == 1
    assert statuses(tmp_path)["group"] == "FAILED: out of time, 0.1 s"


def test_gpu_sh_refuses_parts_that_it_does_not_know(tmp_path):
    done = gpu_sh(tmp_path, PARTS="info dance")
    assert done.returncode == 2
    assert "no part 'dance'" in done.stderr


def test_gpu_sh_limits_add_up_to_less_than_ten_minutes():
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    whole = text[text.index("declare -A LIMITS=(") : text.index("LIMITS+=(")]
    limits = [int(number) for number in re.findall(r"\[\w+\]=(\d+)", whole)]
    assert len(limits) == 11
    assert sum(limits) <= 570  # half a minute is left for what happens between the parts


def test_missing_imports_are_found_through_the_modules_beside_a_test(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "helper.py").write_text("import json\nfrom no_such_a.b import c\n")
    (tmp_path / "test_well.py").write_text("import torch\n\ndef test():\n    import no_such_c\n")
    (tmp_path / "test_ill.py").write_text("import os.path, no_such_b\nfrom helper import x\n")
    (tmp_path / "sub" / "conftest.py").write_text("import helper\n")
    missing_imports.main(str(tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/sub/conftest.py: no_such_a",
        f"{tmp_path}/test_ill.py: no_such_a, no_such_b",
    ]
