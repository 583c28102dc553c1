"""A collection whose disk fills up says so, and loses nothing: the same command goes on with it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from agentkd.record import write_jsonl
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from tests.conftest import action
from tests.e2e.test_collect_killed import check_log, results, whole_lines

WORKERS, TASKS = 4, 12
LONG = "I think. " * 4000
"""Longer than any buffer between the log and the disk."""


class Teacher:
    """Two long steps a task."""

    def __init__(self) -> None:
        self.answered: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        if len(messages) == 1:
            return "ok"  # the check before the start
        with self._lock:
            self.answered[messages[1]["content"], len(messages) // 2] += 1
        return action(LONG, "print(1)" if len(messages) == 2 else "final_answer(1)")


def collect(folder: Path, url: str, largest: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command; no file may grow beyond ``largest`` bytes (Python ignores SIGXFSZ)."""
    command = [sys.executable, "-m", "agentkd", "collect", "--api-base", url, "--model", "fake", "--json"]
    command += ["--tasks", str(folder / "tasks.jsonl"), "--out", str(folder / "run")]
    command += ["--workers", str(WORKERS), "--sandbox", "local", "--step-tokens", "20000"]

    def limit() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest or hard, hard))

    return subprocess.run(command, capture_output=True, text=True, timeout=250, preexec_fn=limit)


def test_a_disk_that_fills_up_and_has_room_again(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "tasks.jsonl",
        [Task(id=str(i), question=f"task {i}", answer="1", split="train") for i in range(TASKS)],
    )
    teacher = Teacher()
    with FakeEndpoint(teacher) as endpoint:
        for size in (300_000, 700_000):  # twice, so that it fills up in a log that was gone on with
            full = collect(tmp_path, endpoint.url, size)
            assert full.returncode == 7, full.stderr
            assert "calls-0.jsonl" in full.stderr or "trajectories.jsonl" in full.stderr
            assert "free some space" in full.stderr
            assert "Traceback" not in full.stderr
            before = whole_lines(tmp_path / "run")
            assert sum(map(len, before.values())) > 3
            for path, lines in before.items():
                assert all(json.loads(line) for line in lines), path
                assert path.read_bytes()[-1:] in (b"", b"\n"), "no line was left torn"
        done = collect(tmp_path, endpoint.url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["correct"] == TASKS
    for path, lines in before.items():
        assert path.read_bytes().split(b"\n")[: len(lines)] == lines, f"{path.name} lost a finished line"
    check_log(tmp_path / "run")
    assert len(results(tmp_path / "run")) == TASKS
    assert len(teacher.answered) == 2 * TASKS
    repeated = sum(count - 1 for count in teacher.answered.values())
    assert repeated <= 2 * WORKERS, "only what was in flight when it was full is asked again"
