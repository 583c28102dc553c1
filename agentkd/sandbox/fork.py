"""The fork sandbox: an OS boundary that costs milliseconds and can be forked.

One zygote a host process imports numpy and sympy once. A session is cloned from it into its own
namespaces; every action runs in a process forked from the session's state, so that an action
that is killed leaves the state as it was, several can be tried side by side, and the winner's
process becomes the session. What a process inside may not do is said in ``docs/security.md``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from smolagents.local_python_executor import BASE_BUILTIN_MODULES, CodeOutput, PythonExecutor

from agentkd.errors import SandboxError
from agentkd.sandbox import CodeFailure, Outcome
from agentkd.sandbox import isolation as isolations
from agentkd.sandbox.candidate import Candidate, drain, end_in_words, has_ended
from agentkd.sandbox.cgroup import ControlGroup
from agentkd.sandbox.inside.wire import plain, receive, send
from agentkd.sandbox.limits import Limits
from agentkd.sandbox.outcome import LOST
from agentkd.sandbox.toolhost import Round, ToolHost
from agentkd.sandbox.zygotes import ANSWER_SECONDS, DOCTOR, Zygote, first_message, zygote_for
from agentkd.trajectory import ToolUse

__all__ = ["ForkSandbox", "Limits"]

STATE_SECONDS = 10.0
"""For the process that holds a session's state to fork; it has run the model's code."""


class ForkSandbox(PythonExecutor):
    """One session. See :class:`agentkd.sandbox.Sandbox`.

    Args:
        imports: modules the code may import beside the harmless ones; "*" for all.
        timeout: wall-clock seconds one action may take, time in tools apart. Candidates that
            run side by side on fewer cores than they are get proportionally more.
        limits: memory, processes and the like.
        isolation: "bubblewrap" or "landlock"; chosen by what the machine has by default.

    Attributes:
        ends_with_answer: set by who closes the session behind a final answer, so that the process that
            gave it need not become the session.
        user: id of the session's user, as the host sees it; None before the first action.
    """

    can_fork = True
    ends_with_answer = False

    def __init__(
        self,
        imports: Sequence[str] = (),
        timeout: float = 10.0,
        limits: Limits | None = None,
        isolation: str | None = None,
    ) -> None:
        self.imports = tuple(imports)
        self.timeout = timeout
        self.limits = limits or Limits()
        self.isolation = isolation
        self._host = ToolHost()
        self._variables: dict[str, Any] = {}
        self._uses: list[ToolUse] = []
        self._zygote: Zygote | None = None
        self._root: socket.socket | None = None
        self._pidfd: int | None = None
        self._opening = threading.RLock()  # :meth:`open` may be called on another thread
        self._telling, self._closed = threading.Lock(), False
        self._ending, self._interrupted = threading.Lock(), False
        self._group: ControlGroup | None = None
        self._state: socket.socket | None = None
        self._waiting: list[dict[str, Any]] = []
        self._tried: list[Candidate] = []
        self._copies = False  # whether candidates have working directories of their own
        self._together = Round()
        self._spent = 0.0
        self.user: int | None = None

    # smolagents' interface.

    def send_tools(self, tools: dict[str, Any]) -> None:
        self._host.tools.update(tools)
        self._set(list(tools), {})

    def send_variables(self, variables: dict[str, Any]) -> None:
        values = {name: plain(value) for name, value in variables.items()}
        with self._telling:
            self._variables.update(values)
        if values:
            self._set([], values)

    def __call__(self, code_action: str) -> CodeOutput:
        outcome = self.try_each([code_action])[0]
        if outcome.ended:
            self.discard()
            self._uses += outcome.tool_uses
        else:
            self.commit(0)
        if outcome.error is not None:
            raise CodeFailure(outcome.error, outcome.printed, outcome.timed_out)
        return CodeOutput(output=outcome.value, logs=outcome.printed, is_final_answer=outcome.is_final)

    def cleanup(self) -> None:
        self.close()

    # Forking.

    def try_each(
        self, codes: Sequence[str], timeout: float | None = None, *, more: bool = False
    ) -> list[Outcome]:
        """Run each code in a fork of the session, side by side. The session itself does not change.

        Call :meth:`commit` or :meth:`discard` next, or this again with ``more``.

        Args:
            codes: the actions, at least one.
            timeout: seconds for each, instead of the session's.
            more: these are tried beside others, earlier or later ones: what was tried with
                ``more`` since the last commit or discard can still be chosen, and is counted on.

        Returns:
            One outcome for each, in the same order.

        Raises:
            CodeFailure: the session's state is lost, by the fault of earlier code.
            SandboxError: the sandbox failed.
            AgentkdError: a tool failed on the host, not by the code's fault.
        """
        if not codes:
            raise ValueError("no code to try")
        if self._tried and not (more and self._copies):
            self.discard()
        seconds = (timeout or self.timeout) * max(1.0, len(codes) / (os.cpu_count() or 1))
        if self._spent > self.limits.session_seconds:
            self.close()
            raise CodeFailure(
                f"The session's {self.limits.session_seconds:g} s are used up. {LOST}", timed_out=True
            )
        began = time.monotonic()
        try:
            if not self._tried:
                self._together, self._copies = Round(), more or len(codes) > 1
            fresh = self._fork(len(codes))
            self._tried += fresh
            if len(codes) == 1:
                fresh[0].drive(codes[0], seconds, self._host.caller(self._together), self._why)
            else:
                with ThreadPoolExecutor(len(codes)) as pool:
                    jobs = [
                        pool.submit(tried.drive, code, seconds, self._host.caller(self._together), self._why)
                        for tried, code in zip(fresh, codes, strict=True)
                    ]
                for job in jobs:
                    job.result()
        except BaseException:
            self.close()
            raise
        outcomes = [tried.outcome for tried in fresh if tried.outcome is not None]
        tools = max(sum(use.seconds for use in outcome.tool_uses) for outcome in outcomes)
        self._spent += max(0.0, time.monotonic() - began - tools)
        return outcomes

    def commit(self, index: int) -> None:
        """Make a candidate's process the session; the others end.

        Raises:
            ValueError: nothing was tried, or that candidate's process has ended.
            SandboxError: the sandbox failed.
        """
        chosen = self._tried[index] if 0 <= index < len(self._tried) else None
        if chosen is None or chosen.outcome is None or chosen.outcome.ended:
            raise ValueError(f"candidate {index} cannot become the session")
        self._uses += chosen.outcome.tool_uses
        if self.ends_with_answer and chosen.outcome.is_final:
            return  # it ends with the session
        tried, self._tried = self._tried, []
        reply = self._ask({"keep": chosen.pid, "directory": index if self._copies else None})
        for candidate in tried:
            if candidate is not chosen or not reply["kept"]:
                candidate.sock.close()
        if reply["kept"]:
            if self._state is not None:
                self._state.close()
            self._state = chosen.sock
            drain(self._state)
        elif reply["lost"]:
            self.close()

    def discard(self) -> None:
        """Forget the candidates; the session is as it was before them."""
        tried, self._tried = self._tried, []
        if not tried or self._root is None:
            return
        if self._state is None:
            self._waiting = []  # the root has been told
        for candidate in tried:
            candidate.sock.close()
        if self._ask({"keep": None, "directory": 0 if self._copies else None})["lost"]:
            self.close()

    def take_tool_uses(self) -> tuple[ToolUse, ...]:
        uses, self._uses = tuple(self._uses), []
        return uses

    def open(self) -> None:
        """Start a new session now rather than with its first action; also from another thread meanwhile.

        Nothing is started where it has been closed already.

        Raises:
            SandboxError: the sandbox failed.
        """
        with self._opening:
            if not self._closed:
                self._open()

    @property
    def alive(self) -> bool:
        """Whether it has been opened, and can go on."""
        with self._ending:
            if self._pidfd is None or self._root is None or self._zygote is None:
                return False
            return self._zygote.alive and not has_ended(self._pidfd, 0)

    def interrupt(self) -> None:
        """End the session for good, from any thread: an action that runs, or is about to, fails."""
        with self._ending:
            self._interrupted = True
            self._kill()

    def _kill(self) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """End the session and everything in it."""
        with self._opening:
            self._closed = True
            for candidate in self._tried:
                candidate.sock.close()
            self._tried = []
            for sock in (self._state, self._root):
                if sock is not None:
                    sock.close()
            self._state = self._root = None
            self._waiting = []
            if self._pidfd is not None:
                self._kill()
                has_ended(self._pidfd, 5000)
                with self._ending:  # an interrupt must not meet another session's descriptor
                    os.close(self._pidfd)
                    self._pidfd = None
            if self._group is not None:
                self._group.close()
                self._group = None
            self._spent = 0.0

    # Talking to the processes.

    def _open(self) -> socket.socket:
        with self._opening:
            return self._root or self._start()

    def _start(self) -> socket.socket:
        limits = self.limits
        extra = isolations.module_paths(self.imports)
        zygote = self._zygote = zygote_for(self.isolation, extra)
        order = {"imports": sorted({*BASE_BUILTIN_MODULES, *self.imports}), **limits.order(self.timeout)}
        root, number, uid = zygote.open(order)
        try:
            ready, pid, self.user = first_message(root)
            if "ready" not in ready:
                raise SandboxError(
                    f"The sandbox cannot isolate a session: {ready.get('broken', 'it ended')}.", DOCTOR
                )
            if self.user == 0 or (uid is not None and uid != self.user):
                raise SandboxError("The sandbox did not give up the rights of root.", DOCTOR)
            with self._ending:
                self._pidfd = os.pidfd_open(pid)
                if self._interrupted:
                    self._kill()
            self._group = ControlGroup(f"{id(zygote):x}-{number}", limits.memory_mb << 20, limits.processes)
            self._group.add(pid)
            with self._telling:  # what is set from here on is sent by who sets it
                send(root, {"tools": list(self._host.tools), "variables": self._variables})
                self._root = root
        except BaseException as exc:
            root.close()
            self.close()
            if isinstance(exc, (OSError, ValueError)):
                why = f"The sandbox cannot start a session: {exc or 'no answer'}."
                raise SandboxError(why, DOCTOR) from exc
            raise
        return root

    def _set(self, tools: list[str], variables: dict[str, Any]) -> None:
        message = {"tools": tools, "variables": variables}
        with self._telling, contextlib.suppress(OSError):  # which the next action finds out
            if self._root is not None:
                send(self._root, message)
        if self._state is not None or self._tried:  # it is stopped and does not read
            self._waiting.append(message)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Ask the root process.

        Raises:
            SandboxError: no answer; the session has ended.
        """
        assert self._root is not None
        try:
            self._root.settimeout(ANSWER_SECONDS)
            send(self._root, message)
            reply = receive(self._root, time.monotonic() + ANSWER_SECONDS)
            if reply is not None and "broken" not in reply:
                return reply
            why = "it ended" if reply is None else reply["broken"]
        except (OSError, ValueError) as exc:
            why = str(exc) or "no answer"
        raise self._gone(why)

    def _gone(self, why: str) -> Exception:
        """The session is gone: by the fault of the sandbox when the zygote is, else of the code."""
        alive = self._zygote is not None and self._zygote.alive
        self.close()
        if not alive:
            return SandboxError(f"The sandbox process ended ({why}).", "Run the command again.")
        return CodeFailure(f"The code ended its session ({why}). {LOST}")

    def _fork(self, count: int) -> list[Candidate]:
        root = self._open()
        first = len(self._tried)
        directories = list(range(first, first + count)) if self._copies else []
        if self._state is not None or directories:
            root.settimeout(ANSWER_SECONDS)
            try:
                send(root, {"thaw": directories})
            except OSError as exc:
                raise self._gone(str(exc)) from exc
            if directories:
                try:
                    reply = receive(root, time.monotonic() + ANSWER_SECONDS)
                except (OSError, ValueError) as exc:
                    raise self._gone(str(exc) or "no answer") from exc
                if reply is None:
                    raise self._gone("it ended")
                if "error" in reply:
                    raise CodeFailure(f"The working directory cannot be copied ({reply['error']}).")
        state = self._state or root
        pairs = [socket.socketpair() for _ in range(count)]
        try:
            # A state that has run no code is trusted, and may have to wait for its turn on a busy machine.
            seconds = ANSWER_SECONDS if state is root else STATE_SECONDS
            state.settimeout(seconds)
            if state is not root:
                while self._waiting:
                    send(state, self._waiting.pop(0))
            send(state, {"fork": directories or None}, [theirs.fileno() for _, theirs in pairs])
            reply = receive(state, time.monotonic() + seconds)
            pids = reply.get("pids") if reply else None
            if not isinstance(pids, list) or len(pids) != count or not all(type(pid) is int for pid in pids):
                raise self._gone(str((reply or {}).get("broken", "it cannot fork"))[:200])
        except (OSError, ValueError, RecursionError) as exc:
            for ours, _ in pairs:
                ours.close()
            raise self._gone(str(exc) or "no answer") from exc
        except BaseException:
            for ours, _ in pairs:
                ours.close()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()
        return [Candidate(pid, ours) for pid, (ours, _) in zip(pids, pairs, strict=True)]

    def _why(self, pid: int) -> str:
        """Why a candidate's process ended, as its parent knows."""
        state = self._state or self._root
        status: Any = None
        deadline = time.monotonic() + 2
        if state is not None and len(self._tried) == 1:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                for _ in range(20):
                    send(state, {"ended": pid})
                    status = (receive(state, deadline) or {}).get("status")
                    if status is not None:
                        break
                    time.sleep(0.005)  # its socket closes a moment before it is gone
        return end_in_words(status)
