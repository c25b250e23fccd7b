"""Rows of files and data sets: each value is used as what it is, or an error names its item and field."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from g2rl_kernels.tasks.base import digest, fingerprint, item_of, question_text
from g2rl_kernels.tasks.choices import ChoiceTask
from g2rl_kernels.tasks.sources import load_task
from g2rl_kernels.trainer import ConfigError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
GOOD = {"question": "?", "answer": "1"}
OPTIONS = ["x", "y", "z", "w"]


def load(path: Path, rows: list[Any], **keys: Any) -> Any:
    (path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task({"kind": "jsonl", "path": str(path / "x.jsonl"), **keys})


def letters(rows: list[dict[str, Any]]) -> list[str]:
    return [item["letter"] for item in ChoiceTask([{"question": "?", **row} for row in rows], "here").rows]


# --- questions and answers ---------------------------------------------------------------------------------


def test_texts_messages_and_numbers_are_kept_as_they_are(tmp_path: Path) -> None:
    rows = [
        GOOD,
        {"question": CHAT, "answer": 0.00001, "level": None},
        {"question": [CHAT[1]], "answer": 10**17},
    ]
    task = load(tmp_path, rows)
    assert [task[place] for place in range(3)] == rows
    assert [item_of(task, place)["question"] for place in range(3)] == [row["question"] for row in rows]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": None}, "question=None: needs a text or a list of messages"),
        ({"question": 3}, "question=3: needs a text or a list of messages"),
        ({"question": True}, "question=True: needs a text or a list of messages"),
        ({"question": {"text": "?"}}, "question={'text': '?'}: needs a text or a list of messages"),
        ({"question": ""}, "question='': needs a text or a list of messages"),
        ({"question": " \n"}, r"question=' \n': needs a text or a list of messages"),
        ({"question": []}, "question=[]: needs at least one message"),
        ({"question": "x\ud83d?"}, "question: character 2 is '\\ud83d', half of a surrogate pair: write the"),
        (
            {"question": [{"role": "user", "content": "\udc00"}]},
            "question[0]: content: character 1 is '\\udc00', half of a surrogate pair",
        ),
        ({"question": ["?"]}, "question[0]='?': needs a message, {'role': ..., 'content': ...}"),
        ({"question": [*CHAT, {"role": "user"}]}, "question[2]: content=None: needs a text"),
        ({"question": [{"role": None, "content": "?"}]}, "question[0]: role=None: needs a text"),
        (
            {"question": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]},
            "question[0]: content=[{'type': 'text', 'text': '?'}]: needs a text",
        ),
        ({"question": [{"role": "user", "content": ""}]}, "question[0]: content='': needs a text"),
        ({"question": [*CHAT, {"role": "assistant", "content": "2"}]}, "question[2] is the assistant's"),
        ({"answer": None}, "answer=None: needs a text or a number"),
        ({"answer": ""}, "answer='': needs a text or a number"),
        ({"answer": True}, "answer=True: needs a text or a number"),
        ({"answer": ["1", "2"]}, "answer=['1', '2']: needs a text or a number"),
        ({"answer": {"value": 1}}, "answer={'value': 1}: needs a text or a number"),
        ({"answer": float("nan")}, "answer=nan: needs a text or a number"),
        ({"answer": float("-inf")}, "answer=-inf: needs a text or a number"),
    ],
)
def test_wrong_values_name_item_and_field(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"x.jsonl, item 3: {message}")) as caught:
        load(tmp_path, [GOOD, GOOD, {**GOOD, **row}])
    assert "\n" not in str(caught.value)


def test_the_name_of_the_field_is_the_file_s(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="item 1: solution=None: needs a text or a number"):
        load(tmp_path, [{"problem": "?", "solution": None}], question="problem", answer="solution")


def test_a_user_s_function_gets_any_answer(tmp_path: Path) -> None:
    rows = [{"question": "?", "answer": None}, {"question": "?", "answer": {"tests": [1]}}, {"question": "?"}]
    task = load(tmp_path, rows, score="operator:eq")
    assert [task[place] for place in range(3)] == rows


# --- options -----------------------------------------------------------------------------------------------


def test_answers_by_letter_index_text_and_label() -> None:
    arc = {"text": OPTIONS, "label": ["1", "2", "3", "4"]}
    assert letters([{"choices": OPTIONS, "answer": answer} for answer in ("B", " B ", 1, "y")]) == ["B"] * 4
    assert letters([{"choices": arc, "answer": answer} for answer in ("2", 2, "y")]) == ["B"] * 3
    swapped = {"text": OPTIONS, "label": ["D", "C", "B", "A"]}
    assert letters([{"choices": swapped, "answer": answer} for answer in ("A", "C")]) == ["D", "B"]
    numbers = {"text": ["4", "2", "1", "3"], "label": [1, 2, 3, 4]}
    assert letters([{"choices": numbers, "answer": answer} for answer in (1, "4")]) == ["A", "D"]
    five = {"text": [*OPTIONS, "v"], "label": list("ABCDE")}
    assert letters([{"choices": five, "answer": "E"}]) == ["E"]


def test_arc_as_the_hub_has_it(tmp_path: Path) -> None:
    row = {
        "id": "Mercury_7175875",
        "question": "Which is most likely?",
        "choices": {
            "text": ["Density decreases.", "Years are longer.", "Days are shorter."],
            "label": ["A", "B", "C"],
        },
        "answerKey": "C",
    }
    task = load(tmp_path, [row], choices="choices", answer="answerKey")
    assert task[0]["question"].endswith(
        "\n\nA. Density decreases.\nB. Years are longer.\nC. Days are shorter."
    )
    assert [task.score(text, task[0]) for text in ("Answer: C", "Days are shorter.", "\\boxed{B}")] == [
        1,
        1,
        0,
    ]


def test_equal_options_are_one_answer() -> None:
    row = {"question": "?", "choices": ["x", "y", "x ", "z"], "answer": "C"}
    task = ChoiceTask([row, {**row, "answer": 2}, {**row, "answer": "x"}], "here")
    for item in task.rows:
        assert item["letter"] == "A"
        assert [task.score(f"\\boxed{{{letter}}}", item) for letter in "ABCD"] == [1, 0, 1, 0]
    assert task.answer("Answer: C", task[0]) == task.answer("Answer: A", task[0])  # one vote


def test_options_stand_below_the_last_message(tmp_path: Path) -> None:
    task = load(tmp_path, [{"question": CHAT, "choices": ["1", "2"], "answer": "B"}], choices="choices")
    assert task[0]["question"] == [CHAT[0], {"role": "user", "content": "1 + 1?\n\nA. 1\nB. 2"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": None}, "choices=None: needs a list of texts, or {'text': [...], 'label': [...]}"),
        ({"choices": "x,y"}, "choices='x,y': needs a list of texts, or"),
        ({"choices": {"text": OPTIONS}}, "needs a list of texts, or {'text': [...], 'label': [...]}"),
        ({"choices": {"A": "x", "B": "y"}}, "needs a list of texts, or {'text': [...], 'label': [...]}"),
        ({"choices": [1, 2, 3]}, "choices[0]=1: needs a text: options are texts, in quotes"),
        ({"choices": ["x", None]}, "choices[1]=None: needs a text"),
        ({"choices": ["x", ""]}, "choices[1]='': needs a text"),
        ({"choices": ["x", "y\ud83d"]}, "choices[1]: character 2 is '\\ud83d', half of a surrogate pair"),
        ({"choices": ["x", ["y"]]}, "choices[1]=['y']: needs a text"),
        ({"choices": ["x", True]}, "choices[1]=True: needs a text"),
        ({"choices": []}, "choices has 0 options: needs 2 to 26"),
        ({"choices": ["x"]}, "choices has 1 options: needs 2 to 26"),
        ({"choices": [f"o{i}" for i in range(27)]}, "choices has 27 options: needs 2 to 26"),
        ({"choices": {"text": OPTIONS, "label": ["A", "B"]}}, "needs 4 different texts or numbers"),
        ({"choices": {"text": OPTIONS, "label": list("ABBD")}}, "needs 4 different texts or numbers"),
        ({"choices": {"text": OPTIONS, "label": [1, 2, 3, None]}}, "needs 4 different texts or numbers"),
        ({"answer": None}, "answer=None is not one of its 4 options: needs the letter, the index from 0"),
        ({"answer": True}, "answer=True is not one of its 4 options"),
        ({"answer": 4}, "answer=4 is not one of its 4 options"),
        ({"answer": -1}, "answer=-1 is not one of its 4 options"),
        ({"answer": 1.0}, "answer=1.0 is not one of its 4 options"),
        ({"answer": float("nan")}, "answer=nan is not one of its 4 options"),
        ({"answer": ["B"]}, "answer=['B'] is not one of its 4 options"),
        ({"answer": ""}, "answer='' is not one of its 4 options"),
        ({"answer": "E"}, "answer='E' is not one of its 4 options"),
        ({"answer": "1"}, "answer='1' is not one of its 4 options"),
        (
            {"choices": ["1", "2", "3", "4"], "answer": 2},
            "answer=2 may be option B and C, by its place or by",
        ),
        ({"choices": ["B", "A", "C", "D"], "answer": "A"}, "answer='A' may be option A and B"),
        (
            {"choices": {"text": OPTIONS, "label": ["1", "2", "3", "4"]}, "answer": 0},
            "answer=0 is not one of its 4 options: needs the label or the text",
        ),
        ({"question": None}, "question=None: needs a text or a list of messages"),
    ],
)
def test_wrong_options_name_item_and_field(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"question": "?", "choices": OPTIONS, "answer": "A"}
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(tmp_path, [good, {**good, **row}], choices="choices")
    assert "x.jsonl, item 2: " in str(caught.value)
    assert "\n" not in str(caught.value)


# --- text forms and fingerprints ---------------------------------------------------------------------------


def test_a_question_as_text_tells_questions_apart() -> None:
    assert question_text("1 + 1?") == "1 + 1?"
    assert json.loads(question_text(CHAT)) == CHAT
    turned = [dict(reversed(message.items())) for message in CHAT]
    assert question_text(turned) == question_text(CHAT)  # as other programs order the fields
    others = [
        CHAT[::-1],
        CHAT[:1],
        [{**CHAT[0], "name": "x"}, CHAT[1]],
        [{"role": "user", "content": "system: x"}],
    ]
    assert len({question_text(one) for one in [CHAT, *others]}) == 5


def test_fingerprints_change_with_what_is_used(tmp_path: Path) -> None:
    def of(*rows: dict[str, Any], **keys: Any) -> dict[str, Any]:
        return fingerprint(load(tmp_path, list(rows), **keys))

    base = of(GOOD, GOOD)
    assert base == of(dict(reversed(GOOD.items())), GOOD)
    changed = [
        of(GOOD),
        of(GOOD, {**GOOD, "answer": 1}),
        of(GOOD, {**GOOD, "question": "!"}),
        of(GOOD, {**GOOD, "question": [CHAT[1]]}),
    ]
    assert len({json.dumps(one) for one in [base, *changed]}) == 5
    choice = {"question": "?", "choices": OPTIONS, "answer": "B"}
    assert of(choice, choices="choices") == of({**choice, "answer": 1}, choices="choices")
    assert of(choice, choices="choices") != of({**choice, "answer": 2}, choices="choices")


def test_the_digest_is_that_of_earlier_samples() -> None:
    """samples.json of earlier runs holds it."""
    for items in ([], [{"b": 1, "a": "é"}], [{"b": 1, "a": "é"}, {"c": None}, {"path": Path("x")}]):
        whole = json.dumps(items, sort_keys=True, default=str)
        assert digest(iter(items)) == hashlib.sha256(whole.encode()).hexdigest()[:16]


def test_fingerprints_of_computed_items() -> None:
    class Task:
        first, read = "1 + 1", 0

        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.read += 1
            return {"question": self.first, "grid": object()}

        def score(self, completion: str, item: dict[str, Any]) -> float:
            return 0.0

    task = Task()
    assert fingerprint(task) == fingerprint(Task())
    assert task.read == 2  # items may be expensive
    other = Task()
    other.first = "1 + 2"
    assert fingerprint(other) != fingerprint(task)

    class Changing(Task):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"question": str(len(seen)), "seen": seen.append(1)}

    seen: list[int] = []
    assert fingerprint(Changing()) == fingerprint(Changing())  # the number of items alone

    class Own(Changing):
        def fingerprint(self) -> str:
            return "version 3"

    assert fingerprint(Own()) == fingerprint(Own()) != fingerprint(Changing())
