"""Times this build beside an older one, on a CPU, turn by turn.

    git worktree add ../older COMMIT
    (cd ../older && python setup.py build_ext --inplace)
    python -m benchmarks.builds ../older --out benchmarks/results/builds.json

Two processes, each with its own build, wait for their turn: in every round each makes one call of every
method that it has, while the other stands still. The floor is torch's: the logits product for
`head_features`, three products for `linear_logprobs`. Both make the same inputs (benchmarks/registry.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEAD, LOGPROBS = "head_features", "linear_logprobs"
FLOORS = {HEAD: "the logits product", LOGPROBS: "three products"}
# Methods by name, as the options of their op. A build that lacks an option leaves the method out.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    HEAD: {
        "1 response": {"responses": 1},
        "8 responses": {"responses": 8},
        "1 response, known log-probs": {"responses": 1, "known": True},
        "8 responses, known log-probs": {"responses": 8, "known": True},
        "8 responses, statistics": {"responses": 8, "statistics": ("sum_p_squared", "top_token")},
        "8 responses, LoRA of rank 16": {"responses": 8, "rank": 16},
    },
    LOGPROBS: {
        "default": {},
        "no logits kept": {"logits_memory": 0},
        "256 MiB of logits": {"logits_memory": 256 << 20},
        "statistics": {"statistics": ("sum_p_squared", "top_token")},
        "LoRA of rank 16": {"rank": 16},
    },
}


# --- one process --------------------------------------------------------------------------------------------


def registry() -> Any:
    """This build's benchmarks/registry.py, whichever package is imported."""
    spec = importlib.util.spec_from_file_location("registry", ROOT / "benchmarks" / "registry.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["registry"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def methods(p: Any) -> dict[tuple[str, str], Callable[[], Any]]:
    """The calls by op and method; the weight of a LoRA is frozen, like its peers' without one."""
    import torch

    import g2rl_kernels as g2

    g = torch.Generator().manual_seed(1)
    hidden, weight = p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_()
    incoming = torch.randn(2, len(p.tokens), generator=g)

    def options(given: dict[str, Any]) -> dict[str, Any]:
        given = {k: v for k, v in given.items() if k != "responses"}
        if given.pop("known", False):
            given["known_logprobs"] = p.logprobs
        if rank := given.pop("rank", 0):
            shapes = (rank, p.hidden.shape[1]), (len(p.weight), rank)
            low = [(torch.randn(shape, generator=g) * rank**-0.5).to(p.hidden.dtype) for shape in shapes]
            given["lora"] = (low[0], low[1], 0.01)
        return given

    def features(given: dict[str, Any]) -> Callable[[], Any]:
        cut, rest = p.cut(given["responses"]), options(given)
        return partial(g2.head_features, p.hidden, p.weight, p.tokens, cut.cu_seqlens, **rest)

    def trained(given: dict[str, Any]) -> Callable[[], Any]:
        rest = options(given)
        heads = [hidden, weight]
        if "lora" in rest:
            lora = [part.requires_grad_() for part in rest["lora"][:2]]
            rest["lora"] = (*lora, rest["lora"][2])
            heads = [hidden, *lora]

        def call() -> Any:
            out = g2.linear_logprobs(hidden, weight if len(heads) == 2 else p.weight, p.tokens, **rest)
            return torch.autograd.grad([out.logprobs, out.entropy], heads, [*incoming])

        return call

    makers = {HEAD: features, LOGPROBS: trained}
    return {(op, name): makers[op](given) for op, found in METHODS.items() for name, given in found.items()}


def floors(p: Any) -> dict[str, Callable[[], Any]]:
    import torch

    logits = torch.zeros(len(p.tokens), len(p.weight), dtype=p.hidden.dtype)

    def product() -> None:
        torch.mm(p.hidden, p.weight.T, out=logits)

    def three() -> None:
        product()
        torch.mm(logits, p.weight)
        torch.mm(logits.T, p.hidden)

    return {HEAD: product, LOGPROBS: three}


def work(shape: str, dtype: str, with_floor: bool = False) -> None:
    """One process: says which calls it has, then times one for each line on stdin that names it."""
    module = registry()
    calls: dict[str, Callable[[], Any]] = {}
    p = module.problem(module.case(shape, dtype))
    for (op, name), call in methods(p).items():
        try:
            call()
        except TypeError:  # an older build does not know the argument
            continue
        calls[f"{op}/{name}"] = call
    if with_floor:
        calls |= {f"{op}/floor": call for op, call in floors(p).items()}
    print(json.dumps([*calls]), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        calls[line.strip()]()
        print(time.perf_counter() - start, flush=True)


class Build:
    """A process that works with the package in `tree`."""

    def __init__(self, tree: Path, shape: str, dtype: str, with_floor: bool):
        path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(Path(__file__).resolve()), "--work", shape, dtype]
        self.process = subprocess.Popen(
            command + ["--with-floor"] * with_floor,
            env={**os.environ, "PYTHONPATH": path},
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.calls: list[str] = json.loads(self._line())

    def seconds(self, call: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(call + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("builds: a process ended early; its error is above")
        return line


# --- both ---------------------------------------------------------------------------------------------------


def compare(older: Path, shape: str, dtype: str, rounds: int, ops: Sequence[str]) -> list[dict[str, Any]]:
    """A row a method: quantiles of its ratio to the floor of its round, and of new / old."""
    from benchmarks.measure import progress, quantiles
    from benchmarks.registry import case

    builds = {"new": Build(ROOT, shape, dtype, True), "old": Build(older, shape, dtype, False)}
    times: dict[str, dict[str, list[float]]] = {"new": {}, "old": {}}
    for round_ in range(rounds + 1):
        progress(f"{shape} {dtype}: round {round_}/{rounds}", often=True)
        for call in (call for call in builds["new"].calls if call.split("/")[0] in ops):
            # Taking turns at being first: the second finds other data in the caches
            for which in ("new", "old") if round_ % 2 else ("old", "new"):
                if call in builds[which].calls:
                    seconds = builds[which].seconds(call)
                    if round_:  # one round to warm up
                        times[which].setdefault(call, []).append(seconds)
    progress("")
    for build in builds.values():
        build.close()
    sizes, rows = case(shape, dtype), []
    for call, new in times["new"].items():
        op, name = call.split("/")
        if name == "floor":
            continue
        floor, old = times["new"][f"{op}/floor"], times["old"].get(call)
        row = {
            **{"shape": shape, "N": sizes.N, "V": sizes.shape.V, "d": sizes.shape.d, "dtype": dtype},
            **{"op": op, "method": name, "rounds": rounds},
            "floor_milliseconds": round(1e3 * quantiles(floor)[1], 2),
            "milliseconds": round(1e3 * quantiles(new)[1], 2),
            "ratio_20_50_80": [round(q, 4) for q in quantiles([a / b for a, b in zip(new, floor)])],
        }
        if old is not None:
            row["older_milliseconds"] = round(1e3 * quantiles(old)[1], 2)
            row["older_20_50_80"] = [round(q, 4) for q in quantiles([a / b for a, b in zip(new, old)])]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a method and shape."""
    from benchmarks.measure import markdown

    def shown(quantiles: list[float] | None) -> str:
        if quantiles is None:
            return ""
        low, middle, high = quantiles
        return f"**{middle:.2f}** ({low:.2f} to {high:.2f})"

    return markdown(
        [
            {
                "N x V x d, dtype": f"{row['N']} x {row['V']} x {row['d']}, {row['dtype']}",
                "op": f"`{row['op']}`",
                "method": row["method"],
                "time / bare products (20 to 80 %)": shown(row["ratio_20_50_80"]),
                "ms": f"{row['milliseconds']:.0f}",
                "older build, ms": f"{row['older_milliseconds']:.0f}" if "older_milliseconds" in row else "",
                "new / older": shown(row.get("older_20_50_80")),
            }
            for row in rows
        ]
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.builds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("older", nargs="?", type=Path, help="a checkout of this project with its own build")
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "qwen3-1.7b"], metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], metavar="NAME")
    parser.add_argument("--ops", nargs="+", default=[*METHODS], choices=[*METHODS], metavar="OP")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the result here, after every case")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--with-floor", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.work:
        shape, dtype = args.work
        work(shape, dtype, args.with_floor)
        return
    if args.older is None or not list(args.older.glob("g2rl_kernels/_C*.so")):
        sys.exit(f"builds: {args.older}: no built checkout (python setup.py build_ext --inplace in it)")
    from benchmarks.measure import machine
    from g2rl_kernels._files import write_whole

    rows: list[dict[str, Any]] = []
    commit = subprocess.run(
        ["git", "-C", str(args.older), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    result = {"op": "builds", "machine": {**machine("cpu"), "older": commit}, "rows": rows}
    for shape in args.shapes:
        for dtype in args.dtypes:
            rows += compare(args.older.resolve(), shape, dtype, args.rounds, args.ops)
            if args.out:
                write_whole(args.out, json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
