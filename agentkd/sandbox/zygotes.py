"""The host's end of the zygotes: one for each isolation, started when first needed."""

from __future__ import annotations

import atexit
import itertools
import os
import secrets
import socket
import struct
import subprocess
import tempfile
import threading
import time
from typing import Any

from agentkd.errors import SandboxError
from agentkd.sandbox import isolation as isolations
from agentkd.sandbox.cgroup import sweep as sweep_groups
from agentkd.sandbox.inside.wire import receive, send

__all__ = ["ANSWER_SECONDS", "DOCTOR", "Zygote", "first_message", "running", "zygote_for"]

START_SECONDS = 60.0
ANSWER_SECONDS = 30.0
"""For the trusted processes to answer."""
DOCTOR = "Run `agentkd doctor`: it says what is missing and how to mend it."


class Zygote:
    """The host's end of one zygote."""

    def __init__(self, kind: str | None, extra: tuple[str, ...]) -> None:
        self.isolation = isolations.choose(kind)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._uids = _first_uid() if self.isolation.root else None
        sweep_groups()
        self._start(isolations.setup(self.isolation, extra))

    def _start(self, settings: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        command, environment = isolations.zygote_command(self.isolation, settings, theirs.fileno())
        with tempfile.TemporaryFile() as log:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the host, which then ends it
            )
            theirs.close()
            self._control = ours
            try:
                host = os.pidfd_open(os.getpid())
                try:
                    send(ours, settings, [host])
                finally:
                    os.close(host)
                ready = receive(ours, time.monotonic() + START_SECONDS)
            except (OSError, TimeoutError, ValueError):
                ready = None
            if ready is None:
                self.stop()
                log.seek(0)
                tail = log.read()[-2000:].decode(errors="replace").strip().splitlines()
                why = tail[-1] if tail else "no message"
                raise SandboxError(f"The sandbox did not start ({self.isolation.kind}): {why}.", DOCTOR)
        ours.settimeout(None)
        if os.path.realpath(ready["library"]) != os.path.realpath(os.path.dirname(os.__file__)):
            self.stop()
            raise SandboxError(f"The sandbox runs another Python ({ready['library']}) than this one.", DOCTOR)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def open(self, order: dict[str, Any]) -> tuple[socket.socket, str, int | None]:
        """A new session: the socket to its root process, a number for it, its user id."""
        ours, theirs = socket.socketpair()
        try:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            with self._lock:
                number = next(self._numbers)
                uid = None if self._uids is None else self._uids[0] + number % self._uids[1]
                send(self._control, {**order, "uid": uid}, [theirs.fileno()])
                reply = receive(self._control, time.monotonic() + ANSWER_SECONDS)
            if reply is None or "error" in reply:
                why = "it is gone" if reply is None else reply["error"]
                raise SandboxError(f"The sandbox cannot start a session: {why}.", DOCTOR)
        except BaseException as exc:
            ours.close()
            if isinstance(exc, (OSError, ValueError)):
                raise SandboxError(
                    f"The sandbox is gone ({exc or 'no answer'}).", "Run the command again."
                ) from exc
            raise
        finally:
            theirs.close()
        return ours, str(number), uid

    def stop(self) -> None:
        """End it and its sessions."""
        self._control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _first_uid() -> tuple[int, int]:
    """First and number of the user ids for sessions: unused ones, so that each is alone in its own."""
    with open("/proc/self/uid_map") as file:
        end = max(sum(map(int, line.split()[::2])) for line in file)
    if end > 2_000_000_000:
        return 1_900_000_000 + 4096 * secrets.randbelow(24_000), 4096
    if end > 65_000:
        return 60_000 + 100 * secrets.randbelow(49), 100
    raise SandboxError("This root user has no other user ids to give to sessions.", DOCTOR)


_zygotes: dict[tuple[str | None, tuple[str, ...]], Zygote] = {}
_zygotes_lock = threading.Lock()


def zygote_for(kind: str | None, extra: tuple[str, ...]) -> Zygote:
    """The zygote of this process for an isolation and the modules outside of site-packages.

    Raises:
        ConfigError: an unknown isolation.
        SandboxError: it is not available, or does not start.
    """
    with _zygotes_lock:
        found = _zygotes.get((kind, extra))
        if found is None or not found.alive:
            found = _zygotes[kind, extra] = Zygote(kind, extra)
        return found


def running() -> list[Zygote]:
    """The zygotes that this process has started."""
    return list(_zygotes.values())


def _forget() -> None:
    """In a forked host: the zygote belongs to the parent."""
    global _zygotes_lock
    _zygotes_lock = threading.Lock()
    for zygote in _zygotes.values():
        zygote._control.close()
    _zygotes.clear()


def _stop() -> None:
    for zygote in _zygotes.values():
        zygote.stop()
    _zygotes.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(_stop)


def first_message(sock: socket.socket) -> tuple[dict[str, Any], int, int]:
    """The first message of a root process, with its process and user id as the kernel tells them."""
    sock.settimeout(ANSWER_SECONDS)
    _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(12), socket.MSG_PEEK)
    message = receive(sock, time.monotonic() + ANSWER_SECONDS) or {}
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid, uid, _ = struct.unpack("3i", data[:12])
            return message, pid, uid
    raise SandboxError("The sandbox does not say who it is.", DOCTOR)
