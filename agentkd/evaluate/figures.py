"""What the runs of an evaluation add up to: accuracy with its interval, cost, and how runs ended.

Pure functions on trajectories. The conventions, so that
no figure flatters:

* A run that ended by an error of the machinery (:attr:`StopReason.is_error`) says nothing about
  the model. It stands in ``errors`` and ``stop_reasons`` and is left out of ``n`` and of all means.
* Every other run counts. No answer, a cut-off answer and an answer that the scorer could not grade
  are all "not correct"; the last are also listed in ``unscored``.
* A file may hold an errored run and its retry under one id: the retry stands, see
  :func:`latest_runs`.
* Intervals are 95% Wilson intervals. Several samples of one task are not independent, so the
  interval is as wide as the number of *tasks* allows, whatever the number of runs.
"""

from __future__ import annotations

import math
import random
import statistics
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict

from agentkd.errors import ConfigError
from agentkd.evaluate.measures import Measures, counted, measure
from agentkd.spend import Price
from agentkd.task import Task
from agentkd.trajectory import Trajectory

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Cell",
    "PairedDifference",
    "SystemResult",
    "comparison_table",
    "contamination",
    "latest_runs",
    "paired_difference",
    "summarise",
    "wilson",
]

Z95 = 1.96
"""Standard normal quantile of a two-sided 95% interval."""
NAME_LIMIT = 40
"""Characters of a name in the terminal."""


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cell(_Result):
    """The figures of one system on one set of tasks. Means are None when ``n`` is 0."""

    n: int
    """Runs that count: all but those in ``errors``."""
    tasks: int
    """Distinct tasks among them; equal to ``n`` with one sample a task."""
    correct: int
    accuracy: float | None
    """``correct / n``, 0 to 1."""
    low: float
    """Lower end of the 95% interval; 0 when nothing was run."""
    high: float
    """Upper end of the 95% interval; 1 when nothing was run."""
    errors: int
    """Runs that the machinery ended; not in ``n``."""
    unscored: int
    """Runs in ``n`` whose answer no scorer could grade; they count as not correct."""
    tokens_per_task: float | None
    """Mean of input and output tokens together, a run."""
    output_tokens_per_task: float | None
    """Mean of sampled tokens, a run."""
    seconds_per_task: float | None
    """Median wall-clock seconds of a run."""
    steps_per_task: float | None
    """Mean number of steps of a run."""
    tool_uses_per_task: float | None
    """Mean number of tool calls of a run, failed calls included."""
    stop_reasons: dict[str, int]
    """How runs ended, errored runs included; most frequent first."""
    failures: dict[str, int]
    """Kinds of failure, at every step where one happened (one run can have several)."""

    def __str__(self) -> str:
        if self.accuracy is None:
            return f"- n=0{f' ({self.errors} errored)' if self.errors else ''}"
        interval = f"[{round(self.low * 100)}, {round(self.high * 100)}]"
        return f"{_percent(self.accuracy)}% {interval} n={self.n}"


class SystemResult(_Result):
    """All figures of one evaluated system."""

    label: str
    overall: Cell
    families: dict[str, Cell]
    """By :attr:`Task.family`, in order of first appearance."""
    levels: dict[str, dict[str, Cell]]
    """By family, then by :attr:`Task.level`."""
    groups: dict[str, Cell]
    """Families pooled under the names given to :func:`summarise`."""
    measures: Measures | None = None
    """Figures of several runs, latency, cost and calibration; None in files of older versions."""


