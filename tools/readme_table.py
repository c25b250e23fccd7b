"""Puts the tables of benchmark runs into README.md and docs/performance.md, from what `g2rl bench` wrote.

    g2rl bench head --out benchmarks/results/cpu-epyc-zen5-2cores.json
    python tools/readme_table.py

docs/performance.md has whole tables. One stands between `<!-- table: g2rl bench head -->`, which takes the
file above, or with a file of benchmarks/results named, `<!-- table: g2rl bench logprobs FILE.json -->`
(logprobs, group, train) or `<!-- table: builds FILE.json -->` (benchmarks/builds.py; the same for support),
and `<!-- end -->`. README.md has four rows of them, between `<!-- short table -->` and `<!-- end -->`.
tests/docs/test_readme.py compares both pages with the results.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
DEFAULT = "cpu-epyc-zen5-2cores.json"
BLOCK = re.compile(
    r"(<!-- table: (?:g2rl bench )?(head|logprobs|group|train|builds|support)(?: (\S+\.json))? -->\n)"
    r".*?(<!-- end -->)",
    re.DOTALL,
)
SHORT_BLOCK = re.compile(r"(<!-- short table -->\n).*?(<!-- end -->)", re.DOTALL)

# README's rows, at the head of Qwen3-1.7B: what it says, result, dtype, and the error that is shown.
SHORT_SHAPE = "qwen3-1.7b"
SHORT_ROWS = [
    ("`head_features`", DEFAULT, "fp32", "features"),
    ("`head_features`", DEFAULT, "bf16", "features"),
    ("`linear_logprobs`, forward and backward", "cpu-epyc-zen4-2cores-logprobs.json", "fp32", "hidden"),
    ("`linear_logprobs`, forward and backward", "cpu-epyc-zen4-2cores-logprobs.json", "bf16", "hidden"),
]


def read(file: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return result


# --- whole tables -------------------------------------------------------------------------------------------


def written(found: re.Match[str]) -> str:
    """A block of docs/performance.md as it should be."""
    return found[1] + block(found[2], found[3] or DEFAULT) + found[4]


def block(op: str, file: str) -> str:
    """The text between the markers: the machine, the table as `g2rl bench` prints it, and its summary."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import builds, support
    from benchmarks.measure import header
    from benchmarks.rows import Result
    from benchmarks.run import OPS, render

    result = read(file)
    if (measured := result.get("op", "head")) != op:
        sys.exit(f"{PERFORMANCE.name}: the table of {op} names {file}, a result of g2rl bench {measured}")
    if op == "support":
        return f"{header(result['machine'])}; {result['rounds']} rounds:\n\n{support.table(result['rows'])}\n"
    if op == "builds":
        rounds = result["rows"][0]["rounds"]
        return f"{header(result['machine'])}; {rounds} rounds:\n\n{builds.table(result['rows'])}\n"
    if "gpu" in result["machine"] or op not in SUMMARIES:
        return render(cast(Result, result)) + "\n"
    rows = result["rows"]
    rounds, summary = rows[0]["rounds"], SUMMARIES[op](rows)
    return f"{header(result['machine'])}; {rounds} rounds:\n\n{OPS[op].table(rows)}\n\n{summary}\n"


def span(times: dict[tuple[str, ...], float], dtype: str) -> str:
    """The range of times by (shape, dtype, method), for one dtype."""
    values = [time for key, time in times.items() if key[1] == dtype]
    return f"{min(values):.2f} to {max(values):.2f} in {dtype}"


def median_times(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], float]:
    """Median ratio to the bare products, by (shape, dtype, method)."""
    return {(row["shape"], row["dtype"], row["method"]): row["ratio_20_50_80"][1] for row in rows}


def head_summary(rows: list[dict[str, Any]]) -> str:
    ours = [row for row in rows if row["method"].startswith("g2rl-kernels")]
    times = median_times(ours)
    one, eight = "g2rl-kernels, 1 response", "g2rl-kernels, 8 responses"
    cost = [
        100 * (times[shape, dtype, eight] / time - 1)
        for (shape, dtype, method), time in times.items()
        if method == one
    ]
    memory = max(row["extra_bytes"] for row in ours) / 1e6
    return (
        f"In short: {span(times, 'fp32')}, {span(times, 'bf16')}; 8 responses instead of 1: "
        f"{min(cost):+.0f} to {max(cost):+.0f} % of time; at most {memory:.1f} MB."
    )


def logprobs_summary(rows: list[dict[str, Any]]) -> str:
    ours = {
        "of the three products": "g2rl-kernels",
        "with an entropy bonus": "g2rl-kernels, entropy bonus",
        "of two with a frozen weight": "g2rl-kernels, frozen weight",
    }
    text = []
    for what, method in ours.items():
        times = median_times([row for row in rows if row["method"] == method])
        text.append(f"{span(times, 'fp32')}, {span(times, 'bf16')} {what}")
    memory = max(row["extra_bytes"] for row in rows if row["method"] in ours.values()) / 1e6
    return f"In short: {'; '.join(text)}; at most {memory:.1f} MB beyond the gradients."


SUMMARIES = {"head": head_summary, "logprobs": logprobs_summary}


# --- README's four rows -------------------------------------------------------------------------------------


def short_table() -> str:
    lines = ["| what | time / bare products | extra memory | error | machine |", "|---|---|---|---|---|"]
    for what, file, dtype, error in SHORT_ROWS:
        result = read(file)
        (row,) = (
            row
            for row in result["rows"]
            if (row["shape"], row["dtype"], row["method"]) == (SHORT_SHAPE, dtype, "g2rl-kernels")
        )
        errors = row.get("errors") or {}
        shown = row["error"] if error == "features" else errors[error]
        machine = result["machine"]
        cells = [
            f"{what}, {dtype}",
            f"**{row['ratio_20_50_80'][1]:.2f}**",
            f"{row['extra_bytes'] / 1e6:.0f} MB",
            f"{shown:.0e}",
            f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    shape = f"{row['N']} tokens, V = {row['V']}, d = {row['d']}"
    return "\n".join(lines) + f"\n\nMedians at the head of Qwen3-1.7B ({shape}); torch {machine['torch']}.\n"


def short_written(found: re.Match[str]) -> str:
    return found[1] + short_table() + found[2]


def main() -> None:
    for page, pattern, write in (
        (README, SHORT_BLOCK, short_written),
        (PERFORMANCE, BLOCK, written),
    ):
        text, count = pattern.subn(write, page.read_text(encoding="utf-8"))
        if count == 0:
            sys.exit(f"{page.name} has no pair of markers, {pattern.pattern}")
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
