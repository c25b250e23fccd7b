"""The tables and the figure of docs/methods.md: methods of other papers beside G2RL and its baselines.

    python -m benchmarks.learning.comparison        from the committed results

A difference from GRPO is paired by seed. Its interval is Bonferroni's over the systems of a level: all of a
column's intervals hold together with 95 %.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from g2rl_kernels._files import write_whole

from .collapse import BASELINE, collapses
from .cost import ratios
from .document import RESULTS, ROOT, difference, interval, load, names, of_seeds, table, tuning_table
from .experiment import Row
from .settings import BY_TEXT, COMPARED, COMPARISON, FEW, LEVELS, METHOD_GRIDS, SETTINGS

PAGE = ROOT / "docs" / "methods.md"
FIGURE = "methods.png"
BLOCK = re.compile(r"(<!-- (methods|tuning) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COMPARED_BY = {"pass@1": 3, "distinct right": 1}  # measure -> digits


def shown(mean: float, half: float, digits: int, sign: str = "") -> str:
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def methods_table(rows: Sequence[Row], costs: dict[str, float]) -> str:
    """A line a system, with the differences from GRPO; bold where an interval excludes zero.

    costs: of a step, in GRPO's (cost.py).
    """
    found, lines = names(rows), []
    others = len(found) - 1
    for name in found:
        cells = []
        for measure, digits in COMPARED_BY.items():
            cells.append(shown(*interval(list(of_seeds(rows, name, measure).values())), digits))
            mean, half = difference(rows, name, measure, comparisons=others)
            text = shown(mean, half, digits, "+")
            if name == BASELINE:
                text = ""
            cells.append(f"**{text}**" if text and abs(mean) > half else text)
        for measure in ("maj@16", "pass@16"):
            cells.append(shown(*interval(list(of_seeds(rows, name, measure).values())), 3))
        seeds = len(of_seeds(rows, name, "pass@1"))
        cells.append(f"{len(collapses(rows, name))} of {seeds}")
        cells.append(f"{costs[name]:.2f}" if name in costs else "")
        lines.append([name, *cells])
    heads = ["system", "pass@1", "less GRPO", "distinct right", "less GRPO", "maj@16", "pass@16"]
    problems = len(rows[0]["problems"]["pass@1"])
    title = SETTINGS[rows[0]["setting"]].title
    said = f"{title[0].upper()}{title[1:]}; {problems} held-out problems, {others} differences together:"
    return f"{said}\n\n" + table([*heads, "collapsed", "step, times GRPO's"], lines)


def filled(text: str, results: Path = RESULTS) -> str:
    """`text`, with every block replaced by its table."""

    def block(found: re.Match[str]) -> str:
        kind, stage = found[2], found[3]
        path = results / f"{stage}.json"
        made = "Not run yet.\n"
        if path.exists():
            rows = load(path)
            if kind == "methods":
                made = methods_table(rows, ratios(results.parent))
            else:
                made = tuning_table(rows, METHOD_GRIDS)
        return found[1] + made + found[4]

    return BLOCK.sub(block, text)


def draw(results: Path, path: Path) -> bool:
    """Accuracy against distinct right answers, a point a system with both intervals, a panel a level."""
    files = {level: results / f"{COMPARISON}{level}.json" for level in LEVELS}
    files = {level: file for level, file in files.items() if file.exists()}
    if not files:
        return False
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(files), figsize=(5.6 * len(files), 5.4), layout="constrained", squeeze=False
    )
    colours = [plt.get_cmap("tab20")(number) for number in range(20)]
    systems = [name for name in COMPARED if not name.endswith(", text")]
    colour = {name: colours[number % 20] for number, name in enumerate(systems)}
    colour |= {f"{name}, text": colour[name] for name in BY_TEXT}
    for axes, (level, file) in zip(panels[0], files.items()):
        rows = load(file)
        for name in names(rows):
            x, dx = interval(list(of_seeds(rows, name, "distinct right").values()))
            y, dy = interval(list(of_seeds(rows, name, "pass@1").values()))
            mark = "x" if name.endswith(", text") else "D" if name in FEW else "o"
            axes.errorbar(
                x, y, dy, dx, mark, color=colour[name], label=name, capsize=2, markersize=6, linewidth=1
            )
        axes.set_title(f"{level}: {SETTINGS[level].title}", fontsize=11, loc="left")
        axes.set_xlabel("distinct right answers a problem")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("pass@1")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
    return True


def write() -> None:
    """Writes docs/methods.md and its figure, from the committed results."""
    write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8")))
    draw(RESULTS, PAGE.with_name(FIGURE))


if __name__ == "__main__":
    write()
    sys.exit(0)
