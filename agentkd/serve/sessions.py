"""Sandbox sessions of one agent model: open before they are wanted, ended behind the answers.

Opening and ending a session takes milliseconds (seconds for a container) that nobody needs to wait for.
One session is kept open; when it is taken, the next one is opened as soon as an answer is out. Where more
are wanted at once, each is opened while its first model call runs. A session serves one rollout.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from agentkd.sandbox import Sandbox

__all__ = ["Sessions"]

MOST_ENDING = 8
"""Sessions that wait to be ended; an answer that would add to them ends its own."""
_CLOSE_SECONDS = 20.0


class Sessions:
    """See the module. Thread-safe.

    Args:
        make: makes a session, which need not be open yet. What it raises goes to who takes one.
    """

    def __init__(self, make: Callable[[], Sandbox]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._ready: Sandbox | None = None
        self._ending = 0
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def prepare(self) -> None:
        """Have a session ready soon."""
        with self._lock:
            self._put(self._refill)

    def take(self) -> Sandbox:
        """A session for one rollout; give it back by :meth:`end`.

        Raises:
            SandboxError: the sandbox is not available here.
        """
        with self._lock:
            session, self._ready = self._ready, None
        if session is not None and getattr(session, "alive", True):
            return session
        if session is not None:
            self.end(session)
        fresh = self._make()
        if (start := getattr(fresh, "open", None)) is not None:
            with self._lock:
                self._put(start)
        return fresh

    def end(self, session: Sandbox) -> None:
        """End a session, after this returns unless many wait for that already."""
        with self._lock:
            later = self._ending < MOST_ENDING and self._put(lambda: self._end(session))
            self._ending += later
        if not later:
            session.cleanup()

    def close(self) -> None:
        """End all that were given back, and the one that is ready."""
        with self._lock:
            self._closed, thread = True, self._thread
            ready, self._ready = self._ready, None
        if ready is not None:
            ready.cleanup()
        if thread is not None:
            self._jobs.put(None)
            thread.join(_CLOSE_SECONDS)

    def _put(self, job: Callable[[], None]) -> bool:
        """Have the thread do something; False once it is closed. The lock is held."""
        if self._closed:
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="agentkd-sessions", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        return True

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with suppress(Exception):  # who uses the session meets it again, and can tell it to somebody
                job()

    def _end(self, session: Sandbox) -> None:
        try:
            session.cleanup()
        finally:
            with self._lock:
                self._ending -= 1
            self._refill()

    def _refill(self) -> None:
        with self._lock:
            if self._ready is not None or self._closed:
                return
        fresh: Any = self._make()
        if not hasattr(fresh, "open"):
            return  # it costs nothing before it is used
        fresh.open()
        with self._lock:
            wanted = self._ready is None and not self._closed
            if wanted:
                self._ready = fresh
        if not wanted:
            fresh.cleanup()
