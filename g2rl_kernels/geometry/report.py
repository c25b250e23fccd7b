"""One HTML page about the geometry of one or several models: figures, tables, and pairs of responses as text.

The page is one file that needs nothing else: figures are SVG in the page, drawn here, colours follow the
reader's light or dark setting, and there is no script. All text is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from .measure import STATISTICS, most

MARK = {"redundant": "most redundant", "opposed": "most opposed"}
SHORT = {
    "cos_mean": "gradient cosine",
    "negative_pairs": "negative pairs",
    "effective_rank": "effective rank",
    "semantic_cosine": "semantic cosine",
    "distinct_answers": "distinct answers",
    "distinct_right": "distinct right",
    "accuracy": "accuracy",
    "entropy": "entropy",
    "length": "length",
}
PERCENT = {"negative_pairs", "accuracy"}
MAPS = 6  # problems with a map of cosines
POINTS = 1500  # pairs of a model in the scatter plot, evenly spaced
LONG, BRIEF = 6000, 1200  # characters of a response shown; the whole is in samples.jsonl


@dataclass
class ModelGeometry:
    """A model's measurements, as the page and geometry.json show them."""

    name: str
    model: str  # as it was given on the command line
    settings: dict[str, Any]  # what else the numbers depend on
    problems: list[dict[str, Any]]  # of `geometry.statistics`, and "problem" (id) and "question"
    overall: dict[str, Any]  # of `geometry.overall`
    samples: dict[tuple[str, int], dict[str, Any]]  # (problem, place in the group): completion, score, answer
    difference: dict[str, Any] | None = None  # of `geometry.difference`, to the first model

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.model,
            "settings": self.settings,
            "overall": self.overall,
            "difference": self.difference,
            "problems": self.problems,
        }


def number(name: str, value: float | None) -> str:
    """A statistic as text, with digits that suit it."""
    if value is None:
        return "–"
    if name in PERCENT:
        return f"{100 * value:.1f} %".replace("-", "−")
    if name.startswith("distinct") and float(value).is_integer():
        return f"{value:.0f}"
    return (f"{value:.1f}" if name == "length" else f"{value:.3f}").replace("-", "−")


def page(models: Sequence[ModelGeometry], title: str = "Gradient geometry") -> str:
    """The whole page. Models on the same problems are compared problem by problem."""
    order = list(dict.fromkeys(problem["problem"] for model in models for problem in model.problems))
    places = [{problem["problem"]: problem for problem in model.problems} for model in models]
    pairs = sum(len(_pairs(problem)) for model in models for problem in model.problems)
    counts = sorted({problem["responses"] for model in models for problem in model.problems})
    sizes = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    figures = [
        ("Pairs by gradient cosine", "density; a mark shows each model's mean", _density(models)),
        ("Negative pairs", "share, with 95 % interval over problems", _negative_bars(models)),
    ]
    if any(problem["semantic"] for model in models for problem in model.problems):
        figures.append(("Text and gradient", "a dot is a pair, a ring its model's mean", _scatter(models)))
    return "".join(
        (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(title)}</title><style>{_STYLE}{_colours(len(models))}</style></head><body><main>"
            f"<h1>{_text(title)}</h1>"
            f'<p class="lead">{len(order)} problem{"s" * (len(order) != 1)}, {sizes} responses each, '
            f"{pairs:,} pairs. Each response is described by the direction in which it would move the "
            f"model's last layer: two responses with a cosine of 1 ask for the same update, with a negative "
            f"one they pull against each other.</p>{_legend(models)}"
            '<section class="figures">',
            *(
                f"<figure><figcaption><b>{name}</b><br>{unit}</figcaption>{svg}</figure>"
                for name, unit, svg in figures
            ),
            "</section><h2>Overall</h2>",
            _overall_table(models),
            '<p class="note">Means over problems, each counting the same, with 95 % bootstrap intervals over '
            "problems; differences are paired, problem by problem, and bold where the interval leaves out 0. "
            "For scale: on AIME25 with 8 responses a problem the G2RL paper (arXiv 2512.15687) "
            "reports for Qwen3-1.7B-Base a mean cosine of 0.208 after GRPO and 0.064 after G2RL, and 5.9 % "
            "and 28.1 % negative pairs.</p><h2>The most telling pairs</h2>",
            '<p class="note">Of all pairs of different texts: the one with the largest and the one with the '
            "smallest gradient cosine.</p>",
            *(_telling_pairs(model, index) for index, model in enumerate(models)),
            "<h2>Cosines within a problem</h2>",
            '<p class="note">Responses of a problem against each other, right ones first (✓). Shown are the '
            "problems with the first model's largest and smallest mean cosine, and some between them.</p>",
            _maps(models, places, order),
            "<h2>Problem by problem</h2>",
            _problem_table(models, places, order),
            "<h2>Pairs of every problem</h2>",
            *(_problem_details(models, places, problem) for problem in order),
            "<h2>How this was measured</h2>",
            _settings(models),
            "</main></body></html>\n",
        )
    )


