"""Easy or hard: does the student answer a question directly?

The student answers every question k times under the prompt without tools. A question is easy when at
least tau of the answers are right. Every decision is recorded with its evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from agentkd.adapt.config import AdaptConfig
from agentkd.agent_config import AgentConfig, agent_factory
from agentkd.errors import ProviderError
from agentkd.prompt import DIRECT
from agentkd.rollouts import Progress, finished_rollouts, run_rollouts
from agentkd.task import Task
from agentkd.tool_use import is_direct, used_tool
from agentkd.trajectory import Score, StopReason, Trajectory

__all__ = ["Answer", "Decision", "Respondent", "partition"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(_Record):
    """One direct answer of the student."""

    trajectory: str
    """Its id, in ``partition/trajectories.jsonl``."""
    answer: str | None
    score: Score | None
    stop_reason: StopReason
    direct: bool
    """Whether it was a lone ``final_answer(<literal>)``."""
    counts: bool
    """Whether it is right, and used none of what counts as a tool."""


class Decision(_Record):
    """Easy or hard, and why; one line of ``partition.jsonl``."""

    task_id: str
    question: str
    gold: str | None
    easy: bool
    accuracy: float
    """Share of the answers that count, 0 to 1."""
    tau: float
    answers: tuple[Answer, ...]


class Respondent(NamedTuple):
    """The student whose answers decide."""

    identity: dict[str, str]
    """What it is, for the record; a partition goes on with the same student only."""
    open: Callable[[AdaptConfig], AbstractContextManager[tuple[AgentConfig, Any]]]
    """Opens its settings and its model, which samples at the temperature and to the length of the given
    settings (None: the endpoint in the student's settings). It is not opened when nothing is left to ask."""


def partition(
    tasks: Sequence[Task],
    student: Respondent,
    folder: Path,
    config: AdaptConfig,
    *,
    workers: int = 32,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Decision]:
    """Ask the student every question directly, and decide.

    Every finished answer is on disk before the next is taken, so a run that was killed goes on behind it.

    Args:
        tasks: the training questions.
        student: who answers.
        folder: for ``trajectories.jsonl``: the answers.
        config: k, tau, temperature, and what counts as a tool.
        workers: questions in flight.
        on_progress: told of each answer.

    Raises:
        ProviderError: some answers ended by errors; what is finished is kept.
    """
    log = folder / "trajectories.jsonl"
    known = finished_rollouts(log)
    wanted = [f"{task.id}#{sample}" for task in tasks for sample in range(config.samples)]
    answers = [known[name] for name in wanted if name in known]
    if len(answers) < len(wanted):
        with student.open(config) as (agent, model):
            settings = agent.model_copy(
                update={
                    "prompt": DIRECT,
                    "max_steps": 1,
                    "sampler": None,
                    "router": None,
                    "temperature": config.temperature,
                    "max_tokens": config.max_tokens,
                }
            )
            answers = run_rollouts(
                tasks,
                agent_factory(settings, (), model),
                log,
                workers=workers,
                samples=config.samples,
                config=settings.model_dump(mode="json"),
                log_calls=model is None,
                on_progress=on_progress,
            )
    if len(answers) < len(wanted):
        raise ProviderError(
            f"{len(wanted) - len(answers)} of {len(wanted)} direct answers ended by errors.",
            f"See {folder / 'errors.jsonl'}; run the same command again to try them again.",
        )
    given: dict[str, list[Trajectory]] = {task.id: [] for task in tasks}
    for answer in answers:
        given[answer.task.id].append(answer)
    return [_decide(task, given[task.id], config) for task in tasks]


def _decide(task: Task, given: Sequence[Trajectory], config: AdaptConfig) -> Decision:
    answers = tuple(
        Answer(
            trajectory=item.id,
            answer=item.answer,
            score=item.score,
            stop_reason=item.stop_reason,
            direct=is_direct(item),
            counts=item.correct and not used_tool(item, config.tools),
        )
        for item in given
    )
    accuracy = sum(item.counts for item in answers) / len(answers)
    return Decision(
        task_id=task.id,
        question=task.question,
        gold=task.answer,
        easy=accuracy >= config.tau,
        accuracy=accuracy,
        tau=config.tau,
        answers=answers,
    )
