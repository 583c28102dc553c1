"""A run while it goes on: what is to be done, what is in flight, what is finished and what it cost.

It is used by :func:`agentkd.rollouts.run_seats`, on one thread.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agentkd.calls import Call, Past, iter_calls, read_past
from agentkd.errors import ProviderError, StorageError
from agentkd.record import AppendLog, read_trajectories, write_jsonl
from agentkd.spend import Ledger, Spent
from agentkd.task import Task
from agentkd.trajectory import StopReason, Trajectory

if TYPE_CHECKING:
    from agentkd.crew import Crew, Done, Notice, Work
    from agentkd.rollouts import RunOptions

__all__ = ["Progress", "Run", "count_left", "count_past", "finished_rollouts"]

GIVE_UP_AFTER = 10
"""Provider errors in a row, with nothing finished in between, before a run is given up."""


class Progress(NamedTuple):
    """How far a run is."""

    done: int
    """Finished rollouts, earlier starts included."""
    total: int
    correct: int
    errors: int
    """Rollouts that ended by an error and were not finished by a retry."""
    latest: Trajectory | None
    in_flight: int = 0
    spent: Spent = Spent()
    """Earlier starts included."""
    new: int = 0
    """Rollouts finished since this start."""
    seconds: float = 0.0
    """Since this start."""
    problem: str = ""
    """The last error, of a rollout or of a call that was tried again."""
    waits: tuple[tuple[str, float], ...] = ()
    """Endpoints that are not asked for a while, in words, and the seconds that are left of it."""


def finished_rollouts(log: Path) -> dict[str, Trajectory]:
    """What stands in an append-only file already, by id; empty when there is none."""
    return {item.id: item for item in read_trajectories(log)} if log.is_file() else {}


def count_left(
    tasks: Sequence[Task], finished: Mapping[str, Trajectory], samples: int, enough: int | None
) -> int:
    """Rollouts that are still to be done, without those that enough correct ones spare.

    Args:
        tasks: all of the run.
        finished: by id.
        samples, enough: see :class:`RunOptions`.
    """
    correct = Counter(item.task.id for item in finished.values() if item.correct)
    todo = [task.id for task in tasks if enough is None or correct[task.id] < enough]
    return sum(f"{name}#{sample}" not in finished for name in todo for sample in range(samples))


def count_past(folder: Path, ledger: Ledger) -> None:
    """Let a ledger know what the log of a folder has cost; each folder is counted once.

    Raises:
        DataError: a line of the log is malformed (it is named).
    """
    for _ in _counted(folder, ledger):
        pass


def _counted(folder: Path, ledger: Ledger) -> Iterator[Call]:
    """The calls of a folder's log, counted where the ledger does not have them yet."""
    from agentkd.crew import iter_faults

    new = ledger.is_new(folder)
    for note in iter_faults(folder) if new else ():
        if note.usage is not None:
            ledger.add(note.model, note.usage, 0.0, calls=0)
    for call in iter_calls(folder):
        if new and call.kind == "model":
            ledger.add(call.model, call.usage, call.seconds)
        yield call


