"""Killable processes that compare answers: one that hangs is killed and costs its time limit only.

A worker is ``python -m agentkd.scorer.worker``; it reads one JSON object a line and answers with one.
Its time is counted in CPU seconds by the kernel, which kills it, so that neither a busy machine nor
code that never returns to the interpreter changes what an expression costs.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

__all__ = ["Reply", "Workers"]

CPU_SECONDS = 3
"""CPU seconds of one comparison."""
MEMORY = 2 << 30
"""Bytes of address space of a worker."""

_ENVIRONMENT = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
)
"""What a worker sees of the environment; it reads what a model wrote, so no key is among it."""


class Reply(NamedTuple):
    """What came of one comparison."""

    value: Any = None
    problem: str | None = None
    """Why there is no value: its time was up, its memory, or an error of the library."""


class Workers:
    """A pool of worker processes; thread-safe. Started when first used, ended with the program.

    Args:
        count: processes, at most.
        memory: bytes of address space of one process.
        cpu_seconds: CPU time of one comparison; in wall-clock time it has twenty times that, the start of
            its worker included.
    """

    def __init__(
        self, count: int | None = None, cpu_seconds: int = CPU_SECONDS, memory: int = MEMORY
    ) -> None:
        self.cpu_seconds = cpu_seconds
        self.memory = memory
        self._free: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(count or min(4, os.cpu_count() or 1)):
            self._free.put(None)
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._owner = os.getpid()
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> Reply:
        """Have one comparison made."""
        worker = self._free.get()
        try:
            if worker is None or worker.poll() is not None:
                worker = self._start()
            reply, usable = self._exchange(worker, request)
            if usable:
                return reply
            self._end(worker)
            worker = None
            return reply
        except BaseException:  # Ctrl-C: its verdict, still to come, would be read as the next one's
            if worker is not None:
                self._end(worker)
                worker = None
            raise
        finally:
            self._free.put(worker)

    def _start(self) -> subprocess.Popen[bytes]:
        worker = subprocess.Popen(
            [sys.executable, "-m", "agentkd.scorer.worker", str(self.cpu_seconds), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the program
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        with self._lock:
            self._alive.add(worker)
        return worker

    def _exchange(self, worker: subprocess.Popen[bytes], request: dict[str, Any]) -> tuple[Reply, bool]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            worker.stdin.flush()
        except OSError:
            return Reply(problem="the grading process could not be started"), False
        # A poll and not a read: what hangs without using CPU is noticed, too.
        poll = select.poll()
        poll.register(worker.stdout, select.POLLIN | select.POLLHUP)
        if not poll.poll(20_000 * self.cpu_seconds):
            return Reply(problem=f"no verdict after {20 * self.cpu_seconds} s"), False
        line = worker.stdout.readline()
        if not line.endswith(b"\n"):
            return Reply(problem=self._why(worker)), False
        answer = json.loads(line)
        return Reply(answer.get("value"), answer.get("problem")), answer.get("problem") is None

    def _why(self, worker: subprocess.Popen[bytes]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(5)
        if worker.returncode == -signal.SIGPROF:
            return f"no verdict after {self.cpu_seconds} CPU seconds"
        return f"the grading process ended (code {worker.returncode})"

    def _end(self, worker: subprocess.Popen[bytes]) -> None:
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            with contextlib.suppress(OSError):  # what was not flushed is of no use any more
                assert pipe is not None
                pipe.close()
        with self._lock:
            self._alive.discard(worker)

    def close(self) -> None:
        """End the processes; the pool starts them again when it is used again."""
        if os.getpid() != self._owner:
            return
        for worker in list(self._alive):
            self._end(worker)
