"""Turns samples into numbers: tables, results.json, a picture of pass@k, paired differences between runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from .._files import save_figure, write_whole
from ..errors import ConfigError, TrainerError
from ..group.options import SCORE_GATE
from .metrics import Estimate, distinct_right, estimate, excludes_zero, maj_at_k, pass_at_k
from .rows import Asked, Sample, is_right

VOTES = 16  # maj@16 is what is usually reported
MOST_VOTES = 64  # largest default k of maj@k, whose cost grows as k^2: about a second for 128 of 1024 samples


class Summary(TypedDict):
    """The numbers of one data set."""

    problems: int
    samples: int  # of each problem
    verify_failures: int  # responses that the verifier could not judge; they score 0
    metrics: dict[str, Estimate]  # by name: pass@k, maj@k, distinct_right, truncated, length


class Difference(Estimate):
    """The mean of value - base over problems, with its interval, and the means of both."""

    base: float
    value: float


class Comparison(TypedDict):
    """The differences of one run to the first, on one data set."""

    problems: int  # those that both runs have
    samples: int  # of each problem, in the run that has fewer
    metrics: dict[str, Difference]


def powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n."""
    return [1 << i for i in range(n.bit_length())]


def check_ks(ks: Sequence[int] | None, n: int) -> list[int]:
    """The k of pass@k in order: `ks` and 1, or all powers of two. ConfigError unless all are in [1, n]."""
    chosen = sorted({1, *(powers(n) if ks is None else ks)})
    for k in chosen:
        if not 1 <= k <= n:
            raise ConfigError(f"k={k}: must be from 1 to n={n}, the number of responses a problem; raise -n")
    return chosen


def by_problem(rows: Sequence[Sample]) -> dict[str, dict[str, list[Sample]]]:
    """{data set: {problem: its samples}}.

    Raises TrainerError where a sample has no score, or problems differ in their number of samples.
    """
    found: dict[str, dict[str, list[Sample]]] = {}
    for row in rows:
        if row["score"] is None:
            raise TrainerError(
                f"samples: problem {row['problem']}, sample {row['sample']} has no score: give its --data"
            )
        name = row.get("data") or str(row["problem"]).rpartition("/")[0]
        found.setdefault(name, {}).setdefault(row["problem"], []).append(row)
    for name, problems in found.items():
        sizes = {len(samples) for samples in problems.values()}
        if len(sizes) > 1:
            raise TrainerError(
                f"samples: the problems of {name} have {min(sizes)} to {max(sizes)} samples: the run is not "
                "finished; start it again"
            )
    return found


def vote_ks(ks: Sequence[int] | None, n: int) -> list[int]:
    """The k of maj@k in order: `ks`, or the powers of two up to min(n, MOST_VOTES); and min(VOTES, n)."""
    chosen = check_ks(ks, n) if ks is not None else powers(min(n, MOST_VOTES))
    return sorted({*chosen, min(VOTES, n)})


def per_problem(
    problems: dict[str, list[Sample]], ks: Sequence[int], votes: Sequence[int], gate: float
) -> dict[str, list[float]]:
    """{metric: its value for every problem, in order}.

    The metrics are pass@k for k in `ks`, maj@k for k in `votes`, distinct_right, truncated and length.
    """
    values: dict[str, list[float]] = {}
    for samples in problems.values():
        right = [is_right(row, gate) for row in samples]
        answers = [row["answer"] for row in samples]
        for k in ks:
            values.setdefault(f"pass@{k}", []).append(pass_at_k(len(right), sum(right), k))
        for k in votes:
            values.setdefault(f"maj@{k}", []).append(maj_at_k(answers, right, k))
        values.setdefault("distinct_right", []).append(distinct_right(answers, right))
        values.setdefault("truncated", []).append(_mean([bool(row.get("truncated")) for row in samples]))
        lengths = [row["length"] if "length" in row else len(row.get("tokens") or ()) for row in samples]
        values.setdefault("length", []).append(_mean(lengths))
    return values


