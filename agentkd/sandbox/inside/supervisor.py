"""One session inside a container or virtual machine, behind one stream of messages.

The supervisor never runs the model's code. It starts the process that holds the session's state,
has candidates forked from it, keeps their time, passes on what they say under their number, kills
all but the winner, and ends when its input does. An action that is tried alone and is to "settle"
is kept without another word. The boundary is what all this runs in; the processes that run the
code still give up what rights they can.

To it: ``{"order"}`` once, then ``{"set"}``, ``{"try", "seconds", "copies", "settle"}``,
``{"reply", "message"}``, ``{"keep"}``. From it: ``{"ready"}``,
``{"candidate", "message" | "ended" | "timed_out"}``,
``{"full"}`` (the working directory cannot be copied), ``{"kept", "lost"}``, ``{"broken"}``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import select
import shutil
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from .holder import MODULES, Holder
from .kernel import adopt_orphans, hide_memory
from .link import WRAPPED_LIMIT, Frames
from .processes import descendants, parent, signal_to, status
from .session import copy_tree
from .wire import encode, receive, send

__all__ = ["main"]

ANSWER_SECONDS = 10.0
SWEEPS = 100
"""For the process that holds the state to fork."""
_BLOCK = 1 << 16
_exit, _fork = os._exit, os.fork


def main() -> None:
    """Serve standard input and output."""
    sys.path.pop(0)
    source, sink, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    Supervisor(source, sink).serve()


class _Candidate:
    """A process that tries an action, as the supervisor sees it."""

    def __init__(self, pid: int, sock: socket.socket, seconds: float) -> None:
        self.pid = pid
        self.sock = sock
        self.frames = Frames()
        self.seconds = self.left = seconds
        self.since: float | None = time.monotonic()
        """None while it waits for a tool, or is done."""
        self.open = True

    def pause(self) -> None:
        """Its time stands still."""
        if self.since is not None:
            self.left -= time.monotonic() - self.since
            self.since = None

    def deadline(self) -> float | None:
        """When its time is up."""
        return None if self.since is None else self.since + self.left


class Supervisor:
    """See the module.

    Args:
        source, sink: descriptors to read messages from and to write them to.
    """

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink
        os.set_blocking(sink, False)
        self._frames = Frames(WRAPPED_LIMIT)
        self._out = bytearray()
        self._state: tuple[int, socket.socket] | None = None
        self._settings: list[dict[str, Any]] = []
        self._tried: list[_Candidate] = []
        self._alone = False
        """Whether the one candidate is kept at once."""
        self._copies = False
        """Whether candidates have working directories of their own."""
        self._home = ""

    def serve(self) -> NoReturn:
        """Until the input ends."""
        adopt_orphans()
        hide_memory()
        code = 0
        try:
            while self._turn():
                pass
        except BaseException as exc:
            code = 1
            print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
        self._sweep(None)
        if self._home:
            shutil.rmtree(os.path.dirname(self._home), ignore_errors=True)
        _exit(code)

    def _turn(self) -> bool:
        now = time.monotonic()
        for number, tried in enumerate(self._tried):
            deadline = tried.deadline()
            if deadline is not None and deadline <= now:
                self._stop(tried)
                self._say({"candidate": number, "timed_out": tried.seconds})
                self._settle(None)
        deadlines = [at for tried in self._tried if (at := tried.deadline()) is not None]
        wait = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        sources: list[Any] = [self._source, *(tried.sock for tried in self._tried if tried.open)]
        readable, writable, _ = select.select(sources, [self._sink] if self._out else [], [], wait)
        if writable:
            del self._out[: os.write(self._sink, self._out[:_BLOCK])]
        for number, tried in enumerate(self._tried):
            if tried.sock in readable:
                self._hear(number, tried)
        if self._source not in readable:
            return True
        data = os.read(self._source, _BLOCK)
        for message in self._frames.feed(data):
            self._command(message)
        return bool(data)

    def _say(self, message: dict[str, Any]) -> None:
        self._out += encode(message, WRAPPED_LIMIT)

    def _command(self, message: dict[str, Any]) -> None:
        if "order" in message:
            self._start(message["order"])
        elif "set" in message:
            self._settings.append(message["set"])  # the process that they are for is stopped
        elif "try" in message:
            self._alone, self._copies = message["settle"], message["copies"]
            self._try(message["try"], message["seconds"])
        elif "reply" in message:
            self._reply(self._tried[message["reply"]], message["message"])
        elif "keep" in message:
            self._say(self._keep(message["keep"]))

    # The process that holds the state.

    def _start(self, order: dict[str, Any]) -> None:
        user = _other_user(order["user"])
        self._home = os.path.join(order["scratch"], f"session-{os.getpid()}", "home")
        os.makedirs(self._home, 0o700)
        if user is not None:
            for folder in (os.path.dirname(self._home), self._home):
                os.chown(folder, user, user)
        ours, theirs = socket.socketpair()
        own = os.getpid()
        pid = _fork()
        if pid == 0:
            ours.close()
            for fd in (self._source, self._sink):
                os.close(fd)
            Holder(theirs, order, self._home, user, own).run()
        theirs.close()
        self._state = (pid, ours)
        ready = receive(ours, time.monotonic() + 60)
        if ready is None or "broken" in ready:
            self._say({"broken": "it ended" if ready is None else ready["broken"]})
            return
        self._sweep(pid)
        self._say({**ready, "version": sys.version.split()[0], "modules": _modules()})

    def _try(self, codes: list[str], seconds: float) -> None:
        assert self._state is not None
        pid, sock = self._state
        count, first = len(codes), len(self._tried)
        seconds *= max(1.0, count / (os.cpu_count() or 1))
        folders = [self._home]
        if self._copies:
            folders = [f"{self._home}-{index}" for index in range(first, first + count)]
            try:
                for folder in folders:
                    copy_tree(self._home, folder)
                    _give(folder, self._home)
            except OSError as exc:
                self._tidy()
                self._say({"full": exc.strerror or str(exc)})
                return
        pairs = [socket.socketpair() for _ in codes]
        try:
            signal_to(pid, signal.SIGCONT)
            sock.settimeout(ANSWER_SECONDS)
            for settings in self._settings:
                send(sock, settings)
            self._settings = []
            send(sock, {"fork": folders}, [theirs.fileno() for _, theirs in pairs])
            reply = receive(sock, time.monotonic() + ANSWER_SECONDS) or {}
            pids = reply["pids"]
            if len(pids) != count or any(parent(one) != pid for one in pids):
                raise ValueError("it cannot fork")
            fresh = [_Candidate(one, ours, seconds) for one, (ours, _) in zip(pids, pairs)]  # noqa: B905  3.9
            self._tried += fresh
            for tried, code in zip(fresh, codes):  # noqa: B905
                tried.sock.settimeout(ANSWER_SECONDS)
                send(tried.sock, {"code": code})
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
            print(f"the session's process is gone: {exc}", file=sys.stderr, flush=True)
            self._sweep(None)
            _exit(1)
        finally:
            for _, theirs in pairs:
                theirs.close()

    # Candidates.

    def _hear(self, number: int, tried: _Candidate) -> None:
        try:
            tried.sock.settimeout(0.0)
            data = tried.sock.recv(_BLOCK)
            if not data:
                ended = status(tried.pid)
                self._stop(tried)
                self._say({"candidate": number, "ended": ended})
                self._settle(None)
                return
            for message in tried.frames.feed(data):
                if tried.since is None:
                    raise ValueError("it speaks out of turn")
                tried.pause()
                self._say({"candidate": number, "message": message})
                if self._alone and "call" not in message:
                    self._settle(None if "broken" in message else number)
                    return  # whatever else it said is dropped
        except BlockingIOError:
            pass
        except (OSError, ValueError, RecursionError) as exc:
            self._stop(tried)
            self._say({"candidate": number, "message": {"broken": str(exc)[:300]}})
            self._settle(None)

    def _reply(self, tried: _Candidate, message: dict[str, Any]) -> None:
        if not tried.open:
            return
        tried.since = time.monotonic()
        with contextlib.suppress(OSError):  # then its socket is closed, which is heard next
            tried.sock.settimeout(ANSWER_SECONDS)
            send(tried.sock, message)

    def _stop(self, tried: _Candidate) -> None:
        tried.pause()
        tried.open = False
        tried.sock.close()
        if parent(tried.pid) in (self._state or ())[:1]:
            signal_to(tried.pid, signal.SIGKILL)

    def _keep(self, index: int | None) -> dict[str, Any]:
        """Make one candidate's process the session's state and end all others; None keeps the one before."""
        assert self._state is not None
        chosen = None if index is None else self._tried[index]
        kept = chosen is not None and chosen.open and parent(chosen.pid) == self._state[0]
        state = (chosen.pid, chosen.sock) if chosen is not None and kept else self._state
        alive = self._sweep(state[0])
        for sock in [self._state[1], *(tried.sock for tried in self._tried)]:
            if sock is not state[1]:
                sock.close()
        own = f"{self._home}-{index}"
        if kept and alive and self._copies:
            os.rename(self._home, f"{self._home}-old")
            os.rename(own, self._home)
        self._tidy()
        if kept and alive:
            _drain(state[1])
        self._state, self._tried = state, []
        return {"kept": kept and alive, "lost": not alive}

    def _settle(self, index: int | None) -> None:
        """What the only candidate leads to, without being asked."""
        if self._alone:
            self._alone = False
            self._say(self._keep(index))

    def _tidy(self) -> None:
        above = os.path.dirname(self._home)
        for name in os.listdir(above):
            if name != "home":
                shutil.rmtree(os.path.join(above, name), ignore_errors=True)

    def _sweep(self, keep: int | None) -> bool:
        """Stop ``keep``, kill all other processes of the session. Whether ``keep`` lives."""
        if keep is not None:
            signal_to(keep, signal.SIGSTOP)
        for _ in range(SWEEPS):
            strays = descendants() - {keep}
            if not strays:
                break
            for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: none makes more meanwhile
                for pid in strays:
                    signal_to(pid, number)
            time.sleep(0.001)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        return keep is not None and parent(keep) is not None


def _drain(sock: socket.socket) -> None:
    sock.settimeout(0.0)
    with contextlib.suppress(OSError):
        while sock.recv(_BLOCK):
            pass
    sock.settimeout(None)


def _give(folder: str, like: str) -> None:
    """Make a copied tree belong to whom the original belongs to."""
    owner = os.stat(like)
    if owner.st_uid != os.geteuid():
        for above, folders, files in os.walk(folder):
            for name in (above, *(os.path.join(above, one) for one in folders + files)):
                os.chown(name, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _other_user(wanted: int | None) -> int | None:
    """The user to become: only root can, and only one that can read the interpreter's library."""
    if wanted is None or os.geteuid() != 0:
        return None
    pid = _fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresuid(wanted, wanted, wanted)
            os.listdir(os.path.dirname(os.__file__))
            os.close(os.open(os.__file__, os.O_RDONLY))
        except BaseException:
            _exit(1)
        _exit(0)
    return wanted if os.waitpid(pid, 0)[1] == 0 else None


def _modules() -> dict[str, str | None]:
    """Versions of what actions like to use."""
    found: dict[str, str | None] = {}
    for name in MODULES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
