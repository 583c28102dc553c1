"""Defects that were found by hand, each with the case that showed it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agentkd import Task, build_agent
from agentkd.agent_config import AgentConfig
from agentkd.collect import CollectConfig, collect
from agentkd.errors import ConfigError, DataError, ProviderError, StorageError
from agentkd.expert.arithmetic import solve_arithmetic
from agentkd.pipeline import run_recipe
from agentkd.recipe import Recipe, quickstart_recipe
from agentkd.record import AppendLog, write_json, write_jsonl
from agentkd.rollout import rollout
from agentkd.taskset import load_taskset
from agentkd.testing import FakeEndpoint, ScriptedModel
from agentkd.trajectory import Trajectory
from tests.conftest import action


def answer(messages: list[dict[str, Any]]) -> str:
    return action("one", "final_answer(1)")


def one_task(folder: Path, **changes: Any) -> Path:
    path = folder / "tasks.jsonl"
    task = Task(id="1", question="one?", answer="1", split="train").model_copy(update=changes)
    write_jsonl(path, [task])
    return path


def config(tasks: Path, url: str, corpus: Path | None = None, **agent: Any) -> CollectConfig:
    settings = {"model": "fake", "api_base": url, **agent}
    return CollectConfig(tasks=str(tasks), corpus=corpus, agent=AgentConfig(**settings), workers=2)


@pytest.mark.parametrize(
    "text",
    [
        action("a", "final_answer(chr(0xD800))"),
        action("b", "print(chr(0xD800))"),
        action("c", "raise ValueError(chr(0xD800))"),
        action("d \ud800", "final_answer(1)"),
    ],
)
def test_half_a_surrogate_pair_can_be_stored(text: str) -> None:
    agent = build_agent(ScriptedModel([text]), max_steps=1)
    record = rollout(agent, Task(id="1", question="q", answer="1"))
    agent.cleanup()
    assert Trajectory.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "q", "answer": "\\ud800"}',
        '{"question": "q", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_a_row_that_cannot_be_stored_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(DataError, match="line 1"):
        load_taskset(str(tmp_path / "bad.jsonl"), "all")


def test_a_failed_start_does_not_bind_the_folder(tmp_path: Path) -> None:
    tasks = one_task(tmp_path)
    with pytest.raises(ProviderError):
        collect(config(tasks, "http://127.0.0.1:9/v1", model="typo"), tmp_path / "run")
    with pytest.raises(ConfigError, match="sandbox"):
        collect(config(tasks, "http://127.0.0.1:9/v1", sandbox="typo"), tmp_path / "run")
    with FakeEndpoint(answer) as endpoint:
        with pytest.raises(ConfigError, match="scorer"):
            collect(config(one_task(tmp_path, scorer="typo"), endpoint.url), tmp_path / "run")
        assert endpoint.requests == []
        assert collect(config(one_task(tmp_path), endpoint.url), tmp_path / "run").missing == 0


def test_another_corpus_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    tasks, corpus = one_task(tmp_path), tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "1", "text": "one"}\n')
    with FakeEndpoint(answer) as endpoint:
        collect(config(tasks, endpoint.url, corpus), tmp_path / "run")
        collect(config(tasks, endpoint.url, corpus), tmp_path / "run")
        corpus.write_text('{"id": "1", "text": "two"}\n')
        with pytest.raises(ConfigError, match="corpus"):
            collect(config(tasks, endpoint.url, corpus), tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_a_storage_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (
        lambda: write_json(tmp_path / "file" / "x.json", {}),
        lambda: write_jsonl(tmp_path / "file" / "x.jsonl", []),
        lambda: AppendLog(tmp_path / "file" / "x.jsonl"),
    ):
        with pytest.raises(StorageError) as caught:
            write()
        assert caught.value.hint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError), AppendLog(tmp_path / "log.jsonl") as log:
        log.append(Task(id="1", question="q"))


def test_ctrl_c_exits_with_130_and_keeps_what_is_finished(tmp_path: Path) -> None:
    rows = [Task(id=str(number), question="one?", answer="1", split="train") for number in range(200)]
    write_jsonl(tmp_path / "tasks.jsonl", rows)

    def slow(messages: list[dict[str, Any]]) -> str:
        time.sleep(0.05)
        return answer(messages)

    command = [sys.executable, "-m", "agentkd", "collect", "--model", "fake"]
    log = tmp_path / "run" / "trajectories.jsonl"
    with FakeEndpoint(slow) as endpoint:
        command += ["--api-base", endpoint.url, "--tasks", str(tmp_path / "tasks.jsonl"), "--workers", "2"]
        process = subprocess.Popen(
            [*command, "--out", str(log.parent)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background jobs inherit that SIGINT is ignored; a terminal's do not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped." in said
    assert all(json.loads(line)["answer"] == "1" for line in log.read_text().splitlines())


def test_an_error_of_many_lines_is_said_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    from agentkd.commands.console import complain

    complain("Error: a\nb\x1b[31m  c", "")
    assert capsys.readouterr().err == "Error: a b [31m c\n"


@pytest.mark.parametrize("name", ["../up", "base", "a/b", ""])
def test_a_student_name_that_is_no_folder_name_is_refused(name: str) -> None:
    content = quickstart_recipe("tiny").model_dump()
    content["students"] = {name: {"kind": "agent"}}
    with pytest.raises(ValueError, match="student's name"):
        Recipe.model_validate(content)


def test_a_wrong_training_setting_is_noticed_before_anything_is_run(tmp_path: Path) -> None:
    content = quickstart_recipe("tiny").model_dump()
    content["students"] = {"small": {"kind": "agent", "settings": {"stepz": 3}}}
    with pytest.raises(ConfigError, match=r"students\.small\.settings: stepz"):
        run_recipe(Recipe.model_validate(content), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "question",
    [
        "Find the Least Common Multiple (LCM) of these numbers: 0, 0",
        "Find the Least Common Multiple (LCM) of these numbers: ,",
        "How many prime numbers there are between 1 and 99999999999999?",
    ],
)
def test_the_expert_survives_impossible_numbers(question: str) -> None:
    assert solve_arithmetic(question) is None
