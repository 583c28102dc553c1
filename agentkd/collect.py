"""Collection: a teacher solves tasks and leaves trajectories.

A run is a folder: ``tasks.jsonl``, ``passages.jsonl`` where there is a corpus,
``trajectories.jsonl`` (append-only, finished rollouts), ``errors.jsonl`` (rollouts whose last
try ended by an error) and ``manifest.json``, which closes it. A run that was stopped goes on
where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.errors import ConfigError, DataError
from agentkd.model import check_endpoint
from agentkd.record import iter_jsonl, load_tasks, read_json, write_json, write_jsonl, write_manifest
from agentkd.retrieval import Passage
from agentkd.rollout import Progress, run_rollouts
from agentkd.scorer import check_scorers
from agentkd.shard import Shard
from agentkd.task import Task
from agentkd.taskset import load_taskset
from agentkd.trajectory import Trajectory

__all__ = ["CollectConfig", "Collected", "collect"]


class CollectConfig(BaseModel):
    """Settings of a collection run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: str
    """Taskset, for instance "gym:products+almanac:hops=2" or "tasks.jsonl"."""
    split: str = "train"
    n: int | None = Field(default=None, ge=1)
    """Tasks; all of a finite set by default."""
    seed: int = 0
    agent: AgentConfig = AgentConfig()
    corpus: Path | None = None
    """JSON Lines of {"id", "title", "text"} for the search tool; the taskset's own by default."""
    samples: int = Field(default=1, ge=1)
    """Rollouts of each task."""
    workers: int = Field(default=16, ge=1)
    """Rollouts in flight."""
    shard: str | None = None
    """Only this part of the tasks, as in "2/8"; the other parts are other runs, see agentkd.merge."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Kept in every record, for instance who the teacher is."""


class Collected(NamedTuple):
    """What a collection run left."""

    folder: Path
    trajectories: list[Trajectory]
    wanted: int

    @property
    def missing(self) -> int:
        """Rollouts that only ended by errors; the same command tries them again."""
        return self.wanted - len(self.trajectories)


def collect(
    config: CollectConfig, out: Path, on_progress: Callable[[Progress], None] | None = None
) -> Collected:
    """Collect trajectories into the folder ``out``; goes on where an earlier run stopped.

    Raises:
        ConfigError: a setting is wrong, or ``out`` holds a run of other tasks.
        ProviderError: the endpoint is dead or keeps failing; finished work is kept.
    """
    if config.agent.api_base is None:
        raise ConfigError(
            "No endpoint was given.", "Pass --api-base http://HOST:PORT/v1, or --teacher expert."
        )
    if config.agent.kind == "agent":
        from agentkd.sandbox import open_sandbox

        open_sandbox(config.agent.sandbox)  # raises what is missing before anything is written
    every, passages = _inputs(config, out)
    tasks = Shard.parse(config.shard).take(every) if config.shard else every
    log = out / "trajectories.jsonl"
    wanted = len(tasks) * config.samples
    tools = search_tools(passages, config.agent.search_k)
    check_scorers(tasks)
    if _finished(log) < wanted:
        check_endpoint(config.agent.api_base, config.agent.model, config.agent.api_key)
    _begin(config, out, every, passages)  # only now: a mistake above must not bind the folder to it
    trajectories = run_rollouts(
        tasks,
        agent_factory(config.agent, tools),
        log,
        workers=config.workers,
        samples=config.samples,
        max_seconds=config.agent.max_seconds,
        config=config.agent.model_dump(mode="json"),
        labels=config.labels,
        on_progress=on_progress,
    )
    correct = sum(trajectory.correct for trajectory in trajectories)
    counts = {"wanted": wanted, "finished": len(trajectories), "correct": correct}
    write_manifest(
        out,
        stage="collect",
        config=config.model_dump(mode="json"),
        counts=counts,
        inputs=[out / "tasks.jsonl"],
        outputs=[log],
    )
    return Collected(out, trajectories, wanted)


def _finished(log: Path) -> int:
    if not log.is_file():
        return 0
    with log.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def _inputs(config: CollectConfig, out: Path) -> tuple[Sequence[Task], Sequence[Passage]]:
    """The run's tasks and passages, compared with those of the first start."""
    taskset = load_taskset(config.tasks, config.split, config.n, config.seed)
    if not taskset.tasks:
        raise DataError(f"The taskset {config.tasks!r} has no tasks.", "Check --tasks, --split and --n.")
    stored = out / "tasks.jsonl"
    if stored.is_file() and (theirs := load_tasks(stored)) != list(taskset.tasks):
        raise ConfigError(
            f"{out} holds a run of other tasks ({len(theirs)} of them, {len(taskset.tasks)} asked for).",
            "Choose another --out, or give the settings of that run.",
        )
    _same_agent(out, config)
    passages: Sequence[Passage] = taskset.passages
    if config.corpus is not None:
        passages = list(iter_jsonl(config.corpus, Passage))
    if stored.is_file() and _passages(out) != list(passages):
        raise ConfigError(
            f"{out} holds a run with another corpus.", "Choose another --out, or give that corpus."
        )
    return taskset.tasks, passages


def _passages(out: Path) -> list[Passage]:
    path = out / "passages.jsonl"
    return list(iter_jsonl(path, Passage)) if path.is_file() else []


def _begin(config: CollectConfig, out: Path, tasks: Sequence[Task], passages: Sequence[Passage]) -> None:
    """Write what later starts are compared with; the tasks last."""
    if not (out / "config.json").is_file():
        write_json(out / "config.json", _settings(config))
    if passages:
        write_jsonl(out / "passages.jsonl", passages)
    write_jsonl(out / "tasks.jsonl", tasks)


def _settings(config: CollectConfig) -> dict[str, Any]:
    """The settings of a run, without those that may change when it goes on."""
    settings: dict[str, Any] = config.model_dump(mode="json")
    settings.pop("workers")
    settings["agent"].pop("api_base")  # the same model may be served elsewhere now
    settings["agent"].pop("timeout")
    return settings


def _same_agent(out: Path, config: CollectConfig) -> None:
    """A run is made by one agent: going on with another one would mix two teachers unseen."""
    path, settings = out / "config.json", _settings(config)
    if path.is_file():
        theirs = read_json(path)
        if theirs.get("shard") != settings["shard"]:
            raise ConfigError(
                f"{out} holds the shard {theirs.get('shard') or 'of all tasks'}.",
                "Give each shard its own --out.",
            )
        changed = sorted(
            key for key in settings["agent"] if theirs["agent"].get(key) != settings["agent"][key]
        )
        if changed:
            raise ConfigError(
                f"{out} was begun with other settings of the agent ({', '.join(changed)}).",
                "Choose another --out, or give the settings of that run.",
            )
