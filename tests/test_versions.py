"""Versions that are tested: what is said of others."""

import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest

import g2rl_kernels
from g2rl_kernels import versions

PACKAGE = Path(g2rl_kernels.__file__).parent

SPAN = "than g2rl-kernels is tested with (2.11 to 2.15)"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.11.0+cu130", None),
        ("2.13.0", None),
        ("2.15.1.dev20261001", None),
        ("2.16.0a0+git123", f"torch 2.16.0a0+git123 is newer {SPAN}"),
        ("3.0.0", f"torch 3.0.0 is newer {SPAN}"),
        ("2.9.1", f"torch 2.9.1 is older {SPAN}"),
    ],
)
def test_versions_outside_the_tested_ones_are_named(monkeypatch, version, said):
    monkeypatch.setitem(versions.TESTED, "torch", ("2.11", "2.15"))
    assert versions.untested("torch", version) == said


def test_a_single_tested_version_is_not_a_span(monkeypatch):
    monkeypatch.setitem(versions.TESTED, "trl", ("1.16", "1.16"))
    assert versions.untested("trl", "1.17.0").endswith("(1.16)")


def test_the_installed_version_counts_and_a_missing_package_does_not(monkeypatch):
    monkeypatch.setitem(versions.TESTED, "numpy", ("99.0", "99.1"))
    monkeypatch.setitem(versions.TESTED, "no-such-package", ("1.0", "1.0"))
    assert "older" in versions.untested("numpy")
    assert versions.untested("no-such-package") is None


def test_a_warning_is_given_once_for_a_caller(monkeypatch):
    monkeypatch.setitem(versions.TESTED, "torch", ("2.11", "2.15"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            versions.warn_untested("torch", "9.0.0", stacklevel=1)
        versions.warn_untested("torch", "2.13.0", stacklevel=1)
    assert [w.category for w in caught] == [versions.UntestedVersionWarning]
    assert caught[0].filename == __file__


# What the import says. Each test starts a Python that thinks its torch another version.


def python(folder, code, version="2.13.0"):
    """Runs a script that imports the package of `folder`, from another file than the first line's."""
    (folder / "user.py").write_text(code)
    # The import hook of an editable install would find the sources in place of `folder`.
    start = (
        "import runpy, sys, torch; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)];"
        f"torch.__version__ = {version!r}; sys.path.insert(0, {str(folder)!r}); runpy.run_path('user.py')"
    )
    return subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, cwd=folder)


def test_an_untested_torch_warns_once_where_it_is_imported(tmp_path):
    (tmp_path / "g2rl_kernels").symlink_to(PACKAGE)
    code = "pass\nimport g2rl_kernels\nimport g2rl_kernels.head.features\n"
    done = python(tmp_path, code, "3.4.0")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "torch 3.4.0" in line]
    assert line.startswith("user.py:2: UntestedVersionWarning: torch 3.4.0 is newer than"), line


def test_a_torch_that_is_too_old_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "g2rl_kernels").symlink_to(PACKAGE)
    done = python(tmp_path, "import g2rl_kernels", "2.10.2+cu126")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: g2rl_kernels needs torch 2.11 or newer, found 2.10.2+cu126: pip install 'torch>=2.11'"
    )


def test_a_build_for_another_python_is_named(tmp_path):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "g2rl_kernels", ignore=ignore)
    (tmp_path / "g2rl_kernels" / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    last = python(tmp_path, "import g2rl_kernels").stderr.splitlines()[-1]
    assert "(built for another Python: _C.cpython-39-x86_64-linux-gnu.so; this one needs _C" in last
    assert sysconfig.get_config_var("EXT_SUFFIX") in last
    assert last.endswith(f"{sys.executable} -m pip install --force-reinstall g2rl-kernels")
