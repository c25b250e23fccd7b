"""Tables and figures of docs/evidence.md, from the rows of the experiments.

A number is a mean over seeds of each seed's mean over held-out problems, with Student's 95 % interval over
seeds. Differences are paired: runs of one seed share the warm start, and the problems in their order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from g2rl_kernels._files import write_whole

from .collapse import BASELINE, collapses
from .experiment import Evaluation, Row
from .settings import (
    COMPARED,
    COMPARISON,
    GRIDS,
    METHOD_GRIDS,
    MORE,
    PAIRS,
    SAMPLED,
    SAMPLING,
    SETTINGS,
    systems,
)

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "learning"
PAGE = ROOT / "docs" / "evidence.md"
BLOCK = re.compile(
    r"(<!-- (results|differences|pairs|tuning|choice)(?: ([\w-]+))? -->\n).*?(<!-- end -->)", re.DOTALL
)

Grids = Mapping[str, Sequence[dict[str, Any]]]  # algorithm -> the keys that tuning tries

# measure -> heading, digits
MEASURES: dict[str, tuple[str, int]] = {
    "pass@1": ("pass@1", 3),
    "maj@16": ("maj@16", 3),
    "pass@16": ("pass@16", 3),
    "distinct right": ("distinct right", 1),
    "entropy": ("entropy, nats", 3),
    "cos_mean": ("mean cosine", 3),
    "negative_pairs": ("negative pairs", 3),
}


# --- numbers ------------------------------------------------------------------------------------------------


def load(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def value(row: Evaluation, measure: str) -> float:
    """A measure of one policy: the mean over held-out problems, or a number of the geometry."""
    if measure in row["problems"]:
        numbers = row["problems"][measure]
        return sum(numbers) / len(numbers)
    return float(row["geometry"][measure])


def of_seeds(rows: Sequence[Row], system: str, measure: str) -> dict[int, float]:
    return {row["seed"]: value(row, measure) for row in rows if row["system"] == system}


def mean_of(rows: Sequence[Row], system: str, measure: str) -> float:
    values = of_seeds(rows, system, measure)
    return sum(values.values()) / len(values)


def interval(values: Sequence[float], comparisons: int = 1) -> tuple[float, float]:
    """Mean and half of its 95 % interval by Student's t; NaN for fewer than three values.

    comparisons: how many intervals hold together with 95 %, by Bonferroni's rule.
    """
    n, mean = len(values), sum(values) / len(values)
    if n < 3:
        return mean, math.nan
    from scipy.stats import t

    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
    return mean, float(t.ppf(1 - 0.025 / comparisons, n - 1)) * deviation / math.sqrt(n)


def difference(
    rows: Sequence[Row], system: str, measure: str, other: str = BASELINE, comparisons: int = 1
) -> tuple[float, float]:
    """One system less another, paired by seed: mean and half of the interval."""
    ours, theirs = of_seeds(rows, system, measure), of_seeds(rows, other, measure)
    both = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in both], comparisons)


def best(rows: Sequence[Row], grids: Grids = GRIDS) -> dict[str, dict[str, Any]]:
    """The result of a tuning stage: for each algorithm, the keys with the highest mean pass@1 on held-out
    problems."""
    found = {}
    for algorithm, grid in grids.items():
        scores = [mean_of(rows, f"{algorithm} {number}", "pass@1") for number in range(len(grid))]
        found[algorithm] = grid[scores.index(max(scores))]
    return found


def names(rows: Sequence[Row]) -> list[str]:
    """The systems in rows, in the order of the registry."""
    found = {row["system"] for row in rows}
    return [name for name in systems(rows[0]["setting"]) | COMPARED | SAMPLED if name in found]


# --- tables -------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def results_table(rows: Sequence[Row]) -> str:
    lines = []
    for name in names(rows):
        cells = []
        for measure, (_, digits) in MEASURES.items():
            mean, half = interval(list(of_seeds(rows, name, measure).values()))
            cells.append(f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}"))
        seeds = len(of_seeds(rows, name, "pass@1"))
        lines.append([name, *cells, f"{len(collapses(rows, name))} of {seeds}"])
    heads = ["system", *(head for head, _ in MEASURES.values()), "collapsed"]
    return f"{_what(rows)}\n\n" + table(heads, lines)


def differences_table(rows: Sequence[Row]) -> str:
    """Differences of every system from GRPO."""
    lines = [_differences(rows, name, name) for name in names(rows) if name != BASELINE]
    return table([f"less {BASELINE}", *(head for head, _ in MEASURES.values())], lines)


def pairs_table(rows: Sequence[Row]) -> str:
    """Differences between systems that differ in one choice."""
    known = names(rows)
    lines = [
        _differences(rows, f"{one} less {other}", one, other)
        for one, other in PAIRS
        if one in known and other in known
    ]
    return table(["one choice", *(head for head, _ in MEASURES.values())], lines)


def _differences(rows: Sequence[Row], title: str, system: str, other: str = BASELINE) -> list[str]:
    """A line of differences, bold where the interval excludes zero and the printed mean is not zero."""
    cells = []
    for measure, (_, digits) in MEASURES.items():
        mean, half = difference(rows, system, measure, other)
        text = f"{mean:+.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
        clear = abs(mean) > half and float(f"{mean:.{digits}f}") != 0
        cells.append(f"**{text}**" if clear else text)
    return [title, *cells]


def tuning_table(rows: Sequence[Row], grids: Grids = GRIDS) -> str:
    """Every setting of the algorithms that were tuned whole; the chosen one in bold."""
    grids = {name: grid for name, grid in grids.items() if _is_tuned(rows, name, grid)}
    lines, chosen = [], best(rows, grids)
    for algorithm, grid in grids.items():
        for number, keys in enumerate(grid):
            said = ", ".join(f"{key}={value:g}" for key, value in keys.items())
            score = mean_of(rows, f"{algorithm} {number}", "pass@1")
            mark = "**" if keys is chosen[algorithm] else ""
            lines.append([algorithm, f"{mark}{said}{mark}", f"{mark}{score:.3f}{mark}"])
    return table(["algorithm", "setting", "pass@1"], lines)


def _is_tuned(rows: Sequence[Row], name: str, grid: Sequence[dict[str, Any]]) -> bool:
    found = {row["system"] for row in rows}
    return all(f"{name} {number}" in found for number in range(len(grid)))


def _what(rows: Sequence[Row]) -> str:
    seeds = {name: len(of_seeds(rows, name, "pass@1")) for name in names(rows)}
    fewest, most = min(seeds.values()), max(seeds.values())
    said = (
        f"{most if fewest == most else f'{fewest} to {most}'} seeds a system, "
        f"{len(rows[0]['problems']['pass@1'])} held-out problems"
    )
    starts = {row["seed"]: value(row["start"], "pass@1") for row in rows if "start" in row}
    entropies = {row["seed"]: row["start"]["geometry"]["entropy"] for row in rows if "start" in row}
    if starts:
        mean, entropy = (sum(found.values()) / len(found) for found in (starts, entropies))
        said += f"; before training pass@1 is {mean:.3f} and entropy {entropy:.3f} nats, mean over seeds"
    rounded = sum("products" in row for row in rows)
    if rounded:
        said += f"; {rounded} of {len(rows)} runs on a CPU that computed bfloat16 products in float32"
    return f"{said}:"


def choice_text(results: Path) -> str:
    """The steps by which the rule of choice.py chooses the default, from the results in a folder."""
    from .choice import STAGES, said, stored

    found = stored(results)
    if missing := [stage for stage in STAGES if stage not in found]:
        return f"Not run yet: {', '.join(missing)}.\n"
    return said(found)


TABLES = {
    "results": results_table,
    "differences": differences_table,
    "pairs": pairs_table,
    "tuning": tuning_table,
}


# --- figures ------------------------------------------------------------------------------------------------

COLOURS = {
    "GRPO": "#6b6b6b",
    "entropy bonus": "#c49a1a",
    "EVOL-RL": "#7a5195",
    "G2RL intent, shape, 0.5": "#1f6fb4",
    "G2RL equation, shape, 0.5": "#3a9b5c",
    "G2RL right, shape, 0.5": "#d1603d",
}
SKIPPED = {name.replace("shape", "skip"): colour for name, colour in COLOURS.items() if "shape" in name}
CURVES = {
    "accuracy": "accuracy in training",
    "entropy": "entropy, nats a token",
    "length": "response length, tokens",
    "cos_mean": "mean cosine between gradients",
    "negative_pairs": "share of negative pairs",
}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Curves of training with 95 % bands over seeds, and each system's results on held-out problems."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    setting = SETTINGS[rows[0]["setting"]]
    figure.suptitle(f"{setting.name}: {setting.title}", fontsize=13)
    panels = list(figure.subplots(2, 3).flat)
    colours = COLOURS if setting.name in ("fluent", "halting") else COLOURS | SKIPPED
    shown = [name for name in names(rows) if name in colours]
    for axes, (key, label) in zip(panels, CURVES.items()):
        for name in shown:
            curves = [row["curves"][key] for row in rows if row["system"] == name]
            points = [interval(at) for at in zip(*curves)]
            steps = [100 * (at + 1) / len(points) for at in range(len(points))]
            style = "--" if name in SKIPPED else "-"
            means = [mean for mean, _ in points]
            axes.plot(steps, means, style, color=colours[name], linewidth=2, label=name)
            low, high = ([mean + sign * half for mean, half in points] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=colours[name], alpha=0.15, linewidth=0)
        axes.set_title(label, fontsize=11, loc="left")
        axes.set_xlabel("training, % of the steps")
    last = panels[-1]
    for name in names(rows):
        x, dx = interval(list(of_seeds(rows, name, "distinct right").values()))
        y, dy = interval(list(of_seeds(rows, name, "pass@1").values()))
        colour = colours.get(name, "#c8c8c8")
        order = 3 if name in colours else 2
        mark = "s" if name in SKIPPED and name in colours else "o"
        last.errorbar(x, y, dy, dx, mark, color=colour, capsize=2, markersize=5, linewidth=1.2, zorder=order)
    last.set_title("held-out problems, after training", fontsize=11, loc="left")
    last.set_xlabel("distinct right answers a problem")
    last.set_ylabel("pass@1")
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    ncols = len(labels) if len(labels) < 7 else -(-len(labels) // 2)
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


# --- the document -------------------------------------------------------------------------------------------


def filled(text: str, results: Path = RESULTS) -> str:
    """`text`, with every block replaced by its table from the results."""

    def block(found: re.Match[str]) -> str:
        kind, stage = found[2], found[3] or found[2]
        if kind == "choice":
            return found[1] + choice_text(results) + found[4]
        path = results / f"{stage}.json"
        made = TABLES[kind](load(path)) if path.exists() else "Not run yet.\n"
        return found[1] + made + found[4]

    return BLOCK.sub(block, text)


def write() -> None:
    """Writes docs/evidence.md and its figures, from the committed results."""
    write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8")))
    for path in sorted(RESULTS.glob("*.json")):
        elsewhere = path.stem.startswith(COMPARISON) or path.stem in (SAMPLING, MORE)
        if "tuning" not in path.stem and not elsewhere:
            draw(load(path), PAGE.with_name(f"evidence-{path.stem}.png"))


def write_report(results: Path) -> Path:
    """Writes results/report.md: the same tables and figures, of all results in a folder."""
    sections = ["# Results\n"]
    for path in sorted(results.glob("*.json")):
        rows, stage = load(path), path.stem
        if not rows:
            continue
        if "tuning" in stage:
            grids: Grids = GRIDS if stage == "tuning" else METHOD_GRIDS
            sections.append(f"## {stage}\n\n{tuning_table(rows, grids)}")
            continue
        draw(rows, results / f"{stage}.png")
        differences = differences_table(rows) if BASELINE in names(rows) else ""
        sections.append(f"## {stage}\n\n![]({stage}.png)\n\n{results_table(rows)}\n{differences}")
    write_whole(results / "report.md", "\n".join(sections))
    return results / "report.md"
