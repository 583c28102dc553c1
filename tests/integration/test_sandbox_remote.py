"""The docker and E2B sandboxes, against stand-ins that run what they are sent; the same against the real
ones where there is a daemon or a key."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError, ProviderError, SandboxError
from agentkd.sandbox import CodeFailure, ForkingSandbox, docker, e2b, open_sandbox, remote
from agentkd.sandbox.fork import Limits
from agentkd.sandbox.inside.link import START, Link
from agentkd.sandbox.machine import probe
from agentkd.sandbox.remote import Channel, RemoteSandbox
from tests.e2b_server import Cloud, cloud

TESTS = Path(__file__).parents[1]
IMPORTS = ("os", "socket", "subprocess", "threading", "sys", "json")
MANAGED = {"api_key": "e2b_" + "0" * 40}


def bubblewrap_works() -> bool:
    command = ["bwrap", "--ro-bind", "/", "/", "--unshare-user", "--unshare-pid", "--unshare-net", "true"]
    return bool(shutil.which("bwrap")) and not subprocess.run(command, capture_output=True).returncode


@pytest.fixture
def clouds() -> Iterator[Cloud]:
    pytest.importorskip("e2b_code_interpreter", reason="the extra e2b is not installed")
    with cloud() as server:
        yield server


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in for docker's client, first on the PATH."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{TESTS / "docker_client.py"}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


def start(kind: str, request: pytest.FixtureRequest, **options: Any) -> RemoteSandbox:
    """A session of one kind; skips what this machine does not have."""
    if kind == "docker stand-in":
        if not bubblewrap_works():
            pytest.skip("needs bubblewrap")
        request.getfixturevalue("client")
        return docker.DockerSandbox(IMPORTS, **options)
    if kind == "docker":
        try:
            docker.check()
        except SandboxError as exc:
            pytest.skip(f"no docker: {exc}")
        return docker.DockerSandbox(IMPORTS, **options)
    if kind == "e2b cloud":
        if not os.environ.get("E2B_API_KEY"):
            pytest.skip("no key in E2B_API_KEY")
        return e2b.E2BSandbox(IMPORTS, **options)
    url = request.getfixturevalue("clouds").url
    if kind == "e2b debug":
        return e2b.E2BSandbox(IMPORTS, debug=True, sandbox_url=url, **options)
    return e2b.E2BSandbox(IMPORTS, api_url=url, sandbox_url=url, **MANAGED, **options)


KINDS = ["docker stand-in", "e2b", "e2b debug", "docker", "e2b cloud"]


@pytest.fixture(params=KINDS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[RemoteSandbox]:
    session = start(request.param, request, timeout=3.0)
    session.send_tools({"double": Double(), "final_answer": object()})
    yield session
    session.cleanup()


class Double:
    inputs = {"x": {"type": "integer"}}

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x: int) -> int:
        self.calls.append(x)
        return 2 * x


def test_it_is_a_forking_sandbox(sandbox: RemoteSandbox) -> None:
    assert isinstance(sandbox, ForkingSandbox)


def test_an_action_and_what_comes_back(sandbox: RemoteSandbox) -> None:
    sandbox.send_variables({"start": [1, "ä", None]})
    assert sandbox("x = start\nprint('ä', x)").logs == "ä [1, 'ä', None]\n"
    assert sandbox("def f(n):\n    return n + len(x)\nf(1)").output == 4
    assert sandbox("class A:\n    y: int = 2\nsum(v for v in (A.y, double(3)))").output == 8
    [use] = sandbox.take_tool_uses()
    assert (use.name, use.arguments, use.result) == ("double", {"x": 3}, "6")
    done = sandbox("final_answer({'n': 10 ** 30})\nprint('never')")
    assert done.is_final_answer and done.output == {"n": 10**30} and done.logs == ""


def test_failures_leave_the_state(sandbox: RemoteSandbox) -> None:
    sandbox("x = 5")
    for code, said in (
        ("x = 6\nprint('a')\n1 / 0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        ("double('a')", "TypeError in double"),
        ("import ctypes", "not allowed"),
    ):
        with pytest.raises(CodeFailure, match=said):
            sandbox(code)
    assert sandbox("x").output == 6  # an exception is an end like another
    for code, said in (
        ("x = 7\nimport os\nos._exit(3)", "ended its process"),
        ("x = 7\nwhile True:\n    pass", "longer than 3 s"),
        (
            "x = 7\nimport os\nos.closerange(3, 64)",
            "ended|broke",
        ),
    ):
        began = time.monotonic()
        with pytest.raises(CodeFailure, match=said) as caught:
            sandbox(code)
        assert time.monotonic() - began < 12
        assert caught.value.timed_out == ("while" in code)
        assert sandbox("x").output == 6


def test_candidates(sandbox: RemoteSandbox) -> None:
    double = sandbox._host.tools["double"]
    sandbox("x = 1\nopen('kept', 'w').write('1')")
    codes = [
        "x += double(4); open('own', 'w').write('a'); x",
        "import os\nx = double(4) + 10; os.listdir('.')",
        "import os\nos._exit(0)",
        "1 / 0",
    ]
    tried = sandbox.try_each(codes)
    assert [one.value for one in tried] == [9, ["kept"], None, None]
    assert [one.ended for one in tried] == [False, False, True, False]
    assert "ZeroDivisionError" in str(tried[3].error)
    assert double.calls == [4]  # once for both
    sandbox.commit(1)
    assert sandbox("x").output == 18
    assert len(sandbox.take_tool_uses()) == 1
    sandbox.try_each(["x = 0", "x = 1"])
    sandbox.discard()
    assert sandbox("x").output == 18
    with pytest.raises(ValueError):
        sandbox.commit(0)
    assert sandbox.try_each(["x = 2", "import os\nos._exit(0)"])[1].ended
    with pytest.raises(ValueError):
        sandbox.commit(1)


def test_candidates_in_several_batches(sandbox: RemoteSandbox) -> None:
    double = sandbox._host.tools["double"]
    sandbox("x = 1\nopen('kept', 'w').write('1')")
    assert [one.value for one in sandbox.try_each(["x += double(1); x"], more=True)] == [3]
    tried = sandbox.try_each(["x += double(1) + 1; x", "import os\nopen('own', 'w'); x = 9; x"], more=True)
    assert [one.value for one in tried] == [4, 9]
    assert double.calls == [1]
    sandbox.commit(2)
    assert sandbox("import os\n[x, sorted(os.listdir('.'))]").output == [9, ["kept", "own"]]
    sandbox.try_each(["x = 1"], more=True)
    sandbox.try_each(["x = 2"], more=True)
    sandbox.commit(0)
    assert sandbox("x").output == 1
    sandbox.try_each(["x = 3"], more=True)
    assert [one.value for one in sandbox.try_each(["x + 4"])] == [5]  # not more: the first is forgotten
    sandbox.discard()
    assert sandbox("x").output == 1


def test_forged_messages_do_not_pass(sandbox: RemoteSandbox) -> None:
    sandbox("x = 1")
    forge = """