def summarise(
    rows: Sequence[Sample], ks: Sequence[int] | None = None, gate: float = SCORE_GATE
) -> dict[str, Summary]:
    """The numbers of each data set: means over problems, with 95 % bootstrap intervals over problems.

    Args:
        rows: all samples, those of a problem with one question; every problem of a data set with as many.
        ks: the k of pass@k and maj@k; None: `check_ks` and `vote_ks` choose.
        gate: a response is right if its score is at least this.

    Raises:
        ConfigError: there are no samples, or a k is above their number.
        TrainerError: a sample has no score, or problems differ in their number of samples.
    """
    if not rows:
        raise ConfigError("samples: the file is empty")
    summary: dict[str, Summary] = {}
    for name, problems in by_problem(rows).items():
        n = len(next(iter(problems.values())))
        values = per_problem(problems, check_ks(ks, n), vote_ks(ks, n), gate)
        metrics = {metric: estimate(of_metric) for metric, of_metric in values.items()}
        failures = sum("failure" in row for samples in problems.values() for row in samples)
        summary[name] = {
            "problems": len(problems),
            "samples": n,
            "verify_failures": failures,
            "metrics": metrics,
        }
    return summary


def table(summary: Mapping[str, Summary]) -> str:
    """A Markdown table with a column for each data set: percent, with the 95 % interval."""
    metrics = _shown(summary.values())
    rows = [["", *summary]]
    rows.append(["problems x responses", *(f"{s['problems']} x {s['samples']}" for s in summary.values())])
    if any(s["verify_failures"] for s in summary.values()):
        rows.append(["verify failures", *(str(s["verify_failures"]) for s in summary.values())])
    for metric in metrics:
        rows.append(
            [LABELS.get(metric, metric), *(_cell(s["metrics"].get(metric), metric) for s in summary.values())]
        )
    return _markdown(rows)


LABELS = {"distinct_right": "distinct right answers", "truncated": "cut off", "length": "length, tokens"}
COUNTS = ("distinct_right", "length")  # all others are shares


def _shown(summaries: Iterable[Summary | Comparison]) -> list[str]:
    """The metrics of a table, in order; among maj@k only maj@16, or that of the largest k below 16."""
    names: dict[str, None] = {}
    for one in summaries:
        names.update(dict.fromkeys(one["metrics"]))
    votes = sorted(
        (int(name[4:]) for name in names if name.startswith("maj@")), key=lambda k: (k > VOTES, -k)
    )
    passes = sorted((name for name in names if name.startswith("pass@")), key=lambda name: int(name[5:]))
    return [passes[0], *(f"maj@{k}" for k in votes[:1]), *passes[1:], "distinct_right", "truncated", "length"]


def _written(value: float, metric: str, sign: str = "") -> str:
    """The value of a metric as text: a share in percent; sign "+" writes one for positive values too."""
    factor, digits = (1, 2) if metric == "distinct_right" else (1, 1) if metric in COUNTS else (100, 1)
    return f"{factor * value:{sign}.{digits}f}"


def _cell(value: Estimate | None, metric: str, sign: str = "") -> str:
    if value is None:
        return ""
    mean = _written(value["mean"], metric, sign)
    if value["low"] is None or value["high"] is None:
        return mean
    return f"{mean} ({_written(value['low'], metric, sign)} to {_written(value['high'], metric, sign)})"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def compare(
    runs: Mapping[str, Sequence[Sample]], ks: Sequence[int] | None = None, gate: float = SCORE_GATE
) -> dict[str, dict[str, Comparison]]:
    """{run: {data set: paired differences to the first run}}, over the problems that both runs have.

    A difference is taken problem by problem; its 95 % interval is a bootstrap over problems. ks: as for
    `summarise`; None: powers of two up to the smaller n. Raises ConfigError where two runs share no problem,
    or where problems of the same name have other questions.
    """
    (base, base_rows), *others = runs.items()
    first = by_problem(base_rows)
    found: dict[str, dict[str, Comparison]] = {}
    for name, rows in others:
        check_questions(rows, base_rows, name, base)
        found[name] = {}
        for data, problems in by_problem(rows).items():
            shared = [problem for problem in problems if problem in first.get(data, {})]
            if not shared:
                continue
            n = min(len(problems[shared[0]]), len(first[data][shared[0]]))
            used, votes = check_ks(ks, n), vote_ks(ks, n)
            ours = per_problem({p: problems[p] for p in shared}, used, votes, gate)
            theirs = per_problem({p: first[data][p] for p in shared}, used, votes, gate)
            metrics: dict[str, Difference] = {
                metric: {
                    "base": _mean(theirs[metric]),
                    "value": _mean(ours[metric]),
                    **estimate(np.subtract(ours[metric], theirs[metric])),
                }
                for metric in ours
            }
            if len(problems[shared[0]]) != len(first[data][shared[0]]):
                metrics.pop("distinct_right", None)  # it grows with the number of samples
            found[name][data] = {"problems": len(shared), "samples": n, "metrics": metrics}
        if not found[name]:
            raise ConfigError(f"compare: {name} and {base} share no problem")
    return found


