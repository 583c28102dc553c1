"""The viewer's server: this machine only, read only, gone with the command.

It binds the loopback address and answers only requests that name it (so that no page of another site
can ask it by a name that resolves to this machine). Whoever can log in here can ask it, too.
"""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from agentkd.errors import AgentkdError, ConfigError, boundary
from agentkd.view.page import page, policy
from agentkd.view.row import as_json
from agentkd.view.runs import Mask, Run

__all__ = ["Viewer"]

_LARGE = 16_384
"""Bytes from which an answer is compressed."""
_FOUND = 100_000
"""Trajectories that one search names at most."""


class Viewer:
    """Serves runs until it is closed.

    Args:
        runs: read ones; they are read on while their files grow.
        mask: says which tokens of a trajectory are learnt, or None.
        port: 0 for a free one.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, runs: Sequence[Run], *, mask: Mask | None = None, port: int = 0) -> None:
        self.runs, self.mask = list(runs), mask
        self._mask_lock = threading.Lock()
        with boundary(ConfigError, f"opening port {port}", "Choose another --port, or none for a free one."):
            self._server = _Server(("127.0.0.1", port), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.port}/"

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def wait(self) -> None:
        """Until it is closed, or Ctrl-C."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def answer(self, path: str, query: dict[str, str]) -> Any:
        """What is asked for, as JSON.

        Raises:
            KeyError, ValueError, IndexError: there is no such thing.
            AgentkdError: it cannot be read.
        """
        if path == "/api/runs":
            for run in self.runs:
                run.refresh()
            return {"runs": [run.summary() for run in self.runs], "mask": self.mask is not None}
        if path == "/api/state":
            for run in self.runs:
                run.refresh()
            return [[len(run.rows), run.open] for run in self.runs]
        at = int(query["run"])
        if at < 0:
            raise IndexError(at)
        run = self.runs[at]
        if path == "/api/search":
            return [number for number, _ in zip(run.find(query["q"]), range(_FOUND), strict=False)]
        number = int(query["n"])
        if path == "/api/mask" and self.mask is not None:
            with self._mask_lock:  # a tokenizer is not for two threads
                return self.mask(run.record(number))
        if path == "/api/trajectory":
            return run.detail(number)
        raise KeyError(path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a page that was left is no error
            super().handle_error(request, client_address)


def _handler(viewer: Viewer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "agentkd", ""
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_GET(self) -> None:
            if self.headers.get("Host") not in {
                f"{name}:{viewer.port}" for name in ("127.0.0.1", "localhost")
            }:
                self._send(403, "text/plain", b"This server answers to its own address only.")
                return
            url = urlsplit(self.path)
            if url.path == "/":
                self._send(200, "text/html", page("Trajectories").encode())
                return
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            try:
                status, value = 200, viewer.answer(url.path, query)
            except AgentkdError as exc:
                status, value = 500, {"error": exc.message, "hint": exc.hint}
            except (KeyError, ValueError, IndexError):
                status, value = 404, {"error": "There is no such thing here.", "hint": ""}
            self._send(status, "application/json", as_json(value).encode())

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            if len(body) > _LARGE and "gzip" in self.headers.get("Accept-Encoding", ""):
                body = gzip.compress(body, 1)
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", policy("'self'") + "; frame-ancestors 'none'")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass  # the terminal is for the address

    return Handler
