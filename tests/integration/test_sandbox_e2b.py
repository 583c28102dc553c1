"""What is E2B's own: round trips, copies of the machine, machines that go, and smolagents' own executor."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError, SandboxError
from agentkd.sandbox import e2b, open_sandbox
from tests.e2b_server import Cloud
from tests.integration.remote_sandboxes import MANAGED, Double, start


def test_one_round_trip_an_action_and_one_a_tool_call(clouds: Cloud, request: pytest.FixtureRequest) -> None:
    session = start("e2b", request)
    session.send_tools({"double": Double()})
    session("x = 1")
    began = clouds.executions
    session("x += 1")
    assert clouds.executions - began == 1
    session("double(double(x))")
    assert clouds.executions - began == 4
    assert clouds.created[0]["allow_internet_access"] is False
    session.cleanup()


def test_candidates_are_copies_of_the_machine(clouds: Cloud, request: pytest.FixtureRequest) -> None:
    session = start("e2b", request)
    session("x = 1")
    [first] = clouds.machines
    session.send_variables({"y": 5})
    tried = session.try_each(["x += y; x", "x += 2; x", "x += 3; x"])
    assert [one.value for one in tried] == [6, 3, 4]
    assert len(clouds.machines) == 4
    session.commit(2)
    assert len(clouds.machines) == 1 and first not in clouds.machines
    assert session("x + y").output == 9
    session.try_each(["x = 0", "x = 1"])
    session.cleanup()
    assert not clouds.machines


def test_the_cloud_copies_machines(request: pytest.FixtureRequest) -> None:
    session = start("e2b cloud", request)
    try:
        session("x = 1")
        assert [one.value for one in session.try_each(["x + 1", "x + 2"])] == [2, 3]
        assert not session.fallback  # type: ignore[attr-defined]
        session.commit(1)
        assert session("x").output == 1
    finally:
        session.cleanup()


def test_where_copies_are_refused_processes_are_forked(clouds: Cloud, request: pytest.FixtureRequest) -> None:
    clouds.forks = False
    session = start("e2b", request)
    session("x = 1")
    assert [one.value for one in session.try_each(["x + 1", "x + 2"])] == [2, 3]  # type: ignore[attr-defined]
    assert len(clouds.machines) == 1
    assert "not in this plan" in session.fallback  # type: ignore[attr-defined]
    session.commit(1)
    session.cleanup()


def test_copies_refused_between_two_batches(clouds: Cloud, request: pytest.FixtureRequest) -> None:
    session = start("e2b", request)
    for chosen, value in ((0, 11), (1, 102)):
        clouds.forks = True
        session.candidates = "machine"  # type: ignore[attr-defined]
        session("x = 10")
        session.try_each(["x += 1"], more=True)
        clouds.forks = False
        session.try_each(["x += 92", "x += 93"], more=True)
        session.commit(chosen)
        assert session("x").output == value
        assert len(clouds.machines) == 1
    session.cleanup()


def test_a_machine_that_is_gone_is_reported(clouds: Cloud, request: pytest.FixtureRequest) -> None:
    session = start("e2b", request)
    session("x = 1")
    for machine in list(clouds.machines.values()):
        machine.kill()
    clouds.machines.clear()
    with pytest.raises(SandboxError, match="state is lost"):
        session("x")
    assert session("1").output == 1
    session.cleanup()


def test_a_machine_that_hangs_is_left_behind(
    clouds: Cloud, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(e2b, "MARGIN_SECONDS", 0.5)
    session = start("e2b", request)
    session("x = 1")
    session.poll_seconds = 0.5
    [machine] = clouds.machines.values()
    os.kill(machine.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(SandboxError, match="does not answer"):
        session("x")
    assert time.monotonic() - began < 10
    assert session("1").output == 1 and machine not in clouds.machines.values()
    session.cleanup()


def test_a_machine_in_use_is_kept_alive(clouds: Cloud, request: pytest.FixtureRequest) -> None:
    session = start("e2b", request, lifetime=1)
    session("x = 1")
    assert clouds.extended == []
    time.sleep(0.6)
    session("x")
    assert clouds.extended == [1]
    session.cleanup()


def test_no_key_and_no_cloud_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2B_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="E2B_API_KEY"):
        open_sandbox("e2b")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    session = e2b.E2BSandbox(api_url=url, sandbox_url=url, retries=0, **MANAGED)
    with pytest.raises(SandboxError, match="no machine"):
        session("1")


@pytest.mark.parametrize("where", ["loopback", "cloud"])
def test_smolagents_own_executor_speaks_the_same(where: str, request: pytest.FixtureRequest) -> None:
    from smolagents import FinalAnswerTool, LogLevel
    from smolagents.monitoring import AgentLogger
    from smolagents.remote_executors import E2BExecutor
    from smolagents.utils import AgentError

    options: dict[str, Any] = {}
    if where == "loopback":
        options = {"debug": True, "sandbox_url": request.getfixturevalue("clouds").url}
    elif not os.environ.get("E2B_API_KEY"):
        pytest.skip("no key in E2B_API_KEY")
    executor = E2BExecutor([], AgentLogger(level=LogLevel.OFF), **options)
    request.addfinalizer(executor.sandbox.kill)
    executor.send_variables({"start": 2})
    assert executor("x = start + 3\nprint('hello')\nx").output == "5"
    assert "hello" in executor("print('hello')").logs
    with pytest.raises(AgentError, match="ZeroDivisionError"):
        executor("1 / 0")
    executor.send_tools({"final_answer": FinalAnswerTool()})
    done = executor("final_answer(x)")
    assert done.is_final_answer and done.output == 5


def test_collecting_in_the_cloud(clouds: Cloud, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    options = "--teacher expert --error-rate 0 --tasks gym:products --n 2 --sandbox e2b --workers 1 --json"
    command = [sys.executable, "-m", "agentkd", "collect", *options.split(), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "E2B_DEBUG": "true", "E2B_SANDBOX_URL": clouds.url}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert clouds.executions >= 4
    lines = (tmp_path / "run" / "trajectories.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line)["stop_reason"] == "final_answer" for line in lines)


def test_many_sessions_at_once(request: pytest.FixtureRequest) -> None:
    clouds = request.getfixturevalue("clouds")
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        session = e2b.E2BSandbox(api_url=clouds.url, sandbox_url=clouds.url, **MANAGED)
        session(f"x = {number}")
        results[number] = session("x").output
        session.cleanup()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: number for number in range(4)}
    assert not clouds.machines
