"""reasoning-gym: the same items in every process, no partial credit, errors, constant answers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_trainer

from g2rl_kernels.evaluation.datasets import load_data
from g2rl_kernels.group.options import SCORE_GATE
from g2rl_kernels.tasks import Item, processes
from g2rl_kernels.tasks.gym import process as gym_process
from g2rl_kernels.tasks.gym.judge import MOST_PARTIAL_CREDIT, GymJudge, GymSpec
from g2rl_kernels.tasks.gym.maker import PROBES, Probed
from g2rl_kernels.tasks.procedural import ReasoningGymTask, constant_answer
from g2rl_kernels.tasks.verify import unify, verify
from g2rl_kernels.trainer import ConfigError, TrainerError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym"),
    pytest.mark.filterwarnings("ignore:task. reasoning-gym:UserWarning"),  # of constant answers
]

# They depend on PYTHONHASHSEED, or draw from the global generator too, or depend on the size.
UNSTABLE = (
    "isomorphic_strings",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
    "knight_swap",
    "intermediate_integration",
    "list_functions",
    "codeio",
    "acre",
)
DIGESTS = """
import hashlib, pickle, sys, warnings
warnings.simplefilter("ignore")
from g2rl_kernels.tasks import load_task
for name in sys.argv[1:]:
    task = load_task({"kind": "reasoning_gym", "name": name, "size": 5, "seed": 9})
    items = [task[index] for index in (4, 0, 3)]  # in another order than the other process
    print(name, hashlib.sha256(repr([items[1], items[2], items[0]]).encode()).hexdigest())
"""


def digest(items: list[Item]) -> str:
    return hashlib.sha256(repr(items).encode()).hexdigest()


def forget(task: ReasoningGymTask) -> None:
    """The task's items are made again when they are read."""
    task._items.clear()


