"""Puts the tables of benchmark runs into README.md, from the JSON that `g2rl bench` wrote.

    g2rl bench head --out benchmarks/results/cpu-epyc-zen5-2cores.json
    python tools/readme_table.py

A table stands between `<!-- table: g2rl bench head -->`, which takes the file above, or with a file of
benchmarks/results named, `<!-- table: g2rl bench group gpu-nvidia-h200-group.json -->`, and `<!-- end -->`.
tests/test_readme.py compares the two.
"""

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
    r"(<!-- table: g2rl bench (head|group|train)(?: (\S+\.json))? -->\n).*?(<!-- end -->)", re.DOTALL
)


def written(found: re.Match[str]) -> str:
    """The block as it should be."""
    return found[1] + block(found[2], found[3] or DEFAULT) + found[4]


def block(op: str, file: str) -> str:
    """What stands between the markers: the machine, the table as `g2rl bench` prints it, and its summary."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.measure import header
    from benchmarks.run import OPS, render

    result = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    if "gpu" in result["machine"] or op != "head":
        return render(result) + "\n"
    rows = result["rows"]
    rounds = rows[0]["rounds"]
    return f"{header(result['machine'])}; {rounds} rounds:\n\n{OPS[op].table(rows)}\n\n{summary(rows)}\n"


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
    text, count = BLOCK.subn(written, readme.read_text(encoding="utf-8"))
    if count == 0:
        sys.exit("README.md has no pair of markers, <!-- table: g2rl bench head --> and <!-- end -->")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
