"""The gate: how many calls at a time, how they wait, and which are tried again."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from agentkd.gate import FIRST_LEVEL, Fault, Gate, GateConfig, Level
from agentkd.spend import LimitReached


class Flaky(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.what)
        self.fault = fault


def gate(**settings: Any) -> Gate:
    return Gate(
        GateConfig(**settings), lambda exc: exc.fault if isinstance(exc, Flaky) else Fault("final", "x")
    )


def failing(times: int, fault: Fault) -> Callable[[], str]:
    left = [fault] * times

    def send() -> str:
        if left:
            raise Flaky(left.pop())
        return "ok"

    return send


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the gate wanted to sleep; it does not."""
    slept: list[float] = []
    monkeypatch.setattr(Gate, "_sleep", lambda self, seconds: slept.append(seconds))
    return slept


def test_what_may_pass_is_tried_again_with_longer_and_longer_pauses(naps: list[float]) -> None:
    assert gate(retries=4).call(failing(4, Fault("transient", "500"))) == "ok"
    assert len(naps) == 4
    assert all(2 * early > late / 2 for early, late in itertools.pairwise(naps))
    assert naps[-1] > naps[0]


def test_it_gives_up_after_the_last_retry(naps: list[float]) -> None:
    with pytest.raises(Flaky):
        gate(retries=2).call(failing(3, Fault("transient", "500")))
    assert len(naps) == 2


def test_what_will_not_pass_is_not_tried_again(naps: list[float]) -> None:
    with pytest.raises(Flaky):
        gate(retries=9).call(failing(1, Fault("final", "401")))
    assert naps == []


def test_an_overloaded_endpoint_is_waited_for_beyond_the_retries(naps: list[float]) -> None:
    assert gate(retries=1).call(failing(20, Fault("overload", "429"))) == "ok"
    with pytest.raises(Flaky):
        gate(retries=1, patience=5).call(failing(50, Fault("overload", "429")))


def test_an_endpoint_that_wants_hours_is_given_up(naps: list[float]) -> None:
    with pytest.raises(Flaky):
        gate().call(failing(1, Fault("overload", "429", retry_after=7200.0)))
    assert naps == []


def test_retry_after_closes_the_gate_for_everybody() -> None:
    shared, sent = gate(), []
    shared.call(failing(0, Fault("final", "x")))
    began = time.monotonic()

    def refused() -> str:
        if not sent:
            sent.append(time.monotonic())
            raise Flaky(Fault("overload", "429", retry_after=0.4))
        return "ok"

    first = threading.Thread(target=shared.call, args=(refused,))
    first.start()
    while not sent:
        time.sleep(0.001)
    time.sleep(0.02)
    shared.call(lambda: sent.append(time.monotonic()))
    first.join()
    assert sent[1] - began >= 0.4


def test_a_stopped_run_waits_for_nothing() -> None:
    stopped = False

    def check() -> None:
        if stopped:
            raise LimitReached("The run is being stopped.")

    waiting = Gate(GateConfig(), lambda exc: Fault("overload", "429", 600.0), check=check)

    def send() -> None:
        raise Flaky(Fault("overload", "429"))

    caught: list[BaseException] = []

    def call() -> None:
        try:
            waiting.call(send)
        except LimitReached as exc:
            caught.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.05)
    stopped = True
    thread.join(5)
    assert "stopped" in str(caught[0])


def test_requests_and_tokens_a_minute_are_kept() -> None:
    limited = gate(requests_per_minute=600)  # ten a second, a hundred of them at once
    began = time.monotonic()
    for _ in range(105):
        limited.call(lambda: "ok")
    assert time.monotonic() - began >= 0.3
    limited = gate(tokens_per_minute=60_000)  # a thousand a second, ten thousand at once
    began = time.monotonic()
    for _ in range(3):
        limited.call(lambda: "ok", lambda answer: 5200)
    assert 0.3 <= time.monotonic() - began < 5


def at_once(limited: Gate, calls: int, tokens: int | None, guess: int = 1000) -> list[float]:
    """Seconds after which so many calls that are made at the same time were sent."""
    sent: list[float] = []
    began = time.monotonic()

    def send() -> None:
        sent.append(time.monotonic() - began)
        time.sleep(0.05)

    threads = [
        threading.Thread(target=limited.call, args=(send, lambda answer: tokens, lambda: guess), daemon=True)
        for _ in range(calls)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.6)
    return sorted(sent)


@pytest.mark.parametrize("tokens", [1000, None])
def test_tokens_are_set_aside_before_they_are_counted(tokens: int | None) -> None:
    """Ten thousand tokens at once and a thousand a second: of 64 calls of a thousand each, eleven go, and
    then one a second, whether the server counts or not."""
    sent = at_once(gate(tokens_per_minute=60_000), 64, tokens)
    assert len([seconds for seconds in sent if seconds < 0.3]) in (10, 11)
    assert len(sent) <= 13


