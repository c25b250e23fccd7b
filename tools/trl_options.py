"""Writes the tables of docs/trl-options.md: every option of GRPOConfig and what it is tested with.

    python tools/trl_options.py

The rows come from tests/trl_options: values from the cases, words and reasons from options.py.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "trl-options.md"
BLOCK = re.compile(r"(<!-- table: tools/trl_options.py (own|inherited) -->\n).*?(<!-- end -->)", re.DOTALL)


def shown(value: Any) -> str:
    return f"`{value}`".replace("|", r"\|")


def load_options() -> Any:
    """tests/trl_options/options.py, whose tests import it by the same name."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "trl_options")]
    return importlib.import_module("options")


def own(options: Any) -> str:
    text = "| option | tested with | with G2RL |\n|---|---|---|\n"
    for name in options.own_names():
        cells = options.NOT_RUN.get(name) or ", ".join(map(shown, options.values_of(name)))
        if "vllm" in name:
            cells += " (stand-in)"
        text += f"| `{name}` | {cells} | {options.WORDS.get(name, '')} |\n"
    return text


def inherited(options: Any) -> str:
    tested = filter(options.cases_of, options.names(options.TrainingArguments))
    text = (
        f"| how | options |\n|---|---|\n| tested as above | {', '.join(f'`{name}`' for name in tested)} |\n"
    )
    for why, names in options.ELSEWHERE.items():
        text += f"| {why} | {', '.join(f'`{name}`' for name in names.split())} |\n"
    return text


def written() -> str:
    """The page as it should be."""
    options, tables = load_options(), {"own": own, "inherited": inherited}
    page = PAGE.read_text(encoding="utf-8")
    return BLOCK.sub(lambda found: found[1] + tables[found[2]](options) + found[3], page)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    PAGE.write_text(written(), encoding="utf-8")
