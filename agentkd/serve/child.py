"""A server as a child process: started, waited for, started again when it crashes, stopped.

Only the process that was started here is ever ended, by its own process group. It ends with this
process, however that ends (on Linux).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import httpx

from agentkd.errors import ProviderError

__all__ = ["Child"]

_BACKOFF = (0.5, 60.0)
"""Seconds before the first and, doubled each time, at most before a later start."""
_STEADY = 60.0
"""Seconds of health after which a crash counts as the first one again."""
_GRACE = 15.0
"""Seconds that it gets to end by itself."""
_LEASH = """
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    sys.exit("the server that started this has ended")
os.execvp(command[0], command)
"""


class Child:
    """Keeps one server running on a free loopback port.

    Args:
        command: makes the command line for a port.
        log: file that takes what it prints; the last lines are shown when it does not start.
        health: path that answers 200 when it is ready.
        environment: its environment variables.
        seconds: what a start may take.
        silence: seconds without an answer of ``health`` after which it counts as crashed.
        name: what it is called in messages.

    Attributes:
        state: "starting", "ready", "down" (crashed or hung, about to be started again) or "stopped".
        restarts: how often it was started again.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        log: Path,
        *,
        health: str = "/health",
        environment: Mapping[str, str] | None = None,
        seconds: float = 600.0,
        silence: float = 60.0,
        name: str = "the engine",
    ) -> None:
        self.command, self.log, self.health = command, log, health
        self.environment, self.seconds, self.name = environment, seconds, name
        self.silence, self._hangs = silence, False
        self.state: Literal["starting", "ready", "down", "stopped"] = "starting"
        self.restarts = 0
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="agentkd-supervisor", daemon=True)

    @property
    def url(self) -> str:
        """``http://127.0.0.1:PORT``; another one after every restart."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start it, and wait until it is ready.

        Raises:
            ProviderError: it ended before it was, or took too long.
        """
        self._thread.start()
        self._first.wait()
        if self.state != "ready":
            self.stop()
            raise ProviderError(f"{self.name} did not start: {self._last_words()}", f"See {self.log}.")

    def stop(self) -> None:
        """End it: asked at first, killed after some seconds."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self.state = "stopped"

    def require(self) -> str:
        """Its URL.

        Raises:
            ProviderError: it is not ready now.
        """
        if self.state != "ready":
            raise ProviderError(
                f"{self.name} has crashed and is being started again.", "Try again in some seconds."
            )
        return self.url

    def _supervise(self) -> None:
        """Runs on one thread from the first start to the end: the kernel's leash is tied to it."""
        delay, first = _BACKOFF[0], True
        try:
            while not self._stopping.is_set():
                ready_at = self._run_once()
                if first and ready_at is None:
                    return  # the first start failed: that is an error of the settings, not a crash
                first = False
                if ready_at is not None and time.monotonic() - ready_at > _STEADY:
                    delay = _BACKOFF[0]
                if self._stopping.is_set():
                    return
                self.state = "down"
                why = f"ended ({self._last_words()})"
                if self._hangs:
                    why = f"was ended, for it has not answered for {self.silence:g} s"
                print(f"{self.name} {why}; starting it again in {delay:g} s.", file=sys.stderr)
                self._hangs = False
                self._stopping.wait(delay)
                delay = min(delay * 2, _BACKOFF[1])
                self.restarts += 1
        finally:
            self._end()
            if self.state == "ready":
                self.state = "stopped"
            self._first.set()

    def _run_once(self) -> float | None:
        """Start it and stay until it has ended; returns when it was ready, None if it never was."""
        self.state, self.port = ("starting" if not self.restarts else "down"), _free_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", _LEASH, str(os.getpid()), *self.command(self.port)]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self.environment) if self.environment is not None else None,
                start_new_session=True,
            )
        ready_at = self._wait_ready(self._process)
        if ready_at is not None:
            self.state = "ready"
            self._first.set()
            self._hangs = self._watch(self._process)
            if not self._stopping.is_set():
                self.state = "down"
        self._end()
        return ready_at

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> float | None:
        deadline = time.monotonic() + self.seconds
        with httpx.Client(trust_env=False, timeout=2.0) as client:
            while process.poll() is None and time.monotonic() < deadline:
                if self._answers(client):
                    return time.monotonic()
                if self._stopping.wait(0.1):
                    return None
        return None

    def _watch(self, process: subprocess.Popen[bytes]) -> bool:
        """Stay until it has ended, hangs, or is to be stopped; returns whether it hangs."""
        heard = asked = time.monotonic()
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while process.poll() is None and not self._stopping.wait(0.05):
                if time.monotonic() - asked < self.silence / 12:
                    continue
                answers, asked = self._answers(client), time.monotonic()
                if answers:
                    heard = asked
                elif asked - heard > self.silence:
                    return True
        return False

    def _answers(self, client: httpx.Client) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return client.get(self.url + self.health).status_code == 200
        return False

    def _end(self) -> None:
        """End the process group; a leader that is gone may have left workers behind."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        _signal(process.pid, signal.SIGKILL)
        process.wait()

    def _last_words(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:300] if lines else "it said nothing"


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
