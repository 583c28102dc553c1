"""A collection that is killed, again and again, loses nothing and asks for nothing twice."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentkd.calls import iter_calls
from agentkd.errors import SandboxError
from agentkd.record import read_trajectories, write_jsonl
from agentkd.retrieval import Passage
from agentkd.sandbox import open_sandbox
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from agentkd.trajectory import Trajectory
from tests.conftest import action

WORKERS = 8
TASKS = 60


class Teacher:
    """Answers in three steps after a short while, and knows what it was asked and what it answered."""

    def __init__(self) -> None:
        self.asked: set[tuple[str, int]] = set()
        self.answered: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        if len(messages) == 1:
            return "ok"  # the check before the start
        question, turn = messages[1]["content"], len(messages) // 2
        with self._lock:
            self.asked.add((question, turn))
        time.sleep(0.03)
        number = question.split()[-1]
        text = {
            1: action("look it up", f"found = search('number {number}')\nprint(found)"),
            2: action("compute", f"x = {number} + 1\nprint(x)"),
        }.get(turn, action("done", "final_answer(x)"))
        with self._lock:
            self.answered[question, turn] += 1
        return text

    def in_flight(self, out: Path) -> int:
        """Calls of a start that has ended which are not in its log: at most one a worker."""
        logged = {
            (f"add one to {call.rollout.partition('#')[0]}", call.step)
            for call in iter_calls(out)
            if call.kind == "model"
        }
        with self._lock:
            lost = len(self.asked - logged)
            self.asked.clear()
        assert lost <= WORKERS
        return lost


def write_inputs(folder: Path, count: int = TASKS) -> None:
    tasks = [
        Task(id=str(i), question=f"add one to {i}", answer=str(i + 1), split="train") for i in range(count)
    ]
    write_jsonl(folder / "tasks.jsonl", tasks)
    passages = [Passage(id=str(i), title=f"number {i}", text=f"number {i} stands here") for i in range(20)]
    write_jsonl(folder / "passages.jsonl", passages)


def a_sandbox() -> str:
    """The default one where this machine has it."""
    try:
        open_sandbox("fork", timeout=10.0).cleanup()
    except SandboxError:
        return "local"
    return "fork"


SANDBOX = a_sandbox()


def start(folder: Path, out: Path, url: str, *more: str, sandbox: str = SANDBOX) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "agentkd", "collect", "--api-base", url, "--model", "fake", "--json"]
    command += ["--tasks", str(folder / "tasks.jsonl"), "--corpus", str(folder / "passages.jsonl")]
    command += ["--sandbox", sandbox, "--workers", str(WORKERS), "--out", str(out), *more]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs inherit that SIGINT is ignored; a terminal's do not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output if code == 0 else errors


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


def plain(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory without its times, and without where it was made."""
    record = trajectory.model_dump(mode="json", exclude={"commit"})  # of a checkout that may move on
    for part in (record, *record["steps"], *(use for step in record["steps"] for use in step["tool_uses"])):
        for name in ("seconds", "started_at", "model_seconds", "code_seconds"):
            part.pop(name, None)
    for name in ("api_base", "sandbox"):
        record["config"].pop(name, None)
    return record


def results(out: Path) -> dict[str, dict[str, Any]]:
    found = [plain(item) for item in read_trajectories(out / "trajectories.jsonl")]
    assert len({item["id"] for item in found}) == len(found), "a trajectory stands there twice"
    return {item["id"]: item for item in found}


@functools.cache
def undisturbed(count: int) -> dict[str, dict[str, Any]]:
    """What a run of so many tasks comes to that nothing happens to."""
    with tempfile.TemporaryDirectory() as name, FakeEndpoint(Teacher()) as endpoint:
        write_inputs(Path(name), count)
        finish(start(Path(name), Path(name) / "run", endpoint.url))
        return results(Path(name) / "run")


def check(out: Path, teacher: Teacher, count: int, repeats: int) -> None:
    """However a run was stopped and gone on with: all is there once, and as if nothing had happened.

    Args:
        out: the run.
        teacher: whom it asked.
        count: its tasks.
        repeats: calls that were in flight when it was stopped, over all times.
    """
    check_log(out)
    repeated = sum(times - 1 for times in teacher.answered.values())
    print(f"{repeated} of {sum(teacher.answered.values())} calls repeated, {repeats} were in flight")
    assert repeated <= repeats
    expected = {
        name: item for name, item in undisturbed(max(count, 100)).items() if int(item["task"]["id"]) < count
    }
    found = results(out)
    assert len(found) == len(expected) == count
    assert found == expected
    assert len(teacher.answered) == 3 * count
    assert not (out / "errors.jsonl").exists()


def check_log(out: Path) -> None:
    keys = Counter((call.rollout, call.restart, call.key) for call in iter_calls(out) if call.kind != "begin")
    assert not [key for key, times in keys.items() if times > 1], "a finished call stands in the log twice"


def whole_lines(out: Path) -> dict[Path, list[bytes]]:
    """What is durable: every complete line of every log."""
    paths = (*out.glob("calls-*.jsonl"), out / "trajectories.jsonl")
    return {path: path.read_bytes().split(b"\n")[:-1] for path in paths if path.is_file()}


