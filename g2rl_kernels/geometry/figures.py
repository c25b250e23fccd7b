"""The page's figures, as SVG: densities, bars, a scatter plot, and maps of cosines.

Shapes have the class m0, m1, ... of their model, which the style sheet gives a colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from .markup import beginning, escaped
from .rows import MeasuredProblem, ModelGeometry

POINTS = 1500  # pairs of a model in the scatter plot, evenly spaced


class _Axes:
    """A coordinate system in an SVG of fixed size: grid, tick labels, and the elements drawn on it."""

    width, height, left, right, top, bottom = 380, 270, 46, 12, 10, 40

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str = ""):
        self.x_range, self.y_range = x, y
        inner_bottom = self.height - self.bottom
        self.elements = []
        for value in _ticks(*x):
            at = self.x(value)
            self.elements.append(
                f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{self.top}" y2="{inner_bottom}"/>'
                f'<text x="{at:.1f}" y="{inner_bottom + 15}" text-anchor="middle">{value:g}</text>'
            )
        for value in _ticks(*y):
            at = self.y(value)
            self.elements.append(
                f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" y1="{at:.1f}" '
                f'y2="{at:.1f}"/>'
                f'<text x="{self.left - 5}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
            )
        self.elements.append(
            f'<text x="{(self.left + self.width - self.right) / 2:.0f}" y="{self.height - 6}" '
            f'text-anchor="middle">{x_label}</text>'
        )
        if y_label:
            middle = (self.top + inner_bottom) / 2
            self.elements.append(
                f'<text transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">'
                f"{y_label}</text>"
            )

    def x(self, value: float) -> float:
        """The horizontal position of a value, in the SVG's units."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """The vertical position of a value."""
        low, high = self.y_range
        bottom = self.height - self.bottom
        return bottom - (value - low) / (high - low) * (bottom - self.top)

    def zero(self) -> None:
        """Draws a vertical line at x = 0."""
        at = self.x(0)
        self.elements.append(
            f'<line class="zero" x1="{at:.1f}" x2="{at:.1f}" y1="{self.top}" '
            f'y2="{self.height - self.bottom}"/>'
        )

    def svg(self, kind: str, label: str) -> str:
        """The figure, of the class `kind`, with a description for screen readers."""
        return (
            f'<svg class="{kind}" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{label}">'
            f"{''.join(self.elements)}</svg>"
        )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, at most seven, for the ticks of an axis."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def pairs(problem: MeasuredProblem) -> list[tuple[int, int]]:
    """All pairs of measured responses, as rows and columns of the problem's matrices."""
    return list(combinations(range(len(problem["measured"])), 2))


def _cosines(model: ModelGeometry) -> np.ndarray:
    """[pairs], the gradient cosines of all pairs."""
    return np.array([p["cosine"][i][j] for p in model.problems for i, j in pairs(p)], dtype=np.float64)


def _both_cosines(model: ModelGeometry) -> np.ndarray:
    """[2, pairs], semantic and gradient cosines of the pairs that have both."""
    found = [
        (p["semantic"][i][j], p["cosine"][i][j]) for p in model.problems if p["semantic"] for i, j in pairs(p)
    ]
    return np.array(found, dtype=np.float64).reshape(-1, 2).T


def _range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """The limits of an axis of cosines: the extremes of the values, moved out to a tenth."""
    joined = np.concatenate(values) if any(map(len, values)) else np.zeros(1)
    return max(-1.0, math.floor(10 * joined.min() - 0.5) / 10), min(
        1.0, math.ceil(10 * joined.max() + 0.5) / 10
    )


def density(models: Sequence[ModelGeometry]) -> str:
    """Histograms of the gradient cosines of all pairs, one for each model."""
    values = [_cosines(model) for model in models]
    low, high = _range(values)
    edges = np.linspace(low, high, 41)
    heights = [np.histogram(v, edges)[0] / max(len(v), 1) / (edges[1] - edges[0]) for v in values]
    axes = _Axes(
        (low, high), (0, max(1e-3, *(h.max() for h in heights)) * 1.06), "gradient cosine", "density"
    )
    for index, (model, found, height) in enumerate(zip(models, values, heights)):
        if not len(found):
            continue
        steps = [f"M{axes.x(low):.1f} {axes.y(0):.1f}"]
        for right, value in zip(edges[1:], height):
            steps.append(f"V{axes.y(value):.1f}H{axes.x(right):.1f}")
        axes.elements.append(
            f'<path class="m{index} area" d="{"".join(steps)}V{axes.y(0):.1f}Z">'
            f"<title>{escaped(model.name)}: {len(found)} pairs</title></path>"
        )
        at = axes.x(found.mean())
        axes.elements.append(
            f'<path class="m{index} mean" d="M{at:.1f} {axes.y(0):.1f}l-5 9h10Z">'
            f"<title>{escaped(model.name)}: mean of the pairs {found.mean():.3f}</title></path>"
        )
    if low <= 0 <= high:
        axes.zero()
    return axes.svg("density", "Density of pairs by gradient cosine, one curve a model")