def check_questions(ours: Sequence[Asked], theirs: Sequence[Asked], name: str, base: str) -> None:
    """Raises ConfigError where problems of the same name have different questions.

    name, base: what the message calls `ours` and `theirs`.
    """
    asked = {row["problem"]: row.get("question") for row in theirs}
    for row in ours:
        if row["problem"] in asked and row.get("question") != asked[row["problem"]]:
            raise ConfigError(f"compare: {row['problem']} is another problem in {name} than in {base}")


def comparison_table(base: str, compared: Mapping[str, Mapping[str, Comparison]]) -> str:
    """A Markdown table of all differences to the run `base`, bold where the interval excludes 0."""
    rows = [["data", "problems", "metric", base, "other", "value", "difference"]]
    for run, data in compared.items():
        for name, one in data.items():
            for metric in _shown([one]):
                value = one["metrics"].get(metric)
                if value is None:
                    continue
                cell = _cell(value, metric, "+")
                rows.append(
                    [
                        name,
                        str(one["problems"]),
                        LABELS.get(metric, metric),
                        _written(value["base"], metric),
                        run,
                        _written(value["value"], metric),
                        f"**{cell}**" if excludes_zero(value) else cell,
                    ]
                )
    return _markdown(rows)


def write_results(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


COLORS = ("#1f6fb4", "#d1603d", "#3a8f5c", "#8b5fb0", "#b08a1f", "#5b6570", "#c2417f")


def draw(curves: Mapping[str, Mapping[str, Estimate]], title: str, path: Path) -> None:
    """Saves a picture (PNG): pass@k over k with its 95 % interval, and maj@k dashed.

    curves: {label: metrics of a `Summary`}, a colour each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    largest = 1
    for color, (label, metrics) in zip(COLORS * len(curves), curves.items()):
        for kind, style in (("pass", "-"), ("maj", "--")):
            ks = sorted(int(name.partition("@")[2]) for name in metrics if name.startswith(f"{kind}@"))
            values = [metrics[f"{kind}@{k}"] for k in ks]
            means = [value["mean"] for value in values]
            axes.plot(
                ks,
                means,
                style,
                color=color,
                linewidth=2.2 if kind == "pass" else 1.4,
                marker="o" if kind == "pass" else None,
                markersize=4,
                label=label if kind == "pass" else None,
            )
            intervals = [
                (value["low"], value["high"])
                for value in values
                if value["low"] is not None and value["high"] is not None
            ]
            if kind == "pass" and intervals:
                lows, highs = zip(*intervals)
                axes.fill_between(ks, lows, highs, color=color, alpha=0.15, linewidth=0)
            largest = max(largest, *ks)
    axes.set_xscale("log", base=2)
    axes.set_xticks(powers(largest), [str(k) for k in powers(largest)])
    axes.minorticks_off()
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("k, responses")
    axes.set_ylabel("share of problems")
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    handles += [Line2D([], [], color="#5b6570", linestyle=style) for style in ("-", "--")]
    axes.legend(handles, [*labels, "pass@k", "maj@k"], frameon=False, fontsize=9)
    save_figure(figure, path, dpi=110)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