# --- figures ------------------------------------------------------------------------------------------------


class _Axes:
    """A coordinate system in an SVG of fixed size."""

    width, height, left, right, top, bottom = 380, 270, 46, 12, 10, 40

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str = ""):
        self.x_range, self.y_range = x, y
        inner_bottom = self.height - self.bottom
        self.parts = []
        for value in _ticks(*x):
            at = self.x(value)
            self.parts.append(
                f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{self.top}" y2="{inner_bottom}"/>'
                f'<text x="{at:.1f}" y="{inner_bottom + 15}" text-anchor="middle">{value:g}</text>'
            )
        for value in _ticks(*y):
            at = self.y(value)
            self.parts.append(
                f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" y1="{at:.1f}" '
                f'y2="{at:.1f}"/>'
                f'<text x="{self.left - 5}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
            )
        self.parts.append(
            f'<text x="{(self.left + self.width - self.right) / 2:.0f}" y="{self.height - 6}" '
            f'text-anchor="middle">{x_label}</text>'
        )
        if y_label:
            middle = (self.top + inner_bottom) / 2
            self.parts.append(
                f'<text transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">'
                f"{y_label}</text>"
            )

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        bottom = self.height - self.bottom
        return bottom - (value - low) / (high - low) * (bottom - self.top)

    def zero(self) -> None:
        at = self.x(0)
        self.parts.append(
            f'<line class="zero" x1="{at:.1f}" x2="{at:.1f}" y1="{self.top}" '
            f'y2="{self.height - self.bottom}"/>'
        )

    def svg(self, kind: str, label: str) -> str:
        return (
            f'<svg class="{kind}" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{label}">'
            f"{''.join(self.parts)}</svg>"
        )


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _pairs(problem: dict[str, Any]) -> list[tuple[int, int]]:
    return list(combinations(range(len(problem["measured"])), 2))


def _values(model: ModelGeometry, key: str) -> np.ndarray:
    """[pairs] of the matrices `key`, in one order for each key."""
    return np.array([p[key][i][j] for p in model.problems if p[key] for i, j in _pairs(p)], dtype=np.float64)


