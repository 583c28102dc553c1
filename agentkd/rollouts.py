"""Many rollouts: a run that goes on where it stopped and makes no finished call twice.

:func:`run_rollouts` is the simple form, :func:`run_seats` the full one: several teachers, several
processes, limits of cost, early stop. Finished trajectories are appended to one file by the
process that runs this; calls are logged by whoever makes them (:mod:`agentkd.crew`).
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from agentkd.calls import Call, Past, iter_calls, read_past
from agentkd.errors import AgentkdError, ProviderError, RetrievalError, SandboxError, StorageError
from agentkd.record import AppendLog, read_trajectories, write_jsonl
from agentkd.scorer import check_scorers
from agentkd.spend import Ledger, Spent
from agentkd.task import Task
from agentkd.trajectory import StopReason, Trajectory

if TYPE_CHECKING:
    from agentkd.agent import StepAgent
    from agentkd.crew import Crew, Done, Seat, Work

__all__ = [
    "Progress",
    "RunOptions",
    "RunResult",
    "count_past",
    "finished_rollouts",
    "run_rollouts",
    "run_seats",
]

GIVE_UP_AFTER = 10
"""Provider errors in a row, with nothing finished in between, before a run is given up."""

_ERRORS: dict[StopReason, type[AgentkdError]] = {
    StopReason.PROVIDER_ERROR: ProviderError,
    StopReason.SANDBOX_ERROR: SandboxError,
    StopReason.RETRIEVAL_ERROR: RetrievalError,
}


class RunOptions(BaseModel):
    """How many rollouts are run, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(default=1, ge=1)
    """Rollouts of each task, at most."""
    enough: int | None = Field(default=None, ge=1)
    """Correct rollouts of a task after which no further sample of it is begun."""
    attempts: int = Field(default=2, ge=1)
    """Tries of a rollout that ends by an error; each goes on where the one before stopped."""
    processes: int = Field(default=1, ge=1)
    """Processes that divide the workers among them."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Wall-clock limit of one rollout."""
    fsync: bool = True
    """Wait for the disk at each call. Without it a crash of the machine, not of the process, may
    cost the last calls."""
    log_calls: bool = True
    """Keep the call log, so that a rollout goes on at the step where it stopped."""


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
    """The last error."""


class RunResult(NamedTuple):
    """What a run left."""

    trajectories: list[Trajectory]
    """All finished ones of the tasks, in the order of tasks and samples."""
    wanted: int
    """Rollouts that were to be finished; those spared by ``enough`` are not among them."""
    spent: Spent
    stopped: str | None
    """The limit that ended the run before all was done, in words."""


def finished_rollouts(log: Path) -> dict[str, Trajectory]:
    """What stands in an append-only file already, by id; empty when there is none."""
    return {item.id: item for item in read_trajectories(log)} if log.is_file() else {}


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


def run_rollouts(
    tasks: Sequence[Task],
    make_agent: Callable[[Task, int], StepAgent],
    out: Path,
    *,
    workers: int = 8,
    samples: int = 1,
    config: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
    log_calls: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Trajectory]:
    """Run many rollouts by worker threads, each finished one appended durably to ``out``.

    Args:
        tasks: the questions.
        make_agent: makes the agent of ``(task, sample)``; called in the worker thread.
        out: ``trajectories.jsonl``.
        workers: rollouts in flight.
        samples: runs of each task.
        config, labels: kept in each record.
        log_calls: see :class:`RunOptions`.
        on_progress: told of each result.

    Returns:
        All finished trajectories of these tasks, in the order of tasks and samples.

    Raises:
        As :func:`run_seats`.
    """
    from agentkd.crew import Seat

    seat = Seat(make_agent, workers, config=config or {}, labels=labels or {})
    options = RunOptions(samples=samples, log_calls=log_calls)
    return run_seats(tasks, [seat], out, options, on_progress=on_progress).trajectories


