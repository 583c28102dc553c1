"""The E2B sandbox: the session's processes in a virtual machine of E2B's cloud.

The kernel of the machine runs no model-written code. It holds a link to a supervisor, a process
beside it, and every ``run_code`` of the host passes messages in and brings messages back: one round
trip for an action and one more for each tool call. Tools stay on the host.

Candidates run in copies of the machine, made by the SDK's ``fork``: memory, files and all. Where
that is refused they run as processes forked inside the one machine, as single actions always do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from agentkd.errors import ConfigError, SandboxError
from agentkd.sandbox import CodeFailure, Outcome
from agentkd.sandbox.inside.wire import MESSAGE_LIMIT
from agentkd.sandbox.limits import Limits
from agentkd.sandbox.outcome import KEPT, LOST
from agentkd.sandbox.remote import Channel, RemoteSandbox

__all__ = ["KEY_VARIABLE", "E2BSandbox", "check"]

KEY_VARIABLE = "E2B_API_KEY"
MOST_FORKS = 20
"""Copies that one call of the SDK makes."""
ANSWER_LIMIT = 4 * MESSAGE_LIMIT
"""Characters of one answer: messages of several candidates."""
MARGIN_SECONDS = 30.0
"""How much longer than it should take a call may take; the SDK's own default is 300 s."""
USER = 65534
"""User id in the machine, where its kernel runs as root."""
_INSIDE = Path(__file__).parent / "inside"
_START = """
import json as _json, os as _os, sys as _sys, tempfile as _tempfile
_folder = _tempfile.mkdtemp(prefix="agentkd-")
_os.mkdir(_folder + "/inside")
for _name, _text in _json.loads({sources!r}).items():
    with open(_folder + "/inside/" + _name, "w", encoding="utf-8") as _file:
        _file.write(_text)
_sys.path.insert(0, _folder)
from inside.link import START as _start, Link as _Link
_environment = dict(_os.environ, PYTHONHASHSEED="0", PYTHONDONTWRITEBYTECODE="1")
_link = _Link([_sys.executable, "-s", "-c", _start, _folder], _environment)
print(_link.turn({order!r}, {wait}))
"""


def check() -> None:
    """That the SDK is there and a key is set.

    Raises:
        ConfigError: one of them is not.
    """
    if importlib.util.find_spec("e2b_code_interpreter") is None:
        raise ConfigError("The E2B SDK is not installed.", "Install it: `pip install 'agentkd[e2b]'`.")
    if not os.environ.get(KEY_VARIABLE) and os.environ.get("E2B_DEBUG", "").lower() != "true":
        raise ConfigError(
            f"No E2B key in {KEY_VARIABLE}.", f"Get one at https://e2b.dev and `export {KEY_VARIABLE}=...`."
        )


class E2BSandbox(RemoteSandbox):
    """One session in one virtual machine. See :class:`agentkd.sandbox.ForkingSandbox`.

    Args:
        imports: modules the code may import beside the harmless ones; "*" for all.
        timeout: seconds one action may take, time in tools apart.
        limits: memory, processes and the like.
        candidates: "machine" for copies of the machine, "process" for forks inside it.
        template: name of an E2B template with a Python kernel; the SDK's own by default.
        lifetime: seconds after which E2B ends a machine that has not been used meanwhile.
        options: for ``Sandbox.create``, such as ``api_key``, ``domain`` and ``metadata``.
    """

    def __init__(
        self,
        imports: Sequence[str] = (),
        timeout: float = 10.0,
        limits: Limits | None = None,
        *,
        candidates: Literal["machine", "process"] = "machine",
        template: str | None = None,
        lifetime: int = 1800,
        **options: Any,
    ) -> None:
        super().__init__(imports, timeout, limits)
        self.candidates = candidates
        self.lifetime = lifetime
        self.fallback = ""
        """Why candidates run inside the one machine although copies were asked for; "" when they do not."""
        self._template = template
        self._options = options
        self._places: list[_Copy | int] = []
        """Where each candidate is: in a copy, or under a number in the one machine."""

    def close(self) -> None:
        self._end_copies()
        super().close()

    def _order(self) -> dict[str, Any]:
        return {**super()._order(), "scratch": "/tmp", "user": USER}

    def _hint(self) -> str:
        return "See https://status.e2b.dev, and `agentkd doctor`."

    def _connect(self) -> Channel:
        if importlib.util.find_spec("e2b_code_interpreter") is None:
            raise ConfigError("The E2B SDK is not installed.", "Install it: `pip install 'agentkd[e2b]'`.")
        from e2b_code_interpreter import Sandbox

        try:
            machine = Sandbox.create(
                self._template, timeout=self.lifetime, allow_internet_access=False, **self._options
            )
        except Exception as exc:
            raise SandboxError(
                f"E2B gives no machine: {_said(exc)}.", f"Check {KEY_VARIABLE} and the plan's limits."
            ) from exc
        return _Machine(machine, self.lifetime)

    def _try(self, codes: list[str], seconds: float, settle: bool = False) -> list[Outcome]:
        if settle:
            return super()._try(codes, seconds, settle)
        copies: list[_Copy] = []
        if self._several and not self._running and self.candidates == "machine":
            self._open()
            copies = self._copy(len(codes))
        self._places += copies or range(self._running, self._running + len(codes))
        if not copies:
            return super()._try(codes, seconds)
        with ThreadPoolExecutor(len(codes)) as pool:
            return list(pool.map(lambda copy, code: copy.attempt(code, seconds), copies, codes))

    def _copy(self, count: int) -> list[_Copy]:
        """Copies of the machine; none when that is refused."""
        assert isinstance(self._channel, _Machine)
        if self._unsent:
            self._exchange([], 0.0)  # what the session was told belongs to the state that is copied
        try:
            machines = self._channel.fork(count)
        except Exception as exc:
            self.fallback = _said(exc)
            if type(exc).__name__ != "RateLimitException":  # that passes; the rest does not
                self.candidates = "process"
            return []
        return [_Copy(self, machine) for machine in machines]

    def _keep(self, index: int | None) -> None:
        place = None if index is None else self._places[index]
        if isinstance(place, _Copy):
            self._places.remove(place)
            if self._channel is not None:
                self._channel.close()
            self._channel, self._running = place.release(), 0
        elif self._running:
            super()._keep(place)
        self._end_copies()

    def _end_copies(self) -> None:
        places, self._places = self._places, []
        copies = [place for place in places if isinstance(place, _Copy)]
        if copies:
            with ThreadPoolExecutor(len(copies)) as pool:
                list(pool.map(lambda copy: copy.close(), copies))