def test_a_guess_of_tokens_that_is_too_high_is_put_right() -> None:
    sent = at_once(gate(tokens_per_minute=60_000), 64, tokens=100, guess=5000)
    assert len([seconds for seconds in sent if seconds < 0.04]) in (2, 3), "as long as nothing is known"
    assert len(sent) > 40


def test_tokens_of_a_call_that_fails_are_given_back(naps: list[float]) -> None:
    limited = gate(tokens_per_minute=60_000, retries=30)
    began = time.monotonic()
    limited.call(failing(20, Fault("transient", "500")), lambda answer: 10, lambda: 5000)
    assert time.monotonic() - began < 1


def test_a_wait_of_all_calls_is_told_once() -> None:
    told: list[tuple[str, float]] = []
    waiting = Gate(
        GateConfig(requests_per_minute=6),
        lambda exc: Fault("overload", "429", 3600.0),
        check=lambda: None,
        on_wait=lambda why, seconds: told.append((why, seconds)),
    )

    def call() -> None:
        waiting.call(failing(1, Fault("overload", "429")))

    threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    time.sleep(0.2)
    assert [why for why, _ in told] == ["asks to wait"]
    assert told[0][1] == pytest.approx(3600, abs=1)
    told.clear()
    limited = Gate(
        GateConfig(requests_per_minute=6),
        lambda exc: Fault("final", "x"),
        on_wait=lambda why, seconds: told.append((why, seconds)),
    )
    for _ in range(2):
        limited.call(lambda: "ok")
    threading.Thread(target=limited.call, args=(lambda: "ok",), daemon=True).start()
    time.sleep(0.1)
    assert [why for why, _ in told] == ["is at its limit of requests a minute for"]
    assert 5 < told[0][1] < 10.1


def test_processes_divide_the_limits() -> None:
    part = GateConfig(max_in_flight=10, requests_per_minute=90).share(3)
    assert (part.max_in_flight, part.requests_per_minute, part.tokens_per_minute) == (4, 30, None)


def test_no_more_calls_at_a_time_than_allowed() -> None:
    limited, now, most, lock = gate(max_in_flight=3), 0, 0, threading.Lock()

    def send() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1

    threads = [threading.Thread(target=limited.call, args=(send,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 3


class Simulated:
    """An endpoint in simulated time: each call takes ``latency`` seconds while ``bears`` calls are in
    flight, and longer, in total slower, beyond; or it refuses what it cannot bear."""

    def __init__(self, bears: int, refuses: bool) -> None:
        self.bears, self.refuses = bears, refuses

    def run(self, level: Level, calls: int) -> tuple[float, list[int]]:
        """Seconds until so many calls are answered, and the levels on the way."""
        now, answered, flying, levels = 0.0, 0, [], []
        while answered < calls:
            while len(flying) < level.now:
                excess = max(0.0, len(flying) / self.bears - 1)
                refused = self.refuses and excess > 0
                # Thrashing: twice the load takes four times as long.
                heapq.heappush(flying, (now + (0.01 if refused else (1 + excess) ** 2), now, refused))
            full = len(flying) >= level.now
            now, began, refused = heapq.heappop(flying)
            if refused:
                level.overloaded(began, now)
            else:
                level.answered(began, now, full)
                answered += 1
            levels.append(level.now)
        return now, levels


def test_the_level_rises_while_an_endpoint_bears_it() -> None:
    level = Level(512)
    seconds, _ = Simulated(bears=1000, refuses=False).run(level, 10_000)
    assert level.now == 512
    assert seconds < 1.3 * 10_000 / 512


@pytest.mark.parametrize("bears", [5, 40, 150])
def test_the_level_falls_to_what_an_endpoint_does_not_refuse(bears: int) -> None:
    level = Level(1024)
    seconds, levels = Simulated(bears, refuses=True).run(level, 60 * bears)
    settled = levels[len(levels) // 2 :]
    assert 0.4 * bears < sum(settled) / len(settled) < 1.5 * bears
    assert seconds < 2 * 60


def test_more_calls_that_only_make_all_slower_are_taken_back() -> None:
    level = Level(1024)
    _, levels = Simulated(bears=60, refuses=False).run(level, 20_000)
    settled = levels[len(levels) // 2 :]
    assert FIRST_LEVEL / 2 < sum(settled) / len(settled) < 150
    blind = Level(1024)
    blind._judge = lambda ended, full: None  # type: ignore[method-assign]
    assert (
        Simulated(bears=60, refuses=False).run(blind, 20_000)[0]
        > 2 * Simulated(60, False).run(Level(1024), 20_000)[0]
    )