def run(program: str, *arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_items_are_the_same_in_every_process() -> None:
    tasks = {name: ReasoningGymTask(name, size=5, seed=9) for name in UNSTABLE}
    here = {name: digest([task[0], task[3], task[4]]) for name, task in tasks.items()}
    said = run(DIGESTS, *UNSTABLE, hash_seed="1")
    assert dict(line.split() for line in said.stdout.splitlines()) == here, said.stderr
    for name, task in tasks.items():
        forget(task)
        assert digest([task[4], task[3], task[0]][::-1]) == here[name], name  # read twice


def test_items_differ_between_seeds_and_indices() -> None:
    one, other = (ReasoningGymTask("list_functions", size=5, seed=seed) for seed in (0, 1))
    texts = {item["question"] for task in (one, other) for item in (task[i] for i in range(5))}
    assert len(texts) == 10


def test_items_cannot_be_changed_by_their_reader() -> None:
    task = ReasoningGymTask("chain_sum", size=3)
    item = task[0]
    item["metadata"].clear()
    item["answer"] = "?"
    assert task[0]["answer"] != "?"
    assert task[0]["metadata"]


def test_fingerprint() -> None:
    """What the trainer compares when it resumes."""
    task = ReasoningGymTask("ransom_note", size=5, seed=7)
    assert task.fingerprint() == ReasoningGymTask("ransom_note", size=5, seed=7).fingerprint()
    assert task.fingerprint() != ReasoningGymTask("ransom_note", size=5, seed=8).fingerprint()


def test_indices() -> None:
    task = ReasoningGymTask("chain_sum", size=3)
    assert len(list(task)) == len(task) == 3  # type: ignore[call-overload]
    assert task[-1] == task[2]
    with pytest.raises(IndexError):
        task[3]


def test_random_state_of_this_process_is_left_alone() -> None:
    import numpy

    before = random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    task = ReasoningGymTask("pool_matrix", size=3)  # seeds numpy's global generator
    assert task.score(task[1]["answer"], task[1]) == 1
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before  # type: ignore[index]


def test_a_user_s_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from g2rl_kernels.tasks import load_task\n"
        "task = load_task({'kind': 'reasoning_gym', 'name': 'gcd', 'size': 2})\n"
        "print('once', task.score(task[0]['answer'], task[0]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run([sys.executable, script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout == "once 1.0\n", said.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_threads() -> None:
    task, found = ReasoningGymTask("gcd", size=64), dict[int, Item]()
    threads = [
        threading.Thread(target=lambda first=first: found.update({i: task[i] for i in range(first, 64, 8)}))
        for first in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = ReasoningGymTask("gcd", size=64)
    assert found == {index: again[index] for index in range(64)}


def _question(task: ReasoningGymTask) -> str:
    question: str = task[1]["question"]
    return question


def test_forked_and_pickled_tasks() -> None:
    task = ReasoningGymTask("gcd", size=3)
    assert pickle.loads(pickle.dumps(task))[1] == task[1]
    task = ReasoningGymTask("gcd", size=3)
    with get_context("fork").Pool(1) as pool:
        there = pool.apply(_question, (task,))
    assert there == task[1]["question"]


def test_process_that_dies_is_replaced() -> None:
    task = ReasoningGymTask("list_functions", size=20)
    first = [task[index] for index in range(3)]
    for _ in range(2):
        process = gym_process.process._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        forget(task)
        assert [task[index] for index in range(3)] == first


def test_process_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_BOOT", "raise SystemError('no interpreter')")
    monkeypatch.setattr(gym_process, "process", gym_process.GymProcess())
    with pytest.raises(
        TrainerError, match=r"gcd: cfg {}: .* ended twice \(exit code 1: SystemError: no inter"
    ):
        ReasoningGymTask("gcd")


def test_process_ends_with_this_one() -> None:
    program = (
        "import os, signal\nfrom g2rl_kernels.tasks import load_task\n"
        "from g2rl_kernels.tasks.gym import process as gym_process\n"
        "load_task({'kind': 'reasoning_gym', 'name': 'gcd', 'size': 2})\n"
        "print(gym_process.process._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(run(program).stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    raise AssertionError("still there")


def test_process_is_without_torch() -> None:
    ReasoningGymTask("gcd", size=2)
    process = gym_process.process._process
    assert process is not None
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "numpy" in maps
    assert "libtorch" not in maps


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "gdc"}, "reasoning-gym gdc: cfg {}: no such data set; did you mean 'gcd'?"),
        ({"name": 24}, "reasoning-gym 24: cfg {}: no such data set"),
        ({"name": "gcd", "size": 0}, "size=0: needs an integer from 1"),
        ({"name": "gcd", "size": 2.5}, "size=2.5: needs an integer"),
        ({"name": "gcd", "seed": None}, "seed=None: needs an integer from 0"),
        ({"name": "gcd", "cfg": {"size": 3}}, "size and seed stand beside it"),
        ({"name": "gcd", "cfg": [3]}, "cfg=[3]: needs a mapping"),
        ({"name": "gcd", "cfg": {"min_value": 5, "max_value": 5}}, "max_value must be > min_value"),
        ({"name": "gcd", "cfg": {"min_value": "a"}}, "cfg {'min_value': 'a'}: "),
        ({"name": "composite"}, "Must specify at least one dataset"),
        ({"name": "gcd", "extract": "box"}, "extract='box'"),
    ],
)
def test_wrong_configurations(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ReasoningGymTask(**keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_item_that_cannot_be_made_is_named() -> None:
    task = ReasoningGymTask("countdown", size=3, cfg={"min_target": 9000, "max_target": 9001})
    with pytest.raises(ConfigError, match=r"countdown: cfg .*9000.*, item 2: Failed to generate valid"):
        task[2]


def test_an_item_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym_process, "REQUEST_SECONDS", 0.01)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"acre: cfg {}: took more than 0\.01 s to make: change cfg"):
        ReasoningGymTask("acre", size=100_000)
    assert time.monotonic() - start < 5
    monkeypatch.undo()
    assert len(ReasoningGymTask("gcd", size=3)) == 3  # and not the late reply


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(TrainerError, match=r"reasoning-gym is not usable here .* pip install"):
        ReasoningGymTask("gcd")


def test_composite() -> None:
    datasets = [{"name": "gcd", "weight": 1}, {"name": "chain_sum", "weight": 1, "config": {"max_terms": 2}}]
    task = ReasoningGymTask("composite", size=10, cfg={"datasets": datasets})
    assert {task[index]["metadata"]["source_dataset"] for index in range(10)} == {"gcd", "chain_sum"}
    assert [task.score(task[i]["answer"], task[i]) for i in range(10)] == [1] * 10


def test_first_problems_do_not_depend_on_the_limit() -> None:
    few, more = load_data("reasoning_gym:acre", limit=3), load_data("reasoning_gym:acre")
    assert few.items() == more.items()[:3]
    assert (len(few), len(more)) == (3, 200)


