"""One process of a fork session that tries an action, as the host sees it."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from agentkd.errors import AgentkdError
from agentkd.sandbox import Outcome
from agentkd.sandbox.inside.wire import receive, send
from agentkd.sandbox.outcome import KEPT, checked
from agentkd.sandbox.toolhost import Caller
from agentkd.trajectory import valid_text

__all__ = ["Candidate", "drain", "end_in_words", "has_ended"]


class Candidate:
    """A forked process, and what came of the action that it was given.

    Args:
        pid: in the session's own numbering.
        sock: to it.
    """

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self.outcome: Outcome | None = None

    def drive(self, code: str, seconds: float, caller: Caller, why: Callable[[int], str]) -> None:
        """Give it its code, answer its calls, take its outcome.

        Args:
            code: the action.
            seconds: that it may take, time in tools apart.
            caller: answers its calls of tools.
            why: says for what reason a process has ended.

        Raises:
            AgentkdError: a tool failed on the host, not by the code's fault.
        """
        began = time.monotonic()
        try:
            message, seconds = self._talk(code, seconds, caller)
            self.outcome = checked(message, caller, time.monotonic() - began)
            return
        except TimeoutError:
            error = f"The code took longer than {seconds:.3g} s and was stopped. {KEPT}"
            timed_out = True
        except AgentkdError:
            raise
        except _Ended:
            error, timed_out = why(self.pid), False
        except (OSError, ValueError, RecursionError) as exc:
            error, timed_out = f"The code broke its interpreter ({exc}). {KEPT}", False
        self.outcome = Outcome(
            error=valid_text(error),
            timed_out=timed_out,
            ended=True,
            tool_uses=tuple(caller.uses),
            seconds=time.monotonic() - began,
        )

    def _talk(self, code: str, seconds: float, caller: Caller) -> tuple[dict[str, Any], float]:
        deadline = time.monotonic() + seconds
        self.sock.settimeout(seconds)
        send(self.sock, {"code": code})
        while True:
            message = receive(self.sock, deadline)
            if message is None:
                raise _Ended
            if "call" not in message:
                return message, seconds
            began = time.monotonic()
            reply = caller.answer(message)
            deadline += time.monotonic() - began
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            send(self.sock, reply)


class _Ended(Exception):
    """The process's socket was closed."""


def drain(sock: socket.socket) -> None:
    """Drop what processes that are gone now may have written."""
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        while sock.recv(1 << 16):
            pass
    sock.setblocking(True)


def end_in_words(status: Any) -> str:
    """What the model is told of a process that has ended.

    Args:
        status: its exit code, negative for a signal; None where it is not known.
    """
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        what = "used too much processor time or memory"
    elif isinstance(status, int) and status < 0:
        what = f"crashed its interpreter (signal {-status})"
    else:
        what = "ended its process"
    return f"The code {what}. {KEPT}"


def has_ended(pidfd: int, milliseconds: int) -> bool:
    """Wait until a process has ended; whether it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(milliseconds))
