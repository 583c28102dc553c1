"""A supervisor started as a child process, and the messages to and from it.

The host uses it for a container, and the kernel of a virtual machine for the supervisor beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .wire import MESSAGE_LIMIT, encode

__all__ = ["START", "WRAPPED_LIMIT", "Frames", "Link"]

START = "import sys; sys.path[0] = sys.argv.pop(1); from inside.supervisor import main; main()"
"""Run by ``python -c`` with the folder that holds ``inside`` as its argument."""
WRAPPED_LIMIT = 6 * MESSAGE_LIMIT + 4096
"""Bytes of a message of a candidate, as long as it can get when it is written anew, and what is
wrapped around it."""
CLOSE_SECONDS = 5.0
_BLOCK = 1 << 16


class Frames:
    """Takes a stream of bytes apart into messages.

    Args:
        limit: bytes of one message.
    """

    def __init__(self, limit: int = MESSAGE_LIMIT) -> None:
        self._limit = limit
        self._data = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that are whole now.

        Raises:
            ValueError: one is longer than the limit, or not a JSON object.
        """
        self._data += data
        found = []
        while len(self._data) >= 4:
            length = int.from_bytes(self._data[:4], "big")
            if length > self._limit:
                raise ValueError(f"message of {length} bytes")
            if len(self._data) < 4 + length:
                break
            message = json.loads(self._data[4 : 4 + length].decode("utf-8"))
            if not isinstance(message, dict):
                raise ValueError("message is not an object")
            found.append(message)
            del self._data[: 4 + length]
        return found


class Link:
    """One supervisor.

    Args:
        command: what starts it.
        environment: its environment; this process's own by default.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=None if environment is None else dict(environment),
            start_new_session=True,  # Ctrl-C is for the host, which then ends it
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._to, self._from = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._to, False)
        self._frames = Frames(WRAPPED_LIMIT)

    def exchange(self, messages: Sequence[dict[str, Any]], wait: float) -> list[dict[str, Any]]:
        """Deliver messages, then wait until there is at least one: all that have come.

        Args:
            messages: for the supervisor.
            wait: seconds; none may have come by then.

        Raises:
            EOFError: the supervisor has ended.
            ValueError: what it sends is no message.
        """
        data = b"".join(encode(message, WRAPPED_LIMIT) for message in messages)
        deadline = time.monotonic() + wait
        found: list[dict[str, Any]] = []
        while data or not found:
            left = max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select([self._from], [self._to] if data else [], [], left)
            if writable:
                try:
                    data = data[os.write(self._to, data[:_BLOCK]) :]
                except OSError as exc:
                    raise EOFError(self.last_words()) from exc
            if readable:
                block = os.read(self._from, _BLOCK)
                if not block:
                    raise EOFError(self.last_words())
                found += self._frames.feed(block)
            elif not writable and left <= 0:
                break
        return found

    def turn(self, text: str, wait: float) -> str:
        """``exchange`` from text to text."""
        return json.dumps(self.exchange(json.loads(text), wait))

    def last_words(self) -> str:
        """The last line that the supervisor, or what runs it, wrote to standard error."""
        self.process.poll()
        try:
            self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, self._log.tell() - 2000))
            lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        except ValueError:  # closed
            return ""
        return lines[-1].strip() if lines else ""

    def close(self) -> None:
        """End the supervisor and with it all that it started."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # it has ended
                    stream.close()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()