class _Copy(RemoteSandbox):
    """A candidate in a copy of the session's machine."""

    def __init__(self, original: E2BSandbox, machine: _Machine) -> None:
        super().__init__(original.imports, original.timeout, original.limits)
        self._host, self._together = original._host, original._together
        self._channel: Channel | None = machine

    def release(self) -> Channel | None:
        """The machine, for another session to go on with."""
        channel, self._channel = self._channel, None
        return channel

    def attempt(self, code: str, seconds: float) -> Outcome:
        """Run one action. A machine that its code ended is an outcome too."""
        try:
            return self._try([code], seconds, settle=True)[0]
        except CodeFailure as exc:
            return Outcome(error=exc.message.replace(LOST, KEPT), timed_out=exc.timed_out, ended=True)


class _Machine:
    """The way through the kernel of one machine."""

    def __init__(self, sandbox: Any, lifetime: int, started: bool = False) -> None:
        self.sandbox = sandbox
        self._lifetime = lifetime
        self._extended = time.monotonic()
        self._started = started

    def exchange(self, messages: Sequence[dict[str, Any]], wait: float) -> list[dict[str, Any]]:
        text = json.dumps(messages)
        code = f"print(_link.turn({text!r}, {wait}))"
        if not self._started:
            code = _START.format(sources=_sources(), order=text, wait=wait)
        if time.monotonic() - self._extended > self._lifetime / 2:
            self._extended = time.monotonic()
            with contextlib.suppress(Exception):  # then the next call fails, and says so
                self.sandbox.set_timeout(self._lifetime)
        try:
            # Never again after an error: the call that follows a timeout hangs.
            execution = self.sandbox.run_code(code, timeout=wait + MARGIN_SECONDS)
        except Exception as exc:
            raise SandboxError(
                f"The E2B machine does not answer ({_said(exc)}); the session's state is lost.",
                "Was its lifetime over? See https://status.e2b.dev.",
            ) from exc
        self._started = True
        if execution.error is not None:
            raise EOFError(f"{execution.error.name}: {execution.error.value}"[:300])
        said = "".join(execution.logs.stdout)
        if len(said) > ANSWER_LIMIT:
            raise ValueError(f"answer of {len(said)} characters")
        found = json.loads(said)
        if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
            raise ValueError("answer is not a list of messages")
        return found

    def fork(self, count: int) -> list[_Machine]:
        """Copies of the machine, all or none.

        Raises:
            Exception: as the SDK says; AttributeError from one that cannot fork.
        """
        forks: list[Any] = []
        while len(forks) < count:
            forks += self.sandbox.fork(count=min(MOST_FORKS, count - len(forks)), timeout=self._lifetime)
        machines = [
            _Machine(fork, self._lifetime, started=True) for fork in forks if not isinstance(fork, Exception)
        ]
        failed = next((fork for fork in forks if isinstance(fork, Exception)), None)
        if failed is not None:
            for machine in machines:
                machine.close()
            raise failed
        return machines

    def close(self) -> None:
        with contextlib.suppress(Exception):  # then E2B ends it when its lifetime is over
            self.sandbox.kill()


def _sources() -> str:
    """The package's ``inside`` folder as JSON."""
    return json.dumps({path.name: path.read_text(encoding="utf-8") for path in sorted(_INSIDE.glob("*.py"))})


def _said(exc: Exception) -> str:
    lines = f"{type(exc).__name__}: {exc}".splitlines()
    return lines[0].rstrip(".")[:300]
