"""Code that means harm, and sessions that are lost, in the docker and E2B sandboxes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from agentkd.errors import SandboxError
from agentkd.sandbox import CodeFailure
from agentkd.sandbox.remote import RemoteSandbox
from tests.integration.remote_sandboxes import Double, start, supervisors


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


def test_nothing_outlives_its_action(sandbox: RemoteSandbox) -> None:
    sandbox("x = 1")
    stray = """
import os, time
if os.fork() == 0:
    try:
        os.setsid()
    except OSError:
        pass  # refused where the filter holds
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