def negative_bars(models: Sequence[ModelGeometry]) -> str:
    """A bar for each model's share of negative pairs, with its interval."""
    found = [model.overall["negative_pairs"] for model in models]
    top = max([0.05, *(f["high"] or f["mean"] for f in found if f)])
    axes = _Axes((-0.6, len(models) - 0.4), (0, 100 * top * 1.18), "", "% of pairs")
    # no vertical grid: the position of a bar has no meaning
    axes.elements = [
        one for one in axes.elements if 'class="grid" x1' not in one or 'text-anchor="end"' in one
    ]
    for index, (model, share) in enumerate(zip(models, found)):
        left, right = axes.x(index - 0.3), axes.x(index + 0.3)
        middle, base = (left + right) / 2, axes.y(0)
        label = beginning(model.name, 16)
        axes.elements.append(
            f'<text x="{middle:.1f}" y="{base + 15:.1f}" text-anchor="middle">{escaped(label)}</text>'
        )
        if not share:
            continue
        y = axes.y(100 * share["mean"])
        axes.elements.append(
            f'<rect class="m{index} bar" x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}" '
            f'height="{base - y:.1f}"><title>{escaped(model.name)}</title></rect>'
        )
        peak = y
        if share["low"] is not None and share["high"] is not None:
            low, peak = axes.y(100 * share["low"]), axes.y(100 * share["high"])
            axes.elements.append(
                f'<path class="whisker" d="M{middle:.1f} {low:.1f}V{peak:.1f}M{middle - 6:.1f} {low:.1f}h12'
                f'M{middle - 6:.1f} {peak:.1f}h12"/>'
            )
        axes.elements.append(
            f'<text class="value" x="{middle:.1f}" y="{peak - 6:.1f}" text-anchor="middle">'
            f"{100 * share['mean']:.1f} %</text>"
        )
    return axes.svg("bars", "Share of pairs with a negative gradient cosine, a bar a model")


def scatter(models: Sequence[ModelGeometry]) -> str:
    """Gradient cosine over semantic cosine: dots for pairs, a ring at each model's mean."""
    semantic, gradient = zip(*map(_both_cosines, models))
    axes = _Axes(_range(semantic), _range(gradient), "semantic cosine", "gradient cosine")
    for index, (x, y) in enumerate(zip(semantic, gradient)):
        if not len(x):
            continue
        some = np.unique(np.linspace(0, len(x) - 1, POINTS).astype(int))
        dots = "".join(f"M{axes.x(a):.1f} {axes.y(b):.1f}h0" for a, b in zip(x[some], y[some]))
        axes.elements.append(f'<path class="m{index} dots" d="{dots}"/>')
    for index, (model, x, y) in enumerate(zip(models, semantic, gradient)):
        if len(x):
            correlation = np.corrcoef(x, y)[0, 1] if x.std() > 0 and y.std() > 0 else math.nan
            axes.elements.append(
                f'<circle class="m{index} ring" cx="{axes.x(x.mean()):.1f}" cy="{axes.y(y.mean()):.1f}" '
                f'r="6"><title>{escaped(model.name)}: semantic {x.mean():.3f}, gradient {y.mean():.3f}, '
                f"correlation {correlation:.2f}</title></circle>"
            )
    return axes.svg("scatter", "Gradient cosine against semantic cosine, a dot a pair")


def cosine_map(model: ModelGeometry, problem: MeasuredProblem) -> str:
    """The matrix of cosines of a problem as coloured cells, right responses first."""
    k = len(problem["measured"])
    scored = [model.sample(problem["problem"], place)["right"] for place in problem["measured"]]
    order = sorted(range(k), key=lambda place: not scored[place])
    side, edge = 220 / max(k, 1), 22
    elements = []
    for row, i in enumerate(order):
        name = f"{problem['measured'][i]}{'✓' if scored[i] else ''}"
        if side > 9:
            middle = edge + (row + 0.5) * side + 3
            elements.append(f'<text x="{edge - 3}" y="{middle:.1f}" text-anchor="end">{name}</text>')
        for column, j in enumerate(order):
            value = problem["cosine"][i][j]
            written = f"{value:.2f}".replace("0.", ".", 1) if side > 24 and i != j else ""
            x, y = edge + column * side, row * side + edge
            elements.append(
                f'<rect class="{"pos" if value >= 0 else "neg"}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{side - 0.6:.1f}" height="{side - 0.6:.1f}" fill-opacity="{min(abs(value), 1):.2f}">'
                f"<title>{problem['measured'][i]} and {problem['measured'][j]}: {value:.3f}</title></rect>"
            )
            if written:
                elements.append(
                    f'<text class="cell" x="{x + side / 2:.1f}" y="{y + side / 2 + 3:.1f}" '
                    f'text-anchor="middle">{written}</text>'
                )
    return (
        f'<svg class="map" viewBox="0 0 {edge + 224} {edge + 224}" role="img" '
        f'aria-label="Cosines between responses">{"".join(elements)}</svg>'
    )