def _range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Limits of cosines, on a tenth."""
    joined = np.concatenate(values) if any(map(len, values)) else np.zeros(1)
    return max(-1.0, math.floor(10 * joined.min() - 0.5) / 10), min(
        1.0, math.ceil(10 * joined.max() + 0.5) / 10
    )


def _density(models: Sequence[ModelGeometry]) -> str:
    values = [_values(model, "cosine") for model in models]
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
        axes.parts.append(
            f'<path class="m{index} area" d="{"".join(steps)}V{axes.y(0):.1f}Z">'
            f"<title>{_text(model.name)}: {len(found)} pairs</title></path>"
        )
        at = axes.x(found.mean())
        axes.parts.append(
            f'<path class="m{index} mean" d="M{at:.1f} {axes.y(0):.1f}l-5 9h10Z">'
            f"<title>{_text(model.name)}: mean of the pairs {found.mean():.3f}</title></path>"
        )
    if low <= 0 <= high:
        axes.zero()
    return axes.svg("density", "Density of pairs by gradient cosine, one curve a model")


def _negative_bars(models: Sequence[ModelGeometry]) -> str:
    found = [model.overall["negative_pairs"] for model in models]
    top = max([0.05, *(f["high"] or f["mean"] for f in found if f)])
    axes = _Axes((-0.6, len(models) - 0.4), (0, 100 * top * 1.18), "", "% of pairs")
    axes.parts = [part for part in axes.parts if 'class="grid" x1' not in part or 'text-anchor="end"' in part]
    for index, (model, share) in enumerate(zip(models, found)):
        left, right = axes.x(index - 0.3), axes.x(index + 0.3)
        middle, base = (left + right) / 2, axes.y(0)
        label = _line(model.name, 16)
        axes.parts.append(
            f'<text x="{middle:.1f}" y="{base + 15:.1f}" text-anchor="middle">{_text(label)}</text>'
        )
        if not share:
            continue
        y = axes.y(100 * share["mean"])
        axes.parts.append(
            f'<rect class="m{index} bar" x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}" '
            f'height="{base - y:.1f}"><title>{_text(model.name)}</title></rect>'
        )
        peak = y
        if share["low"] is not None:
            low, peak = axes.y(100 * share["low"]), axes.y(100 * share["high"])
            axes.parts.append(
                f'<path class="whisker" d="M{middle:.1f} {low:.1f}V{peak:.1f}M{middle - 6:.1f} {low:.1f}h12'
                f'M{middle - 6:.1f} {peak:.1f}h12"/>'
            )
        axes.parts.append(
            f'<text class="value" x="{middle:.1f}" y="{peak - 6:.1f}" text-anchor="middle">'
            f"{100 * share['mean']:.1f} %</text>"
        )
    return axes.svg("bars", "Share of pairs with a negative gradient cosine, a bar a model")


def _scatter(models: Sequence[ModelGeometry]) -> str:
    gradient, semantic = (
        [
            np.array(
                [p[key][i][j] for p in model.problems if p["semantic"] for i, j in _pairs(p)], dtype=float
            )
            for model in models
        ]
        for key in ("cosine", "semantic")
    )
    axes = _Axes(_range(semantic), _range(gradient), "semantic cosine", "gradient cosine")
    for index, (x, y) in enumerate(zip(semantic, gradient)):
        if not len(x):
            continue
        some = np.unique(np.linspace(0, len(x) - 1, POINTS).astype(int))
        dots = "".join(f"M{axes.x(a):.1f} {axes.y(b):.1f}h0" for a, b in zip(x[some], y[some]))
        axes.parts.append(f'<path class="m{index} dots" d="{dots}"/>')
    for index, (model, x, y) in enumerate(zip(models, semantic, gradient)):
        if len(x):
            correlation = np.corrcoef(x, y)[0, 1] if x.std() > 0 and y.std() > 0 else math.nan
            axes.parts.append(
                f'<circle class="m{index} ring" cx="{axes.x(x.mean()):.1f}" cy="{axes.y(y.mean()):.1f}" '
                f'r="6"><title>{_text(model.name)}: semantic {x.mean():.3f}, gradient {y.mean():.3f}, '
                f"correlation {correlation:.2f}</title></circle>"
            )
    return axes.svg("scatter", "Gradient cosine against semantic cosine, a dot a pair")


def _map(model: ModelGeometry, problem: dict[str, Any]) -> str:
    """The matrix of cosines as coloured cells, right responses first."""
    k = len(problem["measured"])
    scored = [_sample(model, problem, place).get("right") for place in problem["measured"]]
    order = sorted(range(k), key=lambda place: not scored[place])
    side, edge = 220 / max(k, 1), 22
    parts = []
    for row, i in enumerate(order):
        name = f"{problem['measured'][i]}{'✓' if scored[i] else ''}"
        if side > 9:
            middle = edge + (row + 0.5) * side + 3
            parts.append(f'<text x="{edge - 3}" y="{middle:.1f}" text-anchor="end">{name}</text>')
        for column, j in enumerate(order):
            value = problem["cosine"][i][j]
            written = f"{value:.2f}".replace("0.", ".", 1) if side > 24 and i != j else ""
            x, y = edge + column * side, row * side + edge
            parts.append(
                f'<rect class="{"pos" if value >= 0 else "neg"}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{side - 0.6:.1f}" height="{side - 0.6:.1f}" fill-opacity="{min(abs(value), 1):.2f}">'
                f"<title>{problem['measured'][i]} and {problem['measured'][j]}: {value:.3f}</title></rect>"
            )
            if written:
                parts.append(
                    f'<text class="cell" x="{x + side / 2:.1f}" y="{y + side / 2 + 3:.1f}" '
                    f'text-anchor="middle">{written}</text>'
                )
    return (
        f'<svg class="map" viewBox="0 0 {edge + 224} {edge + 224}" role="img" '
        f'aria-label="Cosines between responses">{"".join(parts)}</svg>'
    )


# --- tables and text ----------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _dot(index: int) -> str:
    return f'<span class="dot m{index}"></span>'


def _line(text: str, limit: int) -> str:
    """The beginning of a text on one line."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _table(head: str, rows: Iterable[str], kind: str = "scroll") -> str:
    return (
        f'<div class="{kind}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _legend(models: Sequence[ModelGeometry]) -> str:
    items = (f"<li>{_dot(index)}{_text(model.name)}</li>" for index, model in enumerate(models))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _known(models: Sequence[ModelGeometry]) -> list[str]:
    """The statistics that any of the models has."""
    return [name for name in STATISTICS if any(model.overall[name] for model in models)]


def _overall_table(models: Sequence[ModelGeometry]) -> str:
    def cell(found: dict[str, Any] | None, name: str, sign: bool = False) -> str:
        if not found:
            return '<td class="num">–</td>'
        mean, interval = number(name, found["mean"]), ""
        if found["low"] is not None:
            interval = f"<small>{number(name, found['low'])} to {number(name, found['high'])}</small>"
            if sign and (found["low"] > 0 or found["high"] < 0):
                mean = f"<b>{mean}</b>"
        return f'<td class="num">{"+" if sign and found["mean"] > 0 else ""}{mean}{interval}</td>'

    others = [model for model in models if model.difference]
    heads = [f'<th class="num">{_dot(i)}{_text(model.name)}</th>' for i, model in enumerate(models)]
    heads += [f'<th class="num">{_text(other.name)} − {_text(models[0].name)}</th>' for other in others]
    rows = []
    for name in _known(models):
        cells = [cell(model.overall[name], name) for model in models]
        cells += [cell(other.difference[name], name, sign=True) for other in others if other.difference]
        rows.append(
            f"<tr><th>{SHORT[name]}<small>{_text(STATISTICS[name])}</small></th>{''.join(cells)}</tr>"
        )
    return _table(f"<th></th>{''.join(heads)}", rows)


def _sample(model: ModelGeometry, problem: dict[str, Any], place: int) -> dict[str, Any]:
    return model.samples.get((problem["problem"], place), {})


def _shown(text: str, limit: int) -> str:
    """At most about `limit` characters, the end among them: that is where the answer is."""
    if len(text) <= limit:
        return text
    return f"{text[: 2 * limit // 3]}\n[… {len(text) - limit:,} characters …]\n{text[-(limit // 3) :]}"


def _pair(model: ModelGeometry, problem: dict[str, Any], which: str, limit: int) -> str:
    pair = problem[which]
    if pair is None:
        return f'<p class="note">{MARK[which]}: no pair of different texts</p>'
    sides = []
    for place in pair["samples"]:
        sample = _sample(model, problem, place)
        verdict = "" if sample.get("right") is None else "right ✓" if sample["right"] else "wrong ✗"
        answer = sample.get("answer")
        facts = [
            f"response {place}",
            verdict,
            "" if answer is None else f"answer {_text(_shown(answer, 80))}",
        ]
        if sample.get("score") is not None:
            facts.insert(2, f"score {sample['score']:g}")
        sides.append(
            f'<div><p class="facts">{" · ".join(fact for fact in facts if fact)}</p>'
            f"<pre>{_text(_shown(sample.get('completion', ''), limit))}</pre></div>"
        )
    semantic = "" if pair["semantic"] is None else f", semantic cosine {number('cos_mean', pair['semantic'])}"
    return (
        f'<div class="pair {which}"><h4>{MARK[which].capitalize()}: gradient cosine '
        f"{number('cos_mean', pair['cosine'])}{semantic}"
        f'</h4><div class="sides">{"".join(sides)}</div></div>'
    )


def _telling_pairs(model: ModelGeometry, index: int) -> str:
    parts = [f"<h3>{_dot(index)}{_text(model.name)}</h3>"]
    for which in MARK:
        place = most(which, model.problems)
        if place is None:
            parts.append(f'<p class="note">{MARK[which]}: no pair of different texts</p>')
            continue
        problem = model.problems[place]
        parts.append(f'<p class="question">{_text(_shown(problem["question"], BRIEF))}</p>')
        parts.append(_pair(model, problem, which, LONG))
    return "".join(parts)


def _maps(models: Sequence[ModelGeometry], places: Sequence[dict[str, Any]], order: Sequence[str]) -> str:
    ranked = sorted(
        (name for name in order if name in places[0] and places[0][name]["cos_mean"] is not None),
        key=lambda name: -places[0][name]["cos_mean"],
    )
    chosen = sorted({round(at) for at in np.linspace(0, len(ranked) - 1, min(MAPS, len(ranked)))})
    parts = []
    for name in (ranked[at] for at in chosen):
        found = [
            (index, model, places[index][name]) for index, model in enumerate(models) if name in places[index]
        ]
        parts.append(
            f'<div class="maps"><p class="question">{_text(_shown(found[0][2]["question"], 160))}</p>'
        )
        for index, model, problem in found:
            parts.append(
                f"<figure><figcaption>{_dot(index)}{_text(model.name)}: mean "
                f"{number('cos_mean', problem['cos_mean'])}</figcaption>{_map(model, problem)}</figure>"
            )
        parts.append("</div>")
    scale = (
        '<p class="scale"><span class="neg"></span>−1 <span class="zero"></span>0 '
        '<span class="pos"></span>+1</p>'
    )
    return f'{scale}<section class="mapgrid">{"".join(parts)}</section>'


def _problem_table(
    models: Sequence[ModelGeometry], places: Sequence[dict[str, Any]], order: Sequence[str]
) -> str:
    names = _known(models)
    head = "".join(f'<th class="num">{SHORT[name]}</th>' for name in names)
    rows = []
    for problem_id in order:
        found = [(i, place[problem_id]) for i, place in enumerate(places) if problem_id in place]
        question = _line(found[0][1]["question"], 70)
        for row, (index, problem) in enumerate(found):
            first = (
                f'<th rowspan="{len(found)}">{_text(problem_id)}<small>{_text(question)}</small></th>'
                if row == 0
                else ""
            )
            which = (
                f'<td class="name">{_dot(index)}{_text(models[index].name)}</td>' if len(models) > 1 else ""
            )
            cells = "".join(f'<td class="num">{number(name, problem[name])}</td>' for name in names)
            rows.append(f"<tr>{first}{which}{cells}</tr>")
    model = "<th>model</th>" if len(models) > 1 else ""
    return _table(f"<th>problem</th>{model}{head}", rows, "scroll tall")


def _problem_details(
    models: Sequence[ModelGeometry], places: Sequence[dict[str, Any]], problem_id: str
) -> str:
    found = [(i, place[problem_id]) for i, place in enumerate(places) if problem_id in place]
    question = found[0][1]["question"]
    parts = [
        f"<details><summary><b>{_text(problem_id)}</b> {_text(_line(question, 110))}</summary>"
        f'<p class="question">{_text(_shown(question, LONG))}</p>'
    ]
    for index, problem in found:
        parts.append(f"<h3>{_dot(index)}{_text(models[index].name)}</h3>")
        parts += [_pair(models[index], problem, which, BRIEF) for which in MARK]
    return "".join(parts) + "</details>"


def _settings(models: Sequence[ModelGeometry]) -> str:
    keys = list(dict.fromkeys(key for model in models for key in model.settings))
    head = "".join(f"<th>{_dot(i)}{_text(model.name)}</th>" for i, model in enumerate(models))
    rows = []
    for key in ("model", *keys):
        values = [{"model": model.model, **model.settings}.get(key, "–") for model in models]
        cells = "".join(f"<td>{_text(value)}</td>" for value in values)
        rows.append(f"<tr><th>{_text(key)}</th>{cells}</tr>")
    return (
        f"{_table(f'<th></th>{head}', rows)}"
        '<p class="note">A gradient cosine is that of two features: the mean over a response\'s tokens y '
        "of W[y] − E W, the gradient of log p(y) with respect to the LM head's input under the model itself. "
        "Effective rank: exp of the entropy of the eigenvalues of the matrix of cosines (Roy and Vetterli "
        "2007). Made by g2rl geometry; all numbers are in geometry.json, all responses in samples.jsonl.</p>"
    )


# --- style --------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which most kinds of colour blindness tell apart, for light and dark pages
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b0568f", "#8a7300", "#3d8bc4")
_DARK = ("#56b4e9", "#ff8a3d", "#2fc79c", "#e08fc0", "#e6c619", "#9ecbee")


def _colours(count: int) -> str:
    def rules(palette: Sequence[str]) -> str:
        return "".join(f".m{i}{{--c:{palette[i % len(palette)]}}}" for i in range(count))

    return f"{rules(_LIGHT)}@media(prefers-color-scheme:dark){{{rules(_DARK)}}}"


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2128;--soft:#5b6570;--line:#dfe3e8;--panel:#f6f7f9;
  --pos:#b2182b;--neg:#2166ac}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e3e7ec;--soft:#98a3af;--line:#30363d;
  --panel:#1c2127;--pos:#e8604c;--neg:#5aa2e0}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 22px 60px}
h1{font-size:27px;margin:0 0 6px}h2{font-size:19px;margin:38px 0 8px;border-bottom:1px solid var(--line);
  padding-bottom:4px}
h3{font-size:16px;margin:20px 0 6px}h4{font-size:14px;margin:0 0 8px;font-weight:600}
.lead{max-width:78ch;margin:0 0 10px}.note{color:var(--soft);font-size:13.5px;max-width:95ch;
  margin:6px 0 12px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:6px 20px;padding:0;margin:10px 0 16px;
  font-weight:600}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;background:var(--c);margin-right:.45em}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(310px,1fr));gap:16px}
