"""Questions that are messages in `g2rl eval`, and rows of hub data sets with wrong or unusual values."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import LetterTask, make_model, make_tokenizer

from g2rl_kernels.evaluation.datasets import load_data
from g2rl_kernels.evaluation.engines import Decoding, TransformersEngine
from g2rl_kernels.evaluation.results import check_questions
from g2rl_kernels.evaluation.samples import DataSet, Settings, prompt_tokens, read_samples, sample, verify
from g2rl_kernels.trainer import ConfigError, TrainerConfig

CHAT = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
SETTINGS = Settings(
    TrainerConfig.from_dict({"max_new_tokens": 4, "max_prompt_tokens": 32}), Decoding(n=2), batch_size=4
)


class Chats(LetterTask):
    """Conversations that end in `last`."""

    def __init__(self, last: str = "2+2"):
        self.last = last

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": [*CHAT, {"role": "user", "content": f"{self.last}+{index}"}]}


def engine(
    template: str | None = "{% for m in messages %}{{ m['content'] }} {% endfor %}b=",
) -> TransformersEngine:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return TransformersEngine(make_model(), tokenizer, SETTINGS.config, SETTINGS.decoding)


def test_messages_from_samples_to_comparison(tmp_path: Path) -> None:
    data, model = DataSet("chats", "here", Chats()), engine()
    rows = sample([data], SETTINGS, tmp_path, model)
    assert rows == read_samples(tmp_path)
    for row in rows:
        place = int(row["problem"][-1])
        assert json.loads(row["question"]) == Chats()[place]["question"]
        assert row["prompt"] == f"1+1 2 2+2+{place} b="
        assert prompt_tokens(row, model.tokenizer) == model.tokenizer(row["prompt"])["input_ids"]
    before = (tmp_path / "samples.jsonl").read_bytes()
    assert sample([data], SETTINGS, tmp_path, engine()) == rows  # resumed: nothing to do
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert verify(rows, [data]) == rows
    check_questions(rows, rows, "a", "b")
    other = DataSet("chats", "here", Chats("2+3"))
    with pytest.raises(ConfigError, match="problem chats/0 is another one in here"):
        verify(rows, [other])
    with pytest.raises(ConfigError, match="choose another --out"):
        sample([other], SETTINGS, tmp_path, engine())
    theirs = sample([other], SETTINGS, tmp_path / "other", engine())
    with pytest.raises(ConfigError, match="chats/0 is another problem in a than in b"):
        check_questions(rows, theirs, "a", "b")


def test_messages_without_a_chat_template_name_the_problem(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="problem chats/0: question: it is a list of messages, but the tokeni"
    ):
        sample([DataSet("chats", "here", Chats())], SETTINGS, tmp_path, engine(None))


# --- rows of hub data sets ---------------------------------------------------------------------------------

ROWS: dict[str, dict[str, Any]] = {
    "math500": {"problem": "1 + 1?", "solution": "so \\boxed{2}", "answer": "2"},
    "gsm8k": {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
    "gpqa": {
        "Question": "Lightest?",
        "Correct Answer": "electron",
        **{f"Incorrect Answer {i}": text for i, text in enumerate(("proton", "neutron", "muon"), 1)},
    },
    "mmlu_pro": {"question": "Which?", "options": ["w", "x", "y", "z"], "answer": "C"},
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("name", "field", "needs"),
    [
        ("math500", "problem", "needs a text or a list of messages"),
        ("math500", "answer", "needs a text or a number"),
        ("gsm8k", "question", "needs a text"),
        ("gsm8k", "answer", "needs a text"),
        ("gpqa", "Question", "needs a text"),
        ("gpqa", "Correct Answer", "needs a text"),
        ("gpqa", "Incorrect Answer 2", "needs a text"),
        ("mmlu_pro", "question", "needs a text"),
        ("mmlu_pro", "options", "needs a list of texts"),
        ("mmlu_pro", "answer", "is not a letter of its 4 options"),
    ],
)
def test_null_is_an_error_with_item_and_field(tmp_path, suffix, name, field, needs):
    row = ROWS[name]
    if suffix == ".csv":
        row = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
    file = write(tmp_path / f"x{suffix}", [row, row, {**row, field: None}])
    null = "''" if suffix == ".csv" else "None"  # as CSV writes it
    with pytest.raises(
        ConfigError, match=re.escape(f"item 3: {field}={null}") + ".*" + re.escape(needs)
    ) as caught:
        load_data(f"{name}={file}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("math500", {"answer": True}, "answer=True: needs a text or a number"),
        ("math500", {"answer": ["2"]}, "answer=['2']: needs a text or a number"),
        ("math500", {"problem": 3}, "problem=3: needs a text or a list of messages"),
        ("gsm8k", {"answer": "so\n####  "}, "answer='': needs a text or a number"),
        ("gpqa", {"Incorrect Answer 1": 3.5}, "Incorrect Answer 1=3.5: needs a text"),
        ("mmlu_pro", {"options": "['w' 'x']"}, "options=\"['w' 'x']\": needs a list of texts"),
        ("mmlu_pro", {"options": ["w", 1, "y"]}, "options[1]=1: needs a text"),
        ("mmlu_pro", {"answer": 2}, "answer=2 is not a letter of its 4 options"),
    ],
)
def test_other_values_are_errors(tmp_path, name, row, message):
    file = write(tmp_path / "x.jsonl", [ROWS[name], {**ROWS[name], **row}])
    with pytest.raises(ConfigError, match=re.escape(f"item 2: {message}")):
        load_data(f"{name}={file}")


def test_rows_that_are_no_objects(tmp_path):
    (tmp_path / "x.jsonl").write_text("[1]\n")
    with pytest.raises(ConfigError, match=r"item 1: row=\[1\]: needs an object: expected rows of"):
        load_data(f"gpqa={tmp_path / 'x.jsonl'}")
    (tmp_path / "x.csv").write_text("problem,answer\n1 + 1?,2\nWhat, then?,2\n")
    with pytest.raises(ConfigError, match=r"item 2: row=.*: needs as many values as the header has names"):
        load_data(f"math500={tmp_path / 'x.csv'}")
    (tmp_path / "x.csv").write_text("problem,answer\n1 + 1?\n")
    with pytest.raises(ConfigError, match="item 1: answer=None: needs a text or a number"):
        load_data(f"math500={tmp_path / 'x.csv'}")


def test_numbers_and_messages_stay_what_they_are(tmp_path):
    rows = [{"problem": "?", "answer": 0.00001}, {"problem": [CHAT[0]], "answer": 2}]
    task = load_data(f"math500={write(tmp_path / 'x.jsonl', rows)}").task
    assert [task[i]["answer"] for i in range(2)] == [0.00001, 2]
    assert task[1]["question"] == [CHAT[0]]


def test_options_that_look_like_places(tmp_path):
    """The right option is known by its place: texts that are numbers or letters do not disturb."""
    row = {**ROWS["mmlu_pro"], "options": ["2", "3", "0", "1"], "answer": "D"}
    letters = {**row, "options": ["D", "C", "B", "A"]}
    task = load_data(f"mmlu_pro={write(tmp_path / 'x.jsonl', [row, letters])}").task
    assert [task[i]["letter"] for i in range(2)] == ["D", "D"]
    digits = {key: str(place) for place, key in enumerate(list(ROWS["gpqa"])[1:])}
    gpqa = load_data(f"gpqa={write(tmp_path / 'y.jsonl', [{**ROWS['gpqa'], **digits}])}").task
    (item,) = gpqa.rows
    assert item["choices"]["ABCD".index(item["letter"])] == "0"
