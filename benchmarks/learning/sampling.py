"""The tables of docs/sampling.md: what the sampler's mask changes.

python -m benchmarks.learning.sampling        from the committed results
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from g2rl_kernels._files import write_whole

from .document import MEASURES, RESULTS, ROOT, difference, load, results_table, table
from .experiment import Row
from .settings import DEFAULT, KEPT, SAMPLING, WHOLE

PAGE = ROOT / "docs" / "sampling.md"
BLOCK = re.compile(r"(<!-- what the mask changes -->\n).*?(<!-- end -->)", re.DOTALL)


def differences(rows: Sequence[Row]) -> str:
    """With the mask less without, of the same algorithm: paired by seed, 95 % each."""
    lines = []
    for algorithm in ("GRPO", DEFAULT):
        cells = []
        for measure, (_, digits) in MEASURES.items():
            mean, half = difference(rows, f"{algorithm}, {KEPT}", measure, other=f"{algorithm}, {WHOLE}")
            text = f"{mean:+.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
            cells.append(f"**{text}**" if abs(mean) > half else text)
        lines.append([algorithm, *cells])
    return table(["mask kept less whole softmax", *(head for head, _ in MEASURES.values())], lines)


def filled(text: str, results: Path = RESULTS) -> str:
    """`text`, with its block replaced by the tables."""
    path, made = results / f"{SAMPLING}.json", "Not run yet.\n"
    if path.exists():
        rows = load(path)
        made = f"{results_table(rows)}\n{differences(rows)}"
    return BLOCK.sub(lambda found: found[1] + made + found[2], text)


def write() -> None:
    """Writes docs/sampling.md from the committed results."""
    write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    write()
    sys.exit(0)
