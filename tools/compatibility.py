"""The record of what ran on which versions, and the page made of it. Scripts that try versions add rows.

    from compatibility import store, write_page
    store("trl", "1.16.0", {"TRL": "1.16.0", "passed": 135, "failed": 0, "date": today()},
          title="TRL", about="One sentence on what every row ran.")
    write_page()

The record is benchmarks/results/compatibility.json: sections by name, each with a title, a text and rows by
key. A row's keys are the headings of its table, "note" the last; a value that is a dict is kept in the record
alone. A row stored again replaces the old one.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from g2rl_kernels._files import write_whole  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
INTRODUCTION = """\
# Compatibility

What ran, when, on which versions. A version that is not here may well work: a newer one than those of
`g2rl_kernels/versions.py` warns, it is not refused. Nothing on this page ran on a GPU unless a row says so.

Generated from `benchmarks/results/compatibility.json` by `python tools/matrix.py --document`: do not edit.
"""


def today() -> str:
    return datetime.date.today().isoformat()


def natural(key: str) -> list[tuple[int, str]]:
    """Sorts 2.9 before 2.11."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", key)]


def load() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def store(section: str, key: str, row: dict[str, Any], title: str, about: str) -> None:
    """Writes one row at once, so that an interrupted run keeps what it has done."""
    record = load()
    rows = record.get(section, {}).get("rows", {}) | {key: row}
    record[section] = {
        "title": title,
        "about": about,
        "rows": {k: rows[k] for k in sorted(rows, key=natural)},
    }
    write_whole(RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    shown = (k for row in rows for k, value in row.items() if k != "note" and not isinstance(value, dict))
    headings = [*dict.fromkeys(shown), "note"]
    lines = [headings, ["---"] * len(headings)]
    lines += [[str(row.get(heading, "")) for heading in headings] for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page() -> str:
    parts = [INTRODUCTION]
    for section in load().values():
        parts.append(
            f"## {section['title']}\n\n{section['about']}\n\n{table(list(section['rows'].values()))}\n"
        )
    return "\n".join(parts)


def write_page() -> None:
    write_whole(PAGE, page())
