"""What each rank of test_vocab_parallel.py runs: python ranks.py RANK WORLD FOLDER, one process a rank.

All ranks know all cases; each calls the ops with its own rows of weight and bias, and writes what it got to
FOLDER/rank<RANK>.pt. The test compares with the whole vocabulary in float64.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from oracle import Case, make_case
from strategies import low_rank, restricted

import g2rl_kernels as g2
from g2rl_kernels import arguments
from g2rl_kernels.head import logprobs, vocab_parallel

Results = dict[str, torch.Tensor]
TRAINED = ("hidden", "weight", "bias")
STATISTICS = ("sum_p_squared", "top_token")
ASKED = ("sum_p_squared", "top_token", "top_logprob")


def rows(V: int, world: int) -> list[slice]:
    """Shards of 1 row, of what is left, and of more than that: [1, rest] or [1, a few, most, rest]."""
    ends = [0, 1, V] if world == 2 else [0, 1, V // 5, V - V // 10, V]
    return [slice(begin, end) for begin, end in pairwise(ends)]


def cases(world: int) -> dict[str, Case]:
    """By name; world decides where shards begin."""
    V = 203
    shards = rows(V, world)
    full = {"temperature": 0.7, "logit_scale": 1.3, "logit_softcap": 4.0}
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1))
    found = {
        "fp32": make_case([20, 0, 13], V, 24),
        "all options": make_case(
            [20, 0, 13], V, 24, bias=bias, token_weights=torch.rand(33, generator=g(2)), **full
        ),
        "bf16": make_case([20, 0, 13], V, 24, dtype=torch.bfloat16, bias=bias.bfloat16(), **full),
        "fp16": make_case([5, 6], V, 24, dtype=torch.float16),
        "temperatures": make_case(
            [20, 0, 13], V, 24, bias=bias, temperature=0.3 + torch.rand(33, generator=g(5))
        ),
        "equal logits": make_case([9, 4], V, 8).replace(hidden=torch.zeros(13, 8)),
        "several blocks": make_case([530, 200], 3 * V, 2000, dtype=torch.bfloat16),
        "no tokens": make_case([0, 0], V, 8, dtype=torch.bfloat16, bias=bias),
    }
    for name in ("all options", "bf16", "several blocks"):
        case = found[name]
        found[f"{name}, low rank"] = case.replace(lora=low_rank(case, 5, torch.float32))
    for name in ("all options", "bf16", "fp16"):
        found[f"{name}, support"] = restricted(found[name])
    for name, shard in (("first", shards[0]), ("last", shards[-1])):
        case = make_case([9, 8], V, 16, bias=bias)
        found[f"tokens on the {name} rank only"] = case.replace(
            tokens=torch.randint(shard.start, shard.stop, (17,), generator=g(3))
        )
        elsewhere = [v for v in range(V) if not shard.start <= v < shard.stop]
        tokens = torch.tensor(elsewhere)[torch.randint(len(elsewhere), (17,), generator=g(3))]
        masked = case.replace(tokens=tokens, bias=bias.clone())
        masked.bias[shard] = -torch.inf
        found[f"the {name} rank masked"] = masked
        found[f"the {name} rank masked, behind a softcap"] = masked.replace(logit_softcap=3.0)
    # p(token) = 1 - 67 e^-30 or so: 1 - p in float32 has no digit left
    certain = make_case([6, 6], V, 12)
    certain.hidden = torch.eye(12)
    certain.tokens = torch.arange(0, V, V // 12)[:12]
    certain.weight = torch.zeros(V, 12)
    certain.weight[certain.tokens, torch.arange(12)] = 30.0
    found["near-certain tokens"] = certain
    return found


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(N: int) -> torch.Tensor:
    """[2, N]: what comes in for log-probabilities and entropy."""
    return torch.randn(2, N, generator=g(4))


def run(
    case: Case, mine: slice, group: Any, trained: tuple[str, ...] = TRAINED, backend: str | None = None
) -> Results:
    """Both ops on the rows `mine`, forward and backward; `group` None: on all rows, alone."""
    bias = None if case.bias is None else case.bias[mine]
    A, B, scaling = (None, None, 1.0) if case.lora is None else case.lora
    B = None if B is None else B[mine]
    leaves = {"hidden": case.hidden, "weight": case.weight[mine], "bias": bias, "A": A, "B": B}
    leaves = {name: t.clone() for name, t in leaves.items() if t is not None}
    for name in (*trained, "A", "B"):
        if name in leaves:
            leaves[name].requires_grad_()
    options = {**case.head, "bias": leaves.get("bias"), "process_group": group, "backend": backend}
    options["lora"] = None if A is None else (leaves["A"], leaves["B"], scaling)
    options["statistics"] = STATISTICS
    out = g2.linear_logprobs(leaves["hidden"], leaves["weight"], case.tokens, **options)
    torch.autograd.backward([*out[:2]], [*gradients(len(case.tokens)).to(out.logprobs)])
    results = {"logprobs": out.logprobs.detach(), "entropy": out.entropy.detach()}
    results |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    results |= {f"statistics {name}": getattr(out, name) for name in ASKED}
    if case.hidden.dtype != torch.float64:
        head = g2.head_features(
            case.hidden, case.weight[mine], case.tokens, case.cu_seqlens,
            token_weights=case.token_weights, **{**options, "bias": bias},
        )  # fmt: skip
        results |= {f"head {name}": value for name, value in zip(head._fields, head[:4])}
        results |= {f"statistics head {name}": getattr(head, name) for name in ASKED}
    return results


def wrong_arguments(case: Case, rank: int, group: Any) -> dict[str, Callable[[], Any]]:
    """By name: calls that are wrong on rank 1 only, or differ between ranks."""
    bad = rank == 1
    mine = rows(len(case.weight), group.size())[rank]
    head = {"hidden": case.hidden, "weight": case.weight[mine], "tokens": case.tokens, "process_group": group}

    def linear(**changes: Any) -> Callable[[], Any]:
        return lambda: g2.linear_logprobs(**{**head, **changes})

    def features(**changes: Any) -> Callable[[], Any]:
        return lambda: g2.head_features(**{**head, "cu_seqlens": case.cu_seqlens, **changes})

    cu = case.cu_seqlens.clone()
    cu[1] -= int(bad)
    n, d = len(case.weight[mine]), case.hidden.shape[1]
    ends = torch.arange(len(case.tokens) + 1)
    beyond = torch.stack([case.tokens, torch.full_like(case.tokens, len(case.weight))], 1).flatten()
    return {
        "temperature is negative": linear(temperature=-1.0 if bad else 1.0),
        "hidden is missing": features(hidden=None if bad else case.hidden),
        "weight has another dtype": linear(weight=case.weight[mine].half() if bad else case.weight[mine]),
        "weight is empty": linear(weight=case.weight[:0] if bad else case.weight[mine]),
        "cu_seqlens falls": features(cu_seqlens=case.cu_seqlens.flip(0) if bad else case.cu_seqlens),
        "cu_seqlens differs": features(cu_seqlens=cu),
        "tokens differ": linear(tokens=case.tokens.flip(0) if bad else case.tokens),
        "tokens beyond all rows": linear(tokens=case.tokens + len(case.weight)),
        "hidden has fewer rows": linear(hidden=case.hidden[1:], tokens=case.tokens[1:]) if bad else linear(),
        "hidden requires grad": linear(hidden=case.hidden.clone().requires_grad_(bad)),
        "bias is missing": linear(bias=None if bad else case.bias[mine]),
        "token_weights differ": features(token_weights=torch.full(case.tokens.shape, 1.0 + bad)),
        "logit_softcap differs": features(logit_softcap=5.0 if bad else None),
        "A differs": linear(lora=(torch.ones(2, d) * (1 + bad), torch.ones(n, 2), 1.0)),
        "scaling differs": linear(lora=(torch.ones(2, d), torch.ones(n, 2), 1.0 + bad)),
        "A requires grad": linear(lora=(torch.ones(2, d).requires_grad_(bad), torch.ones(n, 2), 1.0)),
        "lora is missing": linear(lora=None if bad else (torch.ones(2, d), torch.ones(n, 2), 1.0)),
        "B has too few rows": linear(lora=(torch.ones(2, d), torch.ones(n - bad, 2), 1.0)),
        "temperatures differ": linear(temperature=torch.full(case.tokens.shape, 1.0 + bad)),
        "statistics differ": linear(statistics=STATISTICS if bad else STATISTICS[:1]),
        "support differs": linear(support=(case.tokens if bad else case.tokens.int(), ends)),
        "support is missing": features(support=None if bad else (case.tokens, ends)),
        "support on rank 1 alone": features(support=(case.tokens, ends) if bad else None),
        "support lacks a token": linear(support=(case.tokens + bad, ends)),
        "support beyond all rows": linear(support=(beyond, ends * 2)),
        "backend differs": linear(backend="reference" if bad else None),
        "function differs": features() if bad else linear(),
    }


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def everything(group: Any) -> dict[str, Any]:
    """What this rank of the group finds."""
    rank, world = group.rank(), group.size()
    found: dict[str, Any] = {}
    for name, case in cases(world).items():
        found[name] = run(case, rows(len(case.weight), world)[rank], group)

    case = cases(world)["all options"]
    mine = rows(len(case.weight), world)[rank]
    found["again"] = run(case, mine, group)
    double = case.replace(**{name: getattr(case, name).double() for name in TRAINED})
    found["float64"] = run(double, mine, group)
    for name in ("all options", "bf16"):
        found[f"{name}, reference"] = run(cases(world)[name], mine, group, backend="reference")
    if arguments.HAS_TRITON and world == 2:  # interpreted, it takes seconds
        found["all options, triton"] = run(case, mine, group, backend="triton")
    found["hidden alone"] = run(case, mine, group, ("hidden",))
    found["weight alone"] = run(case, mine, group, ("weight",))
    sums, chunk = logprobs.SUMS, vocab_parallel.CHUNK
    logprobs.SUMS = 4 * 24 * 10  # bytes: of 10 tokens
    vocab_parallel.CHUNK = 7 * world  # 7 tokens
    found["in chunks"] = run(cases(world)["bf16"], mine, group)
    logprobs.SUMS, vocab_parallel.CHUNK = sums, chunk

    bad = case.replace(tokens=case.tokens.clone())
    bad.tokens[0], bad.tokens[1] = len(case.weight), -1
    function = torch.compile(g2.linear_logprobs, fullgraph=True, backend="aot_eager")
    for name, one in (("right", case), ("wrong", bad)):
        options = {**one.head, "bias": one.bias[mine], "process_group": group}
        out = function(one.hidden, one.weight[mine], one.tokens, **options)
        found[f"compiled, {name}"] = out._asdict()

    found["errors"] = {}
    for name, call in wrong_arguments(case, rank, group).items():
        start = time.perf_counter()
        found["errors"][name] = [message(call), time.perf_counter() - start]
    found["after errors"] = run(case, mine, group)
    return found


def main(rank: int, world: int, folder: Path) -> None:
    """All ranks together, and the first two of them; in the end the last one dies."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    everyone, two = dist.group.WORLD, dist.new_group([0, 1])
    found: dict[Any, Any] = {world: everything(everyone)}
    case = cases(world)["all options"]
    mine = rows(len(case.weight), world)[rank]
    if rank < 2:
        found[2] = everything(two)
    else:
        found["no member"] = message(lambda: run(case, mine, two))
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.perf_counter()
    found["a rank was killed"] = [message(lambda: run(case, mine, everyone)), time.perf_counter() - start]
    torch.save(found, folder / f"rank{rank}.pt")
    os._exit(0)  # no farewell to a group that is broken


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
