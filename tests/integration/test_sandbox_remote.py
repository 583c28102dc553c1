"""What the docker and E2B sandboxes have in common: the language, the state, tools, candidates."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agentkd.action import parse_action
from agentkd.draw import Draft
from agentkd.errors import ProviderError
from agentkd.sampler import SamplerConfig, SelfConsistentSampler
from agentkd.sandbox import CodeFailure, ForkingSandbox, remote
from agentkd.sandbox.fork import Limits
from agentkd.sandbox.inside.link import START, Link
from agentkd.sandbox.remote import Channel, RemoteSandbox
from agentkd.trajectory import Usage
from tests.integration.remote_sandboxes import IMPORTS, TESTS, start


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


def test_sampled_actions(sandbox: RemoteSandbox) -> None:
    double = sandbox._host.tools["double"]
    sandbox("x = 1\nopen('kept', 'w').write('1')")
    codes = [
        "import os\nos.remove('kept')\ndel x\nprint('gone')",
        "x = x + double(4)\nprint(x)",
        "x = x + 1\n1 / 0",
        "open('own', 'w').write('a')\nx = double(4) + 1\nprint(x)",
        "x = x + double(4)\nprint(x)  # the same program",
    ]
    drafts = [Draft(f"Thought: go.\n```python\n{code}\n```") for code in codes]

    def draw(count: int, first: int, config: SamplerConfig) -> tuple[list[Draft], Usage]:
        return drafts[first : first + count], Usage(output_tokens=count)

    sampler = SelfConsistentSampler(SamplerConfig(n=5, first=2, batch=2, confidence=0.99, likely=None))
    done = sampler.act(draw, parse_action, sandbox)
    assert done.outcome is not None
    assert (done.outcome.printed.strip(), done.usage.output_tokens) == ("9", 5)
    assert [candidate.votes for candidate in done.candidates] == [1, 3, 0, 3, 3]
    assert [candidate.chosen for candidate in done.candidates] == [False, True, False, False, False]
    assert double.calls == [4]  # once, however many ask
    assert len(sandbox.take_tool_uses()) == 1
    # The winner alone has acted, and once.
    assert sandbox("import os\n[x, sorted(os.listdir('.'))]").output == [9, ["kept"]]


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
