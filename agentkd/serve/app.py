"""The HTTP side: OpenAI's chat-completions contract over any number of backends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from agentkd import __version__
from agentkd.serve.backend import ChatBackend, ChatChoice, ChatResult, refuse_twins, status_of
from agentkd.serve.guard import CHAT, CLIENT_GONE, Guard, GuardConfig, GuardMiddleware
from agentkd.serve.openapi import ANSWERS, CHAT_BODY, MODEL, MODELS, describe
from agentkd.serve.page import add_page
from agentkd.serve.probes import add_probes
from agentkd.serve.request import ChatRequest, RequestError, parse_request
from agentkd.serve.served import SERVED, Served
from agentkd.serve.tokens import Tokens

__all__ = ["create_app"]

_TOGETHER = 64
"""Events that are written together, at most: a slow reader gets the same time for each write."""


def create_app(
    backends: Sequence[ChatBackend], config: GuardConfig | None = None, tokens: Tokens | None = None
) -> FastAPI:
    """The application: chat completions, the list of models, the page, probes and metrics.

    Args:
        backends: the models, told apart by ``model_id``.
        config: limits and the access log.
        tokens: who may ask; by default this machine may, without a token.

    Raises:
        ConfigError: two models have one name, or the access log cannot be written.
    """
    refuse_twins([backend.model_id for backend in backends])
    guard = Guard(config or GuardConfig(), tokens or Tokens(), backends)
    app = FastAPI(title="agentkd", version=__version__, docs_url=None, redoc_url=None)
    app.state.guard = guard
    app.add_middleware(GuardMiddleware, guard=guard)
    models = {backend.model_id: backend for backend in backends}
    started = int(time.time())
    add_probes(app, guard)
    add_page(app)

    @app.get("/v1/models", responses=MODELS)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(it, started) for it in models.values()]}

    @app.get("/v1/models/{model_id:path}", responses=MODEL)
    async def one_model(model_id: str) -> dict[str, Any]:
        return _model(_find(models, model_id), started)

    @app.post(CHAT, responses=ANSWERS, openapi_extra=CHAT_BODY)
    async def chat_completions(http: Request) -> Response:
        request = parse_request(await http.body())
        backend = _find(models, request.model)
        http.scope[SERVED].accept(request)
        work = _Work(backend, request, http.scope[SERVED])
        work.start()
        watcher = asyncio.create_task(_watch(http, work))
        try:
            first = await work.events.get()
            if isinstance(first, Exception):
                raise status_of(first)
            if request.stream:
                return StreamingResponse(_stream(work, first), media_type="text/event-stream")
            while not isinstance(first, ChatResult):
                first = await work.events.get()
                if isinstance(first, Exception):
                    raise status_of(first)
            return JSONResponse(_response(request, first))
        finally:
            watcher.cancel()
            if not request.stream:
                work.cancel()

    @app.exception_handler(RequestError)
    async def refused(http: Request, exc: RequestError) -> JSONResponse:
        served = http.scope[SERVED]
        served.error = served.error or exc.code or "invalid_request"
        return JSONResponse(exc.body(), status_code=exc.status)

    @app.exception_handler(HTTPException)
    async def no_such_route(http: Request, exc: HTTPException) -> JSONResponse:
        problem = RequestError(f"{http.method} {http.url.path}: {exc.detail}", status=exc.status_code)
        return JSONResponse(problem.body(), status_code=exc.status_code)

    describe(app)
    return app


class _Piece(NamedTuple):
    """The text of a choice goes on."""

    choice: int
    text: str


class _Step(NamedTuple):
    """An agent has got on."""

    reasoning: str
    event: dict[str, Any]


class _Work:
    """A request on its way: runs the backend on a thread of its own, hands events to the loop.

    Events are pieces and steps, at last a ChatResult or an exception.
    """

    def __init__(self, backend: ChatBackend, request: ChatRequest, served: Served) -> None:
        self.backend, self.request, self.served = backend, request, served
        self.events: asyncio.Queue[_Piece | _Step | ChatResult | Exception] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self._gone = threading.Event()
        self._when_gone: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def start(self) -> None:
        """Begin. A daemon thread, so that a long answer never keeps the process alive."""
        self.served.begin()
        threading.Thread(target=self._run, name="agentkd-request", daemon=True).start()

    def text(self, index: int, piece: str) -> None:
        """See :class:`agentkd.serve.backend.Listener`."""
        self.served.pieces += 1
        self._put(_Piece(index, piece))

    def step(self, reasoning: str, event: dict[str, Any]) -> None:
        """See :class:`agentkd.serve.backend.Listener`."""
        self.served.step(event)
        self._put(_Step(reasoning, event))

    def cancelled(self) -> bool:
        """See :class:`agentkd.serve.backend.Listener`."""
        return self._gone.is_set()

    def when_cancelled(self, act: Callable[[], None]) -> None:
        """See :class:`agentkd.serve.backend.Listener`."""
        with self._lock:
            self._when_gone = act
            gone = self._gone.is_set()
        if gone:
            act()

    def cancel(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            first, act = not self._gone.is_set(), self._when_gone
            self._gone.set()
        if first and act is not None:
            act()

    def _run(self) -> None:
        try:
            result = self.backend.complete(self.request, self)
        except Exception as exc:
            # Whatever a backend raises is the answer to this request, and ends no other.
            self.served.fail(exc, status_of(exc))
            self._put(exc)
        else:
            self.served.finish(result)
            self._put(result)
        finally:
            self._on_loop(self.served.end)

    def _put(self, event: _Piece | _Step | ChatResult | Exception) -> None:
        self._on_loop(self.events.put_nowait, event)

    def _on_loop(self, act: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self.loop.call_soon_threadsafe(act, *arguments)


async def _watch(http: Request, work: _Work) -> None:
    """Note when the client hangs up: the engine does not go on for nobody, and nobody waits for it."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    work.cancel()
    work.events.put_nowait(RequestError("The client has gone.", status=CLIENT_GONE, code="client_gone"))


