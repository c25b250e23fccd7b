"""Many threads at once: the ops give the bits of one after the other. The import leaves the GIL off."""

import random
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import make_case
from torch import Tensor

import g2rl_kernels as g2

THREADS = 8
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def head_features(seed: int, backend: str) -> list[Tensor]:
    lengths, V, d = [(9, 0, 30), (70,), (1, 2, 3)][seed % 3], 301 + 97 * seed, 24 + 8 * seed
    case = make_case(list(lengths), V=V, d=d, dtype=(torch.float32, torch.bfloat16)[seed % 2])
    found = g2.head_features(case.hidden, case.weight, case.tokens, case.cu_seqlens, backend=backend)
    return [found.features, found.logprobs, found.logsumexp, found.entropy]


def linear_logprobs(seed: int, backend: str) -> list[Tensor]:
    case = make_case([20 + 9 * seed], V=257 + 64 * seed, d=16 + 8 * seed, dtype=torch.float32)
    leaves = case.hidden.requires_grad_(), case.weight.requires_grad_()
    found = g2.linear_logprobs(*leaves, case.tokens, temperature=0.8, backend=backend)
    loss = found.logprobs.sum() - 0.3 * found.entropy.sum()
    return [found.logprobs, found.entropy, *torch.autograd.grad(loss, leaves)]


def group_geometry(seed: int, _: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(24, 40 + seed, generator=generator)
    rewards = torch.rand(24, generator=generator).round()
    return [*g2.group_geometry(features, rewards, group_size=(4, 8, 12)[seed % 3])]


OPS = (head_features, linear_logprobs, group_geometry)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_threads_at_once_give_the_bits_of_one_after_the_other(backend):
    work = [(op, seed) for op in OPS for seed in range(6)]
    alone = {(op, seed): op(seed, backend) for op, seed in work}
    start = threading.Barrier(THREADS)

    def task(number: int) -> list[str]:
        order = random.Random(number).sample(work, len(work))
        start.wait()
        return [
            f"{op.__name__}({seed}) in thread {number}"
            for op, seed in order
            if not all(a.equal(b) for a, b in zip(op(seed, backend), alone[op, seed], strict=True))
        ]

    with ThreadPoolExecutor(THREADS) as pool:
        different = [name for names in pool.map(task, range(THREADS)) for name in names]
    assert different == []


@pytest.mark.skipif(not FREE_THREADED, reason="needs free-threaded Python")
def test_the_import_leaves_the_gil_off():
    code = "import torch, sys, g2rl_kernels; print(sys._is_gil_enabled())"
    command = [sys.executable, "-W", "error", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
