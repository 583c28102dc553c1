"""Sessions elsewhere: one stream of messages to a supervisor in a container or virtual machine.

What a backend adds is a :class:`Channel`, the way the messages take. Time limits are kept by the
supervisor, beside the code, so that the latency of the channel costs the code nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from smolagents.local_python_executor import BASE_BUILTIN_MODULES, CodeOutput, PythonExecutor

from agentkd.errors import SandboxError
from agentkd.sandbox import CodeFailure, Outcome
from agentkd.sandbox.inside.wire import plain
from agentkd.sandbox.limits import Limits
from agentkd.sandbox.outcome import KEPT, LOST, checked
from agentkd.sandbox.toolhost import Caller, Round, ToolHost
from agentkd.trajectory import ToolUse, valid_text

__all__ = ["Channel", "RemoteSandbox"]

START_SECONDS = 120.0
GRACE_SECONDS = 30.0
"""How much longer than an action's time limit the supervisor may be silent."""
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}


class Channel(Protocol):
    """The way to one supervisor."""

    def exchange(self, messages: Sequence[dict[str, Any]], wait: float) -> list[dict[str, Any]]:
        """Deliver messages, then wait up to ``wait`` seconds for at least one.

        Raises:
            EOFError: the supervisor has ended.
            ValueError: what came is no message.
            SandboxError: the way to it is gone.
        """
        ...

    def close(self) -> None:
        """End the supervisor and what it runs in."""
        ...


