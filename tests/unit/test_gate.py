"""The gate: how many calls at a time, how they wait, and which are tried again."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from agentkd.errors import ContextOverflowError
from agentkd.gate import FIRST_LEVEL, Fault, Gate, GateConfig, Level
from agentkd.model import openai_model, token_usage
from agentkd.spend import LimitReached
from agentkd.testing import FakeEndpoint

ASK = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]


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


def test_a_jump_of_the_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = gate(requests_per_minute=60_000)
    monkeypatch.setattr(time, "time", lambda: -1e9)
    began = time.monotonic()
    assert shared.call(failing(1, Fault("overload", "429", retry_after=0.05))) == "ok"
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert shared.call(failing(1, Fault("overload", "429", retry_after=0.05))) == "ok"
    assert 0.1 <= time.monotonic() - began < 2


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


def answer(**changes: Any) -> bytes:
    import json

    message = {"role": "assistant", "content": "hello"}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
        **changes,
    }
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "bad",
    [
        (200, b'{"id": "1", "choices": [{"message": {"content": "tru'),
        (200, b"<html>bad gateway</html>"),
        (200, b""),
        (200, b"null"),
        (200, answer(choices=[])),
        (200, answer(choices=[{"index": 0, "message": {"role": "assistant", "content": None}}])),
        (500, b'{"error": {"message": "oh"}}'),
        (502, b"<html>"),
        (408, b"{}"),
        (429, b'{"error": {"message": "slow down"}}', {"retry-after": "0.01"}),
        (503, b"", {"retry-after": "0.01"}),
    ],
)
def test_an_answer_that_is_none_is_asked_for_again(bad: Any, naps: list[float]) -> None:
    replies = [bad, "hello"]
    with FakeEndpoint(lambda messages: replies.pop(0)) as endpoint:
        model = openai_model("fake", endpoint.url, retries=1)
        assert model.generate(ASK).content == "hello"
        assert len(endpoint.requests) == 2
        assert sum(model.gate.faults.values()) == 1


def test_a_cut_connection_is_tried_again(naps: list[float]) -> None:
    cut = [True]

    def reply(messages: list[dict[str, Any]]) -> str:
        if cut.pop() if cut else False:
            raise ConnectionResetError
        return "hello"

    with FakeEndpoint(reply) as endpoint:
        assert openai_model("fake", endpoint.url, retries=1).generate(ASK).content == "hello"


def test_an_endpoint_that_hangs_is_left_after_the_timeout(naps: list[float]) -> None:
    hold = threading.Event()

    def reply(messages: list[dict[str, Any]]) -> str:
        hold.wait(5)
        return "late"

    with FakeEndpoint(reply) as endpoint:
        model = openai_model("fake", endpoint.url, timeout=0.1, retries=1)
        with pytest.raises(Exception, match=r"[Tt]imed out"):
            model.generate(ASK)
        assert model.gate.faults == {"timeout": 2}
        hold.set()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_request_that_is_wrong_is_sent_once(status: int, naps: list[float]) -> None:
    with FakeEndpoint(lambda messages: (status, b'{"error": {"message": "no"}}')) as endpoint:
        with pytest.raises(Exception, match="no"):
            openai_model("fake", endpoint.url, retries=5).generate(ASK)
        assert len(endpoint.requests) == 1


def test_a_used_up_quota_is_not_waited_for(naps: list[float]) -> None:
    body = b'{"error": {"message": "no money", "code": "insufficient_quota"}}'
    with FakeEndpoint(lambda messages: (429, body)) as endpoint:
        with pytest.raises(Exception, match="no money"):
            openai_model("fake", endpoint.url).generate(ASK)
        assert len(endpoint.requests) == 1


def test_a_context_overflow_is_no_fault_to_retry(naps: list[float]) -> None:
    from agentkd.model import provider_error

    body = b'{"error": {"message": "too long", "code": "context_length_exceeded"}}'
    with FakeEndpoint(lambda messages: (400, body)) as endpoint:
        with pytest.raises(Exception, match="too long") as caught:
            openai_model("fake", endpoint.url).generate(ASK)
        assert isinstance(provider_error(caught.value), ContextOverflowError)
        assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": None, "completion_tokens": 2},
        {"prompt_tokens": -5, "completion_tokens": 1},
    ],
)
def test_wrong_token_counts_are_unknown(usage: Any) -> None:
    with FakeEndpoint(lambda messages: (200, answer(usage=usage))) as endpoint:
        counted = token_usage(openai_model("fake", endpoint.url).generate(ASK))
    assert (counted.input_tokens, counted.output_tokens, counted.uncounted_calls) == (0, 0, 1)


def test_cached_tokens_are_counted_apart() -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 32}}
    with FakeEndpoint(lambda messages: (200, answer(usage=usage))) as endpoint:
        counted = token_usage(openai_model("fake", endpoint.url).generate(ASK))
    assert (counted.input_tokens, counted.cached_tokens, counted.uncounted_calls) == (50, 32, 0)


class _Refused(Exception):
    """What the client raises, as far as :func:`fault_of` looks."""


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-3"}, None),
        ({}, None),
        # A date counts from the server's clock: ours may be years off.
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    from agentkd.model import _retry_after

    assert _retry_after(headers) == seconds
