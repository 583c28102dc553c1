"""A crew of several processes, each with its own threads, call log and sandbox.

One Python process runs some hundred steps a second, whatever the number of its threads. The
processes are started afresh ("spawn"), so a program that has threads already can start them, and
they end with the process that started them.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentkd.calls import Past
from agentkd.crew import Done, Notice, Seat, ThreadCrew, Work
from agentkd.errors import AgentkdError
from agentkd.spend import Ledger
from agentkd.trajectory import Trajectory

__all__ = ["ProcessCrew"]


class ProcessCrew:
    """See :class:`agentkd.crew.Crew`.

    Args:
        count: processes.
        seats, ready, folder, ledger: as :class:`agentkd.crew.ThreadCrew` takes them.
        options: further arguments of it.

    Raises:
        AgentkdError: a process cannot start (its own error).
    """

    def __init__(
        self,
        count: int,
        seats: Sequence[Seat],
        ready: queue.SimpleQueue[Done | Notice],
        folder: Path | None,
        *,
        ledger: Ledger,
        **options: Any,
    ) -> None:
        self.ready = ready
        self._members = [
            _Member(seats, folder, ledger=ledger, writer=number, share=count, **options)
            for number in range(count)
        ]
        try:
            self.capacity = sum(member.start(ready) for member in self._members)
        except BaseException:
            self.close()
            raise

    def submit(self, work: Work) -> None:
        min(self._members, key=lambda member: len(member.doing)).submit(work)

    def close(self) -> None:
        for member in self._members:
            member.close()


class _Member:
    """One process, seen from the one that started it."""

    def __init__(self, seats: Sequence[Seat], folder: Path | None, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._lock = threading.Lock()
        self.doing: dict[str, Work] = {}
        self._closed = False
        # Not a daemon: the sandbox of the process has a child of its own.
        self._process = context.Process(target=_work, args=(theirs, list(seats), folder, options))
        self._process.start()
        theirs.close()

    def start(self, ready: queue.SimpleQueue[Done | Notice]) -> int:
        """Wait until it is ready; returns its capacity."""
        try:
            first = self._pipe.recv()
        except (EOFError, OSError):
            raise AgentkdError("A worker process ended at its start.", "Is there enough memory?") from None
        if isinstance(first, AgentkdError):
            raise first
        threading.Thread(target=self._listen, args=(ready,), daemon=True).start()
        return int(first)

    def submit(self, work: Work) -> None:
        with self._lock:
            self.doing[work.id] = work
        try:
            self._pipe.send(work)
        except OSError:
            raise _gone() from None

    def _listen(self, ready: queue.SimpleQueue[Done | Notice]) -> None:
        while True:
            try:
                message = self._pipe.recv()
            except (EOFError, OSError):
                break
            if isinstance(message, Notice):
                ready.put(message)
                continue
            name, line, past, error = message
            with self._lock:
                work = self.doing.pop(name)
            trajectory = Trajectory.model_validate_json(line) if line is not None else None
            ready.put(Done(work, trajectory, past, error))
        if not self._closed:
            with self._lock:
                for work in self.doing.values():
                    ready.put(Done(work, None, work.past, _gone()))

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):  # it may have ended
            self._pipe.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _gone() -> AgentkdError:
    return AgentkdError(
        "A worker process has ended unexpectedly.",
        "Was it killed for want of memory? Run the same command again to go on.",
    )


def _work(pipe: Any, seats: list[Seat], folder: Path | None, options: dict[str, Any]) -> None:
    """The process: hand work from the pipe to threads, and results back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    ready: queue.SimpleQueue[Done | Notice] = queue.SimpleQueue()
    try:
        crew = ThreadCrew(seats, ready, folder, **options)
    except AgentkdError as exc:
        pipe.send(exc)
        return
    pipe.send(crew.capacity)
    threading.Thread(target=_report, args=(pipe, ready), daemon=True).start()
    try:
        while True:
            work = pipe.recv()
            if work is None:
                break
            crew.submit(work)
    except (EOFError, OSError):  # the process that started this one is gone
        pass
    finally:
        crew.close()
        atexit._run_exitfuncs()  # ends the sandbox
        os._exit(0)  # at once: threads may still wait for an endpoint


def _report(pipe: Any, ready: queue.SimpleQueue[Done | Notice]) -> None:
    while True:
        message = _message(ready.get())
        try:
            pipe.send(message)
        except OSError:
            return


def _message(done: Done | Notice) -> Any:
    """As it is sent: a notice as it is, a result as ``(id, line, past, error)``."""
    if isinstance(done, Notice):
        return done
    line = done.trajectory.model_dump_json() if done.trajectory is not None else None
    failed = done.trajectory is None or done.trajectory.stop_reason.is_error
    past = done.past if failed else Past()  # only a retry needs it
    error = done.error
    if error is not None and not isinstance(error, AgentkdError):
        error = AgentkdError(f"{type(error).__name__}: {error}")  # which any process can read
    return done.work.id, line, past, error
