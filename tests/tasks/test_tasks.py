from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from g2rl_kernels.tasks.answers import EXTRACTORS
from g2rl_kernels.tasks.base import final_answer, score_completion
from g2rl_kernels.tasks.sources import load_task, read_jsonl
from g2rl_kernels.trainer import ConfigError, RewardError, load_tasks

CHAIN_SUM = {
    "kind": "reasoning_gym",
    "name": "chain_sum",
    "size": 20,
    "cfg": {"max_terms": 2, "max_digits": 1, "min_digits": 1},
}


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("all", "  4 \n", "4"),
        ("boxed", r"first \boxed{1}, so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"never closed \boxed{\frac{1}{2}", ""),
        ("boxed", "no box", ""),
        ("answer_tag", "<answer>3</answer> no, <answer> 4\n</answer>", "4"),
        ("answer_tag", "<answer>3", ""),
        ("last_number", "3 + 4 = 7.", "7"),
        ("last_number", "it is -1,024.5 in all", "-1024.5"),
        ("last_number", "none", ""),
        ("last_number", "The roots are 2,3", "3"),
        ("last_number", "(1,2)", "2"),
        ("last_number", "x = −3", "-3"),
        ("last_number", ".5", "0.5"),
        ("last_number", "10-3", "3"),
        ("last_number", "10 - 3", "3"),
        ("last_number", "- 4", "4"),
        ("last_number", "from 5–10", "10"),
        ("last_number", "-$5", "-5"),
        ("last_number", r"1{,}024 or 1\,024", "1024"),
        ("last_number", "3.0e-7", "3.0e-7"),
        ("last_number", "version 1.2.3", "3"),
        ("last_number", "12 %", "12"),
    ],
)
def test_extract(name: str, text: str, answer: str) -> None:
    assert EXTRACTORS[name](text) == answer


def test_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    task = load_task({**CHAIN_SUM, "extract": "last_number"})
    assert len(task) == 20
    item = task[3]
    assert item == load_task({**CHAIN_SUM, "extract": "last_number"})[3]  # the seed decides
    assert task.score(f"The answer is {item['answer']}.", item) == 1
    assert task.score(f"The answer is {int(item['answer']) + 1}.", item) < 0.99
    assert task.score("", item) < 0.99


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        ("3/4", r"so it is \boxed{0.75}", True),
        ("3/4", r"so it is \boxed{0.74}", False),
        ("1,024", r"\boxed{1024}", True),
        (r"We see that \boxed{\frac{\sqrt{2}}{2}}.", r"Hence \boxed{\frac{1}{\sqrt{2}}}", True),
        ("5", "", False),
        ("5", r"\boxed{", False),
    ],
)
def test_jsonl_with_math_verify(tmp_path: Path, gold: str, completion: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    path = write_jsonl(tmp_path / "x.jsonl", [{"problem": "?", "solution": gold}])
    task = load_task({"kind": "jsonl", "path": path, "question": "problem", "answer": "solution"})
    assert task[0]["question"] == "?"
    assert task.score(completion, task[0]) == float(right)


@pytest.mark.parametrize(
    ("gold", "completion", "answer"),
    [
        ("3/4", r"so it is \boxed{0.75}", "3/4"),
        ("3/4", r"so it is \boxed{\frac{3}{4}}", "3/4"),  # the same text for the same number
        ("5", r"\boxed{7} or \boxed{6}", "6, 7"),  # one answer of two values, in any order
        ("5", "I do not know.", None),
        ("5", "", None),
    ],
)
def test_answers_of_mathematics(tmp_path: Path, gold: str, completion: str, answer: str | None) -> None:
    pytest.importorskip("math_verify")
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "?", "answer": gold}])
    task = load_task({"kind": "jsonl", "path": path})
    assert final_answer(task, completion, task[0]) == answer


def test_answers_of_other_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "?", "answer": "b"}])
    spec = {"kind": "jsonl", "path": path, "score": "test_tasks:ends_with", "extract": "answer_tag"}
    task = load_task(spec)
    assert final_answer(task, "so <answer> b </answer>", task[0]) == "b"
    assert final_answer(task, "so b", task[0]) is None

    class WithoutAnswers:
        pass

    assert final_answer(WithoutAnswers(), " 4\n", {}) == "4"  # type: ignore[arg-type]
    assert final_answer(WithoutAnswers(), " \n", {}) is None  # type: ignore[arg-type]


def test_answers_of_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    task = load_task({**CHAIN_SUM, "extract": "last_number"})
    assert final_answer(task, "1 + 2 = 3.", task[0]) == "3"
    assert final_answer(task, "none", task[0]) is None


def ends_with(completion: str, item: dict[str, Any]) -> float:
    return float(completion.endswith(item["answer"]))


def make(level: int) -> Any:
    return load_task({**CHAIN_SUM, "size": level})


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "?", "answer": "b"}])
    task = load_task({"kind": "jsonl", "path": path, "score": "test_tasks:ends_with"})
    assert [task.score(text, task[0]) for text in ("ab", "ba")] == [1, 0]
    assert len(load_task({"kind": "python", "function": "test_tasks:make", "args": {"level": 3}})) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "gsm8k"}, "needs kind: one of"),
        ({**CHAIN_SUM, "nam": 1}, "unknown key 'nam'; did you mean 'name'?"),
        ({**CHAIN_SUM, "name": "chainsum"}, "did you mean 'chain_sum'?"),
        ({**CHAIN_SUM, "cfg": {"max_term": 3}}, "unexpected keyword argument 'max_term'"),
        ({**CHAIN_SUM, "extract": "box"}, "extract='box': choose one of"),
        ({"kind": "reasoning_gym"}, "missing 1 required positional argument: 'name'"),
        ({"kind": "jsonl", "path": "nowhere.jsonl"}, "nowhere.jsonl: No such file"),
        ({"kind": "python", "function": "os.path"}, "expected module:function"),
        ({"kind": "python", "function": "os.path:nothing"}, "cannot import os.path:nothing"),
        ({"kind": "python", "function": "builtins:object"}, "returned a object without __len__"),
    ],
)
def test_wrong_specs_are_one_line(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_task(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no items"),
        ('{"question": "a"}\n{', "line 2 is not JSON"),
        ("[1]", "item 1: expected an object, got a list"),
        ('{"q": "a", "answer": 1}', "item 1: no field 'question', only q, answer"),
        ('{"question": "a"}', "item 1: no field 'answer'"),
    ],
)
def test_wrong_jsonl(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_task({"kind": "jsonl", "path": str(tmp_path / "x.jsonl")})


def test_jsonl_as_editors_and_other_programs_write_it(tmp_path: Path) -> None:
    rows = [{"question": f"a{mark}b", "answer": "1"} for mark in ("\u2028", "\u2029", "\x85", " ")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "x.jsonl").write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:]]).encode())
    assert read_jsonl(str(tmp_path / "x.jsonl")) == rows


def test_jsonl_in_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"x\.jsonl is not UTF-8 \(byte 14\): save it as UTF-8"):
        read_jsonl(str(tmp_path / "x.jsonl"))


def test_no_tasks() -> None:
    with pytest.raises(ConfigError, match="tasks: none given"):
        load_tasks([])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many", None, ZeroDivisionError("by zero")])
def test_bad_scores_name_the_prompt(value: Any) -> None:
    class Broken:
        def score(self, completion: str, item: dict[str, Any]) -> float:
            if isinstance(value, Exception):
                raise value
            return value

    with pytest.raises(RewardError, match="What is 2 - 2"):
        score_completion(Broken(), "four", {"question": "What is 2 - 2?"})  # type: ignore[arg-type]
