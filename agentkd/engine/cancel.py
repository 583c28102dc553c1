"""Giving up a call that waits: from another thread, whatever it waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Cancellation"]


class Cancellation:
    """Says that nobody waits for an answer any more. Thread-safe.

    Who waits says by :meth:`calling` what ends the waiting; :meth:`cancel` does it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._acts: list[Callable[[], None]] = []
        self.cancelled = False

    def cancel(self) -> None:
        """End all waiting, of now and later."""
        with self._lock:  # so that nobody leaves ``calling`` while what it gave is being done
            if self.cancelled:
                return
            self.cancelled = True
            for act in self._acts:
                act()

    @contextmanager
    def calling(self, act: Callable[[], None]) -> Iterator[None]:
        """While the block lasts, ``act`` (quick, and it waits for nothing) is done on cancelling.

        It is done at once where that has come already.
        """
        with self._lock:
            self._acts.append(act)
            if self.cancelled:
                act()
        try:
            yield
        finally:
            with self._lock:
                self._acts.remove(act)
