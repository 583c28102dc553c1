"""A crew: the workers that run rollouts, as threads of this process or of several.

A crew has one seat for each teacher. All seats of a process take their work from one queue, each
by its own threads, so that a slow endpoint delays only what it is doing itself, and a dead one is
left alone for a while and its work done by the others. A rollout that was begun by one teacher is
kept for that teacher as long as it is alive.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel

from agentkd.agent import StepAgent
from agentkd.calls import Call, Past, call_log
from agentkd.gate import Fault
from agentkd.record import AppendLog, iter_jsonl
from agentkd.recorder import Diverged, Recorder
from agentkd.rollout import rollout
from agentkd.secret import Redactor
from agentkd.spend import Ledger
from agentkd.task import Task
from agentkd.telemetry import start_telemetry
from agentkd.trajectory import StopReason, Trajectory, Usage

__all__ = ["Crew", "Done", "FaultNote", "Notice", "Outfit", "Seat", "ThreadCrew", "Work", "iter_faults"]

BROKEN_AFTER = 3
"""Provider errors in a row after which a seat rests, when there are others."""
FIRST_REST, LONGEST_REST = 5.0, 60.0
"""Seconds; doubled while the endpoint stays dead."""


class Seat(NamedTuple):
    """The place of one teacher."""

    make_agent: Callable[[Task, int], StepAgent]
    """Makes the agent of ``(task, sample)``, in the worker's thread. For several processes it must
    be picklable. Where it has a method ``open(outfit)``, that is called once in every process."""
    workers: int
    """Rollouts in flight, over all processes."""
    name: str = ""
    """The model's id: whose logged rollouts it continues."""
    config: dict[str, Any] = {}
    """Resolved settings, kept in the record."""
    labels: dict[str, str] = {}
    """Kept in the record."""
    temperatures: tuple[float, ...] = ()
    """Of the samples of a task, in turn, where they differ from that of ``config``."""
    secrets: tuple[str, ...] = ()
    """Keys in use, to be kept out of all records."""

    def config_of(self, sample: int) -> dict[str, Any]:
        """The settings of one sample."""
        if not self.temperatures:
            return self.config
        return {**self.config, "temperature": self.temperatures[sample % len(self.temperatures)]}


class Outfit(NamedTuple):
    """What a process gives to the models of its seats."""

    share: int
    """Processes that divide the limits of an endpoint among them."""
    on_fault: Callable[[str, str, Fault, str, float | None], None]
    """Notes a failed call: endpoint, model, fault, message, seconds until the next try."""
    check: Callable[[], None]
    """Raises when the limits of the run allow no further call."""
    on_wait: Callable[[str, str, float], None]
    """Told of each longer wait of all calls: endpoint, why, seconds."""


class FaultNote(BaseModel):
    """One failed call of an endpoint, or an answer with impossible counts: a line of ``faults-N.jsonl``."""

    at: str
    """UTC, ISO 8601."""
    endpoint: str
    kind: str
    """"overload", "transient" or "final"; "usage" is an answer with impossible counts."""
    what: str
    """"429", "timeout", "connection", "garbage", "wrong usage"."""
    message: str
    wait: float | None
    """Seconds until it was tried again; None when it was not."""
    model: str = ""
    """Who was asked."""
    usage: Usage | None = None
    """Tokens of an answer that was of no use; they are in the bill."""


def iter_faults(folder: Path) -> Iterator[FaultNote]:
    """All failed calls of a run, whichever process noted them; torn last lines are passed over."""
    for path in sorted(folder.glob("faults-*.jsonl")):
        yield from iter_jsonl(path, FaultNote, skip_torn=True)


class Work(NamedTuple):
    """One rollout to do."""

    task: Task
    sample: int
    attempt: int = 1
    past: Past = Past()

    @property
    def id(self) -> str:
        return f"{self.task.id}#{self.sample}"


class Done(NamedTuple):
    """One rollout done, or broken off by ``error``, which is not the model's nor the endpoint's."""

    work: Work
    trajectory: Trajectory | None
    past: Past
    error: BaseException | None = None


class Notice(NamedTuple):
    """What a person should know while it lasts: a fault of an endpoint, or that all its calls wait."""

    endpoint: str
    text: str
    wait: float | None = None
    """Seconds for which the endpoint is not asked; None for a fault."""


class Crew(Protocol):
    """Whoever does the work; results and notices come to the queue that it was made with."""

    capacity: int
    """Rollouts that it can have in flight."""

    def submit(self, work: Work) -> None:
        """Hand out one rollout."""
        ...

    def close(self) -> None:
        """Take no more work; what is in flight is left alone."""
        ...


