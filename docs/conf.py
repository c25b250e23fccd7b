"""Sphinx: the pages of this folder, and the API reference from docstrings.

make docs        or:  python -m sphinx -W --keep-going -b html docs build/docs
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
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
napoleon_numpy_docstring = False

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Note|Example|Examples):$")
OUTSIDE = re.compile(r"\[([^\]`]+)\]\((\.\./[^)#]+\.md)\)")


def link_outside(app: Any, page: str, source: list[str]) -> None:
    """Links to Markdown files outside this folder become downloads, as other files there do."""
    source[0] = OUTSIDE.sub(r"{download}`\1 <\2>`", source[0])


def fields(cls: type) -> list[str]:
    """The fields of a dataclass or NamedTuple: with their help if they have one, else as in the source."""
    if dataclasses.is_dataclass(cls):
        helps = {one.name: one for one in dataclasses.fields(cls) if "help" in one.metadata}
        ours = [helps[name] for name in vars(cls)["__annotations__"] if name in helps]
        if ours:
            return [
                line
                for one in ours
                for line in (f"{one.name} = {one.default!r}", *textwrap.wrap(one.metadata["help"], 90), "")
            ]
    elif not hasattr(cls, "_fields"):
        return []
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    (tree,) = ast.parse("\n".join(lines)).body
    assert isinstance(tree, ast.ClassDef)
    own = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    return textwrap.dedent("\n".join(lines[own[0].lineno - 1 : own[-1].end_lineno])).splitlines()


def prepare_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Marks indented text before the first section as a literal block, and adds the fields of a class.

    Docstrings indent what is to be read line by line (equations, tables, code), as Markdown does; RST wants
    `::` before it.
    """
    done: list[str] = []
    in_sections = False
    for number, line in enumerate(lines):
        in_sections = in_sections or bool(SECTION.match(line))
        after_blank = number > 0 and not lines[number - 1].strip()
        above = next((text for text in reversed(done) if text.strip()), "")
        if line.startswith("    ") and after_blank and not above.startswith("    ") and not in_sections:
            done += ["::", ""]
        done.append(line)
    if what == "class" and (found := fields(obj)):
        done += ["", "::", "", *(f"    {line}" for line in found), ""]
    lines[:] = done


def setup(app: Any) -> None:
    app.connect("source-read", link_outside)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon's 500
