"""Time and memory of a head restricted to some ids a token (`support=`), beside the head of all ids.

    python -m benchmarks.support                                    64 and 512 ids a token
    python -m benchmarks.support --shape tiny --N 64 --ids 8 --backend reference

A token's list holds its likeliest ids and the realised one, as a top-k sampler's does. Prints a table, in
milliseconds: head_features; forward and backward pass of linear_logprobs; both with a frozen weight. Memory
is what linear_logprobs takes beyond its gradients at the peak.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import g2rl_kernels as g2

from .floor import megabytes, ms
from .logprobs import Training
from .measure import extra_memory, in_turns, markdown
from .methods import Method, Outputs
from .registry import DTYPES, SHAPES, Problem, case, problem

TOKENS = 256  # whose logits are held at a time


def likeliest(p: Problem, k: int) -> tuple[Tensor, Tensor]:
    """support: ids [N k] and offsets [N + 1]. Each list has the k likeliest ids; where the realised token is
    none of these, it takes the last one's place."""
    lists = [(hidden @ p.weight.T).topk(k).indices for hidden in p.hidden.split(TOKENS)]
    ids = torch.cat(lists)
    lacks = (ids != p.tokens[:, None]).all(1)
    ids[:, -1] = torch.where(lacks, p.tokens, ids[:, -1])
    return ids.flatten(), k * torch.arange(len(ids) + 1, device=ids.device)


def methods(support: tuple[Tensor, Tensor] | None, backend: str | None) -> dict[str, Method]:
    options: dict[str, Any] = {"support": support, "backend": backend}

    def features(p: Problem) -> Outputs:
        inputs = p.hidden, p.weight, p.tokens, p.cu_seqlens
        return Outputs(*g2.head_features(*inputs, logit_softcap=p.softcap, **options))

    def logprobs(p: Problem) -> Outputs:
        out = g2.linear_logprobs(p.hidden, p.weight, p.tokens, logit_softcap=p.softcap, **options)
        return Outputs(logprobs=out.logprobs)

    trained, frozen = Method("logprobs", logprobs), Method("logprobs", logprobs, frozen=True)
    return {"features": Method("features", features), "logprobs": trained, "frozen weight": frozen}


def measure(p: Problem, device: str, ids: Sequence[int], backend: str | None, rounds: int) -> str:
    """The table: a row for the head of all ids, and one for each length of lists."""
    supports = {"all": None} | {str(k): likeliest(p, k) for k in ids}
    calls: dict[str, Callable[[], Any]] = {}
    memory = {}
    for name, support in supports.items():
        of = methods(support, backend)
        training, frozen = Training(of["logprobs"], p), Training(of["frozen weight"], p)
        calls |= {
            f"{name}: head_features": partial(of["features"].call, p),
            f"{name}: forward": training.forward,
            f"{name}: backward": training.backward,
            f"{name}: frozen weight": frozen,
        }
        training()  # compiles
        extra, (_, gradients) = extra_memory(device, training)
        memory[name] = None if extra is None else max(0.0, extra - sum(t.nbytes for t in gradients))
    times = in_turns(device, "support", calls, rounds)
    rows = []
    for name in supports:
        cells = {
            column: ms(1e3 * statistics.median(times[f"{name}: {column}"]))
            for column in ("head_features", "forward", "backward", "frozen weight")
        }
        rows.append({"ids a token": name, **cells, "extra memory": megabytes(memory[name])})
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--N", type=int, default=0, help="tokens (default: as many as take seconds)")
    parser.add_argument("--ids", type=int, nargs="+", default=[64, 512], help="lengths of lists")
    parser.add_argument("--backend", help="default: the device's")
    parser.add_argument("--rounds", type=int, default=11 if gpu else 3)
    args = parser.parse_args(argv)
    device = "cuda" if gpu else "cpu"
    one = case(args.shape, args.dtype, args.N, "0.15 nats", gpu)
    print(f"{one.label}\n")
    print(measure(problem(one, device), device, args.ids, args.backend, args.rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
