"""What stands before the models: tokens, limits, the queue, the log, the metrics. Bad input is most of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from agentkd.errors import ConfigError, SandboxError
from agentkd.serve import GuardConfig, RequestError, Server, Tokens, create_app, read_tokens
from agentkd.serve.guard import Guard, GuardMiddleware
from agentkd.serve.limits import Line, Rates, TryLater
from tests.serving import Talker

SECRET, OTHER = "s" * 20, "o" * 20
CHAT = "/v1/chat/completions"


def body(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "talker", "messages": [{"role": "user", "content": text}], **more}


@contextmanager
def served(
    tokens: dict[str, str] | None = None, talker: Talker | None = None, **limits: Any
) -> Iterator[httpx.Client]:
    app = create_app([talker or Talker()], GuardConfig(**limits), Tokens(tokens))
    with Server(app) as server, httpx.Client(base_url=server.address, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def plain() -> Iterator[httpx.Client]:
    """A server as it comes."""
    with served() as client:
        yield client


def metric(client: httpx.Client, name: str, **options: Any) -> float:
    lines = [it for it in client.get("/metrics", **options).text.splitlines() if it.startswith(name)]
    return sum(float(it.rpartition(" ")[2]) for it in lines)


def test_a_token_is_needed_where_there_are_tokens() -> None:
    with served({"ann": SECRET, "bob": OTHER}) as client:
        for value in (
            None,
            "",
            "Bearer",
            f"Bearer {SECRET}x",
            SECRET,
            f"Basic {SECRET}",
            "Bearer \x80\xff".encode("latin-1"),
        ):
            headers: Any = {} if value is None else {"Authorization": value}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/../v1/models", "//v1/models"):
                assert client.get(path, headers=headers).status_code == 401, (value, path)
            answer = client.post(CHAT, json=body(), headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for token in (SECRET, OTHER):
            answer = client.post(CHAT, json=body("mine"), headers={"Authorization": f"bearer {token}"})
            assert answer.json()["choices"][0]["message"]["content"] == "mine"
        for path in ("/", "/health", "/ready", "/page/chat.js"):
            assert client.get(path).status_code == 200, path


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Host": "127.0.0.1.evil.example"},
    ],
)
def test_without_tokens_a_foreign_page_is_refused(plain: httpx.Client, headers: dict[str, str]) -> None:
    assert plain.post(CHAT, json=body(), headers=headers).status_code == 403
    own = str(plain.base_url).rstrip("/")
    assert plain.post(CHAT, json=body(), headers={"Origin": own}).status_code == 200


def test_tokens_are_read_and_a_bad_line_is_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# ours\nann {SECRET}\n\n{OTHER}\n")
    tokens = read_tokens(file, {"AGENTKD_TOKENS": f"cron {'c' * 16},{'d' * 16}"})
    names = [tokens.caller({"authorization": f"Bearer {it}"}) for it in (SECRET, OTHER, "c" * 16, "d" * 16)]
    assert names == ["ann", "token-2", "cron", "token-4"]
    for text in ("short", f"ann {SECRET}\nann {OTHER}", "a b c" * 9, f"bad/name {SECRET}", "ümläut" * 4, "#"):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_tokens(file, {})
        assert text not in str(caught.value)
    with pytest.raises(ConfigError, match="Cannot read"):
        read_tokens(tmp_path / "none", {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.nip.io"])
def test_other_addresses_need_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="Anyone who reaches"):
        Tokens().check_address(host)
    Tokens({"a": SECRET}).check_address(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    Tokens().check_address(host)


def test_the_command_refuses_before_anything_is_loaded() -> None:
    command = [sys.executable, "-m", "agentkd", "serve", "expert", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--token-file" in done.stderr and "Traceback" not in done.stderr


def test_ten_megabytes_are_refused_and_the_server_goes_on() -> None:
    with served() as client:
        for content in (json.dumps(body("x" * 10_000_000)).encode(), (b"x" * 2**20 for _ in range(10))):
            try:
                answer = client.post(CHAT, content=content)
            except httpx.TransportError:
                continue  # cut off while it was still sending: also an answer
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert client.post(CHAT, json=body()).status_code == 200
        assert metric(client, "agentkd_refused_total") >= 1


@pytest.mark.parametrize(
    "path",
    [
        "/page/../../../../etc/passwd",
        "/page/%2e%2e/%2e%2e/server.py",
        "/page/chat.js/..",
        "/page/",
        "/%00",
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/" + "a" * 5000,
        "/static/chat.js",
    ],
)
def test_no_path_leads_out(plain: httpx.Client, path: str) -> None:
    with socket.create_connection((plain.base_url.host, plain.base_url.port)) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        said = b"".join(iter(lambda: raw.recv(65536), b""))
        assert said.split()[1] in (b"404", b"400"), said[:200]
        assert b"root:" not in said and b"uvicorn" not in said


MALFORMED = [
    b"GARBAGE\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 2\r\n\r\n{}",
    b"\x00\x01\x02\x16\x03\x01" * 50,
]


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_http_is_no_harm(plain: httpx.Client, data: bytes) -> None:
    with socket.create_connection((plain.base_url.host, plain.base_url.port), timeout=5) as raw:
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: raw.recv(65536), b""))
    assert not said or b" 4" in said[:13], said[:100]
    assert plain.post(CHAT, json=body()).status_code == 200


BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"model": 5}',
    b'{"model": "talker"}',
    b'{"model": "talker", "messages": {}}',
    b'{"model": "talker", "messages": [[]]}',
    b'{"model": "talker", "messages": [{"role": "user", "content": 5}]}',
    b'{"model": "talker", "messages": [{"role": "user", "content": "x"}], "n": 1e999}',
    b'{"model": "talker", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "\\u0000", "messages": [{"role": "user", "content": "\\ud800"}]}',
]


@pytest.mark.parametrize("content", BODIES, ids=lambda it: it[:40].decode("latin-1"))
def test_a_wrong_body_is_a_four_hundred(plain: httpx.Client, content: bytes) -> None:
    answer = plain.post(CHAT, content=content)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["message"]


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    with served(body_seconds=0.3) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as raw:
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
            )
            assert b" 408 " in raw.recv(65536)
        assert metric(client, "agentkd_running") == 0


def test_the_line_is_bounded_and_nobody_hangs() -> None:
    talker = Talker()
    text = "slowly " + "on " * 25
    with served(talker=talker, max_running=2, max_waiting=2, queue_seconds=10) as client:

        def ask(number: int) -> httpx.Response:
            return client.post(CHAT, json=body(f"{text}{number}"))

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(12)))
        assert sorted(it.status_code for it in answers) == [200] * 4 + [429] * 8
        for number, answer in enumerate(answers):
            if answer.status_code == 200:
                said = answer.json()["choices"][0]["message"]["content"]
                assert said.split() == f"{text}{number}".split()
            else:
                assert 1 <= int(answer.headers["Retry-After"]) <= 60
                assert answer.json()["error"]["code"] == "server_busy"
        assert metric(client, "agentkd_running") == metric(client, "agentkd_waiting") == 0
        assert metric(client, 'agentkd_refused_total{reason="server_busy"}') == 8


def test_who_waits_too_long_is_told_so() -> None:
    talker = Talker()
    with served(talker=talker, max_running=1, queue_seconds=0.2) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, CHAT, json=body("slowly " + "on " * 40))
        while not talker.running:
            time.sleep(0.005)
        answer = client.post(CHAT, json=body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "server_busy")
        assert first.result().status_code == 200


def test_who_leaves_the_line_frees_it() -> None:
    talker = Talker()
    with served(talker=talker, max_running=1, max_waiting=1) as client:
        with client.stream("POST", CHAT, json=body("for ever", stream=True)) as running:
            lines = running.iter_lines()  # which hangs up when it is dropped
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=body(), timeout=0.2)  # the line is full now, and then it is not
            deadline = time.monotonic() + 5
            while metric(client, "agentkd_waiting") and time.monotonic() < deadline:
                time.sleep(0.01)
            assert metric(client, "agentkd_waiting") == 0
        assert talker.left.wait(5), "the answer is given up with its client"
        assert client.post(CHAT, json=body()).status_code == 200


def test_a_slow_reader_is_dropped() -> None:
    with served(send_seconds=0.4, max_running=1) as client:
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect((client.base_url.host, client.base_url.port))
            content = json.dumps(body("much", stream=True)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n\r\n"
            raw.sendall(head.encode() + content)
            assert client.post(CHAT, json=body("after it")).status_code == 200, "its place is free again"
        assert metric(client, 'agentkd_broken_answers_total{model="talker",why="slow_reader"}') == 1


class Stubborn(Talker):
    """Goes on for a while although nobody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def _answer(self, text: str, listener: Any) -> Any:
        if text == "stubborn":
            listener.text(0, "a word")
            self.go.wait(10)
        return super()._answer(text, listener)


