"""What routing is worth: accuracy against cost for every router, with the best that one could do.

Four runs of a system on the same tasks are enough for whole curves: P_n (``never``), P_i
(``implicit``), P_f (``forced``), and several direct answers (``agreement``). What a threshold would have
decided, and what that would have cost, follows from what those runs recorded.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from agentkd.agent_config import AgentConfig
from agentkd.errors import ConfigError
from agentkd.evaluate.figures import wilson
from agentkd.evaluate.run import run_evaluation
from agentkd.record import write_json
from agentkd.retrieval import Retriever
from agentkd.rollouts import Progress
from agentkd.router import RouterConfig
from agentkd.task import Task
from agentkd.tool_use import ToolKind, tool_usage_accuracy, used_tool
from agentkd.trajectory import RouterKind, Trajectory

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "RouterFigures",
    "RoutingPoint",
    "RoutingResult",
    "compare_routers",
    "routing_figures",
    "routing_table",
    "tuned_router",
]

KINDS: tuple[RouterKind, ...] = ("never", "implicit", "forced", "agreement")
CURVE_POINTS = 21
"""Settings of a router at which it is shown, at most."""
NAMES = {"never": "never (P_n)", "implicit": "implicit (P_i)", "forced": "forced (P_f)"}


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoutingPoint(_Result):
    """One setting of a router on all tasks."""

    value: float | None
    """The router's threshold or agreement; None where it has none."""
    n: int
    accuracy: float
    low: float
    high: float
    """Ends of the 95% interval of ``accuracy``."""
    tokens: float
    """Mean input and output tokens of a question, those spent to decide included."""
    seconds: float
    """Median wall-clock seconds of a question."""
    direct: float
    """Share of questions that were answered directly."""


class RouterFigures(_Result):
    """One router as it was run."""

    point: RoutingPoint
    tool_usage_accuracy: float | None
    """0.5 where tools are used always or never; None without easy or without hard questions."""
    tool_rate: float | None
    tool_rate_easy: float | None
    """Among questions that the system answers correctly under P_n."""
    tool_rate_hard: float | None


class RoutingResult(_Result):
    """All of it; ``routing.json``."""

    label: str
    tools: ToolKind
    """What counts as a tool."""
    easy: int
    """Questions answered correctly under P_n."""
    hard: int
    routers: dict[str, RouterFigures]
    oracle: RoutingPoint
    """P_n where that is correct, else P_f: no router can do better."""
    curves: dict[str, list[RoutingPoint]]
    """By router, in the order of its value."""
    logprobs: bool
    """Whether the server sent log-probabilities; without them the threshold has two places only."""


class _Ran(NamedTuple):
    """What a router made of one question."""

    correct: bool
    tokens: int
    seconds: float
    direct: bool


