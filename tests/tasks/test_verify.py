"""Verification in worker processes: limits, failures, threads, votes. judges.py has the verifiers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from judges import DiesOnce, Heavy, JudgedTask, Loaded, Obedient, Unloadable

from g2rl_kernels.errors import ConfigError, RewardError, TrainerError
from g2rl_kernels.tasks import pool as pools
from g2rl_kernels.tasks import processes
from g2rl_kernels.tasks import verify as verification
from g2rl_kernels.tasks.base import Verdict
from g2rl_kernels.tasks.pool import Limits
from g2rl_kernels.tasks.verify import answers_of, unify, verify

SHORT = Limits(seconds=1, workers=2)


@pytest.fixture(autouse=True)
def _show_failures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_shown", set())


def asked(completions: list[str], judge: Any = None) -> list[tuple[Any, dict[str, Any], str]]:
    task = JudgedTask(judge or Obedient())
    return [(task, task[0], completion) for completion in completions]


def test_verdicts_come_in_order() -> None:
    texts = [f"wait:{'yes' if i % 3 else 'no'}" if i % 5 == 0 else str(i) for i in range(40)]
    verdicts = verify(asked(texts))
    assert verdicts == [Verdict(float(t == "wait:yes"), t.rpartition(":")[2]) for t in texts]
    assert [v.answer for v in verify(asked(texts), answers=False)] == [None] * 40
    assert verify([]) == []


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    texts = ["random", "hash", "torch", "random"] * 5
    verdicts = verify(asked(texts, Loaded()), limits=Limits(workers=workers))
    by_text = {text: {v.answer for t, v in zip(texts, verdicts) if t == text} for text in texts}
    assert by_text["torch"] == {"False"}
    assert by_text["random"] == {"0.8444218515250481"}  # random.seed(0) before each response
    assert len(by_text["hash"]) == 1


@pytest.mark.parametrize(
    ("order", "failure"),
    [
        ("sleep", "TimeoutError: took more than 4 s"),
        ("spin", "TimeoutError: took more than "),  # on a busy machine 4 s may pass first
        ("power", "TimeoutError: took more than "),
        ("memory", "MemoryError"),
        ("recurse", "RecursionError"),
        ("raise:it", "ValueError: cannot read 'it'"),
        ("exit", "SystemExit: 3"),
        ("vanish", "the verifier's process ended twice (exit code 3)"),
        ("garbage", "the verifier's process ended twice"),
        ("nan", "ValueError: the score is nan"),
        ("import", "ModuleNotFoundError"),  # a response that is evaluated may name any module
    ],
)
def test_a_failure_costs_its_response_alone(order: str, failure: str) -> None:
    with pytest.warns(UserWarning, match=r"JudgedTask: the verifier failed on 1 of 5 completions"):
        verdicts = verify(asked(["yes", order, "yes", "no", "yes"]), limits=SHORT)
    assert [v.score for v in verdicts] == [1, 0, 1, 0, 1]
    assert [v.failure is None for v in verdicts] == [True, False, True, True, True]
    assert verdicts[1].answer is None
    assert str(verdicts[1].failure).startswith(failure)


def test_only_the_first_failure_is_shown(recwarn: pytest.WarningsRecorder) -> None:
    for _ in range(3):
        verify(asked(["raise:first", "raise:second"]))
    (shown,) = recwarn.list
    assert "first" in str(shown.message)
    assert "second" not in str(shown.message)
    assert "2 of 2" in str(shown.message)


def test_a_library_that_prints_does_not_disturb() -> None:
    assert [v.score for v in verify(asked(["print:yes", "print:no", "yes"]))] == [1, 0, 1]


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    verdicts = verify(asked(["yes", "no"], DiesOnce(str(tmp_path))), limits=Limits(workers=1, seconds=8))
    assert (tmp_path / "started").exists()
    assert verdicts == [Verdict(1, "yes"), Verdict(0, "no")]


def test_kill_minus_nine_in_the_middle() -> None:
    limits = Limits(workers=2, seconds=6)
    killed: list[int] = []

    def kill() -> None:
        for worker in pools.pool(limits)._workers:
            if worker._process is not None:
                killed.append(worker._process.pid)
                os.kill(worker._process.pid, signal.SIGKILL)

    verify(asked(["yes"] * 4), limits=limits)  # starts both
    timer = threading.Timer(0.45, kill)
    timer.start()
    verdicts = verify(asked(["wait:yes", "wait:no"] * 6), limits=limits)
    timer.join()
    assert killed
    assert [v.score for v in verdicts] == [1, 0] * 6
    assert [v.failure for v in verdicts] == [None] * 12


def test_from_any_thread_and_several_at_once() -> None:
    found: dict[int, list[float]] = {}

    def run(number: int) -> None:
        found[number] = [v.score for v in verify(asked(["yes", "no", "wait:yes"]))]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [1, 0, 1] for number in range(6)}


def test_a_judge_that_cannot_be_loaded_stops_the_run() -> None:
    with pytest.raises(TrainerError, match="a worker process cannot verify: OSError: no such data"):
        verify(asked(["yes"], Unloadable()))
    task = JudgedTask(Obedient())
    with pytest.raises(TrainerError, match="cannot be pickled"):
        verify([(task, {"question": "q", "gold": lambda: 1}, "yes")])


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_BOOT", "raise SystemError('no interpreter')")
    with pytest.raises(TrainerError, match=r"a worker process cannot start \(SystemError: no interpreter\)"):
        verify(asked(["yes"]), limits=Limits(workers=1, seconds=7))


def test_a_worker_that_is_killed_while_it_starts_is_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    note = str(tmp_path / "starts")
    count = (
        f"import os\nopen({note!r}, 'a').write('x')\n"
        f"if len(open({note!r}).read()) < 3:\n    os.kill(os.getpid(), 9)"
    )
    monkeypatch.setattr(processes, "_BOOT", f"{count}\n{processes._BOOT}")
    assert verify(asked(["yes"]), limits=Limits(workers=1, seconds=8)) == [Verdict(1, "yes")]


def test_a_users_function_still_stops_the_run() -> None:
    class Mine:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"question": "q"}

        def score(self, completion: str, item: dict[str, Any]) -> float:
            return 1 / len(completion)

    task = Mine()
    assert verify([(task, task[0], "ab")]) == [Verdict(0.5, "ab")]
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        verify([(task, task[0], "ab"), (task, task[0], "")])


@pytest.mark.filterwarnings("ignore:JudgedTask. the verifier failed")
def test_a_response_cannot_write_start_or_signal(tmp_path: Path) -> None:
    """Some scorers evaluate a response: what a judge has no need for is refused while it works."""
    file = tmp_path / "written"
    orders = [f"write:{file}", "run", "signal", "connect", "read", "yes"]
    verdicts = verify(asked(orders))
    assert [v.score for v in verdicts] == [0, 0, 0, 0, 1, 1]
    assert not file.exists()
    for verdict in verdicts[:4]:
        assert str(verdict.failure).startswith("PermissionError: a verifier may not do this with a response")


def test_votes_by_the_judges_equality() -> None:
    judge = Obedient()
    groups = [(judge, ["a", "A", None, "b", "B", "a"]), (None, ["a", "A"]), (judge, []), (judge, [None])]
    assert unify(groups) == [["a", "a", None, "b", "b", "a"], ["a", "A"], [], [None]]


def test_an_answer_that_cannot_be_compared_is_its_own() -> None:
    groups = [(Obedient(), ["spin 1", "spin 2", "x", "X", "spin 2"])]
    assert unify(groups, SHORT) == [["spin 1", "spin 2", "x", "x", "spin 2"]]


def test_one_answer_that_cannot_be_compared_leaves_the_others_their_votes() -> None:
    groups = [(Obedient(), ["x", "poison 1", "X", "y", "poison 2", "Y", "X"])]
    assert unify(groups, SHORT) == [["x", "poison 1", "x", "y", "poison 2", "y", "x"]]


def test_a_large_completion_and_a_large_answer() -> None:
    text = "x" * 10_000_000
    assert verify(asked([text, "yes"])) == [Verdict(0, text), Verdict(1, "yes")]


def test_a_judge_that_loads_slowly_has_no_limits_for_that(tmp_path: Path) -> None:
    """Neither the first judge of a process nor a later one."""
    limits = Limits(seconds=0.2, memory_gb=0.5, workers=1)
    both = [*asked(["yes"]), *asked(["loaded"], Heavy()), *asked(["yes"])]
    assert verify(both, limits=limits) == [Verdict(1, "yes"), Verdict(0, "loaded"), Verdict(1, "yes")]


def test_answers_without_a_known_one() -> None:
    assert answers_of(Obedient(), ["a:b", "", " c "]) == ["b", None, "c"]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"seconds": 0}, "verify_seconds=0: must be above 0"),
        ({"memory_gb": 0.1}, "verify_memory_gb=0.1: must be at least 0.5"),
        ({"workers": -1}, "verify_workers=-1: must be from 0"),
    ],
)
def test_limits_are_checked(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verify(asked(["yes"]), limits=Limits(**limits))


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Limits().count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert Limits().count() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert Limits().count() == alone


SCRIPT = """
import sys, time
sys.path[:0] = [{tests!r}]
from judges import JudgedTask, Obedient
from g2rl_kernels.tasks import pool
from g2rl_kernels.tasks.verify import verify
task = JudgedTask(Obedient())
assert verify([(task, task[0], "yes")] * 3)[0].score == 1
print(*[w._process.pid for w in pool.pool(pool.Limits())._workers if w._process], flush=True)
{then}
"""


def run_script(then: str) -> tuple[subprocess.Popen[str], list[int]]:
    text = SCRIPT.format(tests=str(Path(__file__).parent.parent), then=then)
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def ends(pid: int, within: float) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("then", ["", "import os; os._exit(1)", "time.sleep(1000)"])
def test_workers_end_with_the_script(then: str) -> None:
    """A script without a guard around its main part; it ends, vanishes, or is killed."""
    process, workers = run_script(then)
    assert workers
    if "sleep" in then:
        process.kill()
    process.wait(30)
    assert all(ends(pid, 10) for pid in workers)


def test_ctrl_c_ends_a_script_at_once() -> None:
    then = "verify([(task, task[0], 'sleep')] * 10)"
    process, workers = run_script(then)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(15) != 0
    assert time.monotonic() - started < 8  # of the 20 s that a response may take
    assert all(ends(pid, 5) for pid in workers)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_ctrl_z_costs_no_response() -> None:
    """The stopped process finds the reply when it goes on, later than the limit on the clock."""
    text = SCRIPT.format(
        tests=str(Path(__file__).parent.parent),
        then="limits = pool.Limits(seconds=0.2)\nverify([(task, task[0], 'yes')] * 2, limits=limits)\n"
        "print('ready', flush=True)\nprint(verify([(task, task[0], 'wait:yes')], limits=limits))",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while "ready" not in process.stdout.readline():
        pass
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(3.5)
    os.killpg(process.pid, signal.SIGCONT)
    assert "score=1.0" in process.communicate(timeout=30)[0]


def test_paths_that_are_no_texts_and_a_folder_that_is_gone(tmp_path: Path) -> None:
    then = (
        "import os, pathlib\nsys.path += [pathlib.Path('/'), '']\npool.close_all()\n"
        "os.chdir({gone!r}); os.rmdir({gone!r})\n"
        "sys.exit(verify([(task, task[0], 'yes')])[0].score != 1)"
    )
    gone = tmp_path / "gone"
    gone.mkdir()
    process, _ = run_script(then.replace("{gone!r}", repr(str(gone))))
    assert process.wait(60) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_workers_of_its_own() -> None:
    then = (
        "import os\\npid = os.fork()\\n"
        "assert verify([(task, task[0], 'yes'), (task, task[0], 'no')])[0].score == 1\\n"
        "pid and sys.exit(os.waitpid(pid, 0)[1])"
    )
    process, _ = run_script(then.replace("\\n", "\n"))
    assert process.wait(60) == 0
