"""Versions that are tested: what is said of others."""

import warnings

import pytest

from g2rl_kernels import versions

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
