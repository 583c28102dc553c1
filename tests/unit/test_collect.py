from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from agentkd.agent_config import AgentConfig
from agentkd.collect import CollectConfig, collect
from agentkd.errors import ConfigError, DataError, ProviderError, SandboxError
from agentkd.filter import FilterConfig, filter_run
from agentkd.record import read_json, read_trajectories, write_jsonl
from agentkd.sandbox import isolation, zygotes
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from agentkd.trajectory import StopReason
from tests.conftest import action


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    write_jsonl(
        path, [Task(id=str(i), question=f"add {i}", answer=str(i + 1), split="train") for i in range(6)]
    )
    return path


def teacher(messages: list[dict[str, Any]]) -> str:
    if len(messages) == 1:
        return "ok"  # the check before the start
    number = messages[1]["content"].split()[-1]
    if number == "0":
        return action("wrong", "final_answer(-1)")
    if number == "1" and len(messages) == 2:
        return "I forgot the code."
    if number == "2" and len(messages) == 2:
        return action("oops", "1 / 0")
    return action("add", f"final_answer({number} + 1)")


def asked(endpoint: FakeEndpoint) -> list[str]:
    """The questions it was asked, once for each call, without the check before the start."""
    talks = [request["messages"] for request in endpoint.requests]
    return [talk[1]["content"] for talk in talks if len(talk) > 1]


def config(tasks: Path, url: str, **changes: Any) -> CollectConfig:
    agent = AgentConfig(model="fake", api_base=url)
    return CollectConfig(tasks=str(tasks), agent=agent, workers=3, **changes)


