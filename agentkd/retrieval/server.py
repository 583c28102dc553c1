"""A retriever behind HTTP, in the wire format of :mod:`agentkd.retrieval.wire`.

Requests that come in while a search is running are searched together afterwards: one pass of the
encoder for many of them, and no waiting when there is only one.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentkd.errors import AgentkdError, RetrievalError, boundary, first_problem
from agentkd.retrieval import Hit, Retriever
from agentkd.retrieval.wire import write_hits

__all__ = ["RetrieveRequest", "retriever_app"]

MAX_BODY = 8 << 20
"""Bytes of a request."""
MAX_BATCH = 64
"""Queries searched together."""


class RetrieveRequest(BaseModel):
    """What a client asks. Keys that other servers of this format know are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    queries: tuple[str, ...] = Field(max_length=1024)
    topk: int | None = Field(default=None, ge=0, le=1000)
    """Passages of each query; None or 0 takes the server's default."""
    return_scores: bool = False


class _Asked(NamedTuple):
    queries: Sequence[str]
    k: int
    answer: Future[list[list[Hit]]]


class _Batcher:
    """One thread that searches; what waits for it with the same ``k`` is searched together."""

    def __init__(self, retriever: Retriever, metrics: _Metrics) -> None:
        self._retriever, self._metrics = retriever, metrics
        self._waiting: SimpleQueue[_Asked] = SimpleQueue()
        threading.Thread(target=self._run, name="agentkd-retriever", daemon=True).start()

    def ask(self, queries: Sequence[str], k: int) -> Future[list[list[Hit]]]:
        answer: Future[list[list[Hit]]] = Future()
        self._waiting.put(_Asked(queries, k, answer))
        return answer

    def _run(self) -> None:
        left: list[_Asked] = []
        while True:
            left = left or [self._waiting.get()]
            with suppress(Empty):
                while True:
                    left.append(self._waiting.get_nowait())
            batch, size = [left[0]], len(left[0].queries)
            for asked in left[1:]:
                if asked.k == left[0].k and size + len(asked.queries) <= MAX_BATCH:
                    batch.append(asked)
                    size += len(asked.queries)
            left = [asked for asked in left if not any(asked is taken for taken in batch)]
            self._search([asked for asked in batch if asked.answer.set_running_or_notify_cancel()])

    def _search(self, batch: list[_Asked]) -> None:
        queries = [query for asked in batch for query in asked.queries]
        if not batch:
            return
        try:
            with boundary(RetrievalError, "searching"):
                found = self._retriever.search(queries, batch[0].k)
        except AgentkdError as exc:  # answers these requests, and ends no others
            for asked in batch:
                asked.answer.set_exception(exc)
            return
        self._metrics.batch.observe(len(queries))
        first = 0
        for asked in batch:
            asked.answer.set_result(found[first : first + len(asked.queries)])
            first += len(asked.queries)


class _Metrics:
    """Counters for Prometheus, of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("agentkd_retriever_requests", "Requests by status.", ["status"], registry=own)
        self.queries = Counter("agentkd_retriever_queries", "Queries searched.", registry=own)
        self.seconds = Histogram("agentkd_retriever_seconds", "Seconds of a request.", registry=own)
        self.batch = Histogram(
            "agentkd_retriever_batch_queries",
            "Queries searched together.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            registry=own,
        )

    def text(self) -> bytes:
        return bytes(generate_latest(self.registry))


class _Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def retriever_app(
    retriever: Retriever, *, topk: int = 3, token: str | None = None, about: dict[str, Any] | None = None
) -> FastAPI:
    """The application: ``POST /retrieve``, ``GET /health`` and ``GET /metrics``.

    Args:
        retriever: what is searched, by one thread.
        topk: passages of a query whose request does not say.
        token: bearer token that ``/retrieve`` and ``/metrics`` want; None wants none.
        about: shown by ``/health``.
    """
    metrics = _Metrics()
    app = FastAPI(title="agentkd retriever", docs_url=None, redoc_url=None, openapi_url=None)
    batcher = _Batcher(retriever, metrics)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **(about or {})}

    @app.get("/metrics")
    async def metrics_page(http: Request) -> Response:
        _check_token(http, token)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/retrieve")
    async def retrieve(http: Request) -> Response:
        began = time.perf_counter()
        try:
            _check_token(http, token)
            asked = _parse(await _body(http))
            results = await asyncio.wrap_future(batcher.ask(asked.queries, asked.topk or topk))
        except _Refused as exc:
            metrics.requests.labels(exc.status).inc()
            raise
        except AgentkdError as exc:
            metrics.requests.labels(500).inc()
            return JSONResponse({"error": {"message": str(exc)}}, status_code=500)
        metrics.requests.labels(200).inc()
        metrics.queries.inc(len(asked.queries))
        metrics.seconds.observe(time.perf_counter() - began)
        body = {"result": [write_hits(hits, asked.return_scores) for hits in results]}
        return Response(json.dumps(body, allow_nan=False), media_type="application/json")

    @app.exception_handler(_Refused)
    async def refused(http: Request, exc: _Refused) -> JSONResponse:
        return JSONResponse({"error": {"message": str(exc)}}, status_code=exc.status)

    return app


def _check_token(http: Request, token: str | None) -> None:
    given = http.headers.get("authorization", "").encode("latin-1")
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise _Refused(401, "A bearer token is needed, and this is not it.")


async def _body(http: Request) -> bytes:
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise _Refused(413, f"A request may have {MAX_BODY:,} bytes.")
    return bytes(body)


def _parse(body: bytes) -> RetrieveRequest:
    try:
        return RetrieveRequest.model_validate_json(body)
    except ValidationError as exc:
        raise _Refused(422, first_problem(exc)) from exc