def wait_for_calls(process: subprocess.Popen[str], teacher: Teacher, more: int) -> None:
    limit, goal = time.monotonic() + 60, sum(teacher.answered.values()) + more
    while sum(teacher.answered.values()) < goal and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.005)


def wait_until_asked(teacher: Teacher) -> None:
    """Until a call is being answered."""
    limit = time.monotonic() + 60
    while not teacher.asked - set(teacher.answered):
        assert time.monotonic() < limit
        time.sleep(0.001)


def killed_again_and_again(folder: Path, kills: int, *more: str) -> None:
    count = 25 * kills  # enough that the run is not over before the last kill
    write_inputs(folder, count)
    chance, repeats, alive = random.Random(kills), 0, 0
    teacher, out = Teacher(), folder / "run"
    with FakeEndpoint(teacher) as endpoint:
        for _ in range(kills):
            process = start(folder, out, endpoint.url, *more)
            try:
                if chance.random() < 0.8:  # else somewhere in its start
                    wait_for_calls(process, teacher, 1)
                time.sleep(chance.uniform(0, 0.25))
                alive += process.poll() is None
                process.send_signal(signal.SIGKILL)
                process.wait()
            finally:
                end(process)
            time.sleep(0.1)  # what was in flight is answered into the void
            repeats += teacher.in_flight(out)
            before = whole_lines(out)
            assert all(json.loads(line) for lines in before.values() for line in lines)
        finish(start(folder, out, endpoint.url, *more))
        for path, lines in before.items():
            assert path.read_bytes().split(b"\n")[: len(lines)] == lines, f"{path.name} lost a finished line"
    assert alive == kills
    check(out, teacher, count, repeats)


def test_killed_a_few_times(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, 4)


def test_two_processes_killed_a_few_times(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, 3, "--processes", "2")


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, 50)


@pytest.mark.parametrize(
    ("number", "code", "processes"),
    [(signal.SIGTERM, 143, "1"), (signal.SIGINT, 130, "1"), (signal.SIGTERM, 143, "2")],
)
def test_stopped_by_a_signal(number: signal.Signals, code: int, processes: str, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    teacher, out = Teacher(), tmp_path / "run"
    with FakeEndpoint(teacher) as endpoint:
        process = start(tmp_path, out, endpoint.url, "--processes", processes)
        try:
            wait_for_calls(process, teacher, 40)
            process.send_signal(number)
            assert "Stopped." in finish(process, code)
        finally:
            end(process)
        time.sleep(0.1)
        repeats = teacher.in_flight(out)
        figures = json.loads(finish(start(tmp_path, out, endpoint.url, "--processes", processes)))
    assert figures["correct"] == TASKS
    check(out, teacher, TASKS, repeats)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the sandbox by /proc")
@pytest.mark.parametrize("sandbox", sorted({"local", SANDBOX}))
def test_the_sandbox_is_killed(sandbox: str, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    teacher, out = Teacher(), tmp_path / "run"
    with FakeEndpoint(teacher) as endpoint:
        process = start(tmp_path, out, endpoint.url, sandbox=sandbox)
        try:
            for _ in range(3):
                wait_for_calls(process, teacher, 40)
                # The zygote may have been started by any thread.
                tasks = Path(f"/proc/{process.pid}/task").iterdir()
                pids = {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
                for pid in pids:  # a run of one process has no other children
                    os.kill(pid, signal.SIGKILL)
            first = json.loads(finish(process))
        finally:
            end(process)
        # One that was hit more often than it is tried at one start is finished by the next.
        assert first["correct"] + first["missing"] == TASKS
        finish(start(tmp_path, out, endpoint.url, sandbox=sandbox))
    check(out, teacher, TASKS, repeats=0)  # only the code runs again


def test_the_endpoint_goes_away_and_comes_back(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    teacher, out = Teacher(), tmp_path / "run"
    with FakeEndpoint(teacher) as endpoint:
        process = start(tmp_path, out, endpoint.url)
        wait_for_calls(process, teacher, 60)
        wait_until_asked(teacher)
    try:
        time.sleep(1.0)
        repeats = teacher.in_flight(out)
        with FakeEndpoint(teacher, port=int(endpoint.url.split(":")[2].split("/")[0])):
            figures = json.loads(finish(process))
    finally:
        end(process)
    assert sum(figures["faults"].values()) > 0
    check(out, teacher, TASKS, repeats)


def test_the_endpoint_dies_and_the_run_goes_on_later(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    teacher, out = Teacher(), tmp_path / "run"
    with FakeEndpoint(teacher) as endpoint:
        process = start(tmp_path, out, endpoint.url, "--retries", "0")
        wait_for_calls(process, teacher, 60)
        wait_until_asked(teacher)
    try:
        said = finish(process, 4)
    finally:
        end(process)
    assert "times in a row" in said
    assert (out / "errors.jsonl").is_file()
    repeats = teacher.in_flight(out)
    with FakeEndpoint(teacher) as endpoint:
        finish(start(tmp_path, out, endpoint.url))
    check(out, teacher, TASKS, repeats)
