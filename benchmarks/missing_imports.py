"""Lists test files that import missing packages, so that the others can run: `path: module, module`.

    python benchmarks/missing_imports.py tests

Only imports at the top of a file count, directly or through a module beside it.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path


def missing(file: Path, seen: frozenset[Path] = frozenset()) -> set[str]:
    """Top-level packages that `file` imports and this interpreter lacks."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        else:
            continue
        for name in {name.split(".")[0] for name in names}:
            # pytest puts a test's folder and those above it first on the path (conftest.py, pythonpath)
            local = [above / f"{name}.py" for above in (file.parent, *file.resolve().parents[1:4])]
            here = next((path for path in local if path.exists()), None)
            if here is not None and here not in seen:
                found |= missing(here, seen | {file})
            elif here is None and importlib.util.find_spec(name) is None:
                found.add(name)
    return found


def main(folder: str) -> None:
    for file in sorted([*Path(folder).rglob("test_*.py"), *Path(folder).rglob("conftest.py")]):
        if names := missing(file):
            print(f"{file}: {', '.join(sorted(names))}")


if __name__ == "__main__":
    main(sys.argv[1])
