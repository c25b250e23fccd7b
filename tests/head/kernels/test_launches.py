"""Every launch of the head's and the group's kernels compiles, with the arguments that they launch it with.

They go through Triton's own launcher, with a driver that claims to be a Hopper, or an MI300, and launches
that end when the kernel is compiled. The interpreter shows what kernels compute, but does not read argument
types as the compiler does."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


AMD = sys.argv[3] == "MI300"


class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("hip", "gfx942", 64) if AMD else GPUTarget("cuda", 90, 32)


driver.set_active(Driver())
torch.version.hip = "7.2" if AMD else None
torch.cuda.get_device_capability = lambda *_: (9, 4 if AMD else 0)
torch.backends.cuda.matmul.fp32_precision = sys.argv[4]
compiled, launch = {}, JITFunction.run


def run(self, *args, grid, warmup, **options):
    assert options["enable_fp_fusion"] is True, self.__name__  # stated, not inherited
    tma = [options.get(flag) for flag in ("H_TMA", "W_TMA", "G_TMA", "K_TMA")]
    assert not AMD or not any(tma), self.__name__
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    assert kernel is not None, self.__name__
    if sys.argv[5] == "support" and not AMD:  # rows are gathered 16 bytes at a time
        assert "ld.global.v4" in kernel.asm["ptx"], self.__name__
    compiled[id(kernel)] = (self.__name__, kernel)  # kept alive: ids are not used again


JITFunction.run = run
from g2rl_kernels.group import triton as group
from g2rl_kernels.head.backend import Hints, Incoming, Kept, Sums
from g2rl_kernels.head.spec import HeadSpec, Responses
from g2rl_kernels.head.support import triton as restricted
from g2rl_kernels.head.support.spec import Support
from g2rl_kernels.head.triton import driver, logprobs, tile, tuning

logprobs._add_product = lambda *_, **__: None
tile.choose = lambda kind, device, dtype, V, D, form: tuning.CANDIDATES["hip" if AMD else 9, form][0]


def inputs(N, V, d, dtype, mode):
    bias, softcap = (torch.zeros(V), 30.0) if mode == "every option" else (None, 0.0)
    head = HeadSpec(torch.zeros(V, d, dtype=dtype), bias, 0.7, 1.0, softcap)
    if mode == "temperatures and statistics":
        head = head._replace(temperatures=torch.ones(N))
    return torch.zeros(N, d, dtype=dtype), torch.zeros(N, dtype=torch.int64), head


def gradients(N, V, d, S, dtype, mode):
    hidden, tokens, head = inputs(N, V, d, dtype, mode)
    more = mode == "temperatures and statistics"
    numbers, sums = torch.zeros(5, N), Sums(torch.zeros(N, d), torch.zeros_like(head.weight))
    for memory in (0, 1 << 40):
        data = torch.zeros(driver.kept_bytes(hidden, head, memory), dtype=torch.uint8)
        kept = Kept(data, N) if memory else None
        driver.statistics(hidden, tokens, head, kept, more)
        driver.sweep(hidden, tokens, head, Incoming(numbers[:2], numbers[2:]), slice(0, V), sums, kept)


def support(N, V, d, S, dtype, mode):
    hidden, tokens, head = inputs(N, V, d, dtype, mode)
    lists = Support(tokens.repeat(3), 3 * torch.arange(N + 1))
    responses = Responses(torch.tensor([0] * S + [N]), None)
    more = mode == "temperatures and statistics"
    restricted.features(hidden, tokens, head, lists, responses, more)
    restricted.gather_sum(torch.zeros(3 * N), lists.ids, lists.offsets, head.weight, torch.empty_like(hidden))


def features(N, V, d, S, dtype, mode):
    hidden, tokens, head = inputs(N, V, d, dtype, mode)
    alpha = torch.ones(N) if mode == "every option" else None
    known = torch.zeros(N) if mode == "one pass" else None
    most = 0.1 if mode == "certificate" else None
    responses = Responses(torch.tensor([0] * S + [N]), alpha)
    more = mode == "temperatures and statistics"
    driver.features(hidden, tokens, head, responses, Hints(known, most), more)


def groups(S, d, B, M):
    for scale in (0, 2):
        members = torch.zeros(B, M, dtype=torch.int64)
        group.launch(torch.zeros(S, d), torch.zeros(S), members, 0.5, 3.0, 1, 0, scale, True, 1e-6)


if sys.argv[2] == "groups":
    features, gradients = (lambda S, d, B, M, *_: groups(S, d, B, M)), lambda *_: None
if sys.argv[5] == "support":
    features, gradients = support, lambda *_: None

counts = []
for size in json.loads(sys.argv[1]):
    for mode in ("two passes", "one pass", "certificate", "every option", "temperatures and statistics"):
        features(*size, getattr(torch, sys.argv[2], None), mode)
        gradients(*size, getattr(torch, sys.argv[2], None), mode)
    counts.append(len(compiled))
print(json.dumps([counts, sorted({name for name, _ in compiled.values()})]))
"""


