"""The engine's processes end with ours, however that ends; and a new process gives the same samples."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve import tokens_of

SERVE = Path(__file__).resolve().parent / "serve.py"


def members(session: int) -> dict[int, str]:
    """Processes of a session that have not ended, and their commands."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.fixture
def sessions() -> Iterator[list[int]]:
    """Sessions that the test starts; what is left of them is ended after it."""
    started: list[int] = []
    yield started
    for session in started:
        for process in members(session):
            os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "exception"])
def test_nothing_is_left_of_an_engine(end, engine, model, sessions, tmp_path):
    what = "raise" if end == "exception" else "wait"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(SERVE), model, what],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    sessions.append(process.pid)
    said = next((line for line in process.stdout or () if line.startswith("SAMPLED")), "")
    assert said, (tmp_path / "log").read_text()[-3000:]
    assert json.loads(said.removeprefix("SAMPLED")) == tokens_of(engine)  # after a restart
    if what == "wait":
        process.send_signal(getattr(signal, end))
    process.wait(timeout=120)
    assert process.returncode == (1 if end == "exception" else -getattr(signal, end))
    deadline = time.monotonic() + 60
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not members(process.pid)


def test_the_command(model, sessions, tmp_path):
    """`g2rl eval --engine vllm`, and again: nothing is left to sample. vLLM's log is not in its output."""
    (tmp_path / "mine.jsonl").write_text(
        '{"question": "abc=", "answer": "a"}\n{"question": "1", "answer": "b"}\n'
    )
    command = [sys.executable, "-m", "g2rl_kernels", "eval", model, "--engine", "vllm", "-n", "4"]
    command += ["--data", "mine={kind: jsonl, path: mine.jsonl}", "--max-new-tokens", "6", "--out", "out"]
    done = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    sessions.append(done.pid)
    out, errors = done.communicate(timeout=600)
    assert done.returncode == 0, errors[-3000:]
    assert "| pass@1 " in out
    assert "INFO" not in out
    assert "INFO" in errors
    assert not members(done.pid)
    lines = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [(line["problem"], line["sample"]) for line in lines] == [
        (f"mine/{i}", j) for i in (0, 1) for j in range(4)
    ]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0
    assert "| pass@1 " in again.stdout
    assert "vllm" not in again.stderr.lower()  # it was not even loaded
