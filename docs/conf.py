"""Sphinx: the pages of this folder, and the API reference from docstrings.

    make docs        or:  python -m sphinx -W --keep-going -b html docs build/docs
"""

from __future__ import annotations

import re
from typing import Any

import g2rl_kernels

project = "g2rl-kernels"
author = "The g2rl-kernels developers"
version = release = g2rl_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
html_theme = "alabaster"
html_theme_options = {"description": "Fused LM-head kernels for G2RL", "page_width": "1100px"}

myst_heading_anchors = 3  # links such as scaling.md#what-is-measured

default_role = "code"  # `name` in a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Note|Example|Examples):$")
LIST_ITEM = re.compile(r"([-*]|\d+\.) ")


def literal_blocks(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Marks indented text before the first section (equations, tables, code) as literal blocks.

    Docstrings here indent what is to be read line by line, as Markdown does; RST wants `::` before it.
    """
    done: list[str] = []
    open_section = False
    for number, line in enumerate(lines):
        open_section = open_section or bool(SECTION.match(line))
        after_blank = number > 0 and not lines[number - 1].strip()
        above = next((text for text in reversed(done) if text.strip()), "")
        starts = line.startswith("    ") and after_blank and not above.startswith("    ")
        if starts and not open_section and not LIST_ITEM.match(above):
            done += ["::", ""]
        done.append(line)
    lines[:] = done


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", literal_blocks, priority=400)  # before napoleon's 500
