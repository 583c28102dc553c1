"""Where collection's CPU time and memory go; part of ``collect.py``, which prints what is measured here."""

from __future__ import annotations

import cProfile
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sandbox import Meter, children

__all__ = ["PeakMemory", "Profile", "import_cost", "profile"]

PARTS = {
    "agentkd/sandbox": "sandbox, this side",
    "agentkd/record": "log",
    "agentkd/calls": "log",
    "agentkd": "agent and rollout",
    "smolagents": "smolagents",
    "openai": "client",
    "httpx": "client",
    "httpcore": "client",
    "h11": "client",
    "anyio": "client",
    "pydantic": "pydantic",
}
"""Who a source file belongs to; the first that fits."""

CODES = ("total_{0} = sum(i * i for i in range(10))\nprint('total', total_{0})", "final_answer(385)")


class Cost(NamedTuple):
    """CPU-ms of one thing."""

    host: float
    """In the process that runs the rollouts."""
    sandbox: float
    """In zygote and sessions."""

    @property
    def all(self) -> float:
        return self.host + self.sandbox


class Profile(NamedTuple):
    """CPU-ms; rollouts run one after the other."""

    step: Cost
    """A step without its session's start and end: all of it."""
    action: Cost
    """Of it what the sandbox costs."""
    session: Cost
    """The start and end of one session."""
    parts: dict[str, float]
    """Of the host's share of a step, session included, by who wrote the code; profiled, so too high."""
    how: str
    """How CPU time was read."""


def profile(n: int, steps: int, url: str, sandbox: str, answer: str) -> Profile:
    """Measure rollouts against an endpoint without latency, and sessions without rollouts.

    Args:
        n: rollouts, and sessions of each length.
        steps: actions of a rollout.
        url: of the mock endpoint.
        sandbox: the backend.
        answer: what is right.
    """
    from agentkd.sandbox import start_sandbox

    meter = Meter()  # before anything is started whose time is to be counted
    try:
        start_sandbox(sandbox)
        with tempfile.TemporaryDirectory() as folder:
            roll = _roller(Path(folder), url, sandbox, answer)
            for _ in range(3):  # by now everything is imported
                roll()
                _session(sandbox, 2)
            whole = _cost(meter, roll, n)
            short = _cost(meter, lambda: _session(sandbox, 1), n)
            long = _cost(meter, lambda: _session(sandbox, 3), n)
            profiler = cProfile.Profile(time.process_time)
            profiler.enable()
            for _ in range(n):
                roll()
            profiler.disable()
    finally:
        meter.close()
    action = Cost((long.host - short.host) / 2, (long.sandbox - short.sandbox) / 2)
    session = Cost(short.host - action.host, short.sandbox - action.sandbox)
    step = Cost((whole.host - session.host) / steps, (whole.sandbox - session.sandbox) / steps)
    return Profile(step, action, session, _parts(profiler, n * steps), meter.how)


def _cost(meter: Meter, do: Callable[[], None], times: int) -> Cost:
    every, host = meter.seconds(), time.process_time()
    for _ in range(times):
        do()
    host, every = time.process_time() - host, meter.seconds() - every
    return Cost(1000 * host / times, 1000 * max(0.0, every - host) / times)


def _session(sandbox: str, actions: int) -> None:
    from agentkd.sandbox import open_sandbox

    session = open_sandbox(sandbox)
    session.send_tools({})
    for number in range(actions):
        session(CODES[0].format(number))
    session.cleanup()


def _roller(folder: Path, url: str, sandbox: str, answer: str) -> Callable[[], None]:
    """A function that runs one rollout, with its log, as a worker does."""
    from agentkd.agent_config import AgentConfig, agent_factory
    from agentkd.gate import Gate, GateConfig
    from agentkd.model import fault_of
    from agentkd.record import AppendLog
    from agentkd.recorder import Recorder
    from agentkd.rollout import rollout
    from agentkd.task import Task

    config = AgentConfig(model="mock", api_base=url, sandbox=sandbox)
    factory = agent_factory(config, gate=Gate(GateConfig(), fault_of))
    calls, done = AppendLog(folder / "calls-0.jsonl"), AppendLog(folder / "trajectories.jsonl", fsync=False)
    number = 0

    def roll() -> None:
        nonlocal number
        number += 1
        task = Task(id=str(number), question=f"question {number}", answer=answer)
        agent = factory(task, 0)
        recorder = Recorder(f"{task.id}#0", lambda call, wait: calls.append(call, wait=wait))
        try:
            done.append(rollout(agent, task, recorder=recorder))
        finally:
            agent.cleanup()

    return roll


def _parts(profiler: cProfile.Profile, steps: int) -> dict[str, float]:
    def part(file: str) -> str:
        return next((name for path, name in PARTS.items() if f"/{path}" in file), "standard library")

    spent: dict[str, float] = {}
    stats: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    for (file, _, _), (_, _, own, _, callers) in stats.items():
        # What is written in C belongs to the one that called it.
        shares = (
            [(caller[0], numbers[2]) for caller, numbers in callers.items()] if file == "~" else [(file, own)]
        )
        for owner, seconds in shares:
            spent[part(owner)] = spent.get(part(owner), 0.0) + 1000 * seconds / steps
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


class PeakMemory:
    """The most memory that a process and all that it has started held at one time, as far as samples tell.

    Args:
        pid: of the process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_mb = 0.0
        self.processes = 0
        """At the time of the peak."""

    def sample(self) -> None:
        """Look once; it takes some milliseconds for each process."""
        pids = [self.pid, *children(self.pid)]
        megabytes = sum(map(_megabytes, pids))
        if megabytes > self.peak_mb:
            self.peak_mb, self.processes = megabytes, len(pids)


def _megabytes(pid: int) -> float:
    """Proportional set size; where that may not be read, what the process has for itself."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    except OSError:
        pass
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return 0.0  # it has ended
    return (resident - shared) * resource.getpagesize() / 2**20


def import_cost() -> dict[str, float]:
    """CPU-ms of starting Python and importing what a collector needs; of smolagents and openai alone."""
    both = {
        "import_ms": "import agentkd.collect, agentkd.agent",
        "import_ms_smolagents": "import smolagents, openai",
    }
    costs: dict[str, float] = {}
    for name, statement in both.items():
        times = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", statement], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        costs[name] = 1000 * statistics.median(times)
    return costs
