"""The fork sandbox: its language, what forking keeps and drops, and what happens when a part of it dies."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError, SandboxError
from agentkd.sandbox import CodeFailure, ForkingSandbox, Sandbox
from agentkd.sandbox.fork import ForkSandbox, Limits
from agentkd.sandbox.inside import seccomp
from agentkd.sandbox.isolation import choose

try:
    choose()
except SandboxError as exc:
    pytest.skip(f"no isolation here: {exc}", allow_module_level=True)


class Double:
    """A tool."""

    inputs = {"number": {"type": "integer"}}

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, number: int) -> int:
        self.calls.append(number)
        return 2 * number


@pytest.fixture
def session() -> Iterator[ForkSandbox]:
    made = ForkSandbox(
        imports=("numpy", "os", "asyncio", "dataclasses", "threading", "sys", "contextlib"), timeout=5
    )
    made.send_tools({"final_answer": object(), "double": Double()})
    yield made
    made.close()


def root(session: ForkSandbox) -> int:
    lines = Path(f"/proc/self/fdinfo/{session._pidfd}").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["Pid"])


def running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def gone(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(pid)


def test_it_is_what_the_agent_wants(session: ForkSandbox) -> None:
    assert isinstance(session, Sandbox)
    assert isinstance(session, ForkingSandbox)


LANGUAGE = {
    "class": ("class A:\n    def __init__(self, n):\n        self.n = n\n    def __add__(self, o):\n"
              "        return A(self.n + o.n)\n(A(1) + A(2)).n", 3),
    "generator": ("def g():\n    x = yield 1\n    yield x\ni = g()\n[next(i), i.send(5)]", [1, 5]),
    "match": ("match {'a': [1, 2]}:\n    case {'a': [x, *rest]}:\n        y = x, rest\ny", [1, [2]]),
    "comprehensions": ("n = 3\n{i: [j for j in range(i) if j % 2] for i in range(n + 1)}",
                       {"0": [], "1": [], "2": [1], "3": [1]}),
    "walrus": ("[y := 4, y ** 2][1] + y", 20),
    "closure over state": ("base = 10\ndef outer():\n    k = 1\n    def inner(x):\n        nonlocal k\n        k += x\n"
                           "        return k + base\n    return inner\nf = outer()\nf(1)\nf(2)", 14),
    "global": ("total = 0\ndef add(x):\n    global total\n    total += x\nfor i in range(4):\n    add(i)\ntotal", 6),
    "dataclass": ("from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int\n    y: int = 2\n"
                  "sorted([P(3), P(1)])[0].x", 1),
    "async": ("import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x * 2\n"
              "async def g():\n    return await asyncio.gather(f(1), f(2))\nasyncio.run(g())", [2, 4]),
    "decorator": ("def twice(f):\n    return lambda *a: f(f(*a))\n@twice\ndef inc(x):\n    return x + 1\ninc(1)", 3),
    "with": ("from contextlib import contextmanager\n@contextmanager\ndef c():\n    yield 7\nwith c() as v:\n    pass\nv", 7),
    "lambda defaults": ("fs = [lambda i=i: i * i for i in range(3)]\n[f() for f in fs]", [0, 1, 4]),
    "star import": ("from math import *\nfloor(pi)", 3),
    "f-string": ("v = 3.14159\nf'{v:.2f} {v!r:>8} {\"x\" * 2}'", "3.14  3.14159 xx"),
    "recursion": ("def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\nfib(15)", 610),
    "threads": ("import threading\nout = []\nts = [threading.Thread(target=out.append, args=(i,)) for i in range(4)]\n"
                "[t.start() for t in ts]\n[t.join() for t in ts]\nsorted(out)", [0, 1, 2, 3]),
    "big integer": ("10 ** 40", 10**40),
    "set": ("{3, 1, 2}", [1, 2, 3]),
    "numpy": ("import numpy as np\nnp.arange(3).sum()", 3),
    "no value": ("x = 1", None),
}  # fmt: skip


def test_the_language_is_cpythons(session: ForkSandbox) -> None:
    for name, (code, value) in LANGUAGE.items():
        assert session(code).output == value, name


def test_state_prints_and_final_answers(session: ForkSandbox) -> None:
    session("x = 5")
    done = session("print('a'); print('b', end='')\nx + 1")
    assert (done.output, done.logs, done.is_final_answer) == (6, "a\nb", False)
    code = "def f():\n    try:\n        final_answer({'x': x})\n    except Exception:\n        final_answer('caught')\nf()\nx = 9"
    done = session(code)
    assert done.is_final_answer
    assert done.output == {"x": 5}
    assert session("x").output == 5


def test_an_error_shows_own_lines_and_no_paths(session: ForkSandbox) -> None:
    session("def half(x):\n    return x / 0")
    with pytest.raises(CodeFailure) as caught:
        session("print('before')\ny = 1\nhalf(y)")
    assert caught.value.message.startswith("ZeroDivisionError")
    assert "line 3: half(y)" in caught.value.message
    assert "line 2 in half: return x / 0" in caught.value.message
    assert caught.value.printed == "before\n"
    assert session("y").output == 1, "what ran before the error is kept"
    for code in ("import json\njson.loads('{')", "open('/nowhere')", "import os.nothing", "import pip"):
        with pytest.raises(CodeFailure) as caught:
            session(code)
        assert sys.prefix not in caught.value.message
        assert sys.base_prefix not in caught.value.message
    with pytest.raises(CodeFailure, match=r"SyntaxError: .*line 2"):
        session("x = 1\ny = = 2")


def test_output_is_cut_with_a_mark(session: ForkSandbox) -> None:
    done = session("for i in range(3):\n    print('x' * 49_999)\n'y' * 70_000")
    assert done.logs.endswith("[output cut: the first 50000 of 150000 characters]")
    assert len(done.logs) < 50_200
    assert len(done.output) <= 51_000


def test_candidates_do_not_change_the_session(session: ForkSandbox) -> None:
    session("data = [1]\nopen('f', 'w').write('old')")
    codes = [
        "data.append(2); open('f', 'w').write('a'); len(data)",
        "data.clear(); open('g', 'w'); len(data)",
        "1 / 0",
    ]
    first, second, third = session.try_each(codes)
    assert (first.value, second.value, third.value) == (2, 0, None)
    assert third.error is not None
    assert not third.ended
    session.discard()
    assert session("[data, open('f').read(), sorted(os.listdir()) if 'os' in globals() else 0]").output[
        :2
    ] == [[1], "old"]
    session.try_each(codes)
    session.commit(0)
    assert session("import os\n[data, open('f').read(), os.listdir()]").output == [[1, 2], "a", ["f"]]
    with pytest.raises(ValueError, match="cannot become"):
        session.commit(0)


def test_random_state_is_the_same_in_every_fork(session: ForkSandbox) -> None:
    draw = "import random, numpy\n[random.random(), float(numpy.random.rand())]"
    one, two = session.try_each([draw, draw])
    assert one.value == two.value
    session.commit(1)
    after = session(draw).output
    assert after != one.value
    fresh = ForkSandbox(imports=("numpy",))
    try:
        assert [fresh(draw).output, fresh(draw).output] == [one.value, after]
    finally:
        fresh.close()


def test_fresh_sessions_are_equal_and_seeds_differ() -> None:
    code = "import random\n[random.random(), list({'b', 'a', 'c', 'zz'}), hash('x')]"
    seen = []
    for seed in (0, 0, 1):
        session = ForkSandbox(limits=Limits(seed=seed))
        seen.append(session(code).output)
        session.close()
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[2][0]


def test_open_files_follow_the_candidate(session: ForkSandbox) -> None:
    session("f = open('log', 'w+')\nf.write('one ')\nf.flush()")
    session.try_each(
        [f"f.write('{word}')\nf.flush()\nf.seek(0)\nf.read()" for word in ("two", "three", "four")]
    )
    session.commit(1)
    assert session("f.write('!')\nf.flush()\nopen('log').read()").output == "one three!"


def test_fifty_commits_in_a_row(session: ForkSandbox) -> None:
    session("n = 0")
    for _ in range(50):
        session.try_each(["n += 1", "n += 100"])
        session.commit(0)
    assert session("n").output == 50


def test_discarded_candidates_do_not_add_up() -> None:
    session = ForkSandbox(limits=Limits(processes=12))
    session("n = 0")
    for _ in range(8):
        session.try_each(["n += 1"] * 4)
        session.discard()
    assert session("n").output == 0
    session.close()


def test_tools_are_called_once_for_equal_calls(session: ForkSandbox) -> None:
    tool = Double()
    session.send_tools({"double": tool})
    outcomes = session.try_each(["double(4)", "double(4) + 1", "double(5)"])
    assert [outcome.value for outcome in outcomes] == [8, 9, 10]
    assert sorted(tool.calls) == [4, 5]
    assert [outcome.tool_uses[0].arguments for outcome in outcomes] == [
        {"number": 4},
        {"number": 4},
        {"number": 5},
    ]
    session.commit(1)
    (use,) = session.take_tool_uses()
    assert (use.name, use.result) == ("double", "8")
    assert session.take_tool_uses() == ()


def test_arguments_of_tools_are_checked_and_can_be_written_down(session: ForkSandbox) -> None:
    for code in ("double('4')", "double(True)", "double([[[1]]])"):
        with pytest.raises(CodeFailure, match="TypeError in double"):
            session(code)
    session.take_tool_uses()
    with pytest.raises(CodeFailure, match="too deep"):
        session("x = 1\nfor _ in range(200):\n    x = [x]\ndouble(x)")
    with pytest.raises(CodeFailure):
        session("double('\\ud800')")
    assert all(use.model_dump_json() for use in session.take_tool_uses())


def test_calls_have_a_bound(session: ForkSandbox) -> None:
    with pytest.raises(CodeFailure, match="too many calls"):
        session("for i in range(1100):\n    double(i)")
    assert len(session.take_tool_uses()) == 1000


def test_a_killed_action_leaves_the_state(session: ForkSandbox) -> None:
    session("x = 5")
    began = time.monotonic()
    (outcome,) = session.try_each(["x = 6\nwhile True:\n    pass"], timeout=0.3)
    assert outcome.timed_out
    assert outcome.ended
    assert time.monotonic() - began < 4
    session.discard()
    for code, told in (
        ("import os\nos._exit(3)", "ended its process"),
        ("import os\nos.abort()", "crashed its interpreter"),
    ):
        with pytest.raises(CodeFailure, match=told):
            session(code)
    assert session("x").output == 5


def test_much_can_be_sent_to_a_session_that_is_stopped(session: ForkSandbox) -> None:
    session("x = 1")
    session.send_variables({"texts": ["y" * 40_000] * 75})
    assert session("sum(map(len, texts)) + x").output == 3_000_001


def test_a_killed_session_is_the_codes_failure_and_begins_anew(session: ForkSandbox) -> None:
    session.send_variables({"given": 3})
    session("x = 1")
    pid = root(session)
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    with pytest.raises(CodeFailure, match="variables are lost"):
        session("x")
    assert session("given + double(1)").output == 5


def test_a_killed_zygote_is_the_sandboxs_failure_and_is_started_again(session: ForkSandbox) -> None:
    session("x = 1")
    pid = root(session)
    status = Path(f"/proc/{pid}/status").read_text()
    zygote = int(status.partition("PPid:")[2].split()[0])
    os.kill(zygote, signal.SIGKILL)
    assert gone(zygote)
    assert gone(pid)
    with pytest.raises((SandboxError, CodeFailure)):
        session("x")
    assert session("1 + 1").output == 2


def test_nothing_is_left_of_a_killed_host(tmp_path: Path) -> None:
    script = """
        import sys, time
        from agentkd.sandbox.fork import ForkSandbox
        sessions = [ForkSandbox() for _ in range(2)]
        for session in sessions:
            session("x = 1")
        pids = [int(dict(l.split(":", 1) for l in open(f"/proc/self/fdinfo/{s._pidfd}"))["Pid"]) for s in sessions]
        print(*pids, sessions[0]._zygote.process.pid, flush=True)
        sessions[0]("while True: pass")
    """
    host = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert host.stdout is not None
    pids = [int(word) for word in host.stdout.readline().split()]
    host.stdout.close()
    assert len(pids) == 3
    host.kill()
    host.wait()
    assert all(gone(pid) for pid in pids)


def test_closing(session: ForkSandbox) -> None:
    session("x = 1")
    pid = root(session)
    session.close()
    session.close()
    assert gone(pid, 0.1)
    assert session("1 + 2").output == 3, "a closed session begins anew"


def test_sessions_from_many_threads() -> None:
    def work(number: int) -> Any:
        session = ForkSandbox()
        try:
            session(f"x = {number}")
            session.try_each(["x += 1", "x += 2"])
            session.commit(1)
            return session("x").output
        finally:
            session.close()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(24))) == [number + 2 for number in range(24)]


def test_a_host_that_forks(session: ForkSandbox) -> None:
    session("x = 1")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            own = ForkSandbox()
            code = 0 if own("40 + 2").output == 42 else 2
            own.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert session("x").output == 1


def test_an_unknown_isolation_is_named() -> None:
    with pytest.raises(ConfigError, match="moat"):
        ForkSandbox(isolation="moat")("1")


def _decide(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """Run a filter as the kernel does."""
    lines = [struct.unpack("=HBBI", program[at : at + 8]) for at in range(0, len(program), 8)]
    words = {0: number, 4: arch, **{16 + 8 * place: value for place, value in enumerate(arguments)}}
    at = held = 0
    while True:
        code, yes, no, value = lines[at]
        at += 1
        if code == 0x06:
            return int(value)
        if code == 0x20:
            held = words.get(value, 0) & 0xFFFFFFFF
        elif code == 0x54:
            held &= value
        else:
            true = {0x15: held == value, 0x25: held > value, 0x45: bool(held & value)}[code]
            at += yes if true else no


@pytest.mark.parametrize(
    ("machine", "arch", "column"), [("x86_64", 0xC000003E, 0), ("aarch64", 0xC00000B7, 1)]
)
def test_the_filter_of_system_calls(machine: str, arch: int, column: int) -> None:
    allowed, refused, missing, killed = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    program = seccomp.program(machine)

    def decide(numbers: tuple[int, int], *arguments: int) -> int:
        return _decide(program, arch, numbers[column], *arguments)

    assert _decide(program, 0x40000003, 1) == killed, "the 32-bit calls"
    assert decide((0x40000000 + 39, 0x40000000)) == missing, "the x32 calls"
    assert decide((435, 435)) == missing, "clone3"
    assert decide((0, 63)) == allowed, "read"
    clone, pair, limit, control = (56, 220), (53, 199), (302, 261), (72, 25)
    assert [decide(clone, flags) for flags in (17, 0x1200011, 0x3D0F00)] == [allowed] * 3
    assert [decide(clone, flags) for flags in (18, 9, 17 | 0x8000, 17 | 0x10000000, 17 | 0x80)] == [
        refused
    ] * 5
    assert [decide(pair, 1, kind) for kind in (1, 5, 1 | 0x80000)] == [allowed] * 3
    assert [decide(pair, *kind) for kind in ((1, 2), (1, 2 | 0x80000), (2, 1), (1, 3))] == [refused] * 4
    assert [decide(limit, pid) for pid in (0, 1, 7)] == [allowed, refused, refused]
    assert [decide(control, 0, command) for command in (1, 4, 8, 10, 15)] == [allowed] * 2 + [refused] * 3
    for numbers in (
        (62, 129),
        (101, 117),
        (59, 221),
        (41, 198),
        (165, 40),
        (321, 280),
        (425, 425),
        (109, 154),
    ):
        assert decide(numbers) == refused
