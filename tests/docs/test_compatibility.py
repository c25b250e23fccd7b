"""docs/compatibility.md is the record's page; what tools/matrix.py and tools/op_bits.py record is so."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tool import load_tool

import g2rl_kernels as g2
from g2rl_kernels import versions

compatibility = load_tool("compatibility")
matrix = load_tool("matrix")
CASE = '<testcase classname="tests.head.test_head{}" file="tests/head/test_head.py" name="{}">{}</testcase>'
FAILED, ERROR = '<failure message="no">trace</failure>', '<error message="no">trace</error>'
UNREAD = f'<testcase classname="" file="tests/test_x.py" name="tests.test_x">{ERROR}</testcase>'
B, C = "tests/head/test_head.py::test_b[1]", "tests/head/test_head.py::TestIt::test_c"


def report(b: str = FAILED, c: str = ERROR, more: str = "") -> str:
    """pytest's report: test_a passed, test_d was skipped."""
    skipped = '<skipped message="no">why</skipped>'
    cases = [("", "test_a", ""), ("", "test_b[1]", b), (".TestIt", "test_c", c), ("", "test_d", skipped)]
    text = "".join(CASE.format(*case) for case in cases)
    return f"<testsuites><testsuite>{text}{more}</testsuite></testsuites>"


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(compatibility, "PAGE", tmp_path / "page.md")
    return tmp_path / "record.json"


def test_the_page_is_made_of_the_record():
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.page()


def test_what_is_recorded_passed_beside_the_pinned_torch_and_others():
    rows = compatibility.load()[matrix.SECTION]["rows"]
    pinned = matrix.PAIRS[0]
    assert rows[pinned.key]["torch"].startswith(pinned.torch)
    assert rows.keys() <= {pair.key for pair in matrix.PAIRS}
    for key, row in rows.items():
        if row["note"].startswith("not run: "):
            continue
        assert row["failed"] == 0, key
        assert row["same bits"] == ("compared with" if key == matrix.PAIRS[0].key else "yes"), key
        assert row["passed"] > 900, key


def test_the_tested_versions_of_torch_are_those_that_passed():
    rows = compatibility.load()[matrix.SECTION]["rows"].values()
    passed = sorted(versions.minor(row["torch"]) for row in rows if row.get("passed") and not row["failed"])
    assert (passed[0], passed[-1]) == tuple(map(versions.minor, versions.TESTED["torch"]))


def test_rows_are_stored_at_once_in_the_order_of_versions(record):
    for version in ("2.11", "2.9", "2.11"):
        row = {"torch": version, "bits": {"avx2": "ab"}, "note": f"a | b, {version}"}
        compatibility.store("torch", version, row, "Torch", "What ran.")
        assert version in json.loads(record.read_text())["torch"]["rows"]
    compatibility.store("trl", "1.16", {"TRL": "1.16", "passed": 3}, "TRL", "Its tests.")
    text = compatibility.page()
    assert "| torch | note |\n| --- | --- |\n| 2.9 | a \\| b, 2.9 |\n| 2.11 | a \\| b, 2.11 |\n" in text
    assert "## TRL\n\nIts tests.\n\n| TRL | passed | note |\n" in text


def test_a_report_of_pytest_is_counted(tmp_path):
    file = tmp_path / "report.xml"
    twice = CASE.format("", "test_a", ERROR)  # its teardown failed
    file.write_text(report(more=UNREAD + twice))
    failed = ["tests/head/test_head.py::test_a", B, C, "tests/test_x.py"]
    assert matrix.counts(matrix.outcomes(file)) == (0, 1, failed)


@pytest.mark.parametrize(
    ("reports", "passed", "failed", "said"),
    [
        ([report(), report(c="")], 2, [B], "1 passed only alone"),
        ([report(more=UNREAD), report(b="", c="")], 3, ["tests/test_x.py"], "2 passed only alone"),
        ([report(b="", c="", more=UNREAD)], 3, ["tests/test_x.py"], ""),
        ([report(b="", c="")], 3, [], ""),
    ],
)
def test_failed_tests_run_again_alone(tmp_path, monkeypatch, reports, passed, failed, said):
    calls = []

    def run(command, log, cwd, **_):
        text = reports[len(calls)]
        calls.append(command)
        log.with_suffix(".xml").write_text(text)
        return int(">trace<" in text)

    monkeypatch.setattr(matrix, "run", run)
    shop = SimpleNamespace(workers=2, tree=tmp_path)
    result, note = matrix.run_tests("python", shop, tmp_path / "log.txt")
    assert all(call[-2:] == [B, C] for call in calls[1:])
    assert len(calls) == len(reports)
    assert (result.passed, result.failed, note) == (passed, failed, said)


