"""Pictures of `g2rl bench head` and `logprobs`: ratio against N and memory against N, one line a method."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .rows import HeadRow, LogprobsRow

Row = HeadRow | LogprobsRow


def panels(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by pair of axes: the same head, dtype and distribution. Cases with one N are dropped if another
    has several: a line needs two points."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        key = f"{row['shape']} (V = {row['V']}, d = {row['d']}), {row['dtype']}"
        key += f", {row['distribution']}" if row.get("distribution") else ""
        found.setdefault(key, []).append(row)
    lines = {key: some for key, some in found.items() if len({row["N"] for row in some}) > 1}
    return lines or found


def draw(rows: list[Row], title: str, floor: str, path: Path) -> None:
    cases = panels(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = {method: plt.get_cmap("tab20")(i % 20) for i, method in enumerate(methods)}
    figure, axes = plt.subplots(
        len(cases), 2, figsize=(12, 4 * len(cases) + 1), squeeze=False, layout="constrained"
    )
    for (left, right), (name, some) in zip(axes, cases.items()):
        for method in methods:
            mine = sorted((row for row in some if row["method"] == method), key=lambda row: row["N"])
            style = {"color": colours[method], "marker": "o", "markersize": 4, "label": method}
            N = [row["N"] for row in mine]
            if mine:
                low, mid, high = zip(*(row["ratio_20_50_80"] for row in mine))
                left.plot(N, mid, **style)
                left.fill_between(N, low, high, color=colours[method], alpha=0.15, linewidth=0)
            # a logarithmic axis has no place for 0 bytes
            memory = [(row["N"], row["extra_bytes"] / 2**20) for row in mine if row["extra_bytes"]]
            if memory:
                right.plot(*zip(*memory), **style)
        left.axhline(1, color="black", linewidth=0.8)
        left.set_ylim(0, 1.15 * max(1, *(row["ratio_20_50_80"][1] for row in some)))
        left.set(ylabel=f"time / {floor}")
        right.set(ylabel="extra memory, MiB", yscale="log")
        right.yaxis.set_major_formatter("{x:g}")
        numbers = sorted({row["N"] for row in some})
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(numbers, [str(n) for n in numbers])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set(title=name, xlabel="N, tokens")
    handles = {label: h for row in axes for h, label in zip(*row[0].get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