# Scorers that raise, and wrong answers that earn nearly full credit


@pytest.mark.parametrize(
    ("name", "completion", "error"),
    [
        ("prime_factorization", "I do not know, maybe 12 or so.", "ValueError"),
        ("boxnet", "0", "TypeError"),
        ("boxnet", '{"a": [1, null]}', "AttributeError"),
        ("game_of_life", '{"a": 1}', "KeyError"),
        ("coin_flip", "1e999", "OverflowError"),
    ],
)
def test_scorers_that_raise(name: str, completion: str, error: str) -> None:
    task = ReasoningGymTask(name, size=3)
    verdict, empty = verify([(task, task[0], completion), (task, task[0], "")])
    assert verdict.score == 0
    assert verdict.failure is not None
    assert verdict.failure.startswith(error)
    assert empty.score < SCORE_GATE
    assert empty.answer is None
    assert task.score(completion, task[0]) == 0
    if task[0]["answer"] is not None:
        right = verify([(task, task[0], task[0]["answer"])])[0]
        assert (right.score, right.failure) == (1, None)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.5, 1.5, None, "many", 1j])
def test_scores_that_are_no_scores(score: Any) -> None:
    class Data:
        def score_answer(self, answer: str, entry: Any) -> Any:
            return score

    judge = GymJudge(GymSpec("gcd", 3, 0, {}), data=Data())
    with pytest.raises((TypeError, ValueError)):
        judge.score("3", {})


def wrong_cell(item: Item) -> str:
    rows = json.loads(item["answer"])
    rows[0][0] = 1 - rows[0][0]
    return json.dumps(rows)


def next_second(item: Item) -> str:
    days, _, at = item["answer"].rpartition(", ")
    *rest, last = at.split(":")
    last = f"{(int(last) + 1) % 60:02}"
    return (days and days + ", ") + ":".join([*rest, last])


@pytest.mark.parametrize(
    ("name", "cfg", "wrong", "credit"),
    [
        ("game_of_life", {}, wrong_cell, 0.98),  # one cell of 100
        ("game_of_life", {"grid_size_x": 60, "grid_size_y": 60}, wrong_cell, MOST_PARTIAL_CREDIT),
        ("chain_sum", {"max_terms": 2}, lambda item: "1" + item["answer"], 0.3),  # 13 for 3: 1/2
        ("spell_backward", {"min_word_len": 9}, lambda item: item["answer"] + "x", MOST_PARTIAL_CREDIT),
        ("spell_backward", {"min_word_len": 9}, lambda item: item["answer"] + ".", MOST_PARTIAL_CREDIT),
        ("letter_jumble", {}, lambda item: item["answer"] + " more", MOST_PARTIAL_CREDIT),
        ("word_sorting", {}, lambda item: item["answer"] + ", zebra", MOST_PARTIAL_CREDIT),
        ("time_intervals", {"task_types": ["time_seconds"]}, next_second, MOST_PARTIAL_CREDIT),
        ("complex_arithmetic", {}, lambda item: item["answer"].replace(".00", ".01"), 0.9),
        ("caesar_cipher", {}, lambda item: item["answer"] + "X", 0.9),
    ],
)
def test_no_partial_credit_reaches_the_gate(
    name: str, cfg: dict[str, Any], wrong: Callable[[Item], str], credit: float
) -> None:
    task = ReasoningGymTask(name, size=20, cfg=cfg)
    items = [task[index] for index in range(20)]
    items = [item for item in items if wrong(item) != item["answer"]]
    assert items
    scores = [verdict.score for verdict in verify([(task, item, wrong(item)) for item in items])]
    assert max(scores) >= credit  # wrong by little, and the scorer says so
    assert max(scores) <= MOST_PARTIAL_CREDIT < SCORE_GATE
    assert not (torch.tensor(scores, dtype=torch.float32) >= SCORE_GATE).any()
    right = [verdict.score for verdict in verify([(task, item, item["answer"]) for item in items])]
    assert right == [1] * len(items)


def test_a_sum_of_parts_reaches_the_gate() -> None:
    total = 0.7 + 0.2 + 0.1
    assert SCORE_GATE <= total < 1


