"""Requests to an engine over connections that are kept, and that any thread can cut off.

On ``http.client``, whose socket is at hand: a call that waits for its answer, or for the first piece of
it, is ended by shutting the socket down, which a client that hides it cannot do.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, RemoteDisconnected
from typing import Any
from urllib.parse import urlsplit

from agentkd.engine import Cancellation

__all__ = ["Wire", "lines"]

KEPT_SECONDS = 2.0
"""How long a connection that nobody uses is kept: shorter than uvicorn keeps it (5 s), so that a
request does not meet a server that has just closed it."""
_MOST_KEPT = 64
_CONNECT_SECONDS = 5.0
_END_SECONDS = 1.0
"""For the end of an answer whose last event has come."""


class Wire:
    """Kept connections to one engine. Thread-safe; a connection serves one call at a time.

    Args:
        patience: seconds without a single byte after which a call is given up.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._lock = threading.Lock()
        self._idle: list[tuple[float, str, HTTPConnection]] = []

    @contextmanager
    def call(
        self,
        url: str,
        body: dict[str, Any] | None = None,
        *,
        patience: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> Iterator[HTTPResponse]:
        """POST a JSON object, or GET; the answer, to be read in the block.

        An answer that is read to its end leaves its connection to the next call.

        Args:
            url: ``http://HOST:PORT/...``.
            body: what is posted; None gets.
            patience: instead of the usual one.
            cancellation: cuts the connection off.

        Raises:
            OSError, HTTPException: no connection, or it broke off; so it does when it is cut off.
        """
        parts, held = urlsplit(url), _Held()
        with nullcontext() if cancellation is None else cancellation.calling(held.cut):
            connection, answer = self._send(parts.netloc, parts.path, body, held)
            try:
                if patience is not None and connection.sock is not None:
                    connection.sock.settimeout(patience)
                yield answer
                _finish(connection, answer)
            finally:
                held.sock = None
                if answer.isclosed() and not answer.will_close and not held.is_cut:
                    self._keep(parts.netloc, connection)
                else:
                    answer.close()
                    connection.close()

    def _send(
        self, address: str, path: str, body: dict[str, Any] | None, held: _Held
    ) -> tuple[HTTPConnection, HTTPResponse]:
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        kept = self._take(address)
        connection = kept or self._connect(address)
        while True:
            try:
                held.hold(connection.sock)
                connection.request(method, path, content, {"Content-Type": "application/json"})
                return connection, connection.getresponse()
            except BaseException as exc:
                connection.close()
                gone = isinstance(exc, (RemoteDisconnected, BrokenPipeError, ConnectionResetError))
                if kept is None or held.is_cut or not gone:
                    raise
                kept, connection = None, self._connect(address)  # it was closed in the very moment

    def _connect(self, address: str) -> HTTPConnection:
        connection = HTTPConnection(address, timeout=_CONNECT_SECONDS)
        connection.connect()
        connection.sock.settimeout(self.patience)
        return connection

    def _take(self, address: str) -> HTTPConnection | None:
        """The connection that was used last, if it can be used again."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                until, other, connection = self._idle.pop()
            if other == address and time.monotonic() < until and not _readable(connection.sock):
                return connection
            connection.close()

    def _keep(self, address: str, connection: HTTPConnection) -> None:
        connection.sock.settimeout(self.patience)
        now = time.monotonic()
        with self._lock:
            old = [it for it in self._idle if it[0] < now]
            self._idle = [it for it in self._idle if it[0] >= now]
            self._idle.append((now + KEPT_SECONDS, address, connection))
            if len(self._idle) > _MOST_KEPT:
                old.append(self._idle.pop(0))
        for _, _, unused in old:
            unused.close()

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, _, connection in idle:
            connection.close()


class _Held:
    """The socket that a call waits on; cut off from another thread."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.is_cut = False

    def hold(self, sock: socket.socket) -> None:
        self.sock = sock
        if self.is_cut:
            raise ConnectionAbortedError("the call was cancelled")

    def cut(self) -> None:
        self.is_cut = True
        if (sock := self.sock) is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def lines(answer: HTTPResponse, last: bytes) -> Iterator[bytes]:
    """The lines of an answer as they come, without their ends, up to the line ``last``, which is left out.

    Raises:
        OSError, HTTPException: the connection broke off, with or without a word.
    """
    rest = b""
    while piece := answer.read1(1 << 16):
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            if line == last:
                return
            yield line
    raise HTTPException("the answer has no end")


def _finish(connection: HTTPConnection, answer: HTTPResponse) -> None:
    """Read what is left of an answer that has been dealt with, which is its end."""
    if answer.isclosed() or connection.sock is None:
        return
    with suppress(OSError, HTTPException):
        connection.sock.settimeout(_END_SECONDS)
        while answer.read1(1 << 16):
            pass


def _readable(sock: socket.socket) -> bool:
    """Whether there is something to read, which on a connection that nobody uses is its end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
