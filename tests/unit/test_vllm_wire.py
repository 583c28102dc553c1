"""How a vLLM is asked: over kept connections, given up at once, with its refusals named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("transformers")

from agentkd.agent_config import AgentConfig
from agentkd.engine import Cancellation
from agentkd.errors import ContextOverflowError, ProviderError
from agentkd.serve import AgentBackend, GuardConfig, Server, StudentBackend, create_app
from agentkd.serve import wire as wires
from agentkd.serve.request import EngineRefusal
from agentkd.serve.vllm import VLLMEngine
from tests.fake_vllm import FakeVLLM, event
from tests.unit.test_render import small_tokenizer

ANSWER = [event("", (1,)), event("", (2, 3)), event("abc", (4,), "stop")]
CHAT = "/v1/chat/completions"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, answer: Callable[[dict[str, Any]], Any]) -> tuple[FakeVLLM, VLLMEngine]:
    fake = stack.enter_context(FakeVLLM(answer).serve())
    engine = VLLMEngine(fake.child, "m")
    stack.callback(engine.close)
    return fake, engine


def test_calls_share_a_connection(stack: ExitStack) -> None:
    fake, engine = start(stack, lambda body: ANSWER)
    for _ in range(20):
        (done,) = engine.generate([1, 2])
        assert (done.text, done.token_ids, done.finish_reason) == ("abc", (1, 2, 3, 4), "stop")
    assert fake.connections == 1, "the answers were read to their ends"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: engine.generate([1, 2]), range(40)))
    assert fake.connections <= 4


def test_a_connection_is_not_kept_as_long_as_the_server_keeps_it(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wires.KEPT_SECONDS < 5, "uvicorn's"
    monkeypatch.setattr(wires, "KEPT_SECONDS", 0.05)
    fake, engine = start(stack, lambda body: ANSWER)
    engine.generate([1])
    time.sleep(0.1)
    engine.generate([1])
    assert fake.connections == 2


def test_a_kept_connection_that_was_closed_meanwhile_costs_nothing(stack: ExitStack) -> None:
    """The server goes away and another comes: the connection of the first is there still."""
    engine = start(stack, lambda body: ANSWER)[1]
    engine.generate([1])
    with FakeVLLM(lambda body: ANSWER).serve() as second:
        engine.child = second.child
        assert engine.generate([1])[0].text == "abc"
        (kept,) = engine._wire._idle
        kept[2].sock.shutdown(2)  # as if the server had closed it a moment ago
        assert engine.generate([1])[0].text == "abc"
        assert second.connections == 2


def test_an_answer_without_an_end_is_no_answer(stack: ExitStack) -> None:
    engine = start(stack, lambda body: [event("", (1,)), {"error": {"message": "out of memory"}}])[1]
    with pytest.raises(ProviderError, match="out of memory"):
        engine.generate([1])
    broken = start(stack, lambda body: ANSWER[:1])[1]
    with pytest.raises(ProviderError, match="ended a request by None"):
        broken.generate([1])


@pytest.mark.parametrize(
    "before", [[5.0], [event("", (1,)), 5.0]], ids=["before the first token", "behind it"]
)
def test_a_call_that_waits_is_given_up_at_once(stack: ExitStack, before: list[Any]) -> None:
    fake, engine = start(stack, lambda body: [*before, *ANSWER])
    cancellation = Cancellation()
    threading.Timer(0.2, cancellation.cancel).start()
    began = time.monotonic()
    with pytest.raises(ProviderError):
        engine.generate([1], cancellation=cancellation)
    assert time.monotonic() - began < 1.5
    with pytest.raises(ProviderError):
        engine.generate([1], cancellation=cancellation)  # and one that comes later
    assert len(fake.bodies) == 1, "it was not even asked"


def test_a_given_up_call_ends_no_other(stack: ExitStack) -> None:
    engine = start(stack, lambda body: ANSWER if body["prompt"] == [1] else [0.3, *ANSWER])[1]
    cancellation = Cancellation()
    assert engine.generate([1], cancellation=cancellation)[0].text == "abc"
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(engine.generate, [2])
        time.sleep(0.1)
        cancellation.cancel()  # the connection is the other's now
        assert other.result()[0].text == "abc"


@pytest.mark.parametrize("status", [400, 422])
def test_what_vllm_refuses_is_the_clients_fault(stack: ExitStack, status: int) -> None:
    fake, engine = start(stack, lambda body: (status, '{"error": {"message": "bad stop"}}'))
    with pytest.raises(EngineRefusal, match="bad stop"):
        engine.generate([1])
    words = small_tokenizer()
    backends: Any = [
        StudentBackend(engine, words, "m"),
        AgentBackend(engine, words, AgentConfig(model="m", prompt="Act.", sandbox="local")),
    ]
    server = stack.enter_context(Server(create_app(backends)))
    for model in ("m", "m-agent"):
        body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
        answer = httpx.post(server.address + CHAT, json=body, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value"), model
    assert fake.connections <= 3, "an error leaves its connection, too"


def test_other_refusals_are_not(stack: ExitStack) -> None:
    words = '{"message": "maximum context length is 5"}'
    with pytest.raises(ContextOverflowError):
        start(stack, lambda body: (400, words))[1].generate([1])
    with pytest.raises(ProviderError, match="status 500: broken") as caught:
        start(stack, lambda body: (500, "broken"))[1].generate([1])
    assert not isinstance(caught.value, EngineRefusal)


def test_what_is_next_to_nothing_is_greedy(stack: ExitStack) -> None:
    fake, engine = start(stack, lambda body: ANSWER)
    assert len(engine.generate([1], n=3, temperature=1e-300, stop=["", "x"])) == 3
    assert [(it["temperature"], it["n"], it["stop"]) for it in fake.bodies] == [(0.0, 1, ["x"])]


PAGE = """
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 120.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 96.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 4.0
"""


def test_the_metrics_show_what_vllm_found_in_its_cache(stack: ExitStack) -> None:
    fake, engine = start(stack, lambda body: ANSWER)
    twin = VLLMEngine(fake.child, "m")
    twin.child = engine.child  # two students of one server
    words = small_tokenizer()
    backends: Any = [StudentBackend(engine, words, "one"), StudentBackend(twin, words, "other")]
    server = stack.enter_context(Server(create_app(backends)))

    def lines() -> list[str]:
        text = httpx.get(server.address + "/metrics").text
        return [line for line in text.splitlines() if line.startswith("agentkd_prefix_cache")]

    assert lines() == []
    fake.metrics = PAGE
    assert lines() == [
        'agentkd_prefix_cache_queried_tokens_total{model="one"} 120.0',
        'agentkd_prefix_cache_hit_tokens_total{model="one"} 100.0',
    ]
    engine.child.require = lambda: "http://127.0.0.1:9"
    assert lines() == []


@pytest.mark.parametrize("sandbox", ["local"])
def test_the_time_limit_reaches_an_engine_that_hangs(stack: ExitStack, sandbox: str) -> None:
    engine = start(stack, lambda body: [10.0, *ANSWER])[1]
    config = AgentConfig(model="m", prompt="Act.", sandbox=sandbox)
    app = create_app([AgentBackend(engine, small_tokenizer(), config)], GuardConfig(max_running=1))
    server = stack.enter_context(Server(app))
    body = {"model": "m-agent", "messages": [{"role": "user", "content": "x"}], "agentkd": {"timeout": 0.5}}
    began = time.monotonic()
    answer = httpx.post(server.address + CHAT, json=body, timeout=30)
    assert time.monotonic() - began < 5
    assert answer.json()["agentkd"]["stop_reason"] == "timeout", answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("model", ["m", "m-agent"])
def test_hanging_up_reaches_an_engine_that_hangs(stack: ExitStack, model: str) -> None:
    engine = start(stack, lambda body: [10.0, *ANSWER])[1]
    words = small_tokenizer()
    backends: Any = [
        StudentBackend(engine, words, "m"),
        AgentBackend(engine, words, AgentConfig(model="m", prompt="Act.", sandbox="local")),
    ]
    app = create_app(backends)
    server = stack.enter_context(Server(app))
    line = app.state.guard.line
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            server.address + CHAT,
            json={"model": model, "messages": [{"role": "user", "content": "x"}]},
            timeout=0.4,
        )
    deadline = time.monotonic() + 5
    while line.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert line.running == 0, "the thread that waited has ended"