class Run:
    """The state of a run while it goes on. One thread uses it."""

    def __init__(
        self,
        tasks: Sequence[Task],
        out: Path,
        options: RunOptions,
        ledger: Ledger,
        log: AppendLog,
        on_progress: Callable[[Progress], None],
    ) -> None:
        from agentkd.crew import Work

        self.options, self.ledger, self.log, self.out = options, ledger, log, out
        self.on_progress = on_progress
        self.ready: queue.SimpleQueue[Done | Notice] = queue.SimpleQueue()
        self.finished = finished_rollouts(out)
        past = self._read_log() if options.log_calls else {}
        works = [
            Work(task, sample, past=past.get(f"{task.id}#{sample}", Past()))
            for task in tasks
            for sample in range(options.samples)
        ]
        self.wanted: Sequence[Work] = works
        kept = [self.finished[work.id] for work in works if work.id in self.finished]
        self.correct = Counter(item.task.id for item in kept if item.correct)
        # All first samples before any second one, so that enough correct ones can spare the others.
        todo = [work for work in works if work.id not in self.finished and not self._spared(work)]
        self.todo = deque(sorted(todo, key=lambda work: work.sample))
        self.done, self.total = len(kept), len(kept) + len(todo)
        self.all_correct = sum(self.correct.values())
        self.finished_now = 0
        self.failed: dict[str, Trajectory] = {}
        self.retried: dict[str, Trajectory] = {}
        self.open = 0
        self.in_a_row = 0
        self.stopped: str | None = None
        self.latest: Trajectory | None = None
        self.problem = ""
        self.waits: dict[str, tuple[str, float]] = {}
        self.began = time.monotonic()
        self._synced_at = self.began

    def _read_log(self) -> dict[str, Past]:
        """What unfinished rollouts have behind them; the ledger learns what all calls have cost."""
        return read_past(_counted(self.out.parent, self.ledger), frozenset(self.finished))

    def work(self, crew: Crew, workers: int) -> None:
        """Hand out all work and take all results."""
        from agentkd.crew import Done

        give_up = max(GIVE_UP_AFTER, 2 * workers)
        try:
            self._tell()
            while True:
                self._fill(crew)
                if not self.open:
                    return
                try:
                    done = self.ready.get(timeout=0.5)  # a timeout, so that Ctrl-C is seen on every system
                except queue.Empty:
                    self._tell()
                    continue
                if not isinstance(done, Done):
                    self._hear(done)
                    continue
                self._take(done)
                if self.in_a_row >= give_up:
                    raise ProviderError(
                        f"The endpoint failed {self.in_a_row} times in a row: {self.problem}",
                        "What is finished is kept; run the same command again to go on.",
                    )
                self._tell()
        except BaseException:
            self.ledger.stop()
            with contextlib.suppress(StorageError):  # where nothing can be written, that has been said
                while not self.ready.empty():
                    done = self.ready.get()
                    if not isinstance(done, Done) or done.trajectory is None:
                        continue
                    if not done.trajectory.stop_reason.is_error:
                        self._take(done)
            raise
        finally:
            crew.close()

    def _spared(self, work: Work) -> bool:
        """Whether enough rollouts of its task are correct."""
        return self.options.enough is not None and self.correct[work.task.id] >= self.options.enough

    def _fill(self, crew: Crew) -> None:
        if self.todo and self.stopped is None:
            self.stopped = self.ledger.reached()
        while self.todo and self.stopped is None and self.open < crew.capacity:
            work = self.todo.popleft()
            if self._spared(work):
                self.total -= 1
                continue
            self.open += 1
            crew.submit(work)

    def _hear(self, notice: Notice) -> None:
        text = f"{notice.endpoint} {notice.text}"
        if notice.wait is None:
            self.problem = text
        else:
            self.waits[notice.endpoint] = text, time.monotonic() + notice.wait
        self._tell()

    def _take(self, done: Done) -> None:
        self.open -= 1
        if done.error is not None:
            raise done.error
        work, trajectory = done.work, done.trajectory
        assert trajectory is not None
        self.latest = trajectory
        self.in_a_row = self.in_a_row + 1 if trajectory.stop_reason == StopReason.PROVIDER_ERROR else 0
        if not trajectory.stop_reason.is_error:
            self._keep(trajectory)
            return
        self.problem = trajectory.failure.message if trajectory.failure else trajectory.stop_reason.value
        limit = self.ledger.reached()
        if trajectory.stop_reason == StopReason.CANCELLED and limit is not None:
            self.stopped = limit
        elif work.attempt < self.options.attempts:
            self.retried[trajectory.id] = trajectory
            self.todo.append(work._replace(attempt=work.attempt + 1, past=done.past))
        else:
            self.failed[trajectory.id] = trajectory

    def _keep(self, trajectory: Trajectory) -> None:
        # Its calls are durable, so the line itself may wait; without a call log it may not.
        now = time.monotonic()
        wait = not self.options.log_calls or now > self._synced_at + 0.2 or not self.open
        self._synced_at = now if wait else self._synced_at
        self.log.append(trajectory, wait=wait)
        self.finished[trajectory.id] = trajectory
        self.finished_now += 1
        self.done += 1
        self.correct[trajectory.task.id] += trajectory.correct
        self.all_correct += trajectory.correct
        self.retried.pop(trajectory.id, None)

    def _tell(self) -> None:
        now = time.monotonic()
        self.on_progress(
            Progress(
                done=self.done,
                total=self.total,
                correct=self.all_correct,
                errors=len(self.failed),
                latest=self.latest,
                in_flight=self.open,
                spent=self.ledger.spent(),
                new=self.finished_now,
                seconds=now - self.began,
                problem=self.problem,
                waits=tuple((text, until - now) for text, until in self.waits.values() if until > now),
            )
        )

    def note_errors(self) -> None:
        """Write ``errors.jsonl``, or remove that of an earlier start."""
        path = self.out.with_name("errors.jsonl")
        last = {**self.retried, **self.failed}  # of a run that was given up, some still wait for a retry
        if last:
            write_jsonl(path, last.values())
        else:
            path.unlink(missing_ok=True)