class _Chair:
    """A seat at work: its own queue and its health. Used under the crew's lock."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.own: deque[Work] = deque()
        self.threads = 0
        self.failures = 0
        self.rest = FIRST_REST
        self.resting_until = 0.0
        self.probing = False

    @property
    def resting(self) -> bool:
        return self.failures >= BROKEN_AFTER and (self.probing or time.monotonic() < self.resting_until)

    def note(self, failed: bool) -> None:
        """A rollout ended by a provider error, or it did not."""
        self.probing = False
        if not failed:
            self.failures, self.rest = 0, FIRST_REST
            return
        self.failures += 1
        if self.failures >= BROKEN_AFTER and time.monotonic() >= self.resting_until:
            self.resting_until = time.monotonic() + self.rest
            self.rest = min(LONGEST_REST, 2 * self.rest)


class ThreadCrew:
    """Threads of this process. They are daemons, so that Ctrl-C ends the process.

    Args:
        seats: the teachers.
        ready: where results go.
        folder: of the call log; None logs no calls.
        ledger: what calls cost, and whether they may be made.
        writer: number of this process among the writers of the log.
        share: processes of the run.
        fsync: see :class:`agentkd.record.AppendLog`.
        max_seconds: wall-clock limit of one rollout.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        ready: queue.SimpleQueue[Done | Notice],
        folder: Path | None,
        *,
        ledger: Ledger,
        writer: int = 0,
        share: int = 1,
        fsync: bool = True,
        max_seconds: float | None = None,
    ) -> None:
        self.ready = ready
        self.ledger = ledger
        self.max_seconds = max_seconds
        self.redactor = Redactor(secret for seat in seats for secret in seat.secrets)
        self._log = AppendLog(call_log(folder, writer), fsync=fsync) if folder else None
        self._faults = AppendLog(folder / f"faults-{writer}.jsonl", fsync=False) if folder else None
        self._chairs = [_Chair(seat._replace(workers=max(1, -(-seat.workers // share)))) for seat in seats]
        self._common: deque[Work] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.capacity = sum(chair.seat.workers for chair in self._chairs)
        start_telemetry()
        outfit = Outfit(share, self._note_fault, ledger.check, self._note_wait)
        for seat in seats:
            if hasattr(seat.make_agent, "open"):
                seat.make_agent.open(outfit)

    def submit(self, work: Work) -> None:
        with self._changed:
            begun_by = [chair for chair in self._chairs if chair.seat.name == work.past.model]
            (begun_by[0].own if begun_by else self._common).append(work)
            self._changed.notify(1 if len(self._chairs) == 1 else self.capacity)
        for chair in self._chairs:  # one more thread for each piece of work, as many as were asked for
            if chair.threads < chair.seat.workers:
                chair.threads += 1
                name = f"rollout-{chair.seat.name}-{chair.threads}"
                threading.Thread(target=self._loop, args=(chair,), name=name, daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for log in (self._log, self._faults):
            if log is not None:
                log.close()

    def _take(self, chair: _Chair) -> Work | None:
        with self._changed:
            while not self._closed:
                if not (len(self._chairs) > 1 and chair.resting):
                    queues = (chair.own, self._common, *self._left_behind(chair))
                    if work := next((queue.popleft() for queue in queues if queue), None):
                        chair.probing = chair.failures >= BROKEN_AFTER
                        return work
                    self._changed.wait()
                else:
                    self._changed.wait(0.5)  # its rest ends without anybody's notice
            return None

    def _left_behind(self, chair: _Chair) -> list[deque[Work]]:
        """The work that was kept for teachers that are down."""
        return [other.own for other in self._chairs if other is not chair and other.resting]

    def _loop(self, chair: _Chair) -> None:
        while (work := self._take(chair)) is not None:
            try:
                done = self._do(chair.seat, work)
            except BaseException as exc:
                done = Done(work, None, work.past, exc)
            reason = done.trajectory.stop_reason if done.trajectory else None
            with self._changed:
                chair.note(failed=reason == StopReason.PROVIDER_ERROR)
            self.ready.put(done)

    def _do(self, seat: Seat, work: Work) -> Done:
        past = work.past
        while True:
            labels = {**seat.labels, "restarted": past.reason} if past.restart else seat.labels
            recorder = Recorder(work.id, self._write, past, meter=self.ledger, redactor=self.redactor)
            agent = seat.make_agent(work.task, work.sample)
            if hasattr(agent.sandbox, "ends_with_answer"):
                agent.sandbox.ends_with_answer = True  # it is closed below
            try:
                trajectory = rollout(
                    agent,
                    work.task,
                    sample=work.sample,
                    max_seconds=self.max_seconds,
                    config=seat.config_of(work.sample),
                    labels=labels,
                    recorder=recorder,
                )
                return Done(work, trajectory, recorder.past)
            except Diverged as exc:
                past = recorder.begin_anew(str(exc))
            finally:
                agent.cleanup()

    def _write(self, call: Call, wait: bool) -> None:
        if self._log is not None:
            self._log.append(call, wait=wait)

    def _note_fault(self, endpoint: str, model: str, fault: Fault, message: str, wait: float | None) -> None:
        if fault.usage is not None:
            self.ledger.add(model, fault.usage, 0.0, calls=0)  # its seconds are those of the next try
        if self._closed:
            return
        message = self.redactor.text(message)[:500]
        self.ready.put(Notice(endpoint, f"{fault.what}: {message}" if message else fault.what))
        if self._faults is not None:
            note = FaultNote(
                at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                endpoint=endpoint,
                kind=fault.kind,
                what=fault.what,
                message=message,
                wait=wait,
                model=model,
                usage=fault.usage,
            )
            self._faults.append(note, wait=False)

    def _note_wait(self, endpoint: str, why: str, seconds: float) -> None:
        self.ready.put(Notice(endpoint, f"{why} {seconds:,.0f} s", seconds))