def run_seats(
    tasks: Sequence[Task],
    seats: Sequence[Seat],
    out: Path,
    options: RunOptions,
    *,
    ledger: Ledger | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Run many rollouts by one or several teachers.

    What stands in ``out`` already is not run again; what the call log beside it has of an
    unfinished rollout is not asked again. A rollout that ends by an error is not finished: it is
    tried ``attempts`` times, its last error goes to ``errors.jsonl`` beside ``out``, and the next
    start tries it again.

    Raises:
        ProviderError: the endpoints failed many times in a row; finished work is kept.
        ConfigError: another process is writing ``out``, or a task names an unknown scorer.
        StorageError: a record cannot be written.
        AgentkdError: nothing finished, with the last error.
    """
    check_scorers(tasks)
    ledger = ledger or Ledger()
    with AppendLog(out, fsync=options.fsync) as log:
        run = _Run(tasks, out, options, ledger, log, on_progress or (lambda progress: None))
        try:
            if run.todo:
                run.work(_crew(seats, run.ready, out.parent, options, ledger), sum(s.workers for s in seats))
        finally:
            run.note_errors()
    if run.failed and not run.done:
        last = list(run.failed.values())[-1]
        error = _ERRORS.get(last.stop_reason, AgentkdError)
        raise error(
            f"No rollout finished; the last error: {last.failure.message if last.failure else 'cancelled'}",
            f"See {out.with_name('errors.jsonl')}, then run the same command again.",
        )
    kept = [run.finished[work.id] for work in run.wanted if work.id in run.finished]
    return RunResult(kept, run.total, ledger.spent(), run.stopped)


def _crew(
    seats: Sequence[Seat], ready: queue.SimpleQueue[Done], folder: Path, options: RunOptions, ledger: Ledger
) -> Crew:
    from agentkd.crew import ThreadCrew
    from agentkd.processes import ProcessCrew

    where = folder if options.log_calls else None
    settings: dict[str, Any] = {"fsync": options.fsync, "max_seconds": options.max_seconds}
    if options.processes == 1:
        return ThreadCrew(seats, ready, where, ledger=ledger, **settings)
    return ProcessCrew(options.processes, seats, ready, where, ledger=ledger, **settings)


class _Run:
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
        self.ready: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self.finished = finished_rollouts(out)
        past = self._read_log() if options.log_calls else {}
        works = [
            Work(task, sample, past=past.get(f"{task.id}#{sample}", Past()))
            for task in tasks
            for sample in range(options.samples)
        ]
        self.wanted: Sequence[Work] = works
        # All first samples before any second one, so that enough correct ones can spare the others.
        self.todo = deque(
            sorted((w for w in works if w.id not in self.finished), key=lambda work: work.sample)
        )
        kept = [self.finished[work.id] for work in works if work.id in self.finished]
        self.correct = Counter(item.task.id for item in kept if item.correct)
        self.done, self.total = len(kept), len(works)
        self.all_correct = sum(self.correct.values())
        self.finished_now = 0
        self.failed: dict[str, Trajectory] = {}
        self.retried: dict[str, Trajectory] = {}
        self.open = 0
        self.in_a_row = 0
        self.stopped: str | None = None
        self.latest: Trajectory | None = None
        self.problem = ""
        self.began = time.monotonic()
        self._synced_at = self.began

    def _read_log(self) -> dict[str, Past]:
        """What unfinished rollouts have behind them; the ledger learns what all calls have cost."""
        return read_past(_counted(self.out.parent, self.ledger), frozenset(self.finished))

    def work(self, crew: Crew, workers: int) -> None:
        """Hand out all work and take all results."""
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
                    if done.trajectory is not None and not done.trajectory.stop_reason.is_error:
                        self._take(done)
            raise
        finally:
            crew.close()

    def _fill(self, crew: Crew) -> None:
        if self.todo and self.stopped is None:
            self.stopped = self.ledger.reached()
        while self.todo and self.stopped is None and self.open < crew.capacity:
            work = self.todo.popleft()
            if self.options.enough is not None and self.correct[work.task.id] >= self.options.enough:
                self.total -= 1
                continue
            self.open += 1
            crew.submit(work)

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
                seconds=time.monotonic() - self.began,
                problem=self.problem,
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
