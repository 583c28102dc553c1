"""The zygote: a trusted process that imports the heavy modules once and clones sessions.

It has no threads, runs nothing that a model wrote, and ends when its host does, which it learns
from the host's pidfd. It and the host talk over one socket.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import platform
import select
import signal
import socket
import sys
from typing import Any

from . import kernel, seccomp
from .kernel import MS_BIND, MS_NODEV, MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC, MS_REMOUNT, NAMESPACES
from .session import Session
from .wire import receive_fds, send

__all__ = ["main"]


def main() -> None:
    """Serve the host whose socket has the number given as the first argument."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # sessions that end leave no zombie
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup, fds = receive_fds(control, 1)
    if setup is None:
        return
    host = fds[0]
    os.chdir("/")
    os.environ.clear()
    os.environ.update(setup["environment"])
    sys.path[:] = setup["path"]
    if setup["expose"]:
        _expose(setup["expose"])
    for name in setup["preload"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if os.geteuid() == 0:
        kernel.drop_bounding_set()
    seccomp.program(platform.machine())  # once, and now if there is none for this architecture
    gc.collect()
    gc.freeze()
    kernel.collapse()
    with open(os.devnull, "r+b", buffering=0) as null:
        # The log of the start is a file of the host's, and all sessions would share it.
        os.dup2(null.fileno(), 2)
    send(control, {"ready": True, "library": os.path.dirname(os.__file__)})
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(host, select.POLLIN)
    while all(fd != host for fd, _ in poll.poll()):
        order, passed = receive_fds(control, 1)
        if order is None:
            break
        send(control, _open(control, host, {**setup, **order}, passed[0]))


def _open(control: socket.socket, host: int, order: dict[str, Any], fd: int) -> dict[str, Any]:
    try:
        flags = NAMESPACES | (kernel.NEW_USER if order["uid"] is None else 0)
        pid = kernel.clone(flags)
    except OSError as exc:
        os.close(fd)
        return {"error": exc.strerror or str(exc)}
    if pid == 0:
        control.close()
        os.close(host)
        Session(socket.socket(fileno=fd), order).root()
    os.close(fd)
    return {"pid": pid}


def _expose(paths: list[str]) -> None:
    """Make folders readable for other users that lie beneath a folder which is not.

    In mounts of this process's own: an empty folder is mounted over the first one that others
    may not enter, and in it, at the same place, nothing but the wanted folders, read-only.
    """
    kernel.unshare(kernel.NEW_NS)
    kernel.mount("none", "/", None, MS_REC | MS_PRIVATE)
    opened = [(path, os.open(path, os.O_PATH)) for path in paths]
    for closed in sorted({_closed(path) for path, _ in opened} - {""}):
        kernel.mount("tmpfs", closed, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    for path, fd in opened:
        if not os.path.exists(path):
            source = f"/proc/self/fd/{fd}"
            if os.path.isdir(source):
                os.makedirs(path, 0o755)
            else:
                os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
                os.close(os.open(path, os.O_CREAT, 0o644))
            kernel.mount(source, path, None, MS_BIND | MS_REC)
            kernel.mount("none", path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
        os.close(fd)


def _closed(path: str) -> str:
    """The topmost folder above ``path`` that other users may not enter; "" for none."""
    parts = path.strip("/").split("/")
    for count in range(1, len(parts)):
        above = "/" + "/".join(parts[:count])
        if not os.stat(above).st_mode & 0o001:
            return above
    return ""