async def _stream(work: _Work, event: Any) -> AsyncIterator[str]:
    """Server-sent events. Token ids and log-probabilities come with the last piece of a choice.

    What has come while the last ones were written is written together.
    """
    request = work.request
    sent = [0] * request.n
    block = [_chunk(work, index, {"role": "assistant", "content": ""}) for index in range(request.n)]
    try:
        while not isinstance(event, ChatResult):
            if isinstance(event, Exception):
                yield "".join([*block, _event(status_of(event).body())])
                return
            if isinstance(event, _Step):
                block.append(
                    _chunk(work, 0, {"reasoning_content": event.reasoning}, agentkd_step=event.event)
                )
            else:
                sent[event.choice] += len(event.text)
                block.append(_chunk(work, event.choice, {"content": event.text}))
            if work.events.empty() or len(block) >= _TOGETHER:
                yield "".join(block)
                block = []
            event = await work.events.get()
        yield "".join([*block, *_closing(work, event, sent)])
    finally:
        work.cancel()


def _closing(work: _Work, result: ChatResult, sent: Sequence[int]) -> Iterator[str]:
    """The events that end a stream of which so many characters of each choice were sent."""
    for index, choice in enumerate(result.choices):
        if rest := choice.text[sent[index] :]:
            yield _chunk(work, index, {"content": rest})
        yield _last_chunk(work, index, choice, result)
    if work.request.stream_options.include_usage:
        yield _event({**_head(work, "chat.completion.chunk"), "choices": [], "usage": _usage(result)})
    yield "data: [DONE]\n\n"


def _chunk(work: _Work, index: int, delta: dict[str, str], **extra: Any) -> str:
    body = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    return _event({**_head(work, "chat.completion.chunk"), "choices": [body], **extra})


def _last_chunk(work: _Work, index: int, choice: ChatChoice, result: ChatResult) -> str:
    body = {"index": index, "delta": {}, **_facts(work.request, choice)}
    return _event({**_head(work, "chat.completion.chunk"), "choices": [body], **_extra(work.request, result)})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _head(work: _Work, kind: str) -> dict[str, Any]:
    return {"id": work.id, "object": kind, "created": work.created, "model": work.request.model}


def _response(work_request: ChatRequest, result: ChatResult) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": _message(choice),
            **_facts(work_request, choice),
        }
        for index, choice in enumerate(result.choices)
    ]
    body: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": work_request.model,
        "choices": choices,
        "usage": _usage(result),
    }
    return {**body, **_extra(work_request, result)}


def _message(choice: ChatChoice) -> dict[str, Any]:
    message = {"role": "assistant", "content": choice.text}
    return message if choice.reasoning is None else {**message, "reasoning_content": choice.reasoning}


def _extra(request: ChatRequest, result: ChatResult) -> dict[str, Any]:
    """What a response carries that OpenAI's has not."""
    extra: dict[str, Any] = {}
    if request.return_token_ids:
        extra["prompt_token_ids"] = result.prompt_token_ids
    if result.rollout is not None:
        extra["agentkd"] = result.rollout
    return extra


def _facts(request: ChatRequest, choice: ChatChoice) -> dict[str, Any]:
    """What a choice carries beside its text."""
    facts: dict[str, Any] = {"finish_reason": choice.finish_reason, "logprobs": None}
    if request.logprobs and choice.logprobs is not None and choice.tokens is not None:
        content = [
            {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
            for token, value in zip(choice.tokens, choice.logprobs, strict=True)
        ]
        facts["logprobs"] = {"content": content, "refusal": None}
    if request.return_token_ids:
        facts["token_ids"] = choice.token_ids
    return facts


def _usage(result: ChatResult) -> dict[str, int]:
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "total_tokens": result.prompt_tokens + result.completion_tokens,
    }


def _find(models: dict[str, ChatBackend], model_id: str) -> ChatBackend:
    if model_id not in models:
        known = ", ".join(models)
        raise RequestError(
            f"The model {model_id!r} does not exist here; there is: {known}.",
            status=404,
            param="model",
            code="model_not_found",
        )
    return models[model_id]


def _model(backend: ChatBackend, started: int) -> dict[str, Any]:
    return {"id": backend.model_id, "object": "model", "created": started, "owned_by": backend.label}
