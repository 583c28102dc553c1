"""What stands before the models: tokens, sizes, limits, the queue; and what is written down about it.

ASGI middleware, so that answers pass through piece by piece. It reads the body of a chat request
before the request stands in line, so that a slow upload takes nobody's place, and keeps the place
until the last byte of the answer is out.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from agentkd.serve.access import AccessLog
from agentkd.serve.limits import Line, Rates, TryLater
from agentkd.serve.metrics import NO_MODEL, Metrics
from agentkd.serve.request import RequestError
from agentkd.serve.served import SERVED, Served
from agentkd.serve.tokens import Tokens

if TYPE_CHECKING:
    from agentkd.serve.backend import ChatBackend

__all__ = ["CHAT", "CLIENT_GONE", "Gone", "Guard", "GuardConfig", "GuardMiddleware"]

CHAT = "/v1/chat/completions"
CLIENT_GONE = 499
"""Status in the metrics of a request whose answer never got to its end, as nginx has it."""
_FIRST = "agentkd.first"
_OPEN = ("/", "/health", "/ready", "/page/chat.js", "/page/style.css")
"""Paths that say nothing about anyone and are for probes and browsers: no token."""

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class GuardConfig(BaseModel):
    """Limits of a server, and its log. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body: int = Field(default=4 * 2**20, ge=1)
    """Bytes of a request."""
    max_running: int = Field(default=256, ge=1)
    """Requests worked on at a time."""
    max_waiting: int = Field(default=256, ge=0)
    """Requests in the queue; more are refused (429)."""
    queue_seconds: float = Field(default=30.0, gt=0)
    """Seconds in the queue after which a request is refused (429)."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Of each token; None: no limit."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompt and completion tokens of each bearer token; None: no limit."""
    body_seconds: float = Field(default=30.0, gt=0)
    """Seconds that the body of a request may take to arrive."""
    send_seconds: float = Field(default=60.0, gt=0)
    """Seconds that a client may read nothing of its answer before it is dropped."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """Seconds that requests under way get when the server is told to end."""
    access_log: Path | None = None
    """File that one JSON line a request is appended to; "-" is stderr, None writes nothing."""
    log_contents: bool = False
    """Whether the access log holds what was asked, with secrets redacted."""


class Guard:
    """The state of a server's limits; one for each application.

    Args:
        config: the limits.
        tokens: who may ask.
        backends: the models.

    Attributes:
        draining: set when the server is about to end; ``/ready`` says so.

    Raises:
        ConfigError: the access log cannot be written.
    """

    def __init__(self, config: GuardConfig, tokens: Tokens, backends: Sequence[ChatBackend]) -> None:
        self.config, self.tokens = config, tokens
        self.line = Line(config.max_running, config.max_waiting, config.queue_seconds)
        self.rates = Rates(config.requests_per_minute, config.tokens_per_minute)
        self.draining = False
        self._engines = [engine for it in backends if (engine := getattr(it, "engine", None)) is not None]
        self._log = None
        if config.access_log is not None:
            self._log = AccessLog(config.access_log, contents=config.log_contents)
        self.metrics = Metrics(backends, self.line, self._log)

    @property
    def problem(self) -> str | None:
        """Why it should get no requests now; None: it is ready."""
        if self.draining:
            return "draining"
        down = any(getattr(getattr(it, "child", None), "state", "ready") != "ready" for it in self._engines)
        return "the engine is being started again" if down else None

    def log(self, visit: Visit) -> None:
        """Count a request that has ended, and write it down."""
        seconds = time.perf_counter() - visit.began
        served = visit.served
        if visit.chat and visit.admitted:
            status = visit.status if visit.status and visit.whole else CLIENT_GONE
            self.metrics.record(served, status, seconds)
            self.rates.charge(visit.caller or "", served.tokens)
            if visit.status == 200 and (served.error or not visit.whole):
                self.metrics.broken.labels(served.model or NO_MODEL, visit.why or "error").inc()
        elif visit.error is not None:
            self.metrics.refused.labels(visit.error).inc()
        if self._log is not None:
            self._log.write(visit.body, **_facts(visit, seconds))


class Visit:
    """One HTTP request as the guard sees it."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.began = time.perf_counter()
        self.id = uuid.uuid4().hex
        self.chat = scope["path"] == CHAT and scope["method"] == "POST"
        self.served = Served()
        self.caller: str | None = None
        self.body: bytes | None = None
        self.status: int | None = None
        """Of the answer; None: none was sent, the client had gone."""
        self.sent = 0
        """Bytes of the answer."""
        self.admitted = False
        """Whether it got its turn."""
        self.queued: float | None = None
        """Seconds in the queue."""
        self.whole = False
        """Whether the last byte of the answer was sent."""
        self.why: str | None = None
        """What ended an answer that is not whole: "client_gone" or "slow_reader"."""
        self.error: str | None = None
        """Short name of what the guard refused it for."""


