"""The layout holds: imports run one way, and every file is short enough to read."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "g2rl_kernels"

# What each package of g2rl_kernels may import, beside itself and the compiled _C.
BASE = {"errors", "_files", "_clock", "arguments", "versions", "_ops"}
MAY_IMPORT = dict.fromkeys(BASE, BASE) | {
    "head": BASE,
    "group": {*BASE, "head"},
    "models": {*BASE, "head"},
    "tasks": BASE,
}
ABOVE = ("trainer", "evaluation", "geometry", "integrations", "cli")
for name in ABOVE:  # all that is before it, and `import g2rl_kernels as g2`
    MAY_IMPORT[name] = {*MAY_IMPORT, ""}


def imported(source: str, folder: tuple[str, ...]) -> Iterator[str]:
    """Packages of g2rl_kernels that a file imports anywhere; "" for g2rl_kernels itself and its names."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = [PACKAGE.name, *folder][: len(folder) + 2 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for first, _, rest in (name.partition(".") for name in names):
            if first == PACKAGE.name:
                package = rest.partition(".")[0]
                yield package if package in (*MAY_IMPORT, "_C") else ""


def wrong_imports(path: str, source: str) -> set[str]:
    """The imports of g2rl_kernels/`path` that run the wrong way."""
    here = Path(path).with_suffix("").parts[0]
    return {*imported(source, Path(path).parts[:-1])} - MAY_IMPORT[here] - {here, "_C"}


def test_imports_run_one_way():
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    assert len(files) > 50
    free = {"__init__.py", "__main__.py"}  # of g2rl_kernels itself
    wrong = {
        str(path): found
        for path in files
        if str(path) not in free and path.parts[0] != "benchmarks"  # part of an installed package only
        if (found := wrong_imports(str(path), (PACKAGE / path).read_text(encoding="utf-8")))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("group/shaping.py", "from ..head.reference import segment_sum", set()),
        ("group/shaping.py", "from ..tasks.base import Item", {"tasks"}),
        ("head/triton/driver.py", "from ...arguments import sizes\nfrom ..spec import HeadSpec", set()),
        ("head/triton/driver.py", "from ...group import geometry", {"group"}),
        ("head/features.py", "def f():\n    from g2rl_kernels.models import loading", {"models"}),
        ("head/features.py", "if TYPE_CHECKING:\n    import g2rl_kernels.trainer.config", {"trainer"}),
        ("tasks/base.py", "from .. import _C, head", {"head"}),
        ("models/loading.py", "import g2rl_kernels as g2", {""}),
        ("models/loading.py", "from .. import head_features", {""}),
        ("trainer/trainer.py", "import g2rl_kernels as g2\nfrom ..tasks import base", set()),
        ("trainer/trainer.py", "from ..evaluation.samples import sample", {"evaluation"}),
        ("errors.py", "import torch\nfrom . import _files", set()),
        ("errors.py", "from .head import spec", {"head"}),
    ],
)
def test_wrong_imports_are_found(path, source, wrong):
    assert wrong_imports(path, source) == wrong


LONGEST = 500
SOURCES = {".py", ".cpp", ".h", ".cu", ".sh", ".md", ".yaml", ".toml"}
MAY_BE_LONG = ("CHANGELOG.md", "benchmarks/results/", "docs/evidence.md")


def test_no_file_is_longer_than_500_lines():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [path for path in listed.stdout.splitlines() if not path.startswith(MAY_BE_LONG)]
    sources = [ROOT / path for path in paths if Path(path).suffix in SOURCES or path == "Makefile"]
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in sources
        if file.is_file()
    }
    assert len(lengths) > 100
    assert not {name: length for name, length in lengths.items() if length > LONGEST}
