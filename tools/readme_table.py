"""Puts the table of a benchmark run into README.md, from the JSON that `g2rl bench` wrote.

    g2rl bench head --out benchmarks/results/cpu-epyc-zen5-2cores.json
    python tools/readme_table.py

tests/test_readme.py compares the two.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-epyc-zen5-2cores.json"
BLOCK = re.compile(r"(<!-- table: g2rl bench head -->\n).*?(<!-- end -->)", re.DOTALL)


def block() -> str:
    """What stands between the markers: the machine, the table as `g2rl bench` prints it, and its summary."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.run import table

    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    machine = "{cpu}, {threads} threads, {isa}, torch {torch}, {date}".format(**result["machine"])
    rounds = result["rows"][0]["rounds"]
    return f"{machine}; {rounds} rounds:\n\n{table(result['rows'])}\n\n{summary(result['rows'])}\n"


def summary(rows: list[dict[str, Any]]) -> str:
    ours = [row for row in rows if row["method"].startswith("g2rl-kernels")]
    times = {(row["shape"], row["dtype"], row["method"]): row["ratio_20_50_80"][1] for row in ours}

    def span(dtype: str) -> str:
        values = [time for (_, kind, _), time in times.items() if kind == dtype]
        return f"{min(values):.2f} to {max(values):.2f} in {dtype}"

    one, eight = "g2rl-kernels, 1 response", "g2rl-kernels, 8 responses"
    cost = [
        100 * (times[shape, dtype, eight] / time - 1)
        for (shape, dtype, method), time in times.items()
        if method == one
    ]
    memory = max(row["extra_bytes"] for row in ours) / 1e6
    return (
        f"In short: {span('fp32')}, {span('bf16')}; 8 responses instead of 1: {min(cost):+.0f} to "
        f"{max(cost):+.0f} % of time; at most {memory:.1f} MB."
    )


def main() -> None:
    readme = ROOT / "README.md"
    text, count = BLOCK.subn(lambda m: m[1] + block() + m[2], readme.read_text(encoding="utf-8"))
    if count != 1:
        sys.exit(f"README.md has {count} pairs of the markers, needs 1")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