class GuardMiddleware:
    """See the module.

    Args:
        app: what is guarded.
        guard: the state.
    """

    def __init__(self, app: App, guard: Guard) -> None:
        self.app, self.guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = Visit(scope)
        scope[SERVED] = visit.served
        answer = self._answering(visit, send)
        try:
            await self._admit(visit, receive, answer)
        except RequestError as exc:
            visit.error = exc.code or "refused"
            await _refuse(exc, answer)
        except Gone as exc:
            visit.why = exc.why
            if visit.status is not None:
                raise  # the server closes the connection in the middle of the answer, as it must
        except asyncio.CancelledError:
            if not await _stop(visit, answer):
                raise
        finally:
            self.guard.log(visit)

    async def _admit(self, visit: Visit, receive: Receive, send: Send) -> None:
        scope, guard = visit.scope, self.guard
        if scope["path"] not in _OPEN:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            visit.caller = guard.tokens.caller(headers)
        if not visit.chat:
            await self.app(scope, receive, send)
            return
        if guard.draining:
            raise RequestError("The server is ending.", status=503, code="draining")
        visit.body = await self._body(scope, receive)
        guard.rates.take(visit.caller or "")
        began = time.perf_counter()
        await _unless_gone(guard.line.enter(), receive)
        turn = time.perf_counter()
        visit.queued, visit.admitted = turn - began, True
        guard.metrics.queue.observe(visit.queued)
        scope[_FIRST] = turn
        try:
            await self.app(scope, _replay(visit, receive), send)
        finally:  # a place is free when its work is over, not when its client is gone
            guard.line.leave_when(visit.served.when_over, turn)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            RequestError: too large (413) or too slow (408).
            Gone: the client hung up.
        """
        most = self.guard.config.max_body
        told = dict(scope["headers"]).get(b"content-length", b"0")
        body = bytearray()
        try:
            async with asyncio.timeout(self.guard.config.body_seconds):
                more = True
                while more:
                    if len(body) > most or (told.isdigit() and int(told[:18]) > most):
                        raise RequestError(
                            f"A request may have {most:,} bytes.", status=413, code="request_too_large"
                        )
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone("client_gone")
                    body += message.get("body", b"")
                    more = message.get("more_body", False) or len(body) > most
        except TimeoutError:
            raise RequestError(
                "The body of the request did not arrive in time.", status=408, code="request_timeout"
            ) from None
        return bytes(body)

    def _answering(self, visit: Visit, send: Send) -> Send:
        """``send`` that notes what is sent, adds headers, and waits for no reader for ever."""
        limit = self.guard.config.send_seconds

        async def answer(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", visit.id.encode())]
                if message["status"] == 503 and not any(name == b"retry-after" for name, _ in headers):
                    headers.append((b"retry-after", b"5"))
                message = {**message, "headers": headers}
            elif message["type"] == "http.response.body":
                visit.sent += len(message.get("body", b""))
                self._first_piece(visit)
            more = message.get("more_body", False)
            try:
                async with asyncio.timeout(limit):
                    await send(message)
                    if more:  # the loop gets to say that the client is gone before more is written
                        await asyncio.sleep(0)
            except TimeoutError:
                raise Gone("slow_reader") from None
            except OSError:
                raise Gone("client_gone") from None
            visit.whole = message["type"] == "http.response.body" and not more and visit.why is None

        return answer

    def _first_piece(self, visit: Visit) -> None:
        turn = visit.scope.get(_FIRST)
        if turn is not None and visit.served.pieces and visit.served.model:
            visit.scope[_FIRST] = None
            self.guard.metrics.first.labels(visit.served.model).observe(time.perf_counter() - turn)


class Gone(Exception):
    """Nobody reads the answer."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


async def _unless_gone(turn: Awaitable[None], receive: Receive) -> None:
    """Wait for a turn; give up as soon as the client hangs up."""
    entering = asyncio.ensure_future(turn)
    await asyncio.sleep(0)
    if entering.done():
        await entering
        return
    hanging_up = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({entering, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        if not entering.done():
            raise Gone("client_gone")
        await entering
    finally:
        for task in (entering, hanging_up):
            task.cancel()
        await asyncio.gather(entering, hanging_up, return_exceptions=True)


def _replay(visit: Visit, receive: Receive) -> Receive:
    """A ``receive`` that gives the body that was read already, and notes when the client hangs up."""
    given = False

    async def again() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": visit.body, "more_body": False}
        message = await receive()
        if message["type"] == "http.disconnect" and not visit.whole:
            visit.why = "client_gone"
        return message

    return again


async def _refuse(exc: RequestError, send: Send) -> None:
    headers = {"content-type": "application/json"}
    if isinstance(exc, TryLater):
        headers["retry-after"] = str(exc.seconds)
    if exc.status == 401:
        headers["www-authenticate"] = "Bearer"
    if exc.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    body = json.dumps(exc.body()).encode()
    headers["content-length"] = str(len(body))
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": exc.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


async def _stop(visit: Visit, send: Send) -> bool:
    """The time to drain is over: say so to the client, where that can still be said."""
    ending = RequestError("The server has ended.", status=503, code="draining")
    with suppress(Gone):
        if visit.status is None:
            visit.error = ending.code
            await _refuse(ending, send)
            return True
        visit.why = "stopped"
        if visit.served.stream and visit.status == 200:
            event = f"data: {json.dumps(ending.body())}\n\n".encode()
            await send({"type": "http.response.body", "body": event})
            return True
    return False


def _facts(visit: Visit, seconds: float) -> dict[str, Any]:
    """What the access log says about a request."""
    served, client = visit.served, visit.scope.get("client")
    facts: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": visit.id,
        "client": client[0] if client else None,
        "caller": visit.caller,
        "method": visit.scope["method"],
        "path": visit.scope["path"][:200],
        "status": visit.status,
        "seconds": round(seconds, 4),
        "bytes_in": len(visit.body) if visit.body is not None else None,
        "bytes_out": visit.sent,
        "error": visit.error or served.error,
        "ended": None if visit.whole else visit.why or "error",
    }
    if not visit.admitted:
        return facts
    return facts | {
        "queue_seconds": round(visit.queued or 0.0, 4),
        "model": served.model,
        "stream": served.stream,
        "prompt_tokens": served.prompt_tokens,
        "completion_tokens": served.completion_tokens,
        "steps": served.steps or None,
        "tool_calls": len(served.tool_calls) or None,
        "stop_reason": served.stop_reason,
    }
