"""Data sets in their own formats, multiple choice, and the errors for what cannot be read."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from g2rl_kernels.evaluation.datasets import HUB_DATASETS, load_data, load_specs
from g2rl_kernels.tasks.base import final_answer
from g2rl_kernels.tasks.choices import ChoiceTask, choice_letter
from g2rl_kernels.trainer import ConfigError, load_tasks

pytest.importorskip("math_verify", reason="needs math-verify: pip install 'g2rl-kernels[train]'")

GPQA = {
    "Record ID": "rec1",
    "Question": "Which particle is lightest?",
    "Correct Answer": "electron\n",
    "Incorrect Answer 1": "proton",
    "Incorrect Answer 2": "neutron",
    "Incorrect Answer 3": "muon",
    "Subdomain": "Physics",
}
MMLU_PRO = {
    "question_id": 70,
    "question": "Typical advertising regulatory bodies suggest ...",
    "options": [
        "Safe practices",
        "Fear",
        "Unsafe practices",
        "Wants",
        "Fun",
        "Joy",
        "Jealousy",
        "Envy",
        "I",
        "Trivial",
    ],
    "answer": "J",
    "answer_index": 9,
    "cot_content": "",
    "category": "business",
    "src": "ori_mmlu-business_ethics",
}
# name, rows as the hub has them, a right completion for the first, its answer, a wrong completion
FORMATS: list[tuple[str, dict[str, Any], str, str, str]] = [
    (
        "math500",
        {
            "problem": "Convert the point $(0,3)$ ...",
            "solution": "We have that ... $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        "so it is $\\boxed{(3, \\frac{\\pi}{2})}$",
        "(3, \\frac{\\pi}{2})",
        "$\\boxed{(3, \\pi)}$",
    ),
    (
        "amc23",
        {"id": 0, "question": "Cities A and B ...", "answer": "27.0", "url": "..."},
        "\\boxed{27}",
        "27",
        "28",
    ),
    (
        "aime24",
        {
            "id": 60,
            "problem": "Every morning ...",
            "solution": "...",
            "answer": "204",
            "url": "...",
            "year": "2024",
        },
        "Therefore \\boxed{204}.",
        "204",
        "\\boxed{203}",
    ),
    (
        "aime24",
        {"id": 60, "problem": "Every morning ...", "solution": "\\boxed{204}"},
        "\\boxed{204}",
        "204",
        "\\boxed{20}",
    ),
    (
        "aime25",
        {"problem": "Find the sum ...", "answer": "070", "id": "0"},
        "it is \\boxed{70}",
        "70",
        "\\boxed{7}",
    ),
    (
        "gsm8k",
        {"question": "Weng earns ...", "answer": "He earned $<<12*100=1200>>1200.\n#### 1,200"},
        "She earned \\boxed{1200} dollars",
        "1200",
        "\\boxed{12}",
    ),
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("name", "row", "right", "answer", "wrong"), FORMATS)
def test_formats_with_an_answer(tmp_path, name, row, right, answer, wrong):
    data = load_data(f"{name}={write(tmp_path / 'x.jsonl', [row, row])}", limit=1)
    assert (data.name, len(data)) == (name, 1)
    assert "{question}" in data.template
    assert "boxed" in data.template
    item = data.task[0]
    assert item["question"] == row.get("problem", row.get("question"))
    assert data.task.score(right, item) == 1
    assert data.task.score(wrong, item) == 0
    assert final_answer(data.task, right, item) == answer
    assert final_answer(data.task, "no idea", item) is None


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_gpqa(tmp_path, suffix):
    rows = [{**GPQA, "Question": f"Question {i}?"} for i in range(40)]
    task = load_data(f"gpqa={write(tmp_path / f'x{suffix}', rows)}").task
    letters = [item["letter"] for item in (task[i] for i in range(40))]
    assert set(letters) == set("ABCD")  # shuffled
    for i in range(40):
        item = task[i]
        assert item["question"].startswith(f"Question {i}?\n\nA. ")
        assert f"{letters[i]}. electron" in item["question"].splitlines()
        assert [task.score(f"\\boxed{{{letter}}}", item) for letter in "ABCD"].count(1) == 1
        assert task.score(f"The answer is ({letters[i]}).", item) == 1
    # the order depends on the question alone
    alone = load_data(f"gpqa={write(tmp_path / f'y{suffix}', rows[7:])}").task
    assert alone[0] == task[7]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_files_that_begin_with_a_byte_order_mark(tmp_path, suffix):
    row = {
        key: value for key, value in GPQA.items() if key != "Record ID"
    }  # the first field is one that is read
    path = Path(write(tmp_path / f"x{suffix}", [row]))
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    assert len(load_data(f"gpqa={path}")) == 1


def test_mmlu_pro(tmp_path):
    padded = {**MMLU_PRO, "options": ["yes", "N/A", "no", "N/A"], "answer": "C"}
    task = load_data(f"mmlu-pro={write(tmp_path / 'x.jsonl', [MMLU_PRO, padded])}").task
    assert "\nJ. Trivial" in task[0]["question"]
    assert task.score("The answer is (J).", task[0]) == 1
    assert task.score("The answer is (I).", task[0]) == 0
    assert task[1]["question"].endswith("\n\nA. yes\nB. no")
    assert task.score("\\boxed{B}", task[1]) == 1
    assert final_answer(task, "\\boxed{C}", task[1]) is None


@pytest.mark.parametrize("answer", ["", "BC", "K", "E", "b"])
def test_mmlu_pro_wants_one_of_its_letters(tmp_path, answer):
    row = {**MMLU_PRO, "options": ["w", "x", "y", "z"], "answer": answer}
    with pytest.raises(ConfigError, match=f"item 1: answer='{answer}' is not a letter of its 4 opt"):
        load_data(f"mmlu_pro={write(tmp_path / 'x.jsonl', [row])}")


def test_a_long_field_of_a_csv(tmp_path):
    row = {"problem": "x" * 200_000, "answer": "1"}
    assert load_data(f"math500={write(tmp_path / 'x.csv', [row])}").task[0]["question"] == row["problem"]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_a_file_in_another_encoding(tmp_path, suffix):
    file = tmp_path / f"x.{suffix}"
    file.write_bytes('problem,answer\n"{caf\xe9",1\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=re.escape(f"{file} is not UTF-8 (byte 20): save it as UTF-8")):
        load_data(f"math500={file}")


def test_a_damaged_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"hello")
    with pytest.raises(ConfigError, match=r"x\.parquet is not a Parquet file: "):
        load_data(f"math500={tmp_path / 'x.parquet'}")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([MMLU_PRO]), tmp_path / "x.parquet")
    assert load_data(f"mmlu_pro={tmp_path / 'x.parquet'}").task[0]["letter"] == "J"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("so \\boxed{B}", "B"),
        ("\\boxed{\\text{(C)}}", "C"),
        ("\\boxed{B. Paris}", "B"),
        ("\\boxed{A} is wrong, hence \\boxed{D}", "D"),
        ("The answer is A? No: the answer is (B).", "B"),
        ("the final answer is: **C**", "C"),
        ("**Answer:** B", "B"),
        ("Answer: $\\text{B}$", "B"),
        ("The correct option is C because of that.", "C"),
        ("\\boxed{42}, so the answer is A", "A"),
        ("I think\n\nB\n", "B"),
        ("B) Paris", "B"),
        ("The answer is a number.", None),
        ("A cat sat on a mat", None),
        ("Because", None),
        ("\\boxed{Both}", None),
        ("The answer is E.", None),  # of four options
        ("", None),
    ],
)
def test_letters(text, letter):
    assert choice_letter(text, 4) == letter


def test_the_trainer_takes_multiple_choice_too(tmp_path):
    rows = [
        {"q": "?", "options": ["x", "y"], "gold": "B"},
        {"q": "?", "options": ["x", "y"], "gold": 0},
        {"q": "?", "options": ["x", "y"], "gold": "y"},
    ]
    spec = {"kind": "jsonl", "path": write(tmp_path / "x.jsonl", rows), "question": "q", "answer": "gold"}
    (task,) = load_tasks([{**spec, "choices": "options"}])
    assert isinstance(task, ChoiceTask)
    assert [task[i]["letter"] for i in range(3)] == ["B", "A", "B"]
    with pytest.raises(ConfigError, match=r"item 1: gold='C' is not one of its 2 options"):
        ChoiceTask([{**rows[0], "gold": "C"}], "here", "q", "gold", "options")
    with pytest.raises(ConfigError, match="no field 'choices'"):
        ChoiceTask(rows, "here", "q", "gold")


def test_other_tasks():
    pytest.importorskip("reasoning_gym")
    one = load_data("reasoning_gym:chain_sum", limit=3)
    assert (one.name, len(one), one.template) == ("chain_sum", 3, None)
    spec = {"kind": "reasoning_gym", "name": "chain_sum", "size": 5}
    task = load_tasks([spec])[0]
    assert load_data(f"sums={json.dumps(spec)}").items() == [task[i] for i in range(5)]
    assert [data.name for data in load_specs([spec, spec])] == ["chain_sum", "chain_sum-2"]


def test_errors_name_the_remedy(tmp_path, monkeypatch):
    for spec, message in (
        ("math50", "did you mean 'math500'"),
        ("zebra", "choose one of math500"),
        (f"math500={tmp_path / 'none.jsonl'}", "none.jsonl: No such file"),
        (
            f"math500={write(tmp_path / 'a.jsonl', [GPQA])}",
            "item 1: no field 'problem or Problem or question'",
        ),
        (f"gpqa={write(tmp_path / 'b.jsonl', [MMLU_PRO])}", "expected rows of Idavidrein/gpqa"),
        ("x={kind: jsonl", "not a mapping"),
        ("reasoning_gym:chain_su", "did you mean 'chain_sum'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_data(spec)
    with pytest.raises(ConfigError, match="limit=0"):
        load_data("math500", limit=0)
    with pytest.raises(ConfigError, match="limit=-3: must be at least 1"):
        load_specs([{"kind": "reasoning_gym", "name": "chain_sum"}], limit=-3)


def test_without_a_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args: Any, **keys: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in HUB_DATASETS:
        with pytest.raises(ConfigError, match=f"--data {name}=FILE.jsonl"):
            load_data(name)


def test_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(path: str, config: str | None, split: str) -> list[Any]:
        asked.append((path, config, split))
        return [GPQA]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_data("gpqa")) == 1
    assert asked == [("Idavidrein/gpqa", "gpqa_diamond", "train")]
