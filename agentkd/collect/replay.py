"""Replay: a run's trajectories once more, from its log alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.calls import Call, Past, iter_calls, read_past
from agentkd.collect.folder import has_corpus
from agentkd.errors import ConfigError, DataError
from agentkd.first_thought import FirstThoughts, load_first_thoughts
from agentkd.record import load_tasks, read_json, write_jsonl, write_manifest
from agentkd.recorder import CannotContinue, Recorder
from agentkd.retrieval import Hit
from agentkd.rollout import rollout
from agentkd.task import Task
from agentkd.trajectory import Trajectory

if TYPE_CHECKING:
    from smolagents import Tool

__all__ = ["Replayed", "replay"]


class _Unasked:
    """Stands where the run had something to search: the log has the results."""

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        raise CannotContinue("a replay does not search")


class Replayed(NamedTuple):
    """What a log gave."""

    folder: Path
    trajectories: list[Trajectory]
    unfinished: int
    """Rollouts that the log has only in part."""


def replay(
    source: Path | str, out: Path | str, on_progress: Callable[[int, int], None] | None = None
) -> Replayed:
    """Rebuild the trajectories of the run in ``source`` into ``out``.

    No endpoint is asked, no tool is used and no code runs: everything comes from the call log. The
    result equals the run's own trajectories but for times and order.

    Args:
        source: a run folder.
        out: another folder.
        on_progress: told of (done, all).

    Raises:
        ConfigError: ``out`` is ``source``.
        DataError: ``source`` holds no run, or no call log.
    """
    source, out = Path(source), Path(out)
    if out.resolve() == source.resolve():
        raise ConfigError("A replay needs a folder of its own.", "Choose another --out.")
    tasks = {task.id: task for task in load_tasks(source / "tasks.jsonl")}
    pasts = read_past(iter_calls(source))
    if not pasts:
        raise DataError(
            f"{source} has no call log.", "Only runs that were collected with one can be replayed."
        )
    agent = AgentConfig.model_validate(read_json(source / "config.json")["agent"])
    tools = search_tools(_Unasked() if has_corpus(source) else None, agent)
    thoughts = load_first_thoughts(source)
    found, unfinished = [], 0
    for number, (name, past) in enumerate(sorted(pasts.items()), 1):
        task_id, _, sample = name.rpartition("#")
        trajectory = (
            _rebuild(tasks[task_id], int(sample), past, tools, thoughts) if task_id in tasks else None
        )
        if trajectory is None:
            unfinished += 1
        else:
            found.append(trajectory)
        if on_progress is not None:
            on_progress(number, len(pasts))
    order = {task_id: number for number, task_id in enumerate(tasks)}
    found.sort(key=lambda item: (order[item.task.id], item.sample))
    write_jsonl(out / "tasks.jsonl", tasks.values())
    write_jsonl(out / "trajectories.jsonl", found)
    counts = {
        "finished": len(found),
        "unfinished": unfinished,
        "correct": sum(item.correct for item in found),
    }
    write_manifest(
        out,
        stage="replay",
        config=read_json(source / "config.json"),
        counts=counts,
        inputs=sorted(source.glob("calls-*.jsonl")),
        outputs=[out / "trajectories.jsonl"],
    )
    return Replayed(out, found, unfinished)


def _rebuild(
    task: Task, sample: int, past: Past, tools: Sequence[Tool], thoughts: FirstThoughts | None
) -> Trajectory | None:
    """The trajectory, or None when the log has only a part of it."""
    if past.begun is None:
        return None
    settings = past.begun.answer
    recorder = Recorder(f"{task.id}#{sample}", _write_nothing, past, replay=True)
    # Nobody listens there, and the sandbox is never opened.
    nowhere = {**settings["config"], "api_base": "http://replay.invalid/v1", "sandbox": "local"}
    make = agent_factory(AgentConfig.model_validate(nowhere), tools)
    agent = (thoughts.give(make) if thoughts is not None else make)(task, sample)
    try:
        trajectory = rollout(agent, task, sample=sample, recorder=recorder, **settings)
    except CannotContinue:
        return None
    return None if trajectory.stop_reason.is_error else trajectory


def _write_nothing(call: Call, wait: bool) -> None:
    raise AssertionError("a replay makes no calls")
