"""Running the application: in a thread for as long as a block lasts, or until it is stopped."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import uvicorn

from agentkd.errors import ConfigError, ProviderError
from agentkd.serve.app import create_app
from agentkd.serve.backend import ChatBackend, student_backend

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


def serve_forever(backends: Sequence[ChatBackend], *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve on the calling thread until SIGINT or SIGTERM. Says where on stderr.

    Raises:
        ConfigError: the address cannot be listened on.
        KeyboardInterrupt: after a clean stop by Ctrl-C.
    """

    def say(address: str) -> None:
        for backend in backends:
            print(
                f"Serving {backend.model_id} ({backend.label}) at {address}/v1. Ctrl-C stops.",
                file=sys.stderr,
            )

    serve_app(create_app(backends), host=host, port=port, say=say)


def serve_app(app: Any, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve any ASGI application on the calling thread until SIGINT or SIGTERM.

    Args:
        app: the application.
        host, port: where to listen; port 0 takes a free one.
        say: told ``http://HOST:PORT`` as soon as connections are taken.

    Raises:
        ConfigError: the address cannot be listened on.
        KeyboardInterrupt: after a clean stop by Ctrl-C.
    """
    listener = _listen(host, port)
    say(_address(host, int(listener.getsockname()[1])))
    try:
        _uvicorn(app).run([listener])
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
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve students and their agents until stopped; see :func:`agentkd.serve.open_students`."""
    from agentkd.serve.students import open_students

    with open_students(folders, config, say) as backends:
        serve_forever(backends, host=host, port=port)


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


def _uvicorn(app: Any) -> uvicorn.Server:
    # No log configuration: uvicorn's would write requests to stdout, which belongs to the caller.
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=_GRACE
    )
    return uvicorn.Server(config)
