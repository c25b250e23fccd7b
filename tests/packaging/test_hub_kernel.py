"""The repository for the Hugging Face Hub: its format, and results of a variant without C++.

`make hub-kernel` loads all variants with the package `kernels` itself.
"""

import ast
import base64
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tool import load_tool

import g2rl_kernels as g2

hub_kernel = load_tool("hub_kernel")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "kernel"
    hub_kernel.build(out, native=False)
    return out


@pytest.fixture
def load(monkeypatch):
    """Imports a variant under its id, as `kernels` does."""

    def loaded(variant: Path):
        name = json.loads((variant / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


def close(a, b):
    """Within rounding of float32, by the largest value."""
    return (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_every_variant_has_its_own_id_and_the_digests_of_its_files(repository):
    variants = sorted((repository / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    found = [json.loads((variant / "metadata.json").read_text()) for variant in variants]
    assert len({metadata["id"] for metadata in found}) == 3
    for variant, metadata in zip(variants, found):
        assert metadata["id"].isidentifier()
        assert metadata["backend"]["type"] == variant.name.removeprefix("torch-")
        files = {str(f.relative_to(variant)) for f in variant.rglob("*") if f.is_file()} - {"metadata.json"}
        assert files == {*metadata["digest"]["files"]}
        for name, digest in metadata["digest"]["files"].items():
            assert base64.b64decode(digest) == hashlib.sha256((variant / name).read_bytes()).digest()


def test_files_import_nothing_but_torch_triton_the_standard_library_and_themselves(repository):
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    files = sorted((repository / "build" / "torch-cuda").rglob("*.py"))
    assert len(files) > 25
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.partition(".")[0] for name in names} <= allowed, file


def test_a_variant_without_c_plus_plus_gives_the_same_results(repository, load):
    theirs = load(repository / "build" / "torch-cuda")
    assert {*theirs.__all__} == {*g2.__all__} - {"__version__"}
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(23, 16, generator=generator), torch.randn(101, 16, generator=generator)
    tokens, cu_seqlens = torch.randint(101, (23,), generator=generator), torch.tensor([0, 9, 9, 23])
    arguments = (hidden, weight, tokens, cu_seqlens)
    for a, b in zip(g2.head_features(*arguments), theirs.head_features(*arguments)):
        assert close(a, b)
    rewards, ids = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([5, 5, 2])
    features = g2.head_features(*arguments).features
    ours = g2.group_geometry(features, rewards, group_ids=ids)
    for a, b in zip(ours, theirs.group_geometry(features, rewards, group_ids=ids)):
        assert close(a, b)
    with pytest.raises(ImportError, match="needs the compiled part"):
        theirs.head_features(*arguments, backend="cpu")


def test_the_folder_for_older_versions_exports_the_same(repository, load):
    variant = repository / "build" / "torch-rocm"
    module = load(variant)
    spec = importlib.util.spec_from_file_location("g2rl_nested", variant / "g2rl_kernels" / "__init__.py")
    nested = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nested)
    assert nested.head_features is module.head_features


def test_a_changed_ops_file_stops_the_build(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_kernel, "PACKAGE", tmp_path)
    (tmp_path / "_ops.py").write_text('import torch\n\nNAMESPACE = "g2rl"\n')
    with pytest.raises(SystemExit, match="one import of _C"):
        hub_kernel.ops_file("_id", None)


@pytest.mark.parametrize("name", [".git/HEAD", "notes.txt", "build/objects/a.o"])
def test_a_folder_with_other_files_is_not_replaced(tmp_path, monkeypatch, name):
    """Such as a clone of the Hub's repository, or a home folder."""
    monkeypatch.setattr(hub_kernel, "write_variant", lambda folder, *_: folder.mkdir(parents=True))
    for _ in range(2):  # an earlier build is replaced
        hub_kernel.build(tmp_path / "kernel", native=False)
    file = tmp_path / "kernel" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    with pytest.raises(
        SystemExit, match=r"--out: .*kernel holds (\.git|notes\.txt|objects), which a build would"
    ):
        hub_kernel.build(tmp_path / "kernel", native=False)
    assert file.read_text() == "mine"
