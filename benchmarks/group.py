"""Time of the group geometry, one call for all groups, beside one read of its features."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels.group import geometry as group
from g2rl_kernels.group import reference
from g2rl_kernels.group.options import ShapingOptions

from .measure import in_turns, least_seconds, markdown, quantiles, spread, why_not
from .rows import GroupRow, LeftOut

# groups, rows a group, d
SIZES = ((64, 16, 4096), (64, 16, 2048), (8, 16, 4096), (256, 16, 2048), (64, 8, 4096), (32, 32, 4096))
CPU_SIZES = ((4, 16, 576), (64, 16, 2048))
QUICK_SIZES = ((8, 16, 1024),)


def inputs(B: int, m: int, d: int, device: str) -> tuple[Tensor, Tensor, int]:
    """Features that share a direction, as responses to one prompt do, and rewards of +1 and -1."""
    g = torch.Generator(device).manual_seed(0)
    shared = torch.randn(B, 1, d, generator=g, device=device)
    features = (shared + torch.randn(B, m, d, generator=g, device=device)).view(B * m, d)
    rewards = torch.randint(2, (B * m,), generator=g, device=device) * 2.0 - 1
    return features, rewards, m


def implementations(features: Tensor, rewards: Tensor, m: int) -> dict[str, Callable[[], Any]]:
    """Name -> call whose last result is the advantages: the public op, with its checks and its list of
    members, and each operator behind it alone, one launch."""
    members = torch.arange(len(rewards), device=rewards.device).view(-1, m)
    gpu = features.is_cuda
    names = {"compiled": "CUDA C++" if gpu else "C++", "triton": "Triton", "reference": "PyTorch"}
    found: dict[str, Callable[[], Any]] = {
        "group_geometry": lambda: g2.group_geometry(features, rewards, group_size=m)
    }
    for key, operator in group.IMPLEMENTATIONS.items():
        if key == "triton" and not gpu:
            continue  # Triton's interpreter is for tests only
        call = partial(operator, features, rewards, members, *ShapingOptions().flat())
        found[f"{names[key]} operator"] = call
    return found


def exact(features: Tensor, rewards: Tensor, m: int) -> Tensor:
    """The advantages in float64."""
    members = torch.arange(len(rewards), device=rewards.device).view(-1, m)
    return reference.group_geometry(features.double(), rewards.double(), members)[3]


def graphed(call: Callable[[], Any], launches: int) -> Callable[[], None]:
    """Replays so many calls in one CUDA graph: their time without the host's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    return graph.replay


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def measure(
    size: tuple[int, int, int], device: str, rounds: int, launches: int
) -> tuple[list[GroupRow], list[LeftOut]]:
    """Rows for one size. A round times `launches` calls in a row, so that the features stay in the L2."""
    B, m, d = size
    label = f"{B} x {m} x {d}"
    features, rewards, _ = inputs(B, m, d, device)
    total = torch.empty((), device=device)
    truth = exact(features, rewards, m)
    singles: dict[str, Callable[[], Any]] = {"floor": lambda: torch.sum(features, (0, 1), out=total)}
    errors: dict[str, float] = {}
    left_out: list[LeftOut] = []
    for name, call in implementations(features, rewards, m).items():
        try:
            errors[name] = float((call()[-1].double() - truth).abs().max())
            singles[name] = call
        except Exception as error:
            left_out.append(why_not(label, name, error))

    calls: dict[str, Callable[[], Any]] = {
        name: partial(_repeat, call, launches) for name, call in singles.items()
    }
    for name, call in singles.items() if device == "cuda" else ():
        try:
            calls[f"{name} graph"] = graphed(call, launches)
        except Exception as error:
            left_out.append(why_not(label, f"{name}, in a CUDA graph", error))
    seconds = in_turns(device, f"group {label}", calls, rounds)
    times = {name: [value / launches * 1e6 for value in values] for name, values in seconds.items()}

    rows: list[GroupRow] = []
    for name in singles:
        graph = times.get(f"{name} graph")
        rows.append(
            {
                "groups": B,
                "m": m,
                "d": d,
                "implementation": "one read of the features" if name == "floor" else name,
                "microseconds_20_50_80": [round(q, 3) for q in quantiles(times[name])],
                "graph_microseconds": round(statistics.median(graph), 3) if graph else None,
                "error": errors.get(name),
                "rounds": rounds,
                "launches": launches,
            }
        )
    return rows, left_out


def table(rows: list[GroupRow]) -> str:
    return markdown(
        [
            {
                "groups x rows x d": f"{row['groups']} x {row['m']} x {row['d']}",
                "implementation": row["implementation"],
                "us a call (20 to 80 %)": spread(row["microseconds_20_50_80"], ".1f"),
                "us in a CUDA graph": (
                    "" if row["graph_microseconds"] is None else f"{row['graph_microseconds']:.1f}"
                ),
                "error of the advantages": "" if row["error"] is None else f"{row['error']:.0e}",
            }
            for row in rows
        ]
    )


def notes(rows: list[GroupRow], machine: Mapping[str, Any]) -> str:
    launches = {row["launches"] for row in rows}
    text = (
        f"Float32; each figure is the mean of {max(launches)} calls in a row, with the features in cache; "
        "median of the rounds."
    )
    least = {}
    for row in rows:
        B, m, d = row["groups"], row["m"], row["d"]
        if found := least_seconds(machine, "fp32", 2 * B * m * m * d, 4 * B * m * d):
            least[f"{B} x {m} x {d}"] = f"{found * 1e6:.1f} us"
    if least:
        text += f" At the ceilings, out of cache: {', '.join(map(' takes '.join, least.items()))}."
    return text
