"""The processes that hold a session's state and run its code, where a supervisor watches them."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import socket
import sys
from typing import Any, NoReturn

from . import landlock, seccomp
from .kernel import die_with_parent, drop_capabilities, hide_memory, no_new_privileges
from .language import Actor, Runner
from .session import MOST_CANDIDATES, reopen
from .wire import receive_fds, send

__all__ = ["MODULES", "Holder"]

MODULES = ("numpy", "sympy")
"""Imported once where installed and allowed, not by every candidate anew."""
_getstate, _setstate = random.getstate, random.setstate
_exit, _fork, _close = os._exit, os.fork, os.close


class Holder(Actor):
    """The first of them, and all that are forked from it.

    Args:
        sock: to the supervisor.
        order: what the host asked for: imports, limits, seed, environment.
        home: the working directory.
        user: id of the user to become; None to stay who it is.
        parent: process id of the supervisor.
    """

    def __init__(
        self, sock: socket.socket, order: dict[str, Any], home: str, user: int | None, parent: int
    ) -> None:
        self.sock = sock
        self.order = order
        self.home = home
        self.user = user
        self.parent = parent

    def run(self) -> NoReturn:
        """Serve the supervisor."""
        try:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 2)
            self._prepare()
            limits = self._confine()
            self.runner = Runner(self.order["imports"], self._call)
            random.seed(self.order["seed"])
            if (numpy := sys.modules.get("numpy")) is not None:
                numpy.random.seed(self.order["seed"] % 2**32)
            send(self.sock, {"ready": True, "uid": os.getuid(), **limits})
            while True:
                message, fds = receive_fds(self.sock, MOST_CANDIDATES)
                if message is None:
                    break
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
                if "fork" not in message:
                    self.runner.set(message["tools"], message["variables"])
                elif self._spawn(fds, message["fork"]):
                    self._act()
        except BaseException as exc:
            with contextlib.suppress(BaseException):
                send(self.sock, {"broken": f"{type(exc).__name__}: {exc}"})
        _exit(1)

    def _prepare(self) -> None:
        """The folder, the environment, and modules that every candidate would import anew."""
        os.chdir(self.home)
        os.environ.clear()
        os.environ.update(self.order["environment"], HOME=self.home, TMPDIR=self.home)
        for name in MODULES:
            if {name, "*"} & set(self.order["imports"]):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)

    def _confine(self) -> dict[str, Any]:
        """Give up what rights can be given up. Only then the model's code runs."""
        import resource

        limits = dict(self.order["limits"])
        if self.user is not None:  # it counts the processes of a user, who must have no others
            limits["NPROC"] = self.order["processes"]
        for name, value in limits.items():
            number = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(number)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (value, value))
        if self.user is not None:
            os.setgroups([])
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
        with contextlib.suppress(OSError):
            drop_capabilities()
        die_with_parent()
        if os.getppid() != self.parent:
            _exit(1)
        if self.user is None:
            hide_memory(False)  # or how a candidate ended is hidden from the supervisor too
        no_new_privileges()
        used = {"landlock": 0, "seccomp": False}
        hidden = ("proc", "sys", "dev", "run")
        readable = [f"/{name}" for name in os.listdir("/") if name not in hidden]
        with contextlib.suppress(OSError):  # a container's own filter may refuse it
            used["landlock"] = landlock.restrict(
                readable, [os.path.dirname(self.home)], ["/dev/null", "/dev/zero", "/dev/urandom"]
            )
        with contextlib.suppress(OSError):  # no table for this architecture
            seccomp.install()
            used["seccomp"] = True
        return used

    def _spawn(self, fds: list[int], folders: list[str]) -> bool:
        """Fork a candidate for every socket. True in a candidate."""
        state, pids = _getstate(), []
        for fd, folder in zip(fds, folders):  # noqa: B905
            pid = _fork()
            if pid == 0:
                _setstate(state)
                self.sock.close()
                for other in fds:
                    if other != fd:
                        _close(other)
                self.sock = socket.socket(fileno=fd)
                if folder != self.home:
                    reopen(self.home, folder)
                    os.chdir(folder)
                os.environ["TMPDIR"] = folder
                if (tempfile := sys.modules.get("tempfile")) is not None:
                    vars(tempfile)["tempdir"] = None
                return True
            pids.append(pid)
        for fd in fds:
            _close(fd)
        send(self.sock, {"pids": pids})
        return False