def test_verdicts_do_not_depend_on_their_order() -> None:
    names = ("list_functions", "word_ladder", "codeio", "simple_equations")
    tasks = [ReasoningGymTask(name, size=5) for name in names]
    asked = [(t, t[i], text) for t in tasks for i in range(3) for text in (t[i]["answer"], "{}", "3")]
    shuffled = random.Random(0).sample(range(len(asked)), len(asked))
    found = verify([asked[index] for index in shuffled])
    assert dict(zip(shuffled, found)) == dict(enumerate(verify(asked)))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("3", "3.0", True),
        ("0.5", ".5", True),
        ("1e3", "1000", True),
        ("+3", "3", True),
        ("3", "4", False),
        ("011", "11", False),  # a binary word
        ("yes", "yes", True),
        ("yes", "Yes", False),
        (".", "", False),
        ("1e999999999", "2e999999999", False),
        ("3\n", "3", False),
        ("nan", "nan", True),
    ],
)
def test_the_same_answer(first: str, second: str, same: bool) -> None:
    judge = GymJudge(GymSpec("gcd", 3, 0, {}))
    assert judge.same(first, second) is judge.same(second, first) is same


def test_votes_count_numbers() -> None:
    task = ReasoningGymTask("chain_sum", size=2, extract="last_number")
    texts = ["It is 3.", "3.0", "so 4"]
    answers = [verdict.answer for verdict in verify([(task, task[0], text) for text in texts])]
    classes = unify([(task.judge, answers)])[0]
    assert classes[0] == classes[1] != classes[2]


# In a training run


def test_training_on_a_scorer_that_raises(tmp_path: Path) -> None:
    task = ReasoningGymTask("prime_factorization", size=4)
    model = make_model(max_position_embeddings=2048)
    make_trainer(tmp_path, task, model, steps=2, max_prompt_tokens=2000, verify_workers=1).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["verify_failures"] > 0 for row in rows)
    assert all(row["accuracy"] == 0 for row in rows)


def test_a_resumed_run_sees_the_same_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """list_functions draws from the global generator of `random`, whose state is not saved."""
    seen: list[Item] = []
    original = ReasoningGymTask.__getitem__
    monkeypatch.setattr(
        ReasoningGymTask, "__getitem__", lambda self, index: seen.append(original(self, index)) or seen[-1]
    )

    def train(folder: str, steps: int) -> list[Item]:
        seen.clear()
        keys = {"steps": steps, "checkpoint_every": 2, "max_prompt_tokens": 4000, "verify_workers": 1}
        model = make_model(max_position_embeddings=4096)
        trainer = make_trainer(tmp_path / folder, ReasoningGymTask("list_functions", size=9), model, **keys)
        seen.clear()  # what it looks at before the first step
        trainer.train()
        return list(seen)

    whole = train("whole", 4)
    parts = train("parts", 2)
    random.seed(5)
    assert parts + train("parts", 4) == whole
    assert len(whole) == 8


# Constant answers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("game_of_life_halting", "almost any answer earns full reward on"),
        ("coin_flip", "the answer '0' earns full reward on 9"),
        ("syllogism", "the answer 'Yes' earns full reward on 7"),
        ("puzzle24", "earns full reward on 20 of its first 20 items"),  # any expression that gives 24
        ("chain_sum", None),
        ("course_schedule", None),  # True or False
        ("acre", None),  # three answers
        ("gcd", None),  # often 1
    ],
)
def test_constant_answers_are_named(name: str, message: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ReasoningGymTask(name, size=150)
    found = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    assert len(found) == (message is not None)
    if message is not None:
        assert found[0].startswith(f"task: reasoning-gym {name}: ")
        assert message in found[0]


def test_constant_answer() -> None:
    assert constant_answer(Probed(100, {"yes": 66, "no": 34})) is None
    assert constant_answer(Probed(19, {"": 19})) is None  # too few to say
    assert constant_answer(Probed(0, {})) is None
    said = constant_answer(Probed(100, {"yes": 70, "0": 67}))
    assert said is not None
    assert said.startswith("the answer 'yes' earns full reward on 70 of its first 100 items")
    assert "'0'" in str(constant_answer(Probed(100, {"yes": 70, "0": 67}), "last_number"))
    assert constant_answer(Probed(100, {"yes": 70}), "last_number") is None  # it is never extracted
    assert "almost any answer" in str(constant_answer(Probed(50, dict.fromkeys(PROBES[1:], 50))))