def test_failures_are_never_counted_as_passed(tmp_path, monkeypatch):
    """By pytest itself: a class, a file that does not import, and names that pytest does not find again."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_class.py").write_text(
        "class TestIt:\n    def test_no(self):\n        assert 0\n    def test_yes(self):\n        pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    shop, log = SimpleNamespace(workers=1, tree=tmp_path), tmp_path / "log.txt"
    monkeypatch.setattr(matrix, "TESTS", ["tests"])
    no = "tests/test_class.py::TestIt::test_no"
    assert matrix.run_tests(sys.executable, shop, log) == ((1, 0, [no]), "")
    (tmp_path / "tests" / "test_import.py").write_text("import nothing_of_this_name\n")
    assert matrix.run_tests(sys.executable, shop, log)[0].failed == ["tests/test_import.py"]
    monkeypatch.setattr(matrix, "TESTS", ["tests/test_missing.py"])
    with pytest.raises(matrix.Unavailable, match=r"the tests did not run: .*test_missing"):
        matrix.run_tests(sys.executable, shop, log)


@pytest.mark.parametrize("given", ["/opt/py/bin/python3.14t", "3.14t=/no/such/python"])
def test_an_interpreter_is_named_with_its_path(capsys, given):
    with pytest.raises(SystemExit):
        matrix.main(["--only", "3", "--python", given])
    assert f"--python: got '{given}', needs NAME=PATH" in capsys.readouterr().err


def test_a_reason_names_no_folder(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("$ uv pip install\nerror: /home/me/build/x.whl has no wheel for this Python\nhint: none\n")
    assert matrix.reason(log) == "error: x.whl has no wheel for this Python"


def test_recorded_pairs_are_not_run_again(record, monkeypatch, capsys):
    first, second = matrix.PAIRS[:2]
    monkeypatch.setattr(matrix, "PAIRS", [first, second])
    monkeypatch.setattr(matrix, "Workshop", lambda folder, *_: SimpleNamespace(folder=folder))
    tried = []

    def try_pair(pair, shop):
        tried.append(pair)
        if pair == second and tried.count(second) == 1:
            raise matrix.Unavailable("no python3.10 on this machine")
        return {"passed": 3, "failed": 0, "note": ""}

    monkeypatch.setattr(matrix, "try_pair", try_pair)
    assert matrix.main([]) == 0
    assert matrix.load()["torch"]["rows"][second.key]["note"] == "not run: no python3.10 on this machine"
    matrix.main([])
    assert tried == [first, second]
    matrix.main(["--only", second.key])
    assert tried == [first, second, second]


def test_an_interpreter_of_another_version_is_not_taken(tmp_path):
    wrong = tmp_path / "python9.9"
    wrong.write_text("#!/bin/sh\necho 3 11 False\n")
    wrong.chmod(0o755)
    with pytest.raises(matrix.Unavailable, match=r"no python9\.9"):
        matrix.find_python("9.9", {"9.9": str(wrong)})


@pytest.mark.parametrize("name", ["linear_logprobs", "group_geometry"])
def test_a_bit_changes_the_hash(monkeypatch, name):
    bits = load_tool("op_bits")
    before = bits.digest()
    assert bits.digest() == before
    op = getattr(g2, name)

    def changed(*args, **options):
        found = op(*args, **options)
        last = found[-1].detach().clone()
        last[-1] = torch.nextafter(last[-1], torch.tensor(9.0))
        return found._replace(**{found._fields[-1]: last.requires_grad_(found[-1].requires_grad)})

    monkeypatch.setattr(g2, name, changed)
    assert bits.digest() != before
