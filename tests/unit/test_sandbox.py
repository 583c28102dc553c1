from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agentkd.errors import ConfigError
from agentkd.sandbox import CodeFailure, open_sandbox


@pytest.fixture
def sandbox() -> Iterator[Any]:
    session = open_sandbox("local", timeout=1.0)
    session.send_tools({"final_answer": object()})
    yield session
    session.cleanup()


def test_value_of_the_last_expression_only(sandbox: Any) -> None:
    assert sandbox("x = 5").output is None
    assert sandbox("x + 1").output == 6
    assert sandbox("print('a'); print('b')").logs == "a\nb\n"


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("final_answer(10 ** 40)", 10**40),
        ("final_answer([1, (2, 3)])", [1, [2, 3]]),
        ("final_answer({1: 2})", {"1": 2}),
        ("final_answer({3, 1, 2})", [1, 2, 3]),
        ("from datetime import date\nfinal_answer(date(2020, 1, 2))", "2020-01-02"),
        ("final_answer(None)", None),
    ],
)
def test_answers_come_over_as_plain_values(sandbox: Any, code: str, value: Any) -> None:
    done = sandbox(code)
    assert done.is_final_answer
    assert done.output == value


def test_an_endless_loop_is_killed_and_the_session_usable_again(sandbox: Any) -> None:
    sandbox("x = 5")
    began = time.monotonic()
    with pytest.raises(CodeFailure, match="longer than 1 s") as caught:
        sandbox("for i in range(10 ** 12):\n    pass")
    assert caught.value.timed_out
    assert time.monotonic() - began < 5
    assert sandbox("1 + 1").output == 2
    with pytest.raises(CodeFailure, match="x"):
        sandbox("x")


def test_a_killed_worker_costs_only_its_session(sandbox: Any) -> None:
    other = open_sandbox("local")
    other("y = 1")
    sandbox("x = 1")
    os.kill(sandbox._pid, 9)
    with pytest.raises(CodeFailure):
        sandbox("x")
    assert other("y").output == 1
    other.cleanup()


def test_nothing_is_left_running() -> None:
    session = open_sandbox("local")
    session("x = 1")
    pid = session._pid  # type: ignore[attr-defined]
    session.cleanup()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_hosts_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    from agentkd.sandbox import local

    local._zygote.stop()  # the next session starts a new one, with this environment at hand
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    session = open_sandbox("local", imports=["os"])
    session.send_tools({})
    seen = session("import os\nstr(dict(os.environ))").output
    session.cleanup()
    assert "PATH" in seen
    assert "hunter2" not in seen


def test_printed_output_before_an_error_is_kept(sandbox: Any) -> None:
    with pytest.raises(CodeFailure) as caught:
        sandbox("print('before')\n1 / 0")
    assert "before" in caught.value.printed
    with pytest.raises(CodeFailure) as caught:
        sandbox("undefined_name")
    assert caught.value.printed == ""


def test_tools_time_is_not_the_codes_time(sandbox: Any) -> None:
    class Slow:
        inputs: dict[str, Any] = {}

        def __call__(self) -> str:
            time.sleep(1.5)
            return "done"

    sandbox.send_tools({"slow": Slow()})
    assert sandbox("slow()").output == "done"
    (use,) = sandbox.take_tool_uses()
    assert use.seconds > 1
    assert sandbox.take_tool_uses() == ()


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ConfigError, match="moon"):
        open_sandbox("moon")
