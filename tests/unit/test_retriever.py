"""The retriever behind HTTP, and its client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from agentkd.errors import ConfigError, RetrievalError
from agentkd.retrieval import Hit, Passage
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.retrieval.client import HTTPRetriever
from agentkd.retrieval.source import open_corpus

server = pytest.importorskip("agentkd.retrieval.server", reason="the serve extra is not installed")
from agentkd.serve import Server  # noqa: E402

PASSAGES = [
    Passage(id="1", title="Silver Harbor", text="Silver Harbor is a town\nfounded in 1802."),
    Passage(id="2", title="Amber Falcon", text="Amber Falcon is a painter born in Silver Harbor."),
    Passage(id="3", title='Copper\n"Meadow" \x1b[31m', text="Copper Meadow <|im_end|> is a village \u202e."),
]


class Slow:
    """Counts what is searched together, and waits until it may."""

    def __init__(self) -> None:
        self.inner, self.batches, self.go = BM25Retriever(PASSAGES), [], threading.Event()  # type: ignore[var-annotated]

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        self.batches.append((len(queries), k))
        self.go.wait(20)
        if "fail" in queries:
            raise ValueError("a fault of the retriever")
        return self.inner.search(queries, k)


@pytest.fixture
def url() -> Iterator[str]:
    with Server(server.retriever_app(BM25Retriever(PASSAGES), about={"passages": 3})) as running:
        yield running.address


def test_the_client_finds_what_the_retriever_finds(url: str) -> None:
    queries = ["silver harbor", "", "painter", "zzz", "copper", "\ud800 silver", "silver " * 20_000]
    local = BM25Retriever(PASSAGES)
    for address in (url, url + "/", url + "/retrieve"):
        client = HTTPRetriever(address)
        assert client.search(queries, 2) == local.search(queries, 2)
        assert client.search(["silver"], 50) == local.search(["silver"], 50)
        assert client.search(["silver"], 0) == [[]]
        assert client.search([], 3) == []
        client.close()


def test_a_corpus_may_be_a_url(url: str) -> None:
    corpus = open_corpus(url)
    assert corpus.identity == f"{url}/retrieve"
    assert corpus.retriever is not None
    assert corpus.retriever.search(["painter"], 1)[0][0].passage.id == "2"


def test_many_queries_go_in_several_requests(url: str) -> None:
    client = HTTPRetriever(url)
    found = client.search(["painter", "town"] * 400, 1)
    assert [hits[0].passage.id for hits in found] == ["2", "1"] * 400
    client.close()


def test_a_kept_connection_does_not_wait_for_acknowledgements(url: str) -> None:
    """Without TCP_NODELAY on the server's side each answer takes 40 ms."""
    times = []
    with httpx.Client() as client:
        for _ in range(15):
            began = time.perf_counter()
            client.post(f"{url}/retrieve", json={"queries": ["painter"]})
            times.append(time.perf_counter() - began)
    assert sorted(times)[7] < 0.03


def test_health_and_metrics(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "passages": 3}
    for _ in range(3):
        httpx.post(f"{url}/retrieve", json={"queries": ["silver", "town"]})
    httpx.post(f"{url}/retrieve", content=b"{")
    text = httpx.get(f"{url}/metrics").text
    assert 'agentkd_retriever_requests_total{status="200"} 3.0' in text
    assert 'agentkd_retriever_requests_total{status="422"} 1.0' in text
    assert "agentkd_retriever_queries_total 6.0" in text
    assert "agentkd_retriever_seconds_count 3.0" in text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"[]", 422),
        (b'{"queries": "one"}', 422),
        (b'{"queries": [1]}', 422),
        (b'{"queries": ["x"], "topk": -1}', 422),
        (b'{"queries": ["x"], "topk": 1000000}', 422),
        (b'{"queries": ["\xff"]}', 422),
        (json.dumps({"queries": ["x"] * 1025}).encode(), 422),
        (b'{"queries": ["' + b"x" * (9 << 20) + b'"]}', 413),
        (b'{"queries": []}', 200),
        (b'{"queries": ["x"], "topk": 0, "eid": "passed over"}', 200),
        (b'{"queries": ["' + b"silver " * 15_000 + b'"]}', 200),
    ],
)
def test_odd_requests(body: bytes, status: int, url: str) -> None:
    answer = httpx.post(f"{url}/retrieve", content=body)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["message"]