figure{margin:0;background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px}
figcaption{font-size:13px;color:var(--soft);margin-bottom:6px}figcaption b{color:var(--fg);font-size:14.5px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:11.5px}
svg .value{fill:var(--fg);font-weight:600}
.grid{stroke:var(--line);stroke-width:1}.zero{stroke:var(--fg);stroke-width:1.2;stroke-dasharray:4 3}
.area{fill:var(--c);fill-opacity:.18;stroke:var(--c);stroke-width:1.8}.mean,.bar{fill:var(--c)}
.dots{stroke:var(--c);stroke-width:3.2;stroke-linecap:round;stroke-opacity:.32;fill:none}
.ring{fill:var(--c);stroke:var(--bg);stroke-width:2.5}.whisker{stroke:var(--fg);stroke-width:1.5;fill:none}
.scroll{overflow-x:auto}.tall{max-height:620px;overflow-y:auto;border:1px solid var(--line);
  border-radius:8px}
.tall thead th{position:sticky;top:0;background:var(--panel)}
table{border-collapse:collapse;font-size:14px}th,td{padding:6px 14px;text-align:left;
  border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600}.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.name{white-space:nowrap}
.tall th:first-child{min-width:230px}.tall thead .num{white-space:normal}.tall th,.tall td{padding:5px 9px}
small{display:block;color:var(--soft);font-weight:400;font-size:12px}
.question{white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid var(--line);
  padding:2px 0 2px 12px;margin:12px 0 8px;color:var(--soft)}