def test_collect_then_filter(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        done = collect(config(tasks, endpoint.url), tmp_path / "run")
    assert [item.correct for item in done.trajectories] == [False, True, True, True, True, True]
    assert read_json(tmp_path / "run" / "manifest.json")["counts"]["correct"] == 5
    result = filter_run(tmp_path / "run", tmp_path / "kept")
    assert [item.task.id for item in result.kept] == ["2", "3", "4", "5"]  # recovery from 1 / 0 is kept
    assert dict(result.reasons) == {"wrong answer": 1, "parse error": 1}
    assert len(read_trajectories(tmp_path / "kept" / "kept.jsonl")) == 4


def test_what_is_finished_is_not_asked_again(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        collect(config(tasks, endpoint.url), tmp_path / "run")
        log = tmp_path / "run" / "trajectories.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(lines[:4]) + lines[4][:50])
        endpoint.requests.clear()
        done = collect(config(tasks, endpoint.url), tmp_path / "run")
        assert len({item.id for item in done.trajectories}) == 6
        assert asked(endpoint) == []  # the log has every call of the two that were lost
        log.write_bytes(b"".join(lines[:4]))
        (tmp_path / "run" / "calls-0.jsonl").unlink()
        collect(config(tasks, endpoint.url), tmp_path / "run")
        kept = {json.loads(line)["task"]["question"] for line in lines[:4]}
        assert len(set(asked(endpoint))) == 2
        assert not set(asked(endpoint)) & kept
        endpoint.requests.clear()
        collect(config(tasks, endpoint.url), tmp_path / "run")
        assert endpoint.requests == []


def test_the_sandbox_is_started_before_the_workers(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        isolation.choose()
    except SandboxError as exc:
        pytest.skip(str(exc))
    zygotes._stop()
    before, started, start = set(threading.enumerate()), list[Any](), zygotes.Zygote._start

    def noting(self: zygotes.Zygote, settings: dict[str, Any]) -> None:
        workers = [thread for thread in threading.enumerate() if thread.name.startswith("rollout-")]
        started.append((threading.current_thread(), set(workers) - before))
        start(self, settings)

    monkeypatch.setattr(zygotes.Zygote, "_start", noting)
    with FakeEndpoint(teacher) as endpoint:
        thinking = config(tasks, endpoint.url)
        agent = thinking.agent.model_copy(update={"kind": "cot"})
        collect(thinking.model_copy(update={"agent": agent}), tmp_path / "thoughts")
        assert started == [], "a chain of thought runs no code"
        collect(config(tasks, endpoint.url), tmp_path / "run")
    assert started == [(threading.main_thread(), set())]


def test_an_errored_rollout_is_not_done(tasks: Path, tmp_path: Path) -> None:
    broken = True

    def flaky(messages: list[dict[str, Any]]) -> Any:
        if broken and messages[-1]["content"] == "add 3":
            return 400, b'{"error": {"message": "no"}}'
        return teacher(messages)

    with FakeEndpoint(flaky) as endpoint:
        done = collect(config(tasks, endpoint.url), tmp_path / "run")
        assert done.missing == 1
        (error,) = read_trajectories(tmp_path / "run" / "errors.jsonl")
        assert error.stop_reason == StopReason.PROVIDER_ERROR
        broken = False
        assert collect(config(tasks, endpoint.url), tmp_path / "run").missing == 0
    assert not (tmp_path / "run" / "errors.jsonl").exists()


def test_other_tasks_or_another_agent_in_the_same_folder_are_refused(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        first = config(tasks, endpoint.url)
        collect(first, tmp_path / "run")
        hotter = first.model_copy(update={"agent": first.agent.model_copy(update={"temperature": 1.0})})
        with pytest.raises(ConfigError, match="temperature"):
            collect(hotter, tmp_path / "run")
        write_jsonl(tasks, [Task(id="new", question="add 9", answer="10", split="train")])
        with pytest.raises(ConfigError, match="other tasks"):
            collect(first, tmp_path / "run")


def test_a_dead_endpoint_is_noticed_before_anything_starts(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="Cannot reach"):
        collect(config(tasks, "http://127.0.0.1:9/v1"), tmp_path / "run")


def test_an_endpoint_of_garbage_is_noticed(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(lambda messages: (200, b"<html>")) as endpoint, pytest.raises(ProviderError):
        collect(config(tasks, endpoint.url), tmp_path / "run")


def test_the_key_is_written_nowhere(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        base = config(tasks, endpoint.url)
        keyed = base.model_copy(update={"agent": base.agent.model_copy(update={"api_key": "sk-secret"})})
        collect(keyed, tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        assert b"sk-secret" not in path.read_bytes()


def test_filtering_to_nothing_is_an_error_and_keeps_the_reasons(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(lambda messages: action("no", "final_answer('no')")) as endpoint:
        collect(config(tasks, endpoint.url), tmp_path / "run")
    with pytest.raises(DataError, match="Nothing was kept"):
        filter_run(tmp_path / "run", tmp_path / "kept")
    assert len((tmp_path / "kept" / "dropped.jsonl").read_text().splitlines()) == 6


def test_the_shortest_of_each_task_is_kept(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(teacher) as endpoint:
        collect(config(tasks, endpoint.url, samples=2), tmp_path / "run")
    result = filter_run(tmp_path / "run", tmp_path / "kept", FilterConfig(per_task=1))
    assert len(result.kept) == 4
    assert result.reasons["near duplicate"] == 4  # the teacher says the same each time


def varied(messages: list[dict[str, Any]]) -> str:
    """Thinks otherwise at each sample; is right for two tasks of three."""
    if len(messages) == 1:
        return "ok"
    number = int(messages[1]["content"].split()[-1])
    thought = " ".join(str(hash((number, time.monotonic_ns(), i)) % 1000) for i in range(12))
    return action(thought, f"final_answer({number + 1 if number % 3 else 0})")


def test_different_ones_of_a_task_are_kept_and_difficulties_balanced(tasks: Path, tmp_path: Path) -> None:
    with FakeEndpoint(varied) as endpoint:
        collect(config(tasks, endpoint.url, samples=2), tmp_path / "run")
    result = filter_run(tmp_path / "run", tmp_path / "kept", FilterConfig(per_task=2))
    assert len(result.kept) == 8
    one = filter_run(tmp_path / "run", tmp_path / "one", FilterConfig(per_task=1))
    assert one.reasons["enough"] == 4
    balanced = FilterConfig(per_task=2, per_difficulty=3)
    few = filter_run(tmp_path / "run", tmp_path / "few", balanced)
    assert len(few.kept) == 3, "all of them are easy: both rollouts were right"
    assert few.reasons["enough of this difficulty"] == 5
