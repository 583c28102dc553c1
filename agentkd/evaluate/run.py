"""Running a system on held-out tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.errors import ConfigError, ProviderError
from agentkd.evaluate.figures import SystemResult, summarise
from agentkd.record import load_tasks, write_json, write_jsonl, write_manifest
from agentkd.retrieval import Retriever
from agentkd.rollouts import Progress, finished_rollouts, run_rollouts
from agentkd.task import Task
from agentkd.trajectory import Trajectory

__all__ = ["run_evaluation"]


def run_evaluation(
    label: str,
    tasks: Sequence[Task],
    system: Callable[[], AbstractContextManager[tuple[AgentConfig, Any]]],
    out: Path,
    *,
    retriever: Retriever | None = None,
    workers: int = 32,
    groups: Mapping[str, Sequence[str]] | None = None,
    same: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[SystemResult, list[Trajectory]]:
    """Run a system on tasks, by the same rollout as everywhere; goes on where it stopped.

    Args:
        label: what the system is called.
        tasks: what it is tested on.
        system: opens the system: its settings and its model (None: the endpoint in the settings).
            It is not opened when nothing is left to run.
        out: folder for ``trajectories.jsonl``, ``result.json`` and ``manifest.json``.
        retriever: what the search tool searches.
        workers: rollouts in flight.
        groups: see :func:`summarise`.
        same: settings of the agent that what stands in ``out`` must have been made with.

    Raises:
        ConfigError: ``out`` holds an evaluation on other tasks, or with other settings.
        ProviderError: some rollouts ended by errors; what is finished is kept.
    """
    stored, log = out / "tasks.jsonl", out / "trajectories.jsonl"
    if stored.is_file() and load_tasks(stored) != list(tasks):
        raise ConfigError(f"{out} holds an evaluation on other tasks.", "Choose another --out.")
    write_jsonl(stored, tasks)
    known = finished_rollouts(log)
    trajectories = [known[key] for task in tasks if (key := f"{task.id}#0") in known]
    for name, value in (same or {}).items():
        if any(run.config.get(name) != value for run in trajectories):
            raise ConfigError(f"{out} holds an evaluation with another {name}.", "Choose another --out.")
    if len(trajectories) < len(tasks):
        with system() as (config, model):
            factory = agent_factory(config, search_tools(retriever, config), model)
            settings = config.model_dump(mode="json")
            trajectories = run_rollouts(
                tasks,
                factory,
                log,
                workers=workers,
                config=settings,
                log_calls=model is None,  # a model in this process costs nothing to ask again
                on_progress=on_progress,
            )
    if len(trajectories) < len(tasks):
        raise ProviderError(
            f"{len(tasks) - len(trajectories)} of {len(tasks)} rollouts ended by errors.",
            f"See {out / 'errors.jsonl'}; run the same command again to try them again.",
        )
    result = summarise(label, trajectories, groups)
    write_json(out / "result.json", result.model_dump(mode="json"))
    counts = {"n": result.overall.n, "correct": result.overall.correct}
    settings = trajectories[0].config if trajectories else {}
    write_manifest(out, stage="evaluate", config=settings, counts=counts, inputs=[stored], outputs=[log])
    return result, trajectories
