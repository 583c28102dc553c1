"""Sandbox sessions of a served agent: ready before they are wanted, ended behind the answers."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentkd.errors import SandboxError
from agentkd.sandbox.fork import ForkSandbox
from agentkd.serve import sessions as module

pytest.importorskip("fastapi")


def wait_for(what: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.005)
    return what()


class Fake:
    """A session that says what was done with it."""

    def __init__(self, stuck: threading.Event | None = None) -> None:
        self.done: list[str] = []
        self.alive = True
        self.stuck = stuck

    def open(self) -> None:
        self.done.append("open")

    def cleanup(self) -> None:
        if self.stuck is not None and threading.current_thread().name == "agentkd-sessions":
            self.stuck.wait(10)
        self.done.append("cleanup")


class Plain:
    """One that cannot be opened beforehand."""

    cleaned = False

    def cleanup(self) -> None:
        self.cleaned = True


class Maker:
    def __init__(self, kind: Callable[[], Any] = Fake) -> None:
        self.kind, self.made = kind, list[Any]()

    def __call__(self) -> Any:
        self.made.append(self.kind())
        return self.made[-1]


@pytest.fixture
def closing() -> Iterator[list[module.Sessions]]:
    opened: list[module.Sessions] = []
    yield opened
    for sessions in opened:
        sessions.close()


def test_one_is_ready_before_it_is_wanted(closing: list[module.Sessions]) -> None:
    maker = Maker()
    sessions = module.Sessions(maker)
    closing.append(sessions)
    sessions.prepare()
    assert wait_for(lambda: sessions._ready is not None)
    taken: Any = sessions.take()
    assert (len(maker.made), taken.done) == (1, ["open"])
    sessions.end(taken)
    assert wait_for(lambda: taken.done == ["open", "cleanup"])
    assert wait_for(lambda: sessions._ready is not None), "the next one is ready behind the answer"
    assert len(maker.made) == 2


def test_further_ones_are_opened_while_something_else_is_done(closing: list[module.Sessions]) -> None:
    sessions = module.Sessions(Maker())
    closing.append(sessions)
    taken: list[Any] = [sessions.take() for _ in range(3)]
    assert len({id(it) for it in taken}) == 3
    assert wait_for(lambda: all(it.done == ["open"] for it in taken))


def test_a_dead_one_is_given_to_nobody(closing: list[module.Sessions]) -> None:
    maker = Maker()
    sessions = module.Sessions(maker)
    closing.append(sessions)
    sessions.prepare()
    assert wait_for(lambda: sessions._ready is not None)
    maker.made[0].alive = False
    assert sessions.take() is not maker.made[0]
    assert wait_for(lambda: "cleanup" in maker.made[0].done)


def test_those_that_wait_for_their_end_do_not_pile_up(closing: list[module.Sessions]) -> None:
    stuck = threading.Event()
    sessions = module.Sessions(Maker(lambda: Fake(stuck)))
    closing.append(sessions)
    taken: list[Any] = [sessions.take() for _ in range(module.MOST_ENDING + 3)]
    for session in taken:
        sessions.end(session)
    assert [it.done.count("cleanup") for it in taken[-3:]] == [1, 1, 1], "the answer's own thread ended them"
    assert not any("cleanup" in it.done for it in taken[:-3])
    stuck.set()
    assert wait_for(lambda: all("cleanup" in it.done for it in taken))


def test_closing_ends_all_and_what_comes_later_ends_at_once() -> None:
    maker = Maker()
    sessions = module.Sessions(maker)
    early, late = sessions.take(), sessions.take()
    sessions.end(early)
    sessions.close()
    sessions.end(late)
    assert all("cleanup" in it.done for it in (early, late))
    assert wait_for(lambda: all("cleanup" in it.done for it in maker.made), 1)


def test_what_costs_nothing_before_its_use_is_not_kept_ready(closing: list[module.Sessions]) -> None:
    maker = Maker(Plain)
    sessions = module.Sessions(maker)
    closing.append(sessions)
    sessions.prepare()
    taken: Any = sessions.take()
    sessions.end(taken)
    assert wait_for(lambda: taken.cleaned)
    assert sessions._ready is None


def test_what_cannot_be_made_is_told_to_who_wants_it(closing: list[module.Sessions]) -> None:
    def make() -> Any:
        raise SandboxError("no namespaces")

    sessions = module.Sessions(make)
    closing.append(sessions)
    sessions.prepare()
    with pytest.raises(SandboxError, match="namespaces"):
        sessions.take()


linux = pytest.mark.skipif(sys.platform != "linux", reason="the fork sandbox is Linux's")


@linux
def test_a_fork_session_opens_while_tools_are_sent() -> None:
    for _ in range(5):
        session = ForkSandbox()
        opening = threading.Thread(target=session.open)
        opening.start()
        for number in range(20):
            session.send_variables({f"x{number}": number})
        session.send_tools({"final_answer": object()})
        try:
            assert session(f"sum([{', '.join(f'x{number}' for number in range(20))}])").output == 190
            assert session("final_answer(3)").is_final_answer
            opening.join()
            assert session.alive
        finally:
            session.close()
        assert not session.alive


@linux
def test_a_closed_fork_session_is_not_opened_behind_its_end() -> None:
    session = ForkSandbox()
    session.close()
    session.open()
    assert not session.alive
    assert session("1 + 1").output == 2, "an action begins it anew"
    session.close()


@linux
def test_behind_a_final_answer_nothing_is_kept_where_nothing_follows() -> None:
    asked: list[dict[str, Any]] = []

    class Watched(ForkSandbox):
        def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
            asked.append(message)
            return super()._ask(message)

    session = Watched()
    session.ends_with_answer = True
    session.send_tools({"final_answer": object()})
    try:
        assert session("x = 1").output is None
        assert len(asked) == 1
        done = session("x += 1\nfinal_answer(x)")
        assert (done.output, done.is_final_answer, len(asked)) == (2, True, 1)
        assert session("x").output == 1, "who goes on all the same finds the state before it"
    finally:
        session.close()