class RemoteSandbox(PythonExecutor):
    """One session. See :class:`agentkd.sandbox.ForkingSandbox`.

    A backend overrides :meth:`_connect` and says in ``order`` what the supervisor is to do.

    Args:
        imports: modules the code may import beside the harmless ones; "*" for all.
        timeout: seconds one action may take, time in tools apart.
        limits: memory, processes and the like.
    """

    can_fork = True
    poll_seconds = 20.0
    """Longest single wait for the supervisor."""

    def __init__(
        self, imports: Sequence[str] = (), timeout: float = 10.0, limits: Limits | None = None
    ) -> None:
        self.imports = tuple(imports)
        self.timeout = timeout
        self.limits = limits or Limits()
        self.about: dict[str, Any] = {}
        """What the supervisor says of itself: version of Python, modules, user id, what confines it."""
        self._host = ToolHost()
        self._variables: dict[str, Any] = {}
        self._uses: list[ToolUse] = []
        self._channel: Channel | None = None
        self._unsent: list[dict[str, Any]] = []
        self._outcomes: list[Outcome] = []
        self._several = False
        """Whether there are or may be several candidates, with working directories of their own."""
        self._running = 0
        """Candidates that the supervisor holds."""
        self._together = Round()
        self._spent = 0.0

    # What a backend is.

    def _connect(self) -> Channel:
        """Start a supervisor."""
        raise NotImplementedError

    def _order(self) -> dict[str, Any]:
        """What the supervisor is told first."""
        limits = self.limits
        cpu = limits.cpu_seconds or 2 * self.timeout
        return {
            "imports": sorted({*BASE_BUILTIN_MODULES, *self.imports}),
            "seed": limits.seed,
            "scratch": "/scratch",
            "user": None,
            "processes": limits.processes,
            "environment": {"LANG": "C.UTF-8", "TZ": "UTC", "PATH": "/nonexistent", **ONE_THREAD},
            "limits": {
                "AS": limits.memory_mb << 20,
                "NOFILE": 256,
                "FSIZE": limits.scratch_mb << 20,
                "CPU": max(1, int(cpu + 0.999)),
                "CORE": 0,
                "MEMLOCK": 0,
            },
        }

    # smolagents' interface.

    def send_tools(self, tools: dict[str, Any]) -> None:
        self._host.tools.update(tools)
        self._set(list(tools), {})

    def send_variables(self, variables: dict[str, Any]) -> None:
        values = {name: plain(value) for name, value in variables.items()}
        self._variables.update(values)
        self._set([], values)

    def __call__(self, code_action: str) -> CodeOutput:
        if self._outcomes:
            self.discard()
        self._together, self._several = Round(), False
        outcome = self._attempt([code_action], self.timeout, settle=True)[0]
        self._uses += outcome.tool_uses
        if outcome.error is not None:
            raise CodeFailure(outcome.error, outcome.printed, outcome.timed_out)
        return CodeOutput(output=outcome.value, logs=outcome.printed, is_final_answer=outcome.is_final)

    def take_tool_uses(self) -> tuple[ToolUse, ...]:
        uses, self._uses = tuple(self._uses), []
        return uses

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
            CodeFailure: the session's state is lost, by the fault of code.
            SandboxError: the sandbox failed.
            AgentkdError: a tool failed on the host, not by the code's fault.
        """
        if not codes:
            raise ValueError("no code to try")
        if self._outcomes and not (more and self._several):
            self.discard()
        if not self._outcomes:
            self._together, self._several = Round(), more or len(codes) > 1
        fresh = self._attempt(list(codes), timeout or self.timeout)
        self._outcomes += fresh
        return fresh

    def commit(self, index: int) -> None:
        """Make a candidate's process the session, counted from the first; the others end.

        Raises:
            ValueError: nothing was tried, or that candidate's process has ended.
            CodeFailure: the session's state is lost.
            SandboxError: the sandbox failed.
        """
        if not 0 <= index < len(self._outcomes) or self._outcomes[index].ended:
            raise ValueError(f"candidate {index} cannot become the session")
        self._uses += self._outcomes[index].tool_uses
        self._outcomes = []
        self._keep(index)

    def discard(self) -> None:
        """Forget the candidates; the session is as it was before them."""
        tried, self._outcomes = self._outcomes, []
        if tried and self._channel is not None:
            self._keep(None)

    def close(self) -> None:
        """End the session and everything in it."""
        channel, self._channel = self._channel, None
        self._outcomes, self._unsent, self._running, self._spent = [], [], 0, 0.0
        if channel is not None:
            channel.close()

    # Talking to the supervisor.

    def _set(self, tools: list[str], variables: dict[str, Any]) -> None:
        if self._channel is not None and (tools or variables):
            self._unsent.append({"set": {"tools": tools, "variables": variables}})

    def _open(self) -> None:
        if self._channel is not None:
            return
        self._channel = self._connect()
        try:
            ready = self._hear([{"order": self._order()}], START_SECONDS)
        except CodeFailure as exc:  # no code has run yet
            raise SandboxError(f"The sandbox did not start: {exc.__cause__ or exc}.", self._hint()) from exc
        if "ready" not in ready:
            self.close()
            raise SandboxError(f"The sandbox did not start: {ready.get('broken')}.", self._hint())
        self.about = {name: value for name, value in ready.items() if name != "ready"}
        self._unsent = [{"set": {"tools": list(self._host.tools), "variables": self._variables}}]

    def _hint(self) -> str:
        return "Run `agentkd doctor`: it says what is missing and how to mend it."

    def _exchange(self, messages: list[dict[str, Any]], wait: float) -> list[dict[str, Any]]:
        """One exchange.

        Raises:
            CodeFailure: the supervisor is gone; the session is closed.
            SandboxError: the way to it is; the session is closed.
        """
        assert self._channel is not None
        try:
            return self._channel.exchange([*self._unsent, *messages], wait)
        except (EOFError, ValueError, RecursionError) as exc:
            self.close()
            why = f"{exc}".rstrip(".") or "it ended"
            raise CodeFailure(f"The code ended its session ({why}). {LOST}") from exc
        except BaseException:
            self.close()
            raise
        finally:
            self._unsent = []

    def _hear(self, messages: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """The next message that is not a late one of a candidate."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for message in self._exchange(messages, min(left, self.poll_seconds)):
                if "candidate" not in message:
                    return message
            messages = []
        self.close()
        raise SandboxError("The sandbox does not answer; the session's state is lost.", self._hint())

    def _keep(self, index: int | None) -> None:
        self._running = 0
        reply = self._hear([{"keep": index}], GRACE_SECONDS)
        if reply.get("lost"):
            self.close()
            raise CodeFailure(f"The code ended its session. {LOST}")

    def _attempt(self, codes: list[str], seconds: float, settle: bool = False) -> list[Outcome]:
        if self._spent > self.limits.session_seconds:
            self.close()
            used = f"The session's {self.limits.session_seconds:g} s are used up. {LOST}"
            raise CodeFailure(used, timed_out=True)
        try:
            outcomes = self._try(codes, seconds, settle)
        except BaseException:
            self.close()
            raise
        tools = (sum(use.seconds for use in outcome.tool_uses) for outcome in outcomes)
        self._spent += max(
            max(0.0, outcome.seconds - spent) for outcome, spent in zip(outcomes, tools, strict=True)
        )
        return outcomes

    def _try(self, codes: list[str], seconds: float, settle: bool = False) -> list[Outcome]:
        """Run the codes; with ``settle`` the only one is kept as well."""
        self._open()
        running = _Running([self._host.caller(self._together) for _ in codes], self._running)
        order = {"try": codes, "seconds": seconds, "copies": self._several, "settle": settle}
        outgoing: list[dict[str, Any]] = [order]
        silent = time.monotonic()
        with ThreadPoolExecutor(len(codes)) as pool:
            while running.left or (settle and running.kept is None):
                messages = self._exchange(outgoing, self.poll_seconds)
                if messages:
                    outgoing = running.take(messages, pool)
                    silent = time.monotonic()
                else:
                    outgoing = []
                    if time.monotonic() - silent > seconds * len(codes) + GRACE_SECONDS:
                        self.close()
                        raise SandboxError(
                            "The sandbox does not answer; the session's state is lost.", self._hint()
                        )
        if running.kept is not None and running.kept.get("lost"):
            raise CodeFailure(f"The code ended its session. {LOST}")
        self._running += 0 if settle else len(codes)
        return [outcome for outcome in running.outcomes if outcome is not None]


