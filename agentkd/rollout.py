"""The rollout: one agent, one task, one trajectory. Everything uses this one loop.

:func:`rollout` runs one task; :func:`run_rollouts` runs many by worker threads into an
append-only file, and goes on where an earlier run stopped.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agentkd.errors import AgentkdError, ContextOverflowError, ProviderError, RetrievalError, SandboxError
from agentkd.record import AppendLog, provenance, read_trajectories
from agentkd.scorer import check_scorers, score
from agentkd.task import Task
from agentkd.tool import tool_schema
from agentkd.trajectory import Failure, StopReason, Trajectory, Usage, valid_text

if TYPE_CHECKING:
    from agentkd.agent import StepAgent

__all__ = ["Progress", "finished_rollouts", "rollout", "run_rollouts"]

GIVE_UP_AFTER = 10
"""Provider errors in a row, with nothing finished in between, before a run is given up."""

_ERRORS: dict[StopReason, type[AgentkdError]] = {
    StopReason.PROVIDER_ERROR: ProviderError,
    StopReason.SANDBOX_ERROR: SandboxError,
    StopReason.RETRIEVAL_ERROR: RetrievalError,
}


def rollout(
    agent: StepAgent,
    task: Task,
    *,
    sample: int = 0,
    max_seconds: float | None = None,
    config: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
) -> Trajectory:
    """Run one agent on one task. Never raises for a failed run: that is a stop reason.

    Args:
        agent: used for this run; its memory is reset, its sandbox session stays open.
        task: the question.
        sample: which of several runs of the same task this is.
        max_seconds: wall-clock limit, checked before every step.
        config: resolved settings to keep in the record.
        labels: free labels to keep in the record.
    """
    began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="milliseconds")
    agent.records = []
    agent.deadline = began + max_seconds if max_seconds is not None else None
    answer, reason, failure = _run(agent, task)
    if failure is not None:
        failure = failure.model_copy(update={"message": valid_text(failure.message)})
    trajectory = Trajectory(
        id=f"{task.id}#{sample}",
        task=task,
        kind=agent.kind,
        sample=sample,
        model=str(getattr(agent.model, "model_id", None) or type(agent.model).__name__),
        system_prompt=agent.system_prompt,
        tools=tuple(tool_schema(tool) for name, tool in agent.tools.items() if name != "final_answer"),
        steps=tuple(agent.records),
        answer=answer,
        stop_reason=reason,
        failure=failure,
        usage=sum((step.usage for step in agent.records), Usage()),
        seconds=time.monotonic() - began,
        started_at=started_at,
        config=config or {},
        labels=labels or {},
        **provenance(),
    )
    if reason.is_error:
        return trajectory
    return trajectory.model_copy(update={"score": score(task, answer)})


def _run(agent: StepAgent, task: Task) -> tuple[str | None, StopReason, Failure | None]:
    from smolagents.utils import AgentError

    from agentkd.agent import RolloutTimeout

    try:
        answer = agent.run(task.question)
    except ContextOverflowError as exc:
        return None, StopReason.CONTEXT_OVERFLOW, Failure(kind="provider", message=str(exc))
    except ProviderError as exc:
        return None, StopReason.PROVIDER_ERROR, Failure(kind="provider", message=str(exc))
    except SandboxError as exc:
        return None, StopReason.SANDBOX_ERROR, Failure(kind="sandbox", message=str(exc))
    except RetrievalError as exc:
        return None, StopReason.RETRIEVAL_ERROR, Failure(kind="retrieval", message=str(exc))
    except RolloutTimeout:
        return None, StopReason.TIMEOUT, None
    except Exception as exc:
        if isinstance(exc, AgentError) and agent.interrupt_switch:
            return None, StopReason.CANCELLED, None
        return (
            None,
            StopReason.INTERNAL_ERROR,
            Failure(kind="internal", message=f"{type(exc).__name__}: {exc}"),
        )
    text = None if answer is None else valid_text(str(answer))
    last = agent.records[-1] if agent.records else None
    if last is not None and last.is_final:
        return text, StopReason.FINAL_ANSWER, None
    if agent.kind == "cot":
        return None, StopReason.OUTPUT_LIMIT if _cut_off(last) else StopReason.NO_ANSWER, None
    return text, StopReason.MAX_STEPS, None


def _cut_off(last: Any) -> bool:
    return last is not None and last.finish_reason == "length"


def finished_rollouts(log: Path) -> dict[str, Trajectory]:
    """What stands in an append-only file already, by id; empty when there is none."""
    return {item.id: item for item in read_trajectories(log)} if log.is_file() else {}


class Progress(NamedTuple):
    """How far :func:`run_rollouts` is."""

    done: int
    """Finished rollouts, earlier runs included."""
    total: int
    correct: int
    errors: int
    """Rollouts that ended by an error and were not finished by a retry."""
    latest: Trajectory | None


class _Work(NamedTuple):
    task: Task
    sample: int
    attempt: int

    @property
    def id(self) -> str:
        return f"{self.task.id}#{self.sample}"


def run_rollouts(
    tasks: Sequence[Task],
    make_agent: Callable[[Task, int], StepAgent],
    out: Path,
    *,
    workers: int = 8,
    samples: int = 1,
    attempts: int = 2,
    max_seconds: float | None = None,
    config: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Trajectory]:
    """Run many rollouts by worker threads, each finished one appended durably to ``out``.

    What stands in ``out`` already is not run again. A rollout that ends by an error is not
    finished: it is tried ``attempts`` times, its last error goes to ``errors.jsonl`` beside
    ``out``, and the next run tries it again.

    Args:
        tasks: the questions.
        make_agent: makes the agent of ``(task, sample)``; called in the worker thread.
        out: ``trajectories.jsonl``.
        workers: rollouts in flight.
        samples: runs of each task.

    Returns:
        All finished trajectories of these tasks, in the order of tasks and samples.

    Raises:
        ProviderError: the endpoint failed many times in a row; finished work is kept.
        ConfigError: another process is writing ``out``, or a task names an unknown scorer.
    """
    check_scorers(tasks)
    runner = _Runner(make_agent, workers, attempts, max_seconds, config, labels)
    with AppendLog(out) as log:
        finished = finished_rollouts(out)
        wanted = [_Work(task, sample, 1) for task in tasks for sample in range(samples)]
        kept = [finished[work.id] for work in wanted if work.id in finished]
        todo = [work for work in wanted if work.id not in finished]
        progress = Progress(len(kept), len(wanted), sum(t.correct for t in kept), 0, None)
        if on_progress:
            on_progress(progress)
        failed: list[Trajectory] = []
        try:
            for trajectory in runner.run(todo):
                if trajectory.stop_reason.is_error:
                    failed.append(trajectory)
                    progress = progress._replace(errors=len(failed), latest=trajectory)
                else:
                    log.append(trajectory)
                    finished[trajectory.id] = trajectory
                    progress = progress._replace(
                        done=progress.done + 1,
                        correct=progress.correct + trajectory.correct,
                        latest=trajectory,
                    )
                if on_progress:
                    on_progress(progress)
        except (KeyboardInterrupt, ProviderError):
            for trajectory in runner.finished():
                if trajectory.id not in finished:
                    log.append(trajectory)
            raise
        _note_errors(out.with_name("errors.jsonl"), failed)
    if failed and progress.done == 0:
        last = failed[-1]
        error = _ERRORS.get(last.stop_reason, AgentkdError)
        raise error(
            f"No rollout finished; the last error: {last.failure.message if last.failure else 'cancelled'}",
            f"See {out.with_name('errors.jsonl')}, then run the same command again.",
        )
    return [finished[work.id] for work in wanted if work.id in finished]


def _note_errors(path: Path, failed: Sequence[Trajectory]) -> None:
    from agentkd.record import write_jsonl

    if failed:
        write_jsonl(path, failed)
    else:
        path.unlink(missing_ok=True)


class _Runner:
    """Worker threads around :func:`rollout`. They are daemons, so that Ctrl-C ends the process."""

    def __init__(
        self,
        make_agent: Callable[[Task, int], StepAgent],
        workers: int,
        attempts: int,
        max_seconds: float | None,
        config: dict[str, Any] | None,
        labels: dict[str, str] | None,
    ) -> None:
        self.make_agent = make_agent
        self.workers = workers
        self.attempts = attempts
        self.options: dict[str, Any] = {"max_seconds": max_seconds, "config": config, "labels": labels}
        self.todo: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[tuple[_Work, Trajectory | BaseException]] = queue.SimpleQueue()

    def run(self, works: Sequence[_Work]) -> Iterator[Trajectory]:
        """Yield each result once: finished ones, and errors that no retry mended."""
        for work in works:
            self.todo.put(work)
        threads = min(self.workers, len(works))
        for number in range(threads):
            threading.Thread(target=self._loop, name=f"rollout-{number}", daemon=True).start()
        open_count, in_a_row = len(works), 0
        try:
            while open_count:
                work, result = self._next()
                if isinstance(result, BaseException):
                    raise result
                broken = result.stop_reason == StopReason.PROVIDER_ERROR
                in_a_row = in_a_row + 1 if broken else 0
                if in_a_row >= max(GIVE_UP_AFTER, 2 * self.workers):
                    raise ProviderError(
                        f"The endpoint failed {in_a_row} times in a row: "
                        f"{result.failure.message if result.failure else ''}",
                        "What is finished is kept; run the same command again to go on.",
                    )
                if result.stop_reason.is_error and work.attempt < self.attempts:
                    self.todo.put(work._replace(attempt=work.attempt + 1))
                    continue
                open_count -= 1
                yield result
        finally:
            self._drain(threads)

    def _next(self) -> tuple[_Work, Trajectory | BaseException]:
        while True:
            try:
                return self.ready.get(timeout=0.5)  # a timeout, so that Ctrl-C is seen on every system
            except queue.Empty:
                continue

    def finished(self) -> Iterator[Trajectory]:
        """What was finished but not yet yielded when the run was broken off."""
        while not self.ready.empty():
            result = self.ready.get()[1]
            if isinstance(result, Trajectory) and not result.stop_reason.is_error:
                yield result

    def _drain(self, threads: int) -> None:
        try:
            while True:
                self.todo.get_nowait()
        except queue.Empty:
            pass
        for _ in range(threads):
            self.todo.put(None)

    def _loop(self) -> None:
        while (work := self.todo.get()) is not None:
            try:
                agent = self.make_agent(work.task, work.sample)
                try:
                    result: Trajectory | BaseException = rollout(
                        agent, work.task, sample=work.sample, **self.options
                    )
                finally:
                    agent.cleanup()
            except BaseException as exc:
                result = exc
            self.ready.put((work, result))
