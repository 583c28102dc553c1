"""What `agentkd collect` writes where: a live display for a person, JSON alone for a program."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

from agentkd.record import write_jsonl
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from tests.conftest import action

ESCAPE = "\x1b"


def collect(folder: Path, url: str, *more: str) -> tuple[str, str]:
    """Standard output of the command, and what its terminal shows of the standard error."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "agentkd", "collect", "--api-base", url, "--model", "fake"]
    command += ["--tasks", str(folder / "tasks.jsonl"), "--sandbox", "local", *more]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal is gone with the last process that has it
            while block := os.read(ours, 65536):
                shown += block
        assert process.stdout is not None
        output = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, shown
    return output, shown.decode()


def test_a_live_display_for_a_person_and_json_alone_for_a_program(tmp_path: Path) -> None:
    tasks = [Task(id=str(i), question=f"task {i}", answer="1", split="train") for i in range(3)]
    write_jsonl(tmp_path / "tasks.jsonl", tasks)
    with FakeEndpoint(lambda messages: action("done", "final_answer(1)")) as endpoint:
        output, shown = collect(tmp_path, endpoint.url, "--out", str(tmp_path / "person"))
        assert ESCAPE in shown
        assert "3/3, 3 correct so far" in shown
        assert ESCAPE not in output
        output, shown = collect(tmp_path, endpoint.url, "--out", str(tmp_path / "program"), "--json")
    (line,) = output.splitlines()
    assert json.loads(line)["correct"] == 3
    assert ESCAPE not in shown
    assert "correct so far" not in shown
    assert all(text.startswith("Note: ") for text in shown.splitlines()), "nothing but the word of warning"
