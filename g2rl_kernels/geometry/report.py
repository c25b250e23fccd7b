"""The HTML page of `g2rl geometry`: figures, tables, and pairs of responses as text, for one or more models.

The page is a single file without scripts: figures are SVG within it, and colours follow the reader's light or
dark setting. All text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..evaluation.metrics import excludes_zero
from .figures import cosine_map, density, negative_bars, pairs, scatter
from .markup import STYLE, beginning, colours, dot, escaped
from .measure import most
from .rows import STATISTICS, Extreme, MeasuredProblem, ModelGeometry, ProblemMean, Statistic

EXTREMES: dict[Extreme, str] = {"redundant": "most redundant", "opposed": "most opposed"}
SHORT: dict[Statistic, str] = {
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
LONG, BRIEF = 6000, 1200  # characters shown of a response; samples.jsonl has all of it


def number(name: str, value: float | None) -> str:
    """The value of a statistic as text, with the digits or the unit that suit it; a dash for None."""
    if value is None:
        return "–"
    if name in PERCENT:
        return f"{100 * value:.1f} %".replace("-", "−")
    if name.startswith("distinct") and float(value).is_integer():
        return f"{value:.0f}"
    return (f"{value:.1f}" if name == "length" else f"{value:.3f}").replace("-", "−")


def page(models: Sequence[ModelGeometry], title: str = "Gradient geometry") -> str:
    """The whole page as HTML. Models on the same problems are compared problem by problem."""
    order = list(dict.fromkeys(problem["problem"] for model in models for problem in model.problems))
    places = [{problem["problem"]: problem for problem in model.problems} for model in models]
    pair_count = sum(len(pairs(problem)) for model in models for problem in model.problems)
    sizes = sorted({problem["responses"] for model in models for problem in model.problems})
    size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    figures = [
        ("Pairs by gradient cosine", "density; a mark shows each model's mean", density(models)),
        ("Negative pairs", "share, with 95 % interval over problems", negative_bars(models)),
    ]
    if any(problem["semantic"] for model in models for problem in model.problems):
        figures.append(("Text and gradient", "a dot is a pair, a ring its model's mean", scatter(models)))
    return "".join(
        (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escaped(title)}</title><style>{STYLE}{colours(len(models))}</style></head><body><main>"
            f"<h1>{escaped(title)}</h1>"
            f'<p class="lead">{len(order)} problem{"s" * (len(order) != 1)}, {size} responses each, '
            f"{pair_count:,} pairs. Each response is described by the direction in which it would move the "
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
            '<p class="note">The pair of different texts with the largest and the one with the '
            "smallest gradient cosine.</p>",
            *(_extreme_pairs(model, index) for index, model in enumerate(models)),
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


def _table(head: str, rows: Iterable[str], kind: str = "scroll") -> str:
    return (
        f'<div class="{kind}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _legend(models: Sequence[ModelGeometry]) -> str:
    items = (f"<li>{dot(index)}{escaped(model.name)}</li>" for index, model in enumerate(models))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _known(models: Sequence[ModelGeometry]) -> list[Statistic]:
    """The statistics that at least one model has."""
    return [name for name in STATISTICS if any(model.overall[name] for model in models)]


def _overall_table(models: Sequence[ModelGeometry]) -> str:
    def cell(found: ProblemMean | None, name: Statistic, sign: bool = False) -> str:
        if not found:
            return '<td class="num">–</td>'
        mean, interval = number(name, found["mean"]), ""
        if found["low"] is not None:
            interval = f"<small>{number(name, found['low'])} to {number(name, found['high'])}</small>"
            if sign and excludes_zero(found):
                mean = f"<b>{mean}</b>"
        return f'<td class="num">{"+" if sign and found["mean"] > 0 else ""}{mean}{interval}</td>'

    others = [model for model in models if model.difference]
    heads = [f'<th class="num">{dot(i)}{escaped(model.name)}</th>' for i, model in enumerate(models)]
    heads += [f'<th class="num">{escaped(other.name)} − {escaped(models[0].name)}</th>' for other in others]
    rows = []
    for name in _known(models):
        cells = [cell(model.overall[name], name) for model in models]
        cells += [cell(other.difference[name], name, sign=True) for other in others if other.difference]
        rows.append(
            f"<tr><th>{SHORT[name]}<small>{escaped(STATISTICS[name])}</small></th>{''.join(cells)}</tr>"
        )
    return _table(f"<th></th>{''.join(heads)}", rows)


def _shown(text: str, limit: int) -> str:
    """The text cut to about `limit` characters in its middle, since the answer is at the end."""
    if len(text) <= limit:
        return text
    return f"{text[: 2 * limit // 3]}\n[… {len(text) - limit:,} characters …]\n{text[-(limit // 3) :]}"


def _pair(model: ModelGeometry, problem: MeasuredProblem, which: Extreme, limit: int) -> str:
    pair = problem[which]
    if pair is None:
        return f'<p class="note">{EXTREMES[which]}: no pair of different texts</p>'
    sides = []
    for place in pair["samples"]:
        sample = model.sample(problem["problem"], place)
        verdict = "" if sample["right"] is None else "right ✓" if sample["right"] else "wrong ✗"
        answer = sample["answer"]
        facts = [
            f"response {place}",
            verdict,
            "" if answer is None else f"answer {escaped(_shown(answer, 80))}",
        ]
        if sample["score"] is not None:
            facts.insert(2, f"score {sample['score']:g}")
        sides.append(
            f'<div><p class="facts">{" · ".join(fact for fact in facts if fact)}</p>'
            f"<pre>{escaped(_shown(sample['completion'], limit))}</pre></div>"
        )
    semantic = "" if pair["semantic"] is None else f", semantic cosine {number('cos_mean', pair['semantic'])}"
    return (
        f'<div class="pair {which}"><h4>{EXTREMES[which].capitalize()}: gradient cosine '
        f"{number('cos_mean', pair['cosine'])}{semantic}"
        f'</h4><div class="sides">{"".join(sides)}</div></div>'
    )


def _extreme_pairs(model: ModelGeometry, index: int) -> str:
    html = [f"<h3>{dot(index)}{escaped(model.name)}</h3>"]
    for which in EXTREMES:
        place = most(which, model.problems)
        if place is None:
            html.append(f'<p class="note">{EXTREMES[which]}: no pair of different texts</p>')
            continue
        problem = model.problems[place]
        html.append(f'<p class="question">{escaped(_shown(problem["question"], BRIEF))}</p>')
        html.append(_pair(model, problem, which, LONG))
    return "".join(html)


def _maps(
    models: Sequence[ModelGeometry], places: Sequence[dict[str, MeasuredProblem]], order: Sequence[str]
) -> str:
    known = ((name, places[0][name]["cos_mean"]) for name in order if name in places[0])
    means = {name: mean for name, mean in known if mean is not None}
    ranked = sorted(means, key=lambda name: -means[name])
    chosen = sorted({round(at) for at in np.linspace(0, len(ranked) - 1, min(MAPS, len(ranked)))})
    html = []
    for name in (ranked[at] for at in chosen):
        found = [
            (index, model, places[index][name]) for index, model in enumerate(models) if name in places[index]
        ]
        html.append(
            f'<div class="maps"><p class="question">{escaped(_shown(found[0][2]["question"], 160))}</p>'
        )
        for index, model, problem in found:
            html.append(
                f"<figure><figcaption>{dot(index)}{escaped(model.name)}: mean "
                f"{number('cos_mean', problem['cos_mean'])}</figcaption>{cosine_map(model, problem)}</figure>"
            )
        html.append("</div>")
    scale = (
        '<p class="scale"><span class="neg"></span>−1 <span class="zero"></span>0 '
        '<span class="pos"></span>+1</p>'
    )
    return f'{scale}<section class="mapgrid">{"".join(html)}</section>'


def _problem_table(
    models: Sequence[ModelGeometry], places: Sequence[dict[str, MeasuredProblem]], order: Sequence[str]
) -> str:
    names = _known(models)
    head = "".join(f'<th class="num">{SHORT[name]}</th>' for name in names)
    rows = []
    for problem_id in order:
        found = [(i, place[problem_id]) for i, place in enumerate(places) if problem_id in place]
        question = beginning(found[0][1]["question"], 70)
        for row, (index, problem) in enumerate(found):
            first = (
                f'<th rowspan="{len(found)}">{escaped(problem_id)}<small>{escaped(question)}</small></th>'
                if row == 0
                else ""
            )
            which = (
                f'<td class="name">{dot(index)}{escaped(models[index].name)}</td>' if len(models) > 1 else ""
            )
            cells = "".join(f'<td class="num">{number(name, problem[name])}</td>' for name in names)
            rows.append(f"<tr>{first}{which}{cells}</tr>")
    model = "<th>model</th>" if len(models) > 1 else ""
    return _table(f"<th>problem</th>{model}{head}", rows, "scroll tall")


def _problem_details(
    models: Sequence[ModelGeometry], places: Sequence[dict[str, MeasuredProblem]], problem_id: str
) -> str:
    found = [(i, place[problem_id]) for i, place in enumerate(places) if problem_id in place]
    question = found[0][1]["question"]
    html = [
        f"<details><summary><b>{escaped(problem_id)}</b> {escaped(beginning(question, 110))}</summary>"
        f'<p class="question">{escaped(_shown(question, LONG))}</p>'
    ]
    for index, problem in found:
        html.append(f"<h3>{dot(index)}{escaped(models[index].name)}</h3>")
        html += [_pair(models[index], problem, which, BRIEF) for which in EXTREMES]
    return "".join(html) + "</details>"


def _settings(models: Sequence[ModelGeometry]) -> str:
    keys = list(dict.fromkeys(key for model in models for key in model.settings))
    head = "".join(f"<th>{dot(i)}{escaped(model.name)}</th>" for i, model in enumerate(models))
    rows = []
    for key in ("model", *keys):
        values = [{"model": model.model, **model.settings}.get(key, "–") for model in models]
        cells = "".join(f"<td>{escaped(value)}</td>" for value in values)
        rows.append(f"<tr><th>{escaped(key)}</th>{cells}</tr>")
    return (
        f"{_table(f'<th></th>{head}', rows)}"
        '<p class="note">A gradient cosine is that of two features: the mean over a response\'s tokens y '
        "of W[y] − E W, the gradient of log p(y) with respect to the LM head's input under the model itself. "
        "Effective rank: exp of the entropy of the eigenvalues of the matrix of cosines (Roy and Vetterli "
        "2007). Made by g2rl geometry; all numbers are in geometry.json, all responses in samples.jsonl.</p>"
    )
