"""Calls: what a run has asked of models and tools, and what came back.

A call is finished when its whole answer has arrived. Each finished call is one line of the run's
call log, durable before the answer is used, so that no crash can make a run pay for it again. A
rollout is continued by asking the log first, see :mod:`agentkd.recorder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from agentkd.record import iter_jsonl
from agentkd.trajectory import Usage

__all__ = ["VOID", "Call", "Past", "call_log", "iter_calls", "read_past"]


VOID = -1
"""``Call.restart`` of a call that another run made for a rollout whose calls were taken from elsewhere."""


class Call(BaseModel):
    """One finished call, or a mark between calls."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    rollout: str
    """Id of the trajectory: ``{task id}#{sample}``."""
    restart: int = 0
    """How often the rollout had begun anew; calls of earlier beginnings are void (but were paid), and so
    are those of ``VOID``."""
    kind: Literal["begin", "model", "tool", "code", "try", "commit", "restart", "end"]
    """"begin" has the settings of a start, "code" the outcome of one action; "try" the outcome of one
    candidate for an action, and "commit" the tools that the chosen one used; "restart" voids what was
    before it, "end" is a time limit."""
    step: int = 0
    """1 for the first step."""
    ordinal: int = 0
    """Which call of this kind in this step, from 0."""
    request: str = ""
    """Hash of what was asked: an answer is used again only for the same question."""
    answer: Any = None
    """What came back, as JSON."""
    error: tuple[str, str] | None = None
    """Class and message of an error that is an answer (a tool's exception, a context overflow)."""
    model: str = ""
    """Who answered, for kind "model"."""
    usage: Usage = Usage()
    seconds: float = 0.0
    """Wall-clock seconds."""

    @property
    def key(self) -> tuple[str, int, int]:
        """Where it stands in its rollout."""
        return self.kind, self.step, self.ordinal


class Past(NamedTuple):
    """What a rollout has behind it."""

    restart: int = 0
    reason: str = ""
    """Why it began anew, when it did."""
    calls: tuple[Call, ...] = ()

    def plus(self, call: Call) -> Past:
        """With one more call."""
        if call.restart < self.restart:
            return self
        if call.restart > self.restart or call.kind == "restart":
            reason = call.error[1] if call.kind == "restart" and call.error else self.reason
            kept = self.calls if call.restart == self.restart else ()
            return Past(call.restart, reason, kept if call.kind == "restart" else (*kept, call))
        return self._replace(calls=(*self.calls, call))

    @property
    def begun(self) -> Call | None:
        """The latest start."""
        begins = [call for call in self.calls if call.kind == "begin"]
        return max(begins, key=lambda call: call.ordinal, default=None)

    @property
    def model(self) -> str | None:
        """Who has acted so far."""
        return next((call.model for call in self.calls if call.kind == "model"), None)


def call_log(folder: Path, writer: int) -> Path:
    """The file of one writer: every process of a run has its own."""
    return folder / f"calls-{writer}.jsonl"


def iter_calls(folder: Path) -> Iterator[Call]:
    """All finished calls of a run, whichever process wrote them; torn last lines are passed over.

    Raises:
        DataError: a line in the middle is not a call (the line is named).
    """
    for path in sorted(folder.glob("calls-*.jsonl")):
        yield from iter_jsonl(path, Call, skip_torn=True)


def read_past(calls: Iterable[Call], skip: frozenset[str] = frozenset()) -> dict[str, Past]:
    """What each rollout has behind it.

    Args:
        calls: of all rollouts, in any order of writers.
        skip: ids of rollouts that are not wanted (finished ones).
    """
    found: dict[str, Past] = {}
    for call in calls:
        if call.rollout not in skip:
            found[call.rollout] = found.get(call.rollout, Past()).plus(call)
    return found
