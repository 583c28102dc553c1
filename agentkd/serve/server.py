"""Running the application: in a thread for as long as a block lasts, or until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import uvicorn

from agentkd.errors import ConfigError, ProviderError
from agentkd.serve.app import create_app
from agentkd.serve.backend import ChatBackend, student_backend
from agentkd.serve.guard import Gone, Guard, GuardConfig
from agentkd.serve.tokens import Tokens, is_loopback

if TYPE_CHECKING:
    from agentkd.serve.students import ServeConfig

__all__ = ["Server", "serve_app", "serve_forever", "serve_student", "serve_students"]

_GRACE = 2
"""Seconds that running requests get when the server stops."""


class Server:
    """Serves an application on a thread until the block ends.

    ::

        with Server(create_app([backend])) as server:
            print(server.url)  # http://127.0.0.1:PORT/v1

    Args:
        app: from :func:`agentkd.serve.create_app`.
        host: address to listen on.
        port: 0 takes a free one.
    """

    def __init__(self, app: Any, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._socket = _listen(host, port)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self._server = _uvicorn(app)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="agentkd-server", daemon=True
        )

    @property
    def address(self) -> str:
        """``http://HOST:PORT``."""
        return _address(self.host, self.port)

    @property
    def url(self) -> str:
        """The base URL that OpenAI clients want; ends in ``/v1``."""
        return f"{self.address}/v1"

    def start(self) -> Self:
        """Listen; returns when requests are answered.

        Raises:
            ProviderError: it did not come up.
        """
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.005)
            if not self._thread.is_alive():
                self._socket.close()
                raise ProviderError("The server did not start.")
        return self

    def stop(self) -> None:
        """Stop listening, give running requests two seconds, then end."""
        self._server.should_exit = True
        self._thread.join(_GRACE + 8)
        self._socket.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def serve_forever(
    backends: Sequence[ChatBackend],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    guard: GuardConfig | None = None,
    tokens: Tokens | None = None,
) -> None:
    """Serve on the calling thread until SIGINT or SIGTERM. Says where on stderr.

    At the first signal no more connections are taken, and requests under way get
    ``guard.drain_seconds`` to end; a second one cuts them off.

    Args:
        backends: the models.
        host, port: where to listen; port 0 takes a free one.
        guard: limits and the access log.
        tokens: who may ask; None at all on loopback only.

    Raises:
        ConfigError: the address cannot be listened on, or is open to others without a token.
    """
    guard, tokens = guard or GuardConfig(), tokens or Tokens()
    tokens.check_address(host)

    def say(address: str) -> None:
        for backend in backends:
            print(
                f"Serving {backend.model_id} ({backend.label}) at {address}/v1. Ctrl-C stops.",
                file=sys.stderr,
            )
        if is_loopback(host):
            print(f"A page to try it on: {address}/", file=sys.stderr)

    app = create_app(backends, guard, tokens)
    serve_app(app, host=host, port=port, say=say, drain_seconds=guard.drain_seconds)


def serve_app(
    app: Any, *, host: str, port: int, say: Callable[[str], None], drain_seconds: float = _GRACE
) -> None:
    """Serve any ASGI application on the calling thread until SIGINT or SIGTERM, and return then.

    Args:
        app: the application.
        host, port: where to listen; port 0 takes a free one.
        say: told ``http://HOST:PORT`` as soon as connections are taken.
        drain_seconds: that requests under way get after the signal.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    listener = _listen(host, port)
    say(_address(host, int(listener.getsockname()[1])))
    try:
        _uvicorn(app, drain_seconds).run([listener])
    finally:
        listener.close()


def serve_student(path: Path | str, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a student folder until stopped; see :func:`serve_forever`."""
    backend = student_backend(path)
    try:
        serve_forever([backend], host=host, port=port)
    finally:
        backend.close()


def serve_students(
    folders: Sequence[Path | str],
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    guard: GuardConfig | None = None,
    tokens: Tokens | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve students and their agents until stopped; see :func:`agentkd.serve.open_students`."""
    from agentkd.serve.students import open_students

    (tokens or Tokens()).check_address(host)  # before the models are loaded
    with open_students(folders, config, say) as backends:
        serve_forever(backends, host=host, port=port, guard=guard, tokens=tokens)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # The protocol is named because asyncio turns Nagle's algorithm off only where it is: without it
        # every answer to a client that keeps its connection waits 40 ms for an acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except (OSError, OverflowError) as exc:
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {exc}.", "Choose another --port or --host."
        ) from exc
    return listener


def _address(host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


class _Uvicorn(uvicorn.Server):
    """A server that a signal ends with grace: uvicorn's own would send itself the signal afterwards."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        guard = getattr(getattr(self.config.app, "state", None), "guard", None)
        if isinstance(guard, Guard):
            guard.draining = True
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_KEPT_SECONDS = 75
"""How long a connection that nobody uses is kept: longer than clients keep theirs (httpx, and openai with it,
5 s; aiohttp 15 s; load balancers 60 s). The other way round, a request would now and then meet a connection
that is being closed, and fail."""


def _is_news(record: logging.LogRecord) -> bool:
    """Whether uvicorn has something to say that is not an answer which was broken off on purpose."""
    return not record.exc_info or not isinstance(record.exc_info[1], (Gone, asyncio.CancelledError))


def _uvicorn(app: Any, drain_seconds: float = _GRACE) -> uvicorn.Server:
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    # No log configuration: uvicorn's would write requests to stdout, which belongs to the caller.
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=math.ceil(drain_seconds),
        timeout_keep_alive=_KEPT_SECONDS,
        server_header=False,
    )
    return _Uvicorn(config)
