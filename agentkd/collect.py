"""Collection: a teacher solves tasks and leaves trajectories.

A run is a folder: ``tasks.jsonl``, ``corpus.json`` (what is searched; and ``passages.jsonl`` with it,
where the passages were in memory),
``trajectories.jsonl`` (append-only, finished rollouts), ``errors.jsonl`` (rollouts whose last
try ended by an error) and ``manifest.json``, which closes it. A run that was stopped goes on
where it stopped. With first thoughts there is a folder ``first-thought/`` in it, see
:mod:`agentkd.first_thought`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.errors import ConfigError, DataError
from agentkd.first_thought import (
    FirstThoughtConfig,
    FirstThoughts,
    collect_first_thoughts,
    load_first_thoughts,
)
from agentkd.model import check_endpoint
from agentkd.record import iter_jsonl, load_tasks, read_json, write_json, write_jsonl, write_manifest
from agentkd.retrieval import Passage
from agentkd.retrieval.source import Corpus, open_corpus
from agentkd.rollout import Progress, run_rollouts
from agentkd.scorer import check_scorers
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
    first_thought: FirstThoughtConfig | None = None
    """Begin each agent's first step with the first thought of a chain of thought; None: do not."""
    corpus: str | Path | None = None
    """What the search tool searches: JSON Lines of {"id", "title", "text"}, the folder of an index, or the
    URL of a retriever; the taskset's own passages by default."""
    samples: int = Field(default=1, ge=1)
    """Rollouts of each task."""
    workers: int = Field(default=16, ge=1)
    """Rollouts in flight."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Kept in every record, for instance who the teacher is."""


class Collected(NamedTuple):
    """What a collection run left."""

    folder: Path
    trajectories: list[Trajectory]
    wanted: int
    first_thoughts: FirstThoughts | None = None

    @property
    def missing(self) -> int:
        """Rollouts that only ended by errors; the same command tries them again."""
        return self.wanted - len(self.trajectories)


def collect(
    config: CollectConfig,
    out: Path,
    on_progress: Callable[[Progress], None] | None = None,
    on_first_thought: Callable[[Progress], None] | None = None,
) -> Collected:
    """Collect trajectories into the folder ``out``; goes on where an earlier run stopped.

    Args:
        config: settings.
        out: the run's folder.
        on_progress: told of each rollout.
        on_first_thought: told of each chain of thought that first thoughts are taken from.

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
    elif config.first_thought is not None:
        raise ConfigError(
            "A chain of thought has no first step to begin.", "Use first thoughts with --kind agent."
        )
    tasks, corpus = _inputs(config, out)
    log = out / "trajectories.jsonl"
    wanted = len(tasks) * config.samples
    tools = search_tools(corpus.retriever, config.agent)
    check_scorers(tasks)
    if _finished(log) < wanted:
        check_endpoint(config.agent.api_base, config.agent.model, config.agent.api_key)
    _begin(config, out, tasks, corpus)  # only now: a mistake above must not bind the folder to it
    make_agent = agent_factory(config.agent, tools)
    thoughts = _first_thoughts(config, tasks, out, _finished(log) < wanted, on_first_thought)
    if thoughts is not None:
        make_agent = thoughts.give(make_agent)
        # A task whose chain of thought ended by an error waits for the next start.
        tasks = [task for task in tasks if task.id in thoughts.lines]
    trajectories = run_rollouts(
        tasks,
        make_agent,
        log,
        workers=config.workers,
        samples=config.samples,
        max_seconds=config.agent.max_seconds,
        config=config.agent.model_dump(mode="json"),
        labels=config.labels,
        on_progress=on_progress,
    )
    correct = sum(trajectory.correct for trajectory in trajectories)
    counts: dict[str, Any] = {"wanted": wanted, "finished": len(trajectories), "correct": correct}
    if thoughts is not None:
        counts["first_thoughts"] = thoughts.counts()
    write_manifest(
        out,
        stage="collect",
        config=config.model_dump(mode="json"),
        counts=counts,
        inputs=[out / "tasks.jsonl"],
        outputs=[log],
    )
    return Collected(out, trajectories, wanted, thoughts)


def _first_thoughts(
    config: CollectConfig,
    tasks: Sequence[Task],
    out: Path,
    unfinished: bool,
    on_progress: Callable[[Progress], None] | None,
) -> FirstThoughts | None:
    if config.first_thought is None:
        return None
    if not unfinished and (known := load_first_thoughts(out)) is not None:
        return known

    def run(tasks: Sequence[Task], agent: AgentConfig, log: Path) -> None:
        run_rollouts(
            tasks,
            agent_factory(agent),
            log,
            workers=config.workers,
            max_seconds=agent.max_seconds,
            config=agent.model_dump(mode="json"),
            labels=config.labels,
            on_progress=on_progress,
        )

    return collect_first_thoughts(tasks, [config.agent], config.first_thought, out, run)


def _finished(log: Path) -> int:
    if not log.is_file():
        return 0
    with log.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def _inputs(config: CollectConfig, out: Path) -> tuple[Sequence[Task], Corpus]:
    """The run's tasks and corpus, compared with those of the first start."""
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
    corpus = open_corpus(config.corpus, taskset.passages)
    if stored.is_file() and _corpus_identity(out) != corpus.identity:
        raise ConfigError(
            f"{out} holds a run with another corpus.", "Choose another --out, or give that corpus."
        )
    return taskset.tasks, corpus


def _corpus_identity(out: Path) -> str:
    path = out / "corpus.json"
    if path.is_file():
        return str(read_json(path)["identity"])
    passages = out / "passages.jsonl"  # of a run that has no corpus.json
    return open_corpus(None, list(iter_jsonl(passages, Passage)) if passages.is_file() else ()).identity


def _begin(config: CollectConfig, out: Path, tasks: Sequence[Task], corpus: Corpus) -> None:
    """Write what later starts are compared with; the tasks last."""
    if not (out / "config.json").is_file():
        write_json(out / "config.json", _settings(config))
    if corpus.passages:
        write_jsonl(out / "passages.jsonl", corpus.passages)
    source = None if config.corpus is None else str(config.corpus)
    write_json(out / "corpus.json", {"source": source, "identity": corpus.identity})
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
        changed = sorted(
            key for key in settings["agent"] if theirs["agent"].get(key) != settings["agent"][key]
        )
        if theirs.get("first_thought") != settings["first_thought"]:
            changed.append("first_thought")
        if changed:
            raise ConfigError(
                f"{out} was begun with other settings of the agent ({', '.join(changed)}).",
                "Choose another --out, or give the settings of that run.",
            )
