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
from agentkd.spend import Price
from agentkd.task import Task
from agentkd.trajectory import Trajectory

__all__ = ["run_evaluation"]


def run_evaluation(
    label: str,
    tasks: Sequence[Task],
    system: Callable[[], AbstractContextManager[tuple[AgentConfig, Any]]],
    out: Path | str,
    *,
    retriever: Retriever | None = None,
    workers: int = 32,
    samples: int = 1,
    seed: int = 0,
    prices: Mapping[str, Price] | None = None,
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
        samples: runs of each task. Run ``i`` samples by the seed ``seed + i``, and the draws of a sampler
            by its own seed + ``i``: what more runs add changes nothing about the first.
        seed: of the first run.
        prices: by model id, for the cost of a task.
        groups: see :func:`summarise`.
        same: settings of the agent that what stands in ``out`` must have been made with.

    Raises:
        ConfigError: ``out`` holds an evaluation on other tasks, or with other settings.
        ProviderError: some rollouts ended by errors; what is finished is kept.
    """
    out = Path(out)
    stored, log = out / "tasks.jsonl", out / "trajectories.jsonl"
    if stored.is_file() and load_tasks(stored) != list(tasks):
        raise ConfigError(f"{out} holds an evaluation on other tasks.", "Choose another --out.")
    write_jsonl(stored, tasks)
    known = finished_rollouts(log)
    wanted = [f"{task.id}#{sample}" for task in tasks for sample in range(samples)]
    trajectories = [known[key] for key in wanted if key in known]
    _check_same(out, trajectories, same or {}, seed)
    if len(trajectories) < len(wanted):
        with system() as (config, model):
            factory = _seeded(config, search_tools(retriever, config), model, samples, seed)
            settings = config.model_dump(mode="json") | ({"seed": seed} if _samples(config) else {})
            trajectories = run_rollouts(
                tasks,
                factory,
                log,
                workers=workers,
                samples=samples,
                config=settings,
                log_calls=model is None,  # a model in this process costs nothing to ask again
                on_progress=on_progress,
            )
    if len(trajectories) < len(wanted):
        raise ProviderError(
            f"{len(wanted) - len(trajectories)} of {len(wanted)} rollouts ended by errors.",
            f"See {out / 'errors.jsonl'}; run the same command again to try them again.",
        )
    price = (prices or {}).get(trajectories[0].model) if trajectories else None
    result = summarise(label, trajectories, groups, price=price)
    write_json(out / "result.json", result.model_dump(mode="json"))
    counts = {"n": result.overall.n, "correct": result.overall.correct}
    settings = trajectories[0].config if trajectories else {}
    write_manifest(out, stage="evaluate", config=settings, counts=counts, inputs=[stored], outputs=[log])
    return result, trajectories


def _seeded(
    config: AgentConfig, tools: Sequence[Any], model: Any, samples: int, seed: int
) -> Callable[[Task, int], Any]:
    """The factory of agents; where they sample, each run has a random stream of its own.

    Raises:
        ConfigError: nothing is random, so that all runs would be the same.
    """
    if not _samples(config):
        if samples == 1:
            return agent_factory(config, tools, model)
        raise ConfigError(
            "At temperature 0 all runs of a task are the same.", "Pass --temperature 0.7, or --runs 1."
        )
    factories = []
    for number in range(samples):
        sampler = config.sampler
        if sampler is not None:
            first = seed if sampler.seed is None else sampler.seed
            sampler = sampler.model_copy(update={"seed": first + number})
        mine = config.model_copy(update={"sampler": sampler})
        factories.append(agent_factory(mine, tools, model, seed=seed + number))
    return lambda task, sample: factories[sample](task, sample)


def _samples(config: AgentConfig) -> bool:
    """Whether anything about its actions is random."""
    return config.temperature > 0 or config.sampler is not None


def _check_same(out: Path, runs: Sequence[Trajectory], same: Mapping[str, Any], seed: int) -> None:
    """What stands in a folder must have been made with the settings that are asked for now.

    Raises:
        ConfigError: it was not.
    """
    for run in runs:
        wanted = dict(same)
        if run.config.get("temperature") or run.config.get("sampler"):
            wanted["seed"] = seed
        for name, value in wanted.items():
            if run.config.get(name) != value:
                raise ConfigError(f"{out} holds an evaluation with another {name}.", "Choose another --out.")