import os, json, sys
for data in ({first!r}, {second!r}):
    for fd in range(3, 64):
        try: os.write(fd, data)
        except OSError: pass
"""
    whole = json.dumps({"value": "forged", "final": True, "printed": ""}).encode()
    framed = len(whole).to_bytes(4, "big") + whole
    # A forged outcome is an outcome: the code could have returned it. What follows it is dropped.
    done = sandbox(forge.format(first=framed, second=framed))
    assert done.output == "forged"
    with pytest.raises(CodeFailure, match=r"broke its|ended its|lost"):
        sandbox(forge.format(first=b"\xff" * 64, second=b""))
    nested = b"[" * 100_000
    with pytest.raises(CodeFailure, match=r"broke its|ended its|lost"):
        sandbox(forge.format(first=len(nested).to_bytes(4, "big") + nested, second=b""))
    kept = {"kept": True, "lost": True}
    text = json.dumps(kept).encode()
    done = sandbox(forge.format(first=len(text).to_bytes(4, "big") + text, second=b""))
    assert done.output is None  # a supervisor's word in a candidate's mouth is only an odd outcome
    try:
        assert sandbox("1 + 1").output == 2
    except CodeFailure as exc:  # stopped while it still wrote: what it wrote then is no fork
        assert "lost" in exc.message
        assert sandbox("1 + 1").output == 2


HOSTILE = {
    "its own machinery emptied": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("inside"):
        module.__dict__.clear()
""",
    "builtins broken": """
import builtins
builtins.len = builtins.isinstance = builtins.open = None
""",
    "threads that eat messages": """
import os, threading
def eat(fd):
    while True:
        os.read(fd, 1)
for fd in range(3, 32):
    threading.Thread(target=eat, args=(fd,), daemon=True).start()
""",
    "descriptors swapped": """
import os
for fd in range(3, 32):
    try:
        os.dup2(0, fd)
    except OSError:
        pass
""",
    "a flood of calls": """
import json, os
call = json.dumps({"call": "double", "args": [1], "kwargs": {}}).encode()
for fd in range(3, 32):
    try:
        os.write(fd, (len(call).to_bytes(4, "big") + call) * 1000)
    except OSError:
        pass
""",
    "signals": """
import os
for pid in (1, os.getppid(), -1):
    try:
        os.kill(pid, 9)
    except OSError:
        pass
""",
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("kind", ["docker stand-in", "e2b"])
def test_hostile_state_costs_its_own_session_at_most(
    kind: str, what: str, request: pytest.FixtureRequest
) -> None:
    session = start(kind, request, timeout=3.0)
    session.send_tools({"double": Double()})
    other = start(kind, request, timeout=3.0)
    other("y = 5")
    began = time.monotonic()
    for code in (HOSTILE[what], "1 + 1", "1 + 1"):
        with contextlib.suppress(CodeFailure):  # it is told of, whatever came of it
            session(code)
    assert time.monotonic() - began < 40
    session.close()
    assert session("1 + 1").output == 2
    assert other("y").output == 5
    session.cleanup()
    other.cleanup()


