"""What ``agentkd evaluate`` does: a student, a base model or an endpoint on a taskset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from agentkd.agent_config import AgentConfig
from agentkd.errors import ConfigError
from agentkd.evaluate import SystemResult, comparison_table, run_evaluation
from agentkd.evaluate.overlap import Overlap, overlaps
from agentkd.evaluate.routing import RoutingResult, compare_routers, routing_table, tuned_router
from agentkd.record import read_trajectories, write_json
from agentkd.retrieval.source import open_corpus
from agentkd.rollouts import Progress
from agentkd.router import RouterConfig, parse_router
from agentkd.sampler import SamplerConfig
from agentkd.spend import Price, load_prices, published_price
from agentkd.task import Task
from agentkd.taskset import load_taskset
from agentkd.test_time import TestTime, load_test_time, save_test_time
from agentkd.tool_use import check_tool_kind

__all__ = ["ALL_ROUTERS", "assess"]

ALL_ROUTERS = "all"
"""In place of a router's name: compare them."""


def assess(
    *,
    student: str | None,
    tasks: str,
    out: Path,
    n: int | None,
    split: str,
    seed: int,
    endpoint: _Endpoint,
    kind: str | None,
    sandbox: str,
    corpus: str | None,
    temperature: float,
    max_tokens: int,
    workers: int,
    actions: int | None,
    router: str | None,
    target_tokens: float | None,
    save: bool,
    tools: str | None = None,
    runs: int = 1,
    prices: Path | None = None,
    trained_on: Path | None = None,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[SystemResult | RoutingResult, Any]:
    """What ``agentkd evaluate`` does; returns the figures and a table of them.

    Args:
        actions, router: instead of those in the student's folder. What they do not name is as it is there
            (of a router: where it is of the same kind).
        tools: what counts as a tool for the router, see :data:`agentkd.tool_use.ToolKind`.
        target_tokens: with ``router="all"``, what a question may cost on average.
        save: keep the sampler and the router, the tuned one if all were compared, in that folder.
        runs: of each task, each with a seed of its own.
        prices: table of US dollars by model, for the cost.
        trained_on: training trajectories; test questions that stand among them go to ``overlap.json``.
        on_progress: told of each result. The others are as in the command.

    Raises:
        ConfigError: the settings do not fit together, or ``out`` was evaluated with others.
        DataError: ``tasks`` or ``trained_on`` cannot be read.
        ProviderError: some rollouts ended by errors; what is finished is kept.
    """
    compare = router == ALL_ROUTERS
    _refuse(student, endpoint, save=save)
    if compare and (runs > 1 or trained_on is not None):
        raise ConfigError("Routers are compared on one run.", "Leave --runs and --trained-on out.")
    if target_tokens is not None and not compare:
        raise ConfigError("A target is for choosing among routers.", "Add --router all.")
    api_base, model, _ = endpoint
    taskset = load_taskset(tasks, split, n, seed)
    test_time = _test_time(student, actions, router, tools, seed)
    label = Path(student).resolve().name if student else str(model)
    found_twice = None if trained_on is None else _overlap(trained_on, taskset.tasks)
    same = _same(student, model, kind, temperature=temperature, max_tokens=max_tokens)
    shared: dict[str, Any] = {
        "retriever": open_corpus(corpus, taskset.passages).retriever,
        "workers": workers,
        "same": same | test_time.model_dump(mode="json"),
        "on_progress": on_progress,
    }
    asked = (kind, sandbox, temperature, max_tokens)
    system = _endpoint(endpoint, asked, test_time) if student is None else _student(student, asked, test_time)
    with _once(system) as source:
        if compare:
            found = compare_routers(label, taskset.tasks, source, out, config=test_time.router, **shared)
            tuned = tuned_router(found, target_tokens, test_time.router)
            test_time = test_time.model_copy(update={"router": tuned})
            result: tuple[SystemResult | RoutingResult, Any] = found, routing_table(found, tuned)
        else:
            costs = _prices(prices, model, api_base)
            more: dict[str, Any] = {"samples": runs, "seed": seed, "prices": costs, **shared}
            figures, _ = run_evaluation(label, taskset.tasks, source, out, **more)
            if found_twice is not None:
                write_json(out / "overlap.json", [item._asdict() for item in found_twice])
            result = figures, comparison_table([figures])
    if save:
        save_test_time(str(student), test_time)
    return result


_Endpoint = tuple[str | None, str | None, str | None]
"""URL, model and key."""
_System = AbstractContextManager[tuple[AgentConfig, Any]]


def _refuse(student: str | None, endpoint: _Endpoint, *, save: bool) -> None:
    """Raises that it is not said what to evaluate, or that nothing can be kept there."""
    api_base, model, _ = endpoint
    if (student is None) == (api_base is None):
        raise ConfigError("Evaluate what?", "Give either a student folder or --api-base and --model.")
    if api_base is not None and model is None:
        raise ConfigError("No model was named.", "Pass --model as the endpoint lists it.")
    if save and (student is None or not (Path(student) / "student.json").is_file()):
        raise ConfigError("Only a student's folder keeps settings.", "Leave --save-test-time out.")


@contextmanager
def _once(system: _System) -> Iterator[Callable[[], _System]]:
    """A system that is opened when it is first needed, and once."""
    with ExitStack() as stack:
        opened: list[tuple[AgentConfig, Any]] = []

        @contextmanager
        def source() -> Iterator[tuple[AgentConfig, Any]]:
            if not opened:
                opened.append(stack.enter_context(system))
            yield opened[0]

        yield source


def _same(student: str | None, model: str | None, kind: str | None, **sampling: Any) -> dict[str, Any]:
    """Of the settings of the agents what is known before the system is opened."""
    if student is None:
        return {"model": model, "kind": kind or "agent", **sampling}
    own = (Path(student) / "student.json").is_file()
    name = Path(student).resolve().name if own else student
    return {"model": name, **({"kind": kind} if kind else {}), **sampling}


def _prices(table: Path | None, model: str | None, api_base: str | None) -> dict[str, Price]:
    """What a table says, else what the provider publishes; a model of one's own has no price."""
    known = load_prices(table) if table is not None else {}
    if model is not None and api_base is not None and model not in known:
        published = published_price(model, api_base)
        return {**known, model: published} if published else known
    return known


def _overlap(trained_on: Path, tasks: Sequence[Task]) -> list[Overlap]:
    path = trained_on
    if path.is_dir():
        kept = path / "kept.jsonl"
        path = kept if kept.is_file() else path / "trajectories.jsonl"
    return overlaps([run.task for run in read_trajectories(path)], tasks)


def _test_time(
    student: str | None, actions: int | None, router: str | None, tools: str | None, seed: int
) -> TestTime:
    """What the student's folder says, but for what is said here.

    Where routers are compared, the router has what they share: the seed, and what counts as a tool.
    """
    saved = TestTime() if student is None else load_test_time(student)
    sampler, routing = saved.sampler, saved.router
    if actions is not None:
        sampler = (sampler or SamplerConfig()).model_copy(update={"n": actions, "seed": seed})
        sampler = sampler if actions > 1 else None
    if router == ALL_ROUTERS:
        routing = RouterConfig(seed=seed, tools=routing.tools if routing else "both")
    elif router is not None:
        routing = parse_router(router, seed, routing)
    if tools is not None:
        check_tool_kind(tools)
        if routing is None:
            raise ConfigError(
                "Only a router asks what counts as a tool.", "Add --router, or leave --tools out."
            )
        routing = routing.model_copy(update={"tools": tools})
    return TestTime(sampler=sampler, router=routing)


_Asked = tuple[str | None, str, float, int]
"""Kind, sandbox, temperature, sampled tokens of a step."""


@contextmanager
def _student(what: str, asked: _Asked, test_time: TestTime) -> Iterator[tuple[AgentConfig, Any]]:
    from agentkd.system import open_system

    kind: Any = asked[0]
    _, sandbox, temperature, max_tokens = asked
    with open_system(
        what,
        kind=kind,
        sandbox=sandbox,
        temperature=temperature,
        max_tokens=max_tokens,
        test_time=test_time,
    ) as system:
        yield system.config, system.model


@contextmanager
def _endpoint(endpoint: _Endpoint, asked: _Asked, test_time: TestTime) -> Iterator[tuple[AgentConfig, Any]]:
    from agentkd.model import check_endpoint

    api_base, model, api_key = endpoint
    assert api_base is not None
    assert model is not None
    check_endpoint(api_base, model, api_key)
    kind: Any = asked[0] or "agent"
    _, sandbox, temperature, max_tokens = asked
    config = AgentConfig(
        model=model,
        api_base=api_base,
        api_key=api_key,
        kind=kind,
        sandbox=sandbox,
        temperature=temperature,
        max_tokens=max_tokens,
        sampler=test_time.sampler,
        router=test_time.router,
    )
    yield config, None
