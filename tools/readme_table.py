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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-epyc-zen5-2cores.json"
BLOCK = re.compile(r"(<!-- table: g2rl bench head -->\n).*?(<!-- end -->)", re.DOTALL)


def block() -> str:
    """The lines between the markers: the machine, then the table as `g2rl bench` prints it."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.run import table

    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    machine = "{cpu}, {threads} threads, {isa}, torch {torch}, {date}".format(**result["machine"])
    return f"{machine}; medians of {result['rows'][0]['rounds']} rounds:\n\n{table(result['rows'])}\n"


def main() -> None:
    readme = ROOT / "README.md"
    text, count = BLOCK.subn(lambda m: m[1] + block() + m[2], readme.read_text(encoding="utf-8"))
    if count != 1:
        sys.exit(f"README.md has {count} pairs of the markers, needs 1")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