def compare_routers(
    label: str,
    tasks: Sequence[Task],
    system: Callable[[], AbstractContextManager[tuple[AgentConfig, Any]]],
    out: Path,
    *,
    config: RouterConfig | None = None,
    retriever: Retriever | None = None,
    workers: int = 32,
    same: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RoutingResult:
    """Run a system on tasks under every router; goes on where it stopped.

    Args:
        label, tasks, system, retriever, workers, same, on_progress: as in :func:`run_evaluation`.
        out: folder for one evaluation a router and ``routing.json``.
        config: how many direct answers, at which temperature, from which seed, and what counts as a tool.

    Raises:
        ConfigError: the system does not act in code, or ``out`` holds other work.
        ProviderError: some rollouts ended by errors; what is finished is kept.
    """
    base = config or RouterConfig()
    runs: dict[str, list[Trajectory]] = {}
    for kind in KINDS:
        # With 0 every question has its direct answers; a higher bar is applied to the record.
        router = base.model_copy(update={"kind": kind, "agreement": 0.0})

        @contextmanager
        def routed(router: RouterConfig = router) -> Any:
            with system() as (settings, model):
                if settings.kind != "agent":
                    raise ConfigError(f"{label} answers by chain of thought: there is nothing to route.")
                yield settings.model_copy(update={"router": router}), model

        _, runs[kind] = run_evaluation(
            label,
            tasks,
            routed,
            out / kind,
            retriever=retriever,
            workers=workers,
            on_progress=on_progress,
            same={**(same or {}), "router": router.model_dump(mode="json")},
        )
    result = routing_figures(label, runs, base.tools)
    write_json(out / "routing.json", result.model_dump(mode="json"))
    return result


def routing_figures(
    label: str, runs: Mapping[str, Sequence[Trajectory]], tools: ToolKind = "both"
) -> RoutingResult:
    """The figures of runs of the same tasks under ``never``, ``implicit``, ``forced`` and ``agreement``.

    Args:
        label: what the system is called.
        runs: by router; tasks that are missing in one of them are left out.
        tools: what counts as a tool, as in the settings of those routers.

    Raises:
        ConfigError: no task is in all of them, or a run was not routed.
    """
    by_task = {kind: {run.task.id: run for run in runs[kind]} for kind in KINDS}
    shared = [task for task in by_task["never"] if all(task in by_task[kind] for kind in KINDS)]
    if not shared:
        raise ConfigError("No question was run under all routers.", "Evaluate with --router all.")
    for kind in ("implicit", "agreement"):
        if any(by_task[kind][task].steps and _route(by_task[kind][task]) is None for task in shared):
            raise ConfigError(f"The runs under {kind} have no record of routing.")
    ran: dict[str, Sequence[Trajectory]] = {kind: [by_task[kind][task] for task in shared] for kind in KINDS}
    easy = [run.correct for run in ran["never"]]
    implicit = ran["implicit"]
    return RoutingResult(
        label=label,
        tools=tools,
        easy=sum(easy),
        hard=len(easy) - sum(easy),
        routers={kind: _figures(ran[kind], easy, tools) for kind in ("never", "implicit", "forced")},
        oracle=_point(
            None,
            (
                _as_run(never if never.correct else forced)
                for never, forced in zip(ran["never"], ran["forced"], strict=True)
            ),
        ),
        curves={
            "threshold": _curve(ran, {_p_tool(run) for run in implicit}, _by_threshold),
            "agreement": _curve(ran, {_agreed(run) for run in ran["agreement"]}, _by_agreement),
        },
        logprobs=any(route.logprobs for run in implicit if (route := _route(run)) is not None),
    )


def tuned_router(
    result: RoutingResult, target: float | None, config: RouterConfig | None = None
) -> RouterConfig:
    """The most accurate router that costs at most ``target`` tokens a question; the cheaper of equals.

    Where none is that cheap, the cheapest. Use a development set: a router that was chosen on the test
    tasks looks better than it is.
    """
    base = config or RouterConfig()
    found = [(kind, figures.point) for kind, figures in result.routers.items()]
    found += [(kind, point) for kind, points in result.curves.items() for point in points]
    affordable = [item for item in found if target is None or item[1].tokens <= target]
    if affordable:
        kind, point = max(affordable, key=lambda item: (item[1].accuracy, -item[1].tokens))
    else:
        kind, point = min(found, key=lambda item: (item[1].tokens, -item[1].accuracy))
    value = {kind: point.value} if point.value is not None else {}
    return RouterConfig.model_validate({**base.model_dump(), "kind": kind, **value})


def _route(run: Trajectory) -> Any:
    return run.steps[0].route if run.steps else None


def _p_tool(run: Trajectory) -> float:
    route = _route(run)
    return 0.5 if route is None or route.p_tool is None else float(route.p_tool)


def _agreed(run: Trajectory) -> float:
    route = _route(run)
    return 0.0 if route is None or route.agreement is None else float(route.agreement)


def _tokens(run: Trajectory) -> int:
    return run.usage.input_tokens + run.usage.output_tokens


def _as_run(run: Trajectory) -> _Ran:
    route = _route(run)
    return _Ran(run.correct, _tokens(run), run.seconds, bool(route is not None and route.direct))


def _by_threshold(ran: Mapping[str, Sequence[Trajectory]], at: int, value: float) -> _Ran:
    first, wanted = ran["implicit"][at], _p_tool(ran["implicit"][at]) <= value
    route = _route(first)
    if route is None or route.direct == wanted:
        return _as_run(first)._replace(direct=wanted)
    # The first action is not what was decided, so it was asked for in vain.
    then, step = ran["never" if wanted else "forced"][at], first.steps[0]
    spent = step.usage.input_tokens + step.usage.output_tokens
    return _Ran(then.correct, spent + _tokens(then), step.model_seconds + then.seconds, wanted)


def _by_agreement(ran: Mapping[str, Sequence[Trajectory]], at: int, value: float) -> _Ran:
    answers, forced = ran["agreement"][at], ran["forced"][at]
    done = _as_run(answers)
    if not done.direct or _agreed(answers) >= value:
        return done
    return _Ran(forced.correct, done.tokens + _tokens(forced), done.seconds + forced.seconds, False)


def _curve(
    ran: Mapping[str, Sequence[Trajectory]],
    values: set[float],
    outcome: Callable[[Mapping[str, Sequence[Trajectory]], int, float], _Ran],
) -> list[RoutingPoint]:
    """A point at each value at which a decision changes, and at both ends."""
    places = sorted({*values, 0.0, 1.0})
    if len(places) > CURVE_POINTS:
        places = [places[round(i * (len(places) - 1) / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]
    count = len(ran["never"])
    return [_point(value, (outcome(ran, at, value) for at in range(count))) for value in places]


def _point(value: float | None, ran: Iterable[_Ran]) -> RoutingPoint:
    outcomes = list(ran)
    n, correct = len(outcomes), sum(one.correct for one in outcomes)
    low, high = wilson(correct, n)
    return RoutingPoint(
        value=value,
        n=n,
        accuracy=correct / n,
        low=low,
        high=high,
        tokens=sum(one.tokens for one in outcomes) / n,
        seconds=statistics.median(one.seconds for one in outcomes),
        direct=sum(one.direct for one in outcomes) / n,
    )


def _figures(runs: Sequence[Trajectory], easy: Sequence[bool], tools: ToolKind) -> RouterFigures:
    usage = tool_usage_accuracy(zip(easy, (used_tool(run, tools) for run in runs), strict=True))
    return RouterFigures(
        point=_point(None, map(_as_run, runs)),
        tool_usage_accuracy=usage.accuracy,
        tool_rate=usage.tool_rate,
        tool_rate_easy=None if usage.on_easy is None else 1 - usage.on_easy,
        tool_rate_hard=usage.on_hard,
    )


def routing_table(result: RoutingResult, tuned: RouterConfig | None = None) -> Table:
    """The table for the terminal: the three prompts, the oracle, and the curves."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(result.label), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("router", "accuracy", "tokens", "seconds", "direct", "tool use", "easy/hard"):
        table.add_column(name, justify="left" if name == "router" else "right", no_wrap=True)
    for kind, figures in result.routers.items():
        rates = f"{_share(figures.tool_rate_easy)}/{_share(figures.tool_rate_hard)}"
        table.add_row(NAMES[kind], *_cells(figures.point), _share(figures.tool_usage_accuracy), rates)
    table.add_row("oracle", *_cells(result.oracle), "", "", style="bold")
    for kind, points in result.curves.items():
        table.add_section()
        for point in points:
            chosen = tuned is not None and tuned.kind == kind and getattr(tuned, kind) == point.value
            name = f"{kind}:{point.value:.3g}"
            table.add_row(name, *_cells(point), "", "", style="bold" if chosen else "")
    table.caption = (
        f"{result.easy} of {result.easy + result.hard} questions are easy (correct under P_n). "
        "tokens, seconds: of a question; tool use: its accuracy; easy/hard: share of them with a tool."
    )
    if not result.logprobs:
        table.caption += " The server sent no log-probabilities."
    if tuned is not None:
        value = getattr(tuned, tuned.kind, None)
        table.caption += f" Chosen: {tuned.kind}" + ("" if value is None else f":{value:.3g}")
    return table


def _cells(point: RoutingPoint) -> list[str]:
    interval = f"[{round(point.low * 100)}, {round(point.high * 100)}]"
    accuracy = f"{point.accuracy:.0%} {interval}"
    return [accuracy, f"{point.tokens:,.0f}", f"{point.seconds:.2f}", f"{point.direct:.0%}"]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