class _Running:
    """Candidates that run: their calls and outcomes.

    Args:
        callers: what answers the calls of each.
        first: number of the first of them.
    """

    def __init__(self, callers: list[Caller], first: int) -> None:
        self.outcomes: list[Outcome | None] = [None] * len(callers)
        self.kept: dict[str, Any] | None = None
        """What became of the only candidate, where that was asked for."""
        self._callers = callers
        self._first = first
        self._began = time.monotonic()

    @property
    def left(self) -> int:
        """How many still run."""
        return self.outcomes.count(None)

    def take(self, messages: list[dict[str, Any]], pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
        """Note outcomes; the replies to calls.

        Raises:
            CodeFailure: they could not be started.
            AgentkdError: a tool failed on the host.
            ValueError: that is no message of a candidate.
        """
        replies = []
        for message in messages:
            if "full" in message:
                raise CodeFailure(
                    f"The working directory is too full to be copied ({message['full']}). {LOST}"
                )
            if "kept" in message:
                self.kept = message
                continue
            number = message["candidate"] - self._first
            if not 0 <= number < len(self.outcomes) or self.outcomes[number]:
                continue  # a word after the last
            said = message.get("message")
            if isinstance(said, dict) and "call" in said:
                replies.append((number, pool.submit(self._callers[number].answer, said)))
            else:
                self.outcomes[number] = self._outcome(number, message)
        answers = []
        for number, reply in replies:
            try:
                answers.append({"reply": self._first + number, "message": reply.result()})
            except (ValueError, RecursionError) as exc:
                self.outcomes[number] = self._failed(
                    number, f"The code broke its interpreter ({exc}). {KEPT}"
                )
        return answers

    def _outcome(self, number: int, message: dict[str, Any]) -> Outcome:
        if isinstance(seconds := message.get("timed_out"), (int, float)):
            error = f"The code took longer than {seconds:.3g} s and was stopped. {KEPT}"
            return self._failed(number, error, timed_out=True)
        said = message.get("message")
        if isinstance(said, dict):
            try:
                return checked(said, self._callers[number], time.monotonic() - self._began)
            except (ValueError, RecursionError) as exc:
                return self._failed(number, f"The code broke its interpreter ({exc}). {KEPT}")
        return self._failed(number, f"The code {_ending(message.get('ended'))}. {KEPT}")

    def _failed(self, number: int, error: str, timed_out: bool = False) -> Outcome:
        return Outcome(
            error=valid_text(error),
            timed_out=timed_out,
            ended=True,
            tool_uses=tuple(self._callers[number].uses),
            seconds=time.monotonic() - self._began,
        )


def _ending(status: Any) -> str:
    """How a process ended, in words; negative numbers are signals."""
    if status in (-24, -9):  # SIGXCPU, SIGKILL
        return "used too much processor time or memory"
    if isinstance(status, int) and status < 0:
        return f"crashed its interpreter (signal {-status})"
    return "ended its process"