def launches(
    sizes: list[tuple[int, int, int, int]],
    what: str,
    gpu: str = "Hopper",
    precision: str = "ieee",
    head: str = "",
) -> tuple[list[int], list[str]]:
    """Kernels that were compiled after each size, and their names. `what` is a dtype, and sizes are (N, V, d,
    S) of heads; or it is "groups", and sizes are (S, d, B, M). `precision` is torch's of float32 products.
    `head` is "support" for one that is restricted to some ids a token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-c", SCRIPT, json.dumps(sizes), what, gpu, precision, head]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    counts, names = json.loads(done.stdout.splitlines()[-1])
    return counts, names


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_mode_compiles_once_for_all_sizes(dtype):
    """One token, one response, one tile; then many: nothing compiles anew, only the first step is slow."""
    counts, names = launches([(1, 64, 64, 1), (500, 70_001, 192, 3), (4099, 1000, 1024, 16)], dtype)
    assert counts[0] == counts[1] == counts[2]
    assert set(names) == {
        f"head_{name}_kernel"
        for name in (
            *("target", "stats", "finish", "residual", "collect", "project", "gather", "reduce", "skip"),
            *("join", "gradient", "total"),
        )
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_mode_compiles_for_amd(dtype):
    """Where torch would multiply float32 as TF32, too: AMD has no 3xTF32."""
    _, names = launches([(500, 7001, 192, 3)], dtype, "MI300", "tf32")
    assert {"head_stats_kernel", "head_residual_kernel", "head_project_kernel"} <= set(names)


@pytest.mark.parametrize("gpu", ["Hopper", "MI300"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_restricted_head_compiles_once_for_all_sizes(dtype, gpu):
    """But for wider tiles of a larger head."""
    sizes = [(1, 64, 64, 1), (500, 7001, 192, 3), (4099, 1000, 1024, 16), (70, 70_001, 2048, 2)]
    counts, names = launches(sizes, dtype, gpu, head="support")
    assert names == ["head_support_dot_kernel", "head_support_sum_kernel"]
    sums = 1 if dtype == "float32" else 2  # stored in float32, and in the dtype of the weight
    assert counts == [1 + sums, 1 + sums, 1 + 2 * sums, 1 + 2 * sums]


def test_rows_that_tma_cannot_address_compile():
    counts, _ = launches([(9, 50, 3, 2), (40, 300, 7, 2)], "bfloat16")
    assert counts[0] == counts[1]


def test_groups_of_one_compile_and_then_nothing_anew():
    counts, names = launches([(1, 1, 1, 1), (48, 100, 3, 16), (7, 64, 7, 1)], "groups")
    assert counts == [3, 3, 3]  # each group's deviation and the batch's, and the second kernel of the latter
    assert names == ["batch_scale_kernel", "group_kernel"]