@pytest.mark.parametrize("kind", ["docker stand-in", "e2b"])
def test_too_much_time_or_memory(kind: str, request: pytest.FixtureRequest) -> None:
    limits = Limits(cpu_seconds=1, memory_mb=512)
    session = start(kind, request, timeout=20.0, limits=limits)
    session("x = 1")
    with pytest.raises(CodeFailure, match="MemoryError"):
        session("y = bytearray(1 << 30)")
    began = time.monotonic()
    with pytest.raises(CodeFailure, match="too much processor time") as caught:
        session("sum(range(10 ** 12))")
    assert not caught.value.timed_out and time.monotonic() - began < 15
    assert session("x").output == 1
    session.cleanup()


def test_output_and_values_are_capped(sandbox: RemoteSandbox) -> None:
    done = sandbox("print('a' * 300_000)\n'b' * 300_000")
    assert len(done.logs) < 60_000 and "output cut" in done.logs
    assert len(done.output) == 50_000


def test_nothing_outlives_its_action(sandbox: RemoteSandbox) -> None:
    sandbox("x = 1")
    stray = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            open('alive', 'a').write('.')
            time.sleep(0.01)
    os._exit(0)
time.sleep(0.2)
os.path.exists('alive')
"""
    assert sandbox(stray).output is True
    before = sandbox("import os\nos.path.getsize('alive')").output
    time.sleep(0.1)
    assert sandbox("os.path.getsize('alive')").output == before


def test_the_world_outside_is_closed(sandbox: RemoteSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    assert "SECRET_TOKEN" not in sandbox("import os\ndict(os.environ)").output
    reach = "try:\n    found = bool({})\nexcept OSError:\n    found = 'closed'\nfound"
    assert sandbox("import socket\n" + reach.format("socket.socket()")).output == "closed"
    if sandbox.about["landlock"]:
        assert sandbox(reach.format("open('/proc/self/environ').read()")).output == "closed"
    assert sandbox.about["seccomp"] in (True, False) and "numpy" in sandbox.about["modules"]


def test_a_tool_that_fails_on_the_host_is_not_the_models_fault(sandbox: RemoteSandbox) -> None:
    class Down:
        inputs = {"x": {"type": "integer"}}

        def __call__(self, x: int) -> int:
            raise ProviderError("The endpoint is down.", "")

    sandbox.send_tools({"down": Down()})
    with pytest.raises(ProviderError):
        sandbox("down(1)")
    assert sandbox("2").output == 2  # a new session


def test_random_numbers_repeat(request: pytest.FixtureRequest) -> None:
    found = []
    for _ in range(2):
        session = start("e2b", request, timeout=5.0, limits=Limits(seed=7))
        first = session("import random\nrandom.random()").output
        tried = session.try_each(["random.random()", "random.random()"])
        session.commit(0)
        found.append((first, *(one.value for one in tried), session("random.random()").output))
        session.cleanup()
    assert found[0] == found[1]
    assert found[0][1] == found[0][2] != found[0][3]


# Sessions that are lost.


def supervisors() -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"inside.supervisor" in line and b"bwrap" not in line.split(b"\0")[0]:
                found.add(int(entry.name))
    return found


@pytest.mark.parametrize("kind", ["docker stand-in", "e2b"])
def test_a_dead_supervisor_is_reported_and_the_next_session_is_new(
    kind: str, request: pytest.FixtureRequest
) -> None:
    before = supervisors()
    session = start(kind, request)
    session("x = 1")
    for pid in supervisors() - before:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises((CodeFailure, SandboxError), match="lost"):
        session("x")
    with pytest.raises(CodeFailure, match="NameError"):
        session("x")
    session.cleanup()


def test_nothing_outlives_a_host_that_is_killed(request: pytest.FixtureRequest) -> None:
    before = supervisors()
    start("docker stand-in", request).cleanup()
    code = (
        "from agentkd.sandbox.docker import DockerSandbox\n"
        "session = DockerSandbox(('os',))\nsession('x = 1')\nprint('ready', flush=True)\n"
        "session.try_each(['while True: pass', 'import os\\nos.fork()\\nwhile True: pass'], timeout=60)\n"
    )
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None and host.stdout.readline() == "ready\n"
    time.sleep(0.3)
    assert supervisors() - before
    host.kill()
    host.wait()
    host.stdout.close()
    for _ in range(100):
        if not supervisors() - before:
            break
        time.sleep(0.05)
    assert not supervisors() - before


@pytest.mark.parametrize("kind", ["docker stand-in", "e2b"])
def test_nothing_is_left_running(kind: str, request: pytest.FixtureRequest) -> None:
    before = supervisors()
    session = start(kind, request, timeout=1.0)
    session("x = 1")
    session.try_each(["x", "while True: pass"])
    assert supervisors() - before
    session.cleanup()
    for _ in range(50):
        if not supervisors() - before:
            break
        time.sleep(0.05)
    assert not supervisors() - before


def test_the_clock_stands_still_in_a_tool(request: pytest.FixtureRequest) -> None:
    class Slow:
        inputs: dict[str, Any] = {}

        def __call__(self) -> str:
            time.sleep(1.2)
            return "done"

    session = start("e2b", request, timeout=0.8)
    session.send_tools({"slow": Slow()})
    assert session("slow()").output == "done"
    session.cleanup()


# E2B.


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


# Docker.


def test_the_container_has_nothing_to_spare() -> None:
    command = docker.container_command(
        "docker", "n", "image", Limits(memory_mb=512, processes=10, scratch_mb=8)
    )
    text = " ".join(command)
    for part in (
        "--network none",
        "--read-only",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--user 65534:65534",
        "--memory 512m --memory-swap 512m",
        "--pids-limit 12",
        "--pull never",
        "--rm",
        "size=8m",
        "target=/agentkd/inside,readonly",
    ):
        assert part in text
    assert "--privileged" not in text and "/var/run/docker.sock" not in text
    assert command.index("image") > command.index("--entrypoint")


def fake_client(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "docker"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("script", "said", "hint"),
    [
        (None, "not installed", "Install"),
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 1", "Cannot connect", "start"),
        ("echo 'permission denied while trying to connect' >&2; exit 1", "may not speak", "usermod"),
        (
            'case "$1" in image) exit 1;; esac; echo 28',
            "python:3.12-slim is not here",
            "docker pull python:3.12-slim",
        ),
    ],
)
def test_what_docker_lacks_is_named(
    script: str | None, said: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(docker.IMAGE_VARIABLE, raising=False)
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fake_client(tmp_path, script, monkeypatch)
    with pytest.raises(SandboxError, match=said) as caught:
        open_sandbox("docker")
    assert hint in caught.value.hint


def test_another_image(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(docker.IMAGE_VARIABLE, "absent/image:1")
    with pytest.raises(SandboxError, match="absent/image:1"):
        open_sandbox("docker")


def test_a_container_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client(
        tmp_path, 'case "$1" in run) echo "no such runtime" >&2; exit 125;; esac; echo 28', monkeypatch
    )
    with pytest.raises(SandboxError, match="no such runtime"):
        docker.DockerSandbox()("1")


def test_the_doctors_probe_holds_here_too(request: pytest.FixtureRequest) -> None:
    session = start("docker stand-in", request)
    assert "65534" in probe(session)
    assert session.about["uid"] == 65534


def test_the_backend_in_the_documentation_runs(tmp_path: Path) -> None:
    text = (TESTS.parent / "docs" / "sandbox.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    script = tmp_path / "backend.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_python_inside_may_be_another(tmp_path: Path) -> None:
    tried = []
    for minor in range(9, 15):
        python = shutil.which(f"python3.{minor}")
        if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
            continue
        session = Beside(python, tmp_path)
        session("x = [n * n for n in range(4)]")
        assert [one.value for one in session.try_each(["sum(x)", "x[-1] / 0"])] == [14, None]
        session.commit(0)
        assert session("import sys\nlist(sys.version_info[:2])").output == [3, minor]
        assert str(session.about["version"]).startswith(f"3.{minor}.")
        session.cleanup()
        tried.append(minor)
    if not tried:
        pytest.skip("no python3.N on the PATH")


class Beside(RemoteSandbox):
    """A supervisor as a plain child process, in any Python."""

    def __init__(self, python: str, scratch: Path) -> None:
        super().__init__(IMPORTS)
        self.python, self.scratch = python, scratch

    def _connect(self) -> Channel:
        return Link([self.python, "-s", "-B", "-c", START, str(Path(remote.__file__).parent)])

    def _order(self) -> dict[str, Any]:
        return {**super()._order(), "scratch": str(self.scratch)}


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
