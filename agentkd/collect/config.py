"""Settings of a collection run."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentkd.agent_config import AgentConfig
from agentkd.errors import ConfigError, boundary, first_problem
from agentkd.first_thought import FirstThoughtConfig
from agentkd.gate import GateConfig
from agentkd.rollouts import RunOptions
from agentkd.shard import Shard
from agentkd.spend import Budget, Price
from agentkd.task import Task

__all__ = ["CollectConfig", "TeacherConfig", "default_processes", "load_teachers"]

_EXAMPLE = 'Write [[teachers]], then model = "NAME" and api_base = "http://HOST:PORT/v1".'


def default_processes(workers: int) -> int:
    """Processes that so many rollouts in flight are divided among.

    One process keeps up with a hundred as long as it has a core. Sandboxes take several times the time that
    it does, so that on fewer than four cores a second process only costs its start.
    """
    return max(1, min((os.cpu_count() or 1) // 2, workers // 96))


class TeacherConfig(BaseModel):
    """One more endpoint of a run, with the same or another model. The prompt and the tools are the run's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Model id, as the endpoint lists it."""
    api_base: str
    """URL of an OpenAI-compatible endpoint, ending in /v1."""
    api_key: str | None = Field(default=None, exclude=True, repr=False)
    """Bearer token; never written anywhere."""
    workers: int | None = Field(default=None, ge=1)
    """Rollouts in flight with this teacher; as many as with the first by default."""
    gate: GateConfig = GateConfig()
    labels: dict[str, str] = Field(default_factory=dict)
    """Kept in the records of this teacher."""


def load_teachers(path: Path) -> tuple[TeacherConfig, ...]:
    """Read a file of teachers: TOML, one ``[[teachers]]`` each, with ``api_key_env`` for its key.

    Without that, ``OPENAI_API_KEY`` is sent to OpenAI alone, and nothing to anybody else.

    Raises:
        ConfigError: no such file, not TOML, a wrong or unknown setting (named), or a key that is not set.
    """
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.", "Check --endpoints.")
    with boundary(ConfigError, f"reading {path}"):
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("teachers", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: the teachers are no list of tables.", _EXAMPLE)
    if not rows:
        raise ConfigError(f"{path} names no teachers.", _EXAMPLE)
    return tuple(_teacher(f"{path}: teacher {number}", row) for number, row in enumerate(rows, 1))


def _teacher(where: str, row: dict[str, Any]) -> TeacherConfig:
    named = row.pop("api_key_env", None)
    if named is not None and not (isinstance(named, str) and os.environ.get(named)):
        raise ConfigError(f"{where}: the environment variable {named} is not set.", "Set it to the key.")
    try:
        teacher = TeacherConfig(**row)
    except ValidationError as exc:
        raise ConfigError(f"{where}: {first_problem(exc)}.", _EXAMPLE) from exc
    if teacher.api_key is not None:
        raise ConfigError(
            f"{where}: api_key: a key does not belong into a file.",
            'Put it into an environment variable, and write api_key_env = "ITS_NAME".',
        )
    if named is None and _is_openai(teacher.api_base):
        named = "OPENAI_API_KEY"
    return teacher.model_copy(update={"api_key": os.environ.get(named) if named else None})


def _is_openai(api_base: str) -> bool:
    """Whose key ``OPENAI_API_KEY`` is: other programs send it to nobody else without being told to."""
    try:
        host = urlsplit(api_base).hostname or ""
    except ValueError:  # no URL at all: the first call says so
        return False
    return host == "openai.com" or host.endswith(".openai.com")


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
    """JSON Lines of {"id", "title", "text"} for the search tool; the taskset's own by default."""
    samples: int = Field(default=1, ge=1)
    """Rollouts of each task, at most."""
    enough: int | None = Field(default=None, ge=1)
    """Correct rollouts of a task after which no further sample of it is begun, so that hard tasks get
    more samples than easy ones; None: all samples are run."""
    temperatures: tuple[float, ...] = ()
    """Of the samples of a task, in turn; the agent's own by default."""
    workers: int = Field(default=16, ge=1)
    """Rollouts in flight, with the first teacher."""
    processes: int = Field(default=1, ge=1)
    """Processes that divide the workers among them."""
    attempts: int = Field(default=2, ge=1)
    """Tries of a rollout that ends by an error, at each start."""
    gate: GateConfig = GateConfig()
    """Limits of the first teacher's endpoint."""
    teachers: tuple[TeacherConfig, ...] = ()
    """More endpoints; each takes the next rollout when it is free."""
    budget: Budget = Budget()
    prices: dict[str, Price] = Field(default_factory=dict)
    """By model id; published prices for the others, where there are any."""
    fsync: bool = True
    """Wait for the disk at each call."""
    shard: str | None = None
    """Only this part of the tasks, as in "2/8"; the other parts are other runs, see agentkd.merge."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Kept in every record, for instance who the teacher is."""

    def options(self) -> RunOptions:
        """What of it concerns the running of many rollouts."""
        return RunOptions(
            samples=self.samples,
            enough=self.enough,
            attempts=self.attempts,
            processes=self.processes,
            max_seconds=self.agent.max_seconds,
            fsync=self.fsync,
        )

    def everyone(self) -> tuple[TeacherConfig, ...]:
        """All teachers; the first is the agent's own endpoint.

        Raises:
            ConfigError: it has none.
        """
        if self.agent.api_base is None:
            raise ConfigError(
                "No endpoint was given.", "Pass --api-base http://HOST:PORT/v1, or --teacher expert."
            )
        first = TeacherConfig(
            model=self.agent.model,
            api_base=self.agent.api_base,
            api_key=self.agent.api_key,
            workers=self.workers,
            gate=self.gate,
        )
        return first, *self.teachers

    def agent_of(self, teacher: TeacherConfig) -> AgentConfig:
        """The agent with this teacher's model."""
        return self.agent.model_copy(
            update={"model": teacher.model, "api_base": teacher.api_base, "api_key": teacher.api_key}
        )

    def part(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """The tasks of this run's shard; all where it has none."""
        return Shard.parse(self.shard).take(tasks) if self.shard else tasks

    def lasting(self) -> dict[str, Any]:
        """The settings that decide what is collected: those a run must go on with."""
        agent = self.agent.model_dump(mode="json")
        agent.pop("api_base")  # the same model may be served elsewhere now
        agent.pop("timeout")
        return {
            "agent": agent,
            "teachers": sorted(teacher.model for teacher in self.teachers),
            "seed": self.seed,
            "temperatures": list(self.temperatures),
            "labels": self.labels,
            "shard": self.shard,
            "first_thought": self.first_thought.model_dump(mode="json") if self.first_thought else None,
        }