.pair{border:1px solid var(--line);border-left:4px solid var(--pos);border-radius:8px;padding:12px 14px;
  margin:8px 0 14px;background:var(--panel)}
.pair.opposed{border-left-color:var(--neg)}.sides{display:grid;grid-template-columns:1fr 1fr;gap:14px}
@media(max-width:760px){.sides{grid-template-columns:1fr}}
.facts{margin:0 0 4px;font-size:13px;color:var(--soft)}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:380px;overflow-y:auto;
  font:13px/1.45 ui-monospace,Menlo,Consolas,monospace;background:var(--bg);border:1px solid var(--line);
  border-radius:6px;padding:10px}
.mapgrid{display:flex;flex-wrap:wrap;gap:16px}.maps{display:flex;flex-wrap:wrap;gap:10px;
  align-content:flex-start}
.maps .question{flex-basis:100%;width:0;min-width:100%;margin:4px 0;font-size:13px;max-height:4.6em;
  overflow:hidden}
.maps figure{width:270px}.map .pos,.scale .pos{fill:var(--pos)}.map .neg{fill:var(--neg)}
.map text{font-size:10px}.map .cell{fill:var(--fg)}
.scale{font-size:13px;color:var(--soft)}.scale span{display:inline-block;width:1em;height:1em;
  margin:0 .3em 0 .8em;vertical-align:-.12em;border:1px solid var(--line)}
.scale .pos{background:var(--pos)}.scale .neg{background:var(--neg)}.scale .zero{background:var(--bg)}
details{border-bottom:1px solid var(--line);padding:6px 0}summary{cursor:pointer;overflow-wrap:anywhere}
"""
