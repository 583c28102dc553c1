"""Messages: JSON with a four-byte length before them, over a Unix socket, never pickle."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["MESSAGE_LIMIT", "OUTPUT_LIMIT", "encode", "plain", "receive", "receive_fds", "send"]

MESSAGE_LIMIT = 16 << 20
"""Bytes of one message."""
OUTPUT_LIMIT = 50_000
"""Characters of printed text or of one string value."""
ITEM_LIMIT = 10_000
"""Items of one list or dict."""
PARTS_LIMIT = 500_000
"""Values in one message: a byte of JSON can cost the reader thirty of memory."""

# Bound now: model-written code may replace what these modules hold.
_dumps = json.JSONEncoder(ensure_ascii=True).encode
_loads = json.JSONDecoder().decode
_pack = struct.Struct("!I").pack
_unpack = struct.Struct("!I").unpack
_monotonic = time.monotonic


def encode(message: dict[str, Any], limit: int = MESSAGE_LIMIT) -> bytes:
    """A message as bytes.

    Raises:
        ValueError: longer than the limit, or not JSON.
    """
    data = _dumps(message).encode("ascii")
    if len(data) > limit:
        raise ValueError(f"message of {len(data)} bytes")
    return _pack(len(data)) + data


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Write one message, with open files attached to it."""
    data = encode(message)
    if fds:
        sent = socket.send_fds(sock, [data], list(fds))
        data = data[sent:]
    if data:
        sock.sendall(data)


def receive(sock: socket.socket, deadline: float | None = None) -> dict[str, Any] | None:
    """Read one message; None at the end of the stream.

    Args:
        sock: a stream socket.
        deadline: ``time.monotonic()`` by which the whole message must have come.

    Raises:
        TimeoutError: it did not come in time.
        ValueError: longer than the limit, or not a JSON object.
    """
    head = _exactly(sock, 4, deadline)
    return None if head is None else _body(sock, head, deadline)


def receive_fds(sock: socket.socket, most: int) -> tuple[dict[str, Any] | None, list[int]]:
    """Read one message and the files attached to it."""
    head, fds, _, _ = socket.recv_fds(sock, 4, most)
    if len(head) < 4:
        rest = _exactly(sock, 4 - len(head), None) if head else None
        if rest is None:
            return None, fds
        head += rest
    return _body(sock, head, None), fds


def _body(sock: socket.socket, head: bytes, deadline: float | None) -> dict[str, Any] | None:
    (length,) = _unpack(head)
    if length > MESSAGE_LIMIT:
        raise ValueError(f"message of {length} bytes")
    data = _exactly(sock, length, deadline)
    if data is None:
        return None
    if len(data) > PARTS_LIMIT and sum(map(data.count, (b",", b"[", b"{"))) > PARTS_LIMIT:
        raise ValueError("message of too many parts")
    try:
        message = _loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("message too deep") from None
    if not isinstance(message, dict):
        raise ValueError("message is not an object")
    return message


def _exactly(sock: socket.socket, count: int, deadline: float | None) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        if deadline is not None:  # anew each time: a sender that drips bytes must not win time
            left = deadline - _monotonic()
            if left <= 0:
                raise TimeoutError
            sock.settimeout(left)
        block = sock.recv(min(count - len(data), 1 << 20))
        if not block:
            return None
        data += block
    return bytes(data)


def plain(value: Any) -> Any:
    """A JSON value for whatever the code made: itself where JSON has it, else its text.

    Raises:
        ValueError: an integer too long to be written in digits.
    """
    try:
        return _plain(value)
    except RecursionError:
        return str(value)[:OUTPUT_LIMIT]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        str(value)  # raises where json would, but with the value still at hand
        return value
    if isinstance(value, str):
        return str(value[:OUTPUT_LIMIT])
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= ITEM_LIMIT:
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_plain(item) for item in items]
    if isinstance(value, dict) and len(value) <= ITEM_LIMIT:
        return {str(key)[:OUTPUT_LIMIT]: _plain(item) for key, item in value.items()}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return _plain(value.item())
    return str(value)[:OUTPUT_LIMIT]
