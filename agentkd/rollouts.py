"""Many rollouts: a run that goes on where it stopped and makes no finished call twice.

:func:`run_rollouts` is the simple form, :func:`run_seats` the full one: several teachers, several
processes, limits of cost, early stop. Finished trajectories are appended to one file by the
process that runs this; calls are logged by whoever makes them (:mod:`agentkd.crew`).
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from agentkd.errors import AgentkdError, ProviderError, RetrievalError, SandboxError
from agentkd.record import AppendLog
from agentkd.running import Progress, Run, count_left, count_past, finished_rollouts
from agentkd.scorer import check_scorers
from agentkd.spend import Ledger, Spent
from agentkd.task import Task
from agentkd.trajectory import StopReason, Trajectory

if TYPE_CHECKING:
    from agentkd.agent import StepAgent
    from agentkd.crew import Crew, Done, Notice, Seat

__all__ = [
    "Progress",
    "RunOptions",
    "RunResult",
    "count_left",
    "count_past",
    "finished_rollouts",
    "run_rollouts",
    "run_seats",
]

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


class RunResult(NamedTuple):
    """What a run left."""

    trajectories: list[Trajectory]
    """All finished ones of the tasks, in the order of tasks and samples."""
    wanted: int
    """Rollouts that were to be finished; those spared by ``enough`` are not among them."""
    spent: Spent
    stopped: str | None
    """The limit that ended the run before all was done, in words."""


def run_rollouts(
    tasks: Sequence[Task],
    make_agent: Callable[[Task, int], StepAgent],
    out: Path | str,
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
    out = Path(out)
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
        run = Run(tasks, out, options, ledger, log, on_progress or (lambda progress: None))
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
    seats: Sequence[Seat],
    ready: queue.SimpleQueue[Done | Notice],
    folder: Path,
    options: RunOptions,
    ledger: Ledger,
) -> Crew:
    from agentkd.crew import ThreadCrew
    from agentkd.processes import ProcessCrew

    where = folder if options.log_calls else None
    settings: dict[str, Any] = {"fsync": options.fsync, "max_seconds": options.max_seconds}
    if options.processes == 1:
        return ThreadCrew(seats, ready, where, ledger=ledger, **settings)
    return ProcessCrew(options.processes, seats, ready, where, ledger=ledger, **settings)