class PairedDifference(NamedTuple):
    """Mean difference in accuracy on the tasks that two systems share."""

    mean: float
    """Accuracy of the first minus accuracy of the second, -1 to 1."""
    low: float
    high: float
    n_pairs: int
    """Shared tasks. 0 means that nothing can be said: the interval is then [-1, 1]."""


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion; ``(0, 1)`` when ``n`` is 0.

    Raises:
        ConfigError: ``successes`` is not between 0 and ``n``, or ``z`` is negative.
    """
    if not 0 <= successes <= n or z < 0:
        raise ConfigError(
            f"{successes} of {n} is no proportion, or z = {z} is negative.",
            "Give 0 <= successes <= n and z >= 0.",
        )
    return _wilson(successes / n, n, z) if n else (0.0, 1.0)


def _wilson(share: float, n: int, z: float = Z95) -> tuple[float, float]:
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    margin = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exactly 0 and 1 by the formula; floating point would leave 1e-17 beside them.
    low = 0.0 if share == 0 else max(0.0, centre - margin)
    high = 1.0 if share == 1 else min(1.0, centre + margin)
    return low, high


def latest_runs(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """One run for each trajectory id: the last one that did not end by an error, else the last.

    The order is that of first appearance.
    """
    runs: dict[str, Trajectory] = {}
    for run in trajectories:
        known = runs.get(run.id)
        if known is None or known.stop_reason.is_error or not run.stop_reason.is_error:
            runs[run.id] = run
    return list(runs.values())


def summarise(
    label: str,
    trajectories: Iterable[Trajectory],
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    price: Price | None = None,
) -> SystemResult:
    """All figures of one system.

    Args:
        label: what the system is called in tables.
        trajectories: its runs.
        groups: families to pool, as in ``{"arithmetic (pooled)": ["products", "lcm"]}``. A group
            of which no family was run is left out.
        price: of the model, for the cost.
    """
    runs = latest_runs(trajectories)
    families: dict[str, list[Trajectory]] = defaultdict(list)
    levels: dict[str, dict[str, list[Trajectory]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        families[run.task.family].append(run)
        levels[run.task.family][run.task.level].append(run)
    pooled = {
        name: [run for run in runs if run.task.family in members] for name, members in (groups or {}).items()
    }
    return SystemResult(
        label=label,
        overall=_cell(runs),
        families={name: _cell(members) for name, members in families.items()},
        levels={
            name: {level: _cell(members) for level, members in sorted(by_level.items())}
            for name, by_level in levels.items()
        },
        groups={name: _cell(members) for name, members in pooled.items() if members},
        measures=measure(runs, price),
    )


def _cell(runs: Sequence[Trajectory]) -> Cell:
    valid = [run for run in runs if not run.stop_reason.is_error]
    n = len(valid)
    tasks = len({run.task.id for run in valid})
    correct = sum(run.correct for run in valid)
    low, high = _wilson(correct / n, tasks) if n else (0.0, 1.0)
    return Cell(
        n=n,
        tasks=tasks,
        correct=correct,
        accuracy=correct / n if n else None,
        low=low,
        high=high,
        errors=len(runs) - n,
        unscored=sum(_ungraded(run) for run in valid),
        tokens_per_task=_mean([run.usage.input_tokens + run.usage.output_tokens for run in valid]),
        output_tokens_per_task=_mean([run.usage.output_tokens for run in valid]),
        seconds_per_task=statistics.median(run.seconds for run in valid) if valid else None,
        steps_per_task=_mean([len(run.steps) for run in valid]),
        tool_uses_per_task=_mean([sum(len(step.tool_uses) for step in run.steps) for run in valid]),
        stop_reasons=counted(run.stop_reason.value for run in runs),
        failures=counted(kind for run in runs for kind in _failure_kinds(run)),
    )


def _ungraded(run: Trajectory) -> bool:
    return run.answer is not None and (run.score is None or run.score.value is None)


def _failure_kinds(run: Trajectory) -> list[str]:
    failures = [step.failure for step in run.steps if step.failure is not None]
    # What ended the run usually stands at its last step too: one failure, counted once.
    if run.failure is not None and run.failure not in failures:
        failures.append(run.failure)
    return [failure.kind for failure in failures]


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None


def paired_difference(
    a: Iterable[Trajectory], b: Iterable[Trajectory], *, seed: int = 0, resamples: int = 2000
) -> PairedDifference:
    """Accuracy of ``a`` minus that of ``b`` on the tasks (by id) that both finished.

    The 95% interval is a percentile bootstrap over tasks. Where all pairs differ by the same
    amount a bootstrap has no spread and would claim certainty; the interval is then that of
    Agresti and Min for matched proportions (half a task added to each of the four outcomes).

    Args:
        a, b: runs; errored runs are left out, several samples of a task are averaged.
        seed: of the resampling; the same seed gives the same interval, in any order of runs.
        resamples: number of bootstrap samples.

    Raises:
        ConfigError: ``resamples`` is not positive.
    """
    if resamples < 1:
        raise ConfigError(f"Cannot bootstrap with {resamples} resamples.", "Use 1,000 or more.")
    first, second = _task_accuracy(a), _task_accuracy(b)
    differences = [first[task] - second[task] for task in sorted(first.keys() & second.keys())]
    n = len(differences)
    if n == 0:
        return PairedDifference(0.0, -1.0, 1.0, 0)
    mean = math.fsum(differences) / n
    if len(set(differences)) == 1:
        return PairedDifference(mean, *_agresti_min(mean, n), n)
    rng = random.Random(seed)
    means = sorted(math.fsum(rng.choices(differences, k=n)) / n for _ in range(resamples))
    cut = int(0.025 * resamples)
    return PairedDifference(mean, means[cut], means[-1 - cut], n)


def _task_accuracy(runs: Iterable[Trajectory]) -> dict[str, float]:
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for run in latest_runs(runs):
        if not run.stop_reason.is_error:
            outcomes[run.task.id].append(run.correct)
    return {task: sum(correct) / len(correct) for task, correct in outcomes.items()}


def _agresti_min(mean: float, n: int) -> tuple[float, float]:
    wins, losses = max(mean, 0.0) * n + 0.5, max(-mean, 0.0) * n + 0.5
    total = n + 2
    centre = (wins - losses) / total
    margin = Z95 * math.sqrt(wins + losses - (wins - losses) ** 2 / total) / total
    return max(-1.0, min(mean, centre - margin)), min(1.0, max(mean, centre + margin))


def contamination(train_tasks: Iterable[Task], test_tasks: Iterable[Task]) -> int:
    """Number of test tasks whose question also stands in the training tasks.

    Questions are compared exactly after Unicode normalisation (NFKC), case folding and the
    collapsing of white space. Punctuation stays: "3 - 4" is not "3 + 4".
    """
    known = {_normalised(task.question) for task in train_tasks}
    return sum(_normalised(task.question) in known for task in test_tasks)


def _normalised(question: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", question).casefold().split())


def comparison_table(results: Sequence[SystemResult], *, title: str | None = None) -> Table:
    """The table for the terminal: systems side by side, accuracy per family, then cost.

    A cell reads ``94% [88, 97] n=100``: accuracy, 95% interval, counted runs.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(_printable(title)) if title else None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("")
    for result in results:
        table.add_column(Text(_printable(result.label)), justify="right", overflow="fold")

    def row(name: str, cells: Iterable[object], style: str = "") -> None:
        table.add_row(Text(_printable(name)), *(Text(str(cell)) for cell in cells), style=style)

    families, groups = _names([r.families for r in results]), _names([r.groups for r in results])
    for name in families:
        row(name, [result.families.get(name, "-") for result in results])
    table.add_section()
    for name in groups:
        row(name, [result.groups.get(name, "-") for result in results], "bold")
    row("all", [result.overall for result in results], "bold")
    table.add_section()
    cells = [result.overall for result in results]
    row("tokens/task", [_number(cell.tokens_per_task, 0) for cell in cells])
    row("  of which sampled", [_number(cell.output_tokens_per_task, 0) for cell in cells])
    row("median seconds/task", [_number(cell.seconds_per_task, 2) for cell in cells])
    row("steps/task", [_number(cell.steps_per_task, 1) for cell in cells])
    _add_measures(row, [result.measures for result in results])
    if any(cell.errors for cell in cells):
        row("errored runs (not in n)", [cell.errors for cell in cells], "yellow")
    if any(cell.unscored for cell in cells):
        row("not gradable (count as wrong)", [cell.unscored for cell in cells], "yellow")
    if len({cell.tasks for cell in cells}) > 1:
        table.caption = "The systems ran different numbers of tasks; compare them on the tasks they share."
    return table


