"""Puts the tables of benchmark runs into README.md, from the JSON that `g2rl bench` wrote.

    g2rl bench head --out benchmarks/results/cpu-epyc-zen5-2cores.json
    python tools/readme_table.py

A table stands between `<!-- table: g2rl bench head -->` and `<!-- end -->`. It is made from the file above,
or from another file of benchmarks/results: `<!-- table: g2rl bench logprobs FILE.json -->` (logprobs, group,
train). tests/docs/test_readme.py compares README.md with the results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT = "cpu-epyc-zen5-2cores.json"
BLOCK = re.compile(
    r"(<!-- table: g2rl bench (head|logprobs|group|train)(?: (\S+\.json))? -->\n).*?(<!-- end -->)", re.DOTALL
)


def written(found: re.Match[str]) -> str:
    """The block with its table replaced."""
    return found[1] + block(found[2], found[3] or DEFAULT) + found[4]


def block(op: str, file: str) -> str:
    """The text between the markers: the machine, the table as `g2rl bench` prints it, and its summary."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.measure import header
    from benchmarks.run import OPS, render

    result = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    if (measured := result.get("op", "head")) != op:
        sys.exit(f"README.md: the table of g2rl bench {op} names {file}, a result of g2rl bench {measured}")
    if "gpu" in result["machine"] or op not in SUMMARIES:
        return render(result) + "\n"
    rows = result["rows"]
    rounds, summary = rows[0]["rounds"], SUMMARIES[op](rows)
    return f"{header(result['machine'])}; {rounds} rounds:\n\n{OPS[op].table(rows)}\n\n{summary}\n"


def span(times: dict[tuple[str, ...], float], dtype: str) -> str:
    """The range of times by (shape, dtype, method), for one dtype."""
    values = [time for key, time in times.items() if key[1] == dtype]
    return f"{min(values):.2f} to {max(values):.2f} in {dtype}"


def median_times(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], float]:
    """Median ratio to the floor, by (shape, dtype, method)."""
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


def main() -> None:
    readme = ROOT / "README.md"
    text, count = BLOCK.subn(written, readme.read_text(encoding="utf-8"))
    if count == 0:
        sys.exit("README.md has no pair of markers, <!-- table: g2rl bench head --> and <!-- end -->")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
