"""The recorder: what stands between an agent and the world while a rollout is logged.

It wraps three things of one agent: the model, the tools that the sandbox is given, and the
sandbox. Whatever is asked goes to the log first. What the log has is answered from there; what it
has not is asked, written durably, and only then used.

So a rollout that was cut off is continued by running it again: the model's and the tools' answers
come from the log, the code runs in a fresh session, and where the log ends, life begins. Should
the code do something else than it did before, the rollout cannot be continued
(:class:`Diverged`) and begins anew. In a replay nothing is asked at all, and no code runs.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from agentkd.calls import Call, Past
from agentkd.errors import AgentkdError
from agentkd.secret import Redactor
from agentkd.trajectory import Usage

if TYPE_CHECKING:
    from agentkd.agent import StepAgent

__all__ = ["CannotContinue", "Diverged", "Meter", "NotRecorded", "Recorder"]


class CannotContinue(AgentkdError):
    """The rollout and its log do not fit together; neither the model nor the world is at fault."""


class Diverged(CannotContinue):
    """Run again, the rollout did something else than the log says."""


class NotRecorded(CannotContinue):
    """A replay came to where the log ends."""


class Meter(Protocol):
    """Counts what calls cost, and refuses them when nothing is left."""

    def check(self) -> None:
        """Called before a model call.

        Raises:
            AgentkdError: no call may be made any more.
        """
        ...

    def add(self, model: str, usage: Usage, seconds: float) -> None:
        """Called after a model call, once for each."""
        ...


class Recorder:
    """The log's view of one rollout.

    Args:
        rollout: id of the trajectory.
        write: appends a call; durable on return, or with the next call when its second argument
            is False.
        past: what the log has of this rollout.
        meter: counts the calls that are made.
        redactor: cleans what arrives.
        replay: ask nothing and run nothing; everything comes from the log.
    """

    def __init__(
        self,
        rollout: str,
        write: Callable[[Call, bool], None],
        past: Past = Past(),  # noqa: B008  immutable
        *,
        meter: Meter | None = None,
        redactor: Redactor | None = None,
        replay: bool = False,
    ) -> None:
        self.rollout = rollout
        self.past = past
        self.meter = meter
        self.redactor = redactor or Redactor()
        self.replay = replay
        self._write = write
        self._known = {call.key: call for call in past.calls}
        self._counts: Counter[tuple[str, int]] = Counter()
        self._alike: Counter[tuple[str, int, str]] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def watching(self, agent: StepAgent) -> Iterator[None]:
        """Log what this agent asks, as long as the block lasts."""
        from agentkd.recorded import RecordedModel, RecordedSandbox, RecordedTool

        model, sandbox, search = agent.model, agent.python_executor, agent.search

        def step() -> int:
            return len(agent.records) + 1

        agent.model = RecordedModel(model, self, step)
        agent.python_executor = RecordedSandbox(sandbox, self, step)
        if search is not None:
            agent.search = RecordedTool(search.name, search, self, step)
        try:
            yield
        finally:
            agent.model, agent.python_executor, agent.search = model, sandbox, search

    def reserve(self, kind: str, step: int, count: int = 1) -> int:
        """The ordinal of the next call of this kind; so many from it on are taken."""
        with self._lock:
            ordinal = self._counts[kind, step]
            self._counts[kind, step] += count
        return ordinal

    def find(self, kind: str, step: int, request: str, ordinal: int | None = None) -> tuple[int, Call | None]:
        """The ordinal of the next call of this kind, and the call where it was made before.

        Args:
            kind, step: of the call.
            request: what is asked, as a fingerprint.
            ordinal: a reserved one, for calls that are made side by side.

        Raises:
            Diverged: another question was asked there before.
        """
        if ordinal is None:
            ordinal = self.reserve(kind, step)
        call = self._known.get((kind, step, ordinal))
        if call is not None and call.request != request:
            raise Diverged(f"step {step}: another {kind} request than before")
        return ordinal, call

    def find_alike(self, kind: str, step: int, request: str) -> tuple[int, Call | None]:
        """As :meth:`find`, for calls of a step whose order is left to chance: known by what is asked.

        The k-th that asks this is answered by the k-th that the log has.
        """
        with self._lock:
            place = self._alike[kind, step, request]
            self._alike[kind, step, request] += 1
            logged = sorted(
                (
                    call
                    for call in self._known.values()
                    if (*call.key[:2], call.request) == (kind, step, request)
                ),
                key=lambda call: call.ordinal,
            )
            if place < len(logged):
                return logged[place].ordinal, logged[place]
            while (kind, step, self._counts[kind, step]) in self._known:
                self._counts[kind, step] += 1
            self._counts[kind, step] += 1
            return self._counts[kind, step] - 1, None

    def note(
        self,
        kind: Literal["code", "try", "commit"],
        step: int,
        ordinal: int,
        request: str,
        answer: Any,
        seconds: float,
    ) -> None:
        """Write what the sandbox did. It can be had again, so the next call makes it durable."""
        call = Call(
            rollout=self.rollout,
            kind=kind,
            step=step,
            ordinal=ordinal,
            request=request,
            answer=answer,
            seconds=seconds,
        )
        self.add(call, wait=False)

    def add(self, call: Call, *, wait: bool = True) -> Call:
        """Write a finished call."""
        call = call.model_copy(update={"rollout": self.rollout, "restart": self.past.restart})
        self._write(call, wait)
        with self._lock:
            self.past = self.past.plus(call)
        return call

    def begin_anew(self, reason: str) -> Past:
        """Void what stands in the log of this rollout, and say so there."""
        mark = Call(
            rollout=self.rollout,
            restart=self.past.restart + 1,
            kind="restart",
            error=("Diverged", reason),
        )
        self._write(mark, True)
        return self.past.plus(mark)

    def begin(self, config: dict[str, Any], labels: dict[str, str]) -> None:
        """Note with which settings the rollout is begun, or gone on with."""
        if not self.replay:
            before = self.past.begun
            ordinal = before.ordinal + 1 if before else 0
            answer = {"config": config, "labels": labels}
            self.add(Call(rollout=self.rollout, kind="begin", ordinal=ordinal, answer=answer), wait=False)

    def end(self) -> None:
        """Note that the time limit ended the rollout: nothing else in the log would tell."""
        if not self.replay:
            self.add(Call(rollout=self.rollout, kind="end", error=("RolloutTimeout", "time limit")))

    @property
    def tried(self) -> bool:
        """Whether the log has actions that were tried in forks."""
        return any(call.kind == "try" for call in self.past.calls)

    @property
    def timed_out(self) -> bool:
        """Whether the log ends with a time limit."""
        return any(call.kind == "end" for call in self.past.calls)