@pytest.mark.parametrize("stream", [False, True])
def test_a_place_is_taken_until_its_work_is_over(stream: bool) -> None:
    talker = Stubborn()
    with served(talker=talker, max_running=1, max_waiting=1) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=body("stubborn", stream=stream), timeout=0.3)
        deadline = time.monotonic() + 5
        while not metric(client, "agentkd_lingering") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert metric(client, "agentkd_running") == metric(client, "agentkd_lingering") == 1
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(client.post, CHAT, json=body("mine"))
            time.sleep(0.2)
            assert not second.done(), "it waits for the place"
            talker.go.set()
            assert second.result().status_code == 200
        deadline = time.monotonic() + 5
        while metric(client, "agentkd_running") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert metric(client, "agentkd_running") == metric(client, "agentkd_lingering") == 0


def test_rates_are_each_callers_own() -> None:
    with served({"ann": SECRET, "bob": OTHER}, requests_per_minute=3) as client:

        def ask(token: str) -> httpx.Response:
            return client.post(CHAT, json=body(), headers={"Authorization": f"Bearer {token}"})

        assert [ask(SECRET).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = ask(SECRET)
        assert 1 <= int(refused.headers["Retry-After"]) <= 20
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert ask(OTHER).status_code == 200


def test_buckets_fill_evenly_and_tokens_are_paid_afterwards() -> None:
    now = [0.0]
    rates = Rates(requests=2, tokens=100, clock=lambda: now[0])
    rates.take("a")
    rates.charge("a", 250)  # one answer may go below nothing
    with pytest.raises(TryLater) as caught:
        rates.take("a")
    assert caught.value.seconds == 60
    rates.take("b")
    now[0] += 92
    rates.take("a")
    rates.take("a")
    with pytest.raises(TryLater, match="2 requests a minute"):
        rates.take("a")
    now[0] += 30
    rates.take("a")


def test_a_turn_is_never_lost() -> None:
    async def play() -> None:
        line = Line(1, 10, 0.02)
        await line.enter()
        waiting = [asyncio.create_task(line.enter()) for _ in range(5)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        line.leave(0.01)
        waiting[1].cancel()  # in the very moment of its turn
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(it) for it in done[:3]] == [asyncio.CancelledError, asyncio.CancelledError, type(None)]
        assert all(isinstance(it, TryLater) for it in done[3:])
        assert (line.running, line.waiting) == (1, 0)
        line.leave(0.01)
        assert line.running == 0

    asyncio.run(play())


def test_the_access_log_says_what_happened_and_not_what_was_said(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    with served({"ann": SECRET}, access_log=log) as client:
        headers = {"Authorization": f"Bearer {SECRET}"}
        client.post(CHAT, json=body("my diary"), headers=headers)
        client.post(CHAT, json=body("broken", stream=True), headers=headers)
        client.get("/v1/models/x%0d%0a%1b[31m?password=diary")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    first, second, third = lines
    assert (first["caller"], first["model"], first["status"]) == ("ann", "talker", 200)
    assert (first["prompt_tokens"], first["completion_tokens"], first["stream"]) == (2, 1, False)
    assert first["bytes_out"] > 0 and first["seconds"] >= first["queue_seconds"]
    assert (second["status"], second["error"]) == (200, "unavailable")
    assert (third["status"], third["error"], third["path"]) == (
        401,
        "invalid_api_key",
        "/v1/models/x\r\n\x1b[31m",
    )
    assert "\x1b" not in log.read_text() and len({it["id"] for it in lines}) == 3
    for secret in ("diary", SECRET):
        assert secret not in log.read_text()


def test_contents_are_logged_on_request_without_secrets(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    with served(access_log=log, log_contents=True) as client:
        client.post(CHAT, json=body(f"my key is sk-{'a' * 30}"))
    content = json.loads(log.read_text())["content"]
    assert "my key is [redacted]" in content


def test_a_full_disk_fails_no_request() -> None:
    with served(access_log=Path("/dev/full")) as client:
        assert client.post(CHAT, json=body()).status_code == 200
        assert metric(client, "agentkd_access_log_lost_lines_total") >= 1


def test_the_metrics_are_prometheus_and_labels_are_not_the_clients() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with served() as client:
        client.post(CHAT, json=body())
        client.post(CHAT, json={**body(), "model": "made up"})
        families = {it.name: it for it in text_string_to_metric_families(client.get("/metrics").text)}
        asked = {
            (it.labels["model"], it.labels["status"]): it.value
            for it in families["agentkd_requests"].samples
            if it.name.endswith("_total")
        }
        assert asked == {("talker", "200"): 1.0, ("none", "404"): 1.0}
        for name in ("request_seconds", "queue_seconds", "completion_tokens", "running"):
            assert families[f"agentkd_{name}"].samples, name
        assert families["process_resident_memory_bytes"].samples


def test_a_client_that_vanishes_is_counted_as_one() -> None:
    with served() as client:
        with client.stream("POST", CHAT, json=body("for ever", stream=True)) as answer:
            next(answer.iter_lines())
        deadline = time.monotonic() + 5
        gone = 'agentkd_requests_total{model="talker",status="499"}'
        while not metric(client, gone) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert metric(client, gone) == 1


def test_between_two_pieces_the_loop_can_say_that_the_client_is_gone() -> None:
    """asyncio complains on stderr of pieces that are written after that."""
    seen: list[bool] = []

    async def play() -> None:
        loop, gone = asyncio.get_running_loop(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200})
            for _ in range(3):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                seen.append(gone.is_set())
                loop.call_soon(gone.set)

        guard = Guard(GuardConfig(), Tokens(), [])
        scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
        await GuardMiddleware(app, guard)(scope, app, send)  # type: ignore[arg-type]

    asyncio.run(play())
    assert seen == [False, True, True]


@contextmanager
def process_that_drains(seconds: float) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server of its own, and a client of it."""
    program = (
        "from agentkd.serve.server import create_app, serve_app; from tests.serving import Talker\n"
        f"serve_app(create_app([Talker()]), host='127.0.0.1', port=0, drain_seconds={seconds},\n"
        "          say=lambda address: print(address, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    with process, httpx.Client(base_url=process.stdout.readline().strip(), timeout=20) as client:
        try:
            yield process, client
        finally:
            process.kill()


def test_what_does_not_end_in_time_is_told_so() -> None:
    with process_that_drains(1) as (process, client), ThreadPoolExecutor(2) as pool:
        whole = pool.submit(client.post, CHAT, json=body("for ever"))
        stream = pool.submit(client.post, CHAT, json=body("for ever", stream=True))
        while metric(client, "agentkd_running") < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "draining"
        *_, last = (line for line in stream.result().text.splitlines() if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        _, said = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_under_way_end(number: signal.Signals) -> None:
    with process_that_drains(10) as (process, client):
        text = "slowly " + "on " * 40
        lines: list[str] = []
        begun = threading.Event()

        def follow() -> None:
            with client.stream("POST", CHAT, json=body(text, stream=True)) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=follow)
        reader.start()
        assert begun.wait(20)
        process.send_signal(number)
        time.sleep(0.3)
        with pytest.raises(httpx.TransportError):
            httpx.get(client.base_url.join("/health"), timeout=5)
        reader.join(20)
        assert process.wait(10) == 0
    assert "data: [DONE]" in lines and lines.count("") >= 40


def test_it_is_not_ready_while_it_drains() -> None:
    app = create_app([Talker()])
    with Server(app) as server, httpx.Client(base_url=server.address) as client:
        assert client.get("/ready").json() == {"status": "ready", "reason": None}
        app.state.guard.draining = True
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "draining")
        refused = client.post(CHAT, json=body())
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "5"
        assert client.get("/health").status_code == 200


def test_it_is_not_ready_while_an_engine_starts_again() -> None:
    class Child:
        state, restarts = "ready", 0

    class Engine:
        child = Child()

    talker = Talker()
    talker.engine = Engine()  # type: ignore[attr-defined]
    with served(talker=talker) as client:
        assert client.get("/ready").status_code == 200
        Child.state = "down"
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "the engine is being started again")
        assert client.get("/health").status_code == 200
        Child.state, Child.restarts = "ready", 1
        assert client.get("/ready").status_code == 200
        assert metric(client, 'agentkd_engine_restarts_total{model="talker"}') == 1


def test_what_has_come_meanwhile_is_written_together() -> None:
    from agentkd.serve import ChatChoice, ChatRequest, ChatResult
    from agentkd.serve.app import _Piece, _stream, _Work
    from agentkd.serve.served import Served

    words = [f"word{number} " for number in range(200)]

    async def play() -> list[str]:
        request = ChatRequest.model_validate({**body(), "stream": True})
        work = _Work(Talker(), request, Served())
        for word in words[1:]:
            work.events.put_nowait(_Piece(0, word))
        work.events.put_nowait(ChatResult((ChatChoice("".join(words) + "end", "stop"),), 1, 1))
        return [block async for block in _stream(work, _Piece(0, words[0]))]

    blocks = asyncio.run(play())
    assert len(blocks) < 10
    lines = [line for line in "".join(blocks).split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert [it["delta"].get("content") for it in chunks] == ["", *words, "end", None]
    assert chunks[-1]["finish_reason"] == "stop"


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="called talker"):
        create_app([Talker(), Talker()])


def test_what_an_agent_does_is_counted() -> None:
    from agentkd.serve.metrics import Metrics
    from agentkd.serve.served import Served

    class Tool:
        name = "search"

    class Backend(Talker):
        tools = (Tool(),)

    served = Served()
    served.model = "talker"
    uses = [
        {"name": "search", "error": None},
        {"name": "search", "error": "down"},
        {"name": "odd", "error": None},
    ]
    event = {"number": 1, "failure": {"kind": "execution"}, "tool_uses": uses}
    served.step({**event, "state": "acting"})
    served.step({**event, "state": "done"})
    served.fail(SandboxError("gone"), RequestError("gone", status=503, code="sandbox_error"))
    metrics = Metrics([Backend()], Line(1, 1, 1.0))
    metrics.record(served, 503, 1.0)
    text = metrics.text().decode()
    for line in (
        'agentkd_agent_steps_total{model="talker"} 1.0',
        'agentkd_agent_step_failures_total{kind="execution",model="talker"} 1.0',
        'agentkd_tool_calls_total{outcome="ok",tool="search"} 1.0',
        'agentkd_tool_calls_total{outcome="error",tool="search"} 1.0',
        'agentkd_tool_calls_total{outcome="ok",tool="other"} 1.0',
        'agentkd_sandbox_failures_total{model="talker"} 1.0',
    ):
        assert line in text
    assert served.tokens == 2, "an answer that broke is charged by what there was of it"


def test_a_connection_is_kept_longer_than_clients_keep_theirs() -> None:
    """Who lets go first must be the client: a request that meets a closing connection fails."""
    patience = httpx.Limits().keepalive_expiry
    assert patience is not None
    with (
        served() as client,
        httpx.Client(base_url=client.base_url, limits=httpx.Limits(keepalive_expiry=None)) as own,
    ):
        ports = set()
        for wait in (0.0, patience + 0.5):
            time.sleep(wait)
            stream = own.get("/healthz").extensions["network_stream"]
            ports.add(stream.get_extra_info("client_addr")[1])
    assert len(ports) == 1