def _add_measures(row: Callable[[str, Iterable[object]], None], all_measures: list[Measures | None]) -> None:
    """The lines that only some evaluations have."""
    found = [item or Measures(runs=0) for item in all_measures]
    for k in sorted({k for item in found for k in item.pass_at if k > 1}):
        row(f"pass@{k}", [_number(_hundred(item.pass_at.get(k)), 1) for item in found])
    if any(item.runs > 1 for item in found):
        row(
            "accuracy of each run",
            [" ".join(f"{100 * it:.0f}" for it in item.run_accuracies) for item in found],
        )
    if any(item.cost_per_task is not None for item in found):
        row("US dollars/task", [_number(item.cost_per_task, 5) for item in found])
    if any(item.calibration for item in found):
        row(
            "calibration error",
            [_number(item.calibration.ece if item.calibration else None, 3) for item in found],
        )
    if any(item.repairs for item in found):
        row("texts mended", [_counts(item.repairs) for item in found])


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items()) or "-"


def _hundred(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _names(parts: Iterable[Mapping[str, Cell]]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part))


def _percent(share: float) -> int:
    """Whole percent, but 0 and 100 only when that is exact."""
    return round(share * 100) if share in (0.0, 1.0) else min(99, max(1, round(share * 100)))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _printable(text: str) -> str:
    """Names come from files: no escape sequence may reach the terminal."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:NAME_LIMIT])
    return shown + "\N{HORIZONTAL ELLIPSIS}" * (len(text) > NAME_LIMIT)
