"""One session: its root process, and the processes forked from it that run the code.

The root is process 1 of the session's own pid namespace. It never runs the model's code: it
holds the pristine state, forks the first candidates from it, stops and continues the process
that holds the session's state, and kills everything else after every action. When it ends, the
kernel kills what is left. All others have given up every right before their first line of code.

The root copies and removes what the code has left in the working directory, links that lead
elsewhere included. It is therefore confined to the same files as the code.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import fcntl
import gc
import os
import random
import resource
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from typing import Any, NoReturn

from . import landlock, seccomp
from .kernel import (
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    die_with_parent,
    drop_capabilities,
    mount,
    no_new_privileges,
    read_only,
)
from .language import Actor, Runner
from .wire import receive_fds, send

__all__ = ["MOST_CANDIDATES", "Session", "copy_tree", "reopen"]

PROCESS_CHURN = 30_000
"""Processes and threads of one action beyond which the session is ended."""
WATCH_MILLISECONDS = 100
"""How often they are counted while an action runs: process numbers start again at the kernel's
limit, 32768 on small machines, and none may get there unseen."""
STOP_SECONDS = 5.0
"""For a stopped process to stop and all others to end."""
MOST_CANDIDATES = 64

_getstate, _setstate = random.getstate, random.setstate
_exit, _fork, _close, _fstat = os._exit, os.fork, os.close, os.fstat


class Session(Actor):
    """Both kinds of process; see the module.

    Args:
        sock: the root's socket to the host.
        order: what the host asked for: imports, limits, seed, uid, readable, scratch, landlock.
    """

    def __init__(self, sock: socket.socket, order: dict[str, Any]) -> None:
        self.sock = sock
        self.order = order
        self.home = os.path.join(order["scratch"], "home")
        self.swept = 1  # pids up to here are dead, but for the current one
        self.newest = 1
        self.running = False
        self.current: int | None = None

    # The root.

    def root(self) -> NoReturn:
        """Set the session up, serve the host, end with it."""
        try:
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            self._enter()
            self.runner = Runner(self.order["imports"], self._call)
            random.seed(self.order["seed"])
            if (numpy := sys.modules.get("numpy")) is not None:
                numpy.random.seed(self.order["seed"] % 2**32)
            gc.freeze()
            send(self.sock, {"ready": True, "uid": os.getuid()})
            while True:
                self._watch()
                message, fds = receive_fds(self.sock, MOST_CANDIDATES)
                if message is None:
                    break
                self._command(message, fds)
        except BaseException as exc:
            with contextlib.suppress(OSError):
                send(self.sock, {"broken": f"{type(exc).__name__}: {exc}"})
        _exit(0)

    def _enter(self) -> None:
        """Own mounts, own user, no rights beyond the session."""
        order, uid = self.order, self.order["uid"]
        if uid is None:  # the user namespace is new: be the same user in it, with no group to gain
            outside, group = order["user"], order["group"]
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{outside} {outside} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory runs out, the sandbox goes first
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        # Landlock stops neither chmod nor utime, and the user of a session may own files out there.
        try:
            read_only("/")
        except OSError as exc:
            if order["landlock"] or exc.errno != errno.ENOSYS:
                raise
        safe = MS_NOSUID | MS_NODEV | MS_NOEXEC
        owner = "" if uid is None else f",uid={uid},gid={uid}"
        size = f"mode=0700,size={order['scratch_mb']}m,nr_inodes=16384{owner}"
        mount("tmpfs", order["scratch"], "tmpfs", safe, size)
        mount("tmpfs", "/proc", "tmpfs", safe | MS_RDONLY, "size=4k")
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        die_with_parent()
        no_new_privileges()
        os.mkdir(self.home, 0o700)
        os.chdir(self.home)
        os.environ.update(HOME=self.home, TMPDIR=self.home)
        used = landlock.restrict(order["readable"], [order["scratch"]], order["devices"])
        if order["landlock"] and not used:
            raise OSError("Landlock is needed here and the kernel has none")
        with open(os.__file__, "rb"):
            pass  # the interpreter's own library, or PermissionError: better here than in an import

    def _watch(self) -> None:
        """Wait for a message; while an action runs, count its processes."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while self.running and not poll.poll(WATCH_MILLISECONDS):
            self._count()

    def _count(self) -> int:
        """The newest process number. Ends the session when there were too many to be sure of them."""
        newest = _newest_pid()
        if not self.newest < newest <= self.swept + PROCESS_CHURN:
            _exit(1)  # the kernel ends them with this one
        self.newest = newest
        return newest

    def _command(self, message: dict[str, Any], fds: list[int]) -> None:
        self.running = "thaw" in message or "fork" in message or (self.running and "keep" not in message)
        if "thaw" in message:
            self._prepare(message["thaw"])
        elif "fork" in message:
            if not self._spawn(fds, message["fork"]):
                return
            self._serve()
        elif "keep" in message:
            send(self.sock, self._keep(message["keep"], message["directory"]))
        else:
            self._other(message)

    def _prepare(self, directories: list[int]) -> None:
        """Give candidates their own copies of the working directory, then let the state go on."""
        try:
            for index in directories:
                self._remove(index)  # the code may have taken the name
                copy_tree(self.home, f"{self.home}-{index}")
        except (OSError, RecursionError) as exc:
            for index in directories:
                self._remove(index)
            send(self.sock, {"error": getattr(exc, "strerror", None) or str(exc)})
            return
        if self.current is not None:
            _signal(self.current, signal.SIGCONT)
        if directories:
            send(self.sock, {"prepared": directories})

    def _keep(self, pid: int | None, directory: int | None) -> dict[str, Any]:
        """Make one process the session's state and end all others; None keeps the one before."""
        kept = pid is not None and pid != os.getpid() and _lives(pid)
        chosen = pid if kept else self.current
        alive = self._sweep(chosen)
        self.current = chosen if alive else None
        if directory is not None:
            if kept and alive:
                with contextlib.suppress(FileNotFoundError):  # the code may have removed either
                    os.rename(self.home, f"{self.home}-old")
                try:
                    os.rename(f"{self.home}-{directory}", self.home)
                except FileNotFoundError:
                    os.mkdir(self.home, 0o700)
            self._clear()
        return {"kept": kept and alive, "lost": chosen is not None and not alive}

    def _remove(self, index: int) -> None:
        """Remove a candidate's directory."""
        _remove(self.order["scratch"], f"home-{index}")

    def _clear(self) -> None:
        """Remove everything but the working directory itself."""
        for name in os.listdir(self.order["scratch"]):
            if name != "home":
                _remove(self.order["scratch"], name)

    def _sweep(self, keep: int | None) -> bool:
        """Stop ``keep``, kill all other processes of the session. Whether ``keep`` lives.

        A fork that is under way when the stop comes still makes a process. So nothing is over
        before ``keep`` has stopped and a look around after that has found nobody. When there are
        more than can be counted the session ends here, and the kernel ends them.
        """
        if keep is not None:
            _signal(keep, signal.SIGSTOP)
        before = self.current
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            still = keep is None or _stopped(keep)
            last = self._count()
            killed = [fd for pid in range(self.swept + 1, last) if pid != keep and (fd := _kill(pid))]
            if before is not None and before != keep and (fd := _kill(before)):
                killed.append(fd)
            _await(killed)
            if not killed and still:
                self.swept = last
                return keep is not None and _lives(keep)
            if not killed:
                time.sleep(0.0002)
        return bool(_exit(1))

    # The processes that run the code.

    def _spawn(self, fds: list[int], directories: list[int] | None) -> bool:
        """Fork a candidate for every socket. True in a candidate."""
        state, pids, from_root = _getstate(), [], os.getpid() == 1
        _reap()  # candidates that were not kept count against the limit until then
        for index, fd in enumerate(fds):
            pid = _fork()
            if pid == 0:
                _setstate(state)
                self.sock.close()
                for other in fds:
                    if other != fd:
                        _close(other)
                self.sock = socket.socket(fileno=fd)
                if from_root:
                    self._become()
                self._settle(None if directories is None else directories[index])
                return True
            pids.append(pid)
        for fd in fds:
            _close(fd)
        send(self.sock, {"pids": pids})
        return False

    def _become(self) -> None:
        """Give up every right. Only then the model's code runs."""
        limits = self.order["limits"]
        for name, value in limits.items():
            number = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(number)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (value, value))
        drop_capabilities()
        seccomp.install()

    def _settle(self, directory: int | None) -> None:
        """Move into the candidate's own copy of the working directory, open files included."""
        path = self.home if directory is None else f"{self.home}-{directory}"
        if directory is not None:
            reopen(self.home, path)
            os.chdir(path)
        os.environ["TMPDIR"] = path
        tempfile.tempdir = None

    def _serve(self) -> NoReturn:
        try:
            self._act()
            while True:
                message, fds = receive_fds(self.sock, MOST_CANDIDATES)
                if message is None:
                    break
                if "fork" not in message:
                    self._other(message)
                elif self._spawn(fds, message["fork"]):
                    self._act()
        except BaseException as exc:
            with contextlib.suppress(BaseException):
                send(self.sock, {"broken": f"{type(exc).__name__}: {exc}"})
        _exit(1)

    def _other(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            status = None
            with contextlib.suppress(OSError):
                pid, code = os.waitpid(int(message["ended"]), os.WNOHANG)
                status = os.waitstatus_to_exitcode(code) if pid else None
            send(self.sock, {"status": status})
        else:
            self.runner.set(message["tools"], message["variables"])


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _newest_pid() -> int:
    """The number that a new process would get: that of a thread made for the purpose."""
    done, found = _thread.allocate_lock(), []
    done.acquire()

    def look() -> None:
        found.append(threading.get_native_id())
        done.release()

    _thread.start_new_thread(look, ())
    done.acquire()
    return found[0]


def _kill(pid: int) -> int | None:
    """Kill a process, if one of that number lives; its pidfd. A thread's number is no process."""
    fd = _living(pid)
    if fd is not None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    return fd


def _await(fds: list[int]) -> None:
    """Wait until the killed are dead, and reap those that are ours."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
        poll.poll(5000)
        poll.unregister(fd)
        _close(fd)
    _reap()


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _living(pid: int) -> int | None:
    """The pidfd of a process that has not ended."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if poll.poll(0):
        _close(fd)
        return None
    return fd


def _lives(pid: int) -> bool:
    fd = _living(pid)
    if fd is not None:
        _close(fd)
    return fd is not None


def _stopped(pid: int) -> bool:
    """Whether a process has stopped wholly, all its threads out of the kernel, or has ended."""
    try:
        seen = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return not _lives(pid)  # its parent is another one, which is killed first
    return seen is not None


def _remove(folder: str, name: str) -> None:
    """Remove a file or a tree, however deep and whatever its modes; what cannot be removed stays."""
    todo = [os.path.join(folder, name)]
    moved = 0
    while todo:
        path = todo.pop()
        with contextlib.suppress(OSError):
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            inner = os.listdir(path)
            for entry in inner:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(path, entry))
                    continue
                moved += 1
                to = os.path.join(folder, f"home-removed-{moved}")  # side by side: no path grows too long
                with contextlib.suppress(OSError):
                    os.chmod(os.path.join(path, entry), 0o700)
                    os.rename(os.path.join(path, entry), to)
                    todo.append(to)
            os.rmdir(path)


def copy_tree(source: str, target: str) -> None:
    """Copy a tree: files, folders and links; nothing that could block."""
    os.mkdir(target, 0o700)
    for entry in os.scandir(source):
        to = os.path.join(target, entry.name)
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), to)
        elif entry.is_dir():
            copy_tree(entry.path, to)
        elif entry.is_file():
            shutil.copyfile(entry.path, to, follow_symlinks=False)


def reopen(source: str, target: str) -> None:
    """Open files are shared between forks, position included: open the copies instead."""
    found = {}
    for fd in range(3, 256):
        try:
            seen = _fstat(fd)
        except OSError:
            continue
        if stat.S_ISREG(seen.st_mode):
            found[fd] = (seen.st_dev, seen.st_ino)
    if not found:
        return
    names = {}
    for folder, _, files in os.walk(source):
        for name in files:
            path = os.path.join(folder, name)
            seen = os.lstat(path)
            names[seen.st_dev, seen.st_ino] = os.path.relpath(path, source)
    for fd, key in found.items():
        if key in names:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)
            fresh = os.open(os.path.join(target, names[key]), flags)
            os.lseek(fresh, os.lseek(fd, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(fresh, fd)
            _close(fresh)
