"""Running a collection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agentkd.agent_config import agent_factory, search_tools
from agentkd.collect.config import CollectConfig, TeacherConfig
from agentkd.collect.estimate import Estimate, estimate
from agentkd.collect.folder import RunLock, begin, check_inputs, stored_retriever
from agentkd.errors import ConfigError, ProviderError
from agentkd.first_thought import (
    FOLDER,
    FirstThoughts,
    collect_first_thoughts,
    first_thought_log,
    load_first_thoughts,
)
from agentkd.gate import Gate
from agentkd.model import check_endpoint, fault_of
from agentkd.record import write_manifest
from agentkd.rollouts import Progress, RunOptions, count_left, count_past, finished_rollouts, run_seats
from agentkd.sandbox import start_sandbox
from agentkd.scorer import check_scorers
from agentkd.spend import Ledger, Price, Spent, published_price
from agentkd.task import Task
from agentkd.trajectory import Trajectory

if TYPE_CHECKING:
    from agentkd.agent import StepAgent
    from agentkd.agent_config import AgentConfig
    from agentkd.crew import Outfit, Seat
    from agentkd.gate import GateConfig

__all__ = ["Collected", "collect", "count_faults", "expect", "price_table"]


class Collected(NamedTuple):
    """What a collection run left."""

    folder: Path
    trajectories: list[Trajectory]
    wanted: int
    """Rollouts asked for, without those that early stop spared."""
    spent: Spent = Spent()
    """Over all starts of the run."""
    unpriced: tuple[str, ...] = ()
    """Models without a price: they cost ``spent.seconds`` and are not in ``spent.cost``."""
    faults: dict[str, int] = {}
    """Failed calls of endpoints, and answers with impossible counts, over all starts, by what they were."""
    stopped: str | None = None
    """The limit that ended the run early, in words."""
    first_thoughts: FirstThoughts | None = None

    @property
    def missing(self) -> int:
        """Rollouts that ended by errors or were not begun; the same command goes on with them."""
        return self.wanted - len(self.trajectories)


def collect(
    config: CollectConfig,
    out: Path | str,
    on_progress: Callable[[Progress], None] | None = None,
    on_first_thought: Callable[[Progress], None] | None = None,
    ledger: Ledger | None = None,
) -> Collected:
    """Collect trajectories into the folder ``out``; goes on where an earlier run stopped.

    Args:
        config: settings.
        out: the run's folder.
        on_progress: told of each rollout.
        on_first_thought: told of each chain of thought that first thoughts are taken from.
        ledger: of a run that shares the budget with others; by default all of it is this run's.

    Raises:
        ConfigError: a setting is wrong, ``out`` holds another run, or another process is in it.
        ProviderError: all endpoints are dead or keep failing; finished work is kept.
        StorageError: the folder cannot be written.
    """
    out = Path(out)
    _check(config)
    with RunLock(out):
        every, corpus = check_inputs(config, out)
        tasks = config.part(every)
        check_scorers(tasks)
        prices = price_table(config)
        wanted = len(tasks) * config.samples
        unfinished = _unfinished(config, tasks, out / "trajectories.jsonl")
        if unfinished:
            _check_endpoints(config.everyone())
        begin(config, out, every, corpus)  # only now: a mistake above must not bind the folder to it
        ledger = ledger or Ledger(config.budget, prices)
        thoughts = _first_thoughts(config, tasks, out, unfinished, ledger, on_first_thought)
        if thoughts is not None:
            # A task whose chain of thought ended by an error waits for the next start.
            tasks = [task for task in tasks if task.id in thoughts.lines]
        result = run_seats(
            tasks,
            [_seat(config, teacher, out) for teacher in config.everyone()],
            out / "trajectories.jsonl",
            config.options(),
            ledger=ledger,
            on_progress=on_progress,
        )
        done = Collected(
            out,
            result.trajectories,
            result.wanted + wanted - len(tasks) * config.samples,
            result.spent,
            tuple(sorted({teacher.model for teacher in config.everyone()} - set(prices))),
            count_faults(out),
            result.stopped or (thoughts.stopped if thoughts is not None else None),
            thoughts,
        )
        _close(config, done)
    return done


def expect(config: CollectConfig, out: Path) -> Estimate:
    """What the rest of a run will cost; asks no endpoint and writes nothing.

    Raises:
        ConfigError: as :func:`collect`.
    """
    _check(config)
    tasks, _ = check_inputs(config, out)
    part, finished = config.part(tasks), finished_rollouts(out / "trajectories.jsonl")
    to_think = 0
    if config.first_thought is not None:
        to_think = max(0, len(part) - len(finished_rollouts(first_thought_log(out))))
    return estimate(config, part, price_table(config), list(finished.values()), to_think)


def _check(config: CollectConfig) -> None:
    config.everyone()  # raises that there is no endpoint
    if config.agent.kind == "agent":
        from agentkd.sandbox import open_sandbox

        open_sandbox(config.agent.sandbox)  # raises what is missing before anything is written
    elif config.first_thought is not None:
        raise ConfigError(
            "A chain of thought has no first step to begin.", "Use first thoughts with --kind agent."
        )


def price_table(config: CollectConfig) -> dict[str, Price]:
    """Prices by model id: the given ones, then published ones.

    Raises:
        ConfigError: a limit of money is set and a model has no price.
    """
    prices = dict(config.prices)
    for teacher in config.everyone():
        if teacher.model not in prices and (price := published_price(teacher.model, teacher.api_base)):
            prices[teacher.model] = price
    missing = sorted({teacher.model for teacher in config.everyone()} - set(prices))
    if missing and config.budget.max_cost is not None:
        raise ConfigError(
            f"There is no price for {', '.join(missing)}, so --max-cost cannot be kept.",
            "Give one in a table (--prices), or use --max-tokens or --max-hours.",
        )
    return prices


def _check_endpoints(teachers: Sequence[TeacherConfig]) -> None:
    """One living endpoint is enough to start.

    Raises:
        ProviderError: none answers.
    """
    problems = []
    for teacher in teachers:
        try:
            check_endpoint(teacher.api_base, teacher.model, teacher.api_key)
        except ProviderError as exc:
            problems.append(exc)
    if len(problems) == len(teachers):
        raise problems[0]


def _first_thoughts(
    config: CollectConfig,
    tasks: Sequence[Task],
    out: Path,
    unfinished: bool,
    ledger: Ledger,
    on_progress: Callable[[Progress], None] | None,
) -> FirstThoughts | None:
    if config.first_thought is None:
        return None
    if not unfinished and (known := load_first_thoughts(out)) is not None:
        count_past(out / FOLDER, ledger)
        return known
    count_past(out, ledger)  # before the pass spends anything of what is left
    teachers = config.everyone()

    def run(tasks: Sequence[Task], agent: AgentConfig, log: Path) -> str | None:
        seat = _seat(config, teachers[0], out)._replace(
            make_agent=_Agents(agent, teachers[0].gate, out, thinking=True),
            config=agent.model_dump(mode="json"),
            temperatures=(),
        )
        options = RunOptions(attempts=config.attempts, max_seconds=agent.max_seconds, fsync=config.fsync)
        return run_seats(tasks, [seat], log, options, ledger=ledger, on_progress=on_progress).stopped

    agents = [config.agent_of(teacher) for teacher in teachers]
    return collect_first_thoughts(tasks, agents, config.first_thought, out, run)


def _unfinished(config: CollectConfig, tasks: Sequence[Task], log: Path) -> bool:
    """Whether anything is left to do; a run that is finished needs no living endpoint."""
    if not log.is_file():
        return True
    if config.enough is not None:
        return count_left(tasks, finished_rollouts(log), config.samples, config.enough) > 0
    with log.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file) < len(tasks) * config.samples


def _seat(config: CollectConfig, teacher: TeacherConfig, out: Path) -> Seat:
    from agentkd.crew import Seat

    agent = config.agent_of(teacher)
    return Seat(
        _Agents(agent, teacher.gate, out, config.temperatures, given=config.first_thought is not None),
        teacher.workers or config.workers,
        teacher.model,
        agent.model_dump(mode="json"),
        {**config.labels, **teacher.labels},
        config.temperatures,
        (teacher.api_key,) if teacher.api_key else (),
    )


class _Agents:
    """Makes the agents of one teacher; can be sent to another process, and is opened there.

    Args:
        agent, gate, out, temperatures: of the run.
        given: whether their first step begins with a first thought.
        thinking: whether they have the chains of thought that those are taken from, without tools.
    """

    def __init__(
        self,
        agent: AgentConfig,
        gate: GateConfig,
        out: Path,
        temperatures: tuple[float, ...] = (),
        *,
        given: bool = False,
        thinking: bool = False,
    ) -> None:
        self.agent, self.gate, self.out, self.temperatures = agent, gate, out, temperatures
        self.given, self.thinking = given, thinking
        self._make: Callable[[Task, int], StepAgent] | None = None

    def open(self, outfit: Outfit) -> None:
        """Make what the agents of this process share: the tools, the connection and its gate."""
        name, model = str(self.agent.api_base), self.agent.model
        gate = Gate(
            self.gate.share(outfit.share),
            fault_of,
            name=name,
            on_fault=lambda fault, message, wait: outfit.on_fault(name, model, fault, message, wait),
            check=outfit.check,
            on_wait=lambda why, seconds: outfit.on_wait(name, why, seconds),
        )
        if self.agent.kind == "agent":
            start_sandbox(self.agent.sandbox, imports=self.agent.imports)  # before there are threads
        tools = [] if self.thinking else search_tools(stored_retriever(self.out), self.agent)
        make = agent_factory(self.agent, tools, gate=gate, temperatures=self.temperatures)
        thoughts = load_first_thoughts(self.out) if self.given else None
        self._make = thoughts.give(make) if thoughts is not None else make

    def __call__(self, task: Task, sample: int) -> StepAgent:
        assert self._make is not None, "open() comes first"
        return self._make(task, sample)


def count_faults(out: Path) -> dict[str, int]:
    """Failed calls of endpoints in all starts of a run, by what they were."""
    from agentkd.crew import iter_faults

    notes = (note for folder in (out, out / FOLDER) for note in iter_faults(folder))
    return dict(Counter(note.what for note in notes).most_common())


def _close(config: CollectConfig, done: Collected) -> None:
    usage = done.spent.usage
    counts: dict[str, Any] = {
        "wanted": done.wanted,
        "finished": len(done.trajectories),
        "correct": sum(trajectory.correct for trajectory in done.trajectories),
        "restarted": sum("restarted" in trajectory.labels for trajectory in done.trajectories),
        "calls": done.spent.calls,
        **usage.model_dump(),
        "model_seconds": round(done.spent.seconds, 1),
        "cost": None if done.unpriced else round(done.spent.cost, 6),
        "faults": done.faults,
        "stopped": done.stopped,
    }
    if done.first_thoughts is not None:
        counts["first_thoughts"] = done.first_thoughts.counts()
    write_manifest(
        done.folder,
        stage="collect",
        config=config.model_dump(mode="json"),
        counts=counts,
        inputs=[done.folder / "tasks.jsonl"],
        outputs=[done.folder / "trajectories.jsonl"],
    )