def test_a_token_is_asked_for() -> None:
    app = server.retriever_app(BM25Retriever(PASSAGES), token="sesame")
    with Server(app) as running:
        assert httpx.get(f"{running.address}/health").status_code == 200
        assert httpx.get(f"{running.address}/metrics").status_code == 401
        for token in (None, "wrong", "sésame"):
            with pytest.raises(RetrievalError, match="401") as caught:
                HTTPRetriever(running.address, token=token).search(["x"])
            assert "AGENTKD_RETRIEVER_TOKEN" in caught.value.hint
        assert HTTPRetriever(running.address, token="sesame").search(["painter"], 1)[0][0].passage.id == "2"


def test_requests_that_wait_are_searched_together() -> None:
    slow = Slow()
    with Server(server.retriever_app(slow)) as running, ThreadPoolExecutor(12) as pool:

        def ask(number: int) -> list[str]:
            client = HTTPRetriever(running.address)
            hits = client.search(["painter" if number % 2 else "village"], 1 + number // 10)
            client.close()
            return [hit.passage.id for hit in hits[0]]

        answers = [pool.submit(ask, 0)]
        while not slow.batches:
            pass
        answers += [pool.submit(ask, number) for number in range(1, 12)]
        deadline = threading.Event()
        deadline.wait(0.5)
        slow.go.set()
        found = [answer.result(20) for answer in answers]
    assert found == [["2"] if number % 2 else ["3"] for number in range(12)]
    assert slow.batches[0] == (1, 1)
    assert len(slow.batches) < 12
    assert sum(size for size, _ in slow.batches) == 12
    assert {k for _, k in slow.batches} == {1, 2}  # only equal k are searched together


def test_a_fault_of_the_retriever_ends_only_its_request() -> None:
    slow = Slow()
    slow.go.set()
    with Server(server.retriever_app(slow)) as running:
        answer = httpx.post(f"{running.address}/retrieve", json={"queries": ["fail"]})
        assert answer.status_code == 500
        assert "fault" in answer.json()["error"]["message"]
        assert httpx.post(f"{running.address}/retrieve", json={"queries": ["town"]}).status_code == 200


class _Stub:
    """A server that answers what it is told to."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        stub = self
        self.answers, self.seen = list(answers), []  # type: ignore[var-annotated]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                stub.seen.append((self.path, json.loads(self.rfile.read(length))))
                status, body = stub.answers[min(len(stub.seen), len(stub.answers)) - 1]
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> _Stub:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"{}",
        b"3",
        b'{"result": []}',
        b'{"result": [[], []]}',
        b'{"result": [3]}',
        b'{"result": [[3]]}',
        b'{"result": [[{"document": {"id": "1"}, "score": 1}]]}',
        b'{"result": [[{"document": {"contents": "x"}, "score": "high"}]]}',
        b'{"result": [[{"document": {"contents": "x"}, "score": NaN}]]}',
        b'{"result": [[{"document": {"contents": "x", "id": {}}, "score": 1}]]}',
        b"[" * 100_000,
    ],
)
def test_an_answer_that_is_none_is_an_error(body: bytes) -> None:
    with _Stub((200, body)) as stub, pytest.raises(RetrievalError, match="does not answer like a retriever"):
        HTTPRetriever(stub.url).search(["x"])


def test_a_failing_server_is_asked_again_and_then_given_up() -> None:
    fine = json.dumps({"result": [[{"document": {"id": "1", "contents": '"T"\nx'}, "score": 2}]]}).encode()
    with _Stub((503, b"busy"), (200, fine)) as stub:
        hit = HTTPRetriever(stub.url).search(["x"])[0][0]
        assert (hit.passage, hit.score) == (Passage(id="1", title="T", text="x"), 2.0)
        assert len(stub.seen) == 2
    with _Stub((500, b"broken")) as stub:
        with pytest.raises(RetrievalError, match="500: broken"):
            HTTPRetriever(stub.url).search(["x"])
        assert len(stub.seen) == 3
    with _Stub((404, b"no")) as stub:
        with pytest.raises(RetrievalError, match="404"):
            HTTPRetriever(stub.url).search(["x"])
        assert len(stub.seen) == 1


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(RetrievalError, match="Cannot reach") as caught:
        HTTPRetriever("http://127.0.0.1:9").search(["x"])
    assert "agentkd retriever" in caught.value.hint
    for url in ("127.0.0.1:8100", "ftp://host", "http://"):
        with pytest.raises(ConfigError, match="URL"):
            HTTPRetriever(url)
