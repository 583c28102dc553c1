"""Two evaluations side by side: what changed in their settings, and whether the difference is real."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from agentkd.action import program_key
from agentkd.errors import DataError
from agentkd.evaluate.figures import PairedDifference, latest_runs, paired_difference
from agentkd.record import read_json, read_trajectories
from agentkd.trajectory import Trajectory

__all__ = ["Comparison", "Difference", "StepAgreement", "compare_runs", "step_agreement"]

RESAMPLES = 2000


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Difference(_Result):
    """A figure of the second run minus that of the first, with its 95% interval."""

    first: float
    """Mean over the shared tasks."""
    second: float
    mean: float
    low: float
    high: float
    n: int
    """Shared tasks."""

    @property
    def real(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.n > 0 and (self.low > 0 or self.high < 0)


class StepAgreement(_Result):
    """How alike two systems act on the same questions, such as a teacher and its student."""

    n: int
    """Shared questions that both finished."""
    answers: float
    """Share with the same answer."""
    first_actions: float
    """Share whose first code is the same program (names, formatting and comments count, spacing does not)."""
    tools: float
    """Share with the same tools called in the same order."""
    steps: float
    """Of the first system's steps: share that the second takes at the same place with the same program."""


class Comparison(_Result):
    """What :func:`compare_runs` finds."""

    accuracy: Difference
    wins: int
    """Shared tasks that only the second got right (more often, with several runs)."""
    losses: int
    tokens: Difference
    """Input and output tokens of a run."""
    steps: Difference
    seconds: Difference
    """Wall-clock seconds of a run."""
    agreement: StepAgreement
    changed: dict[str, tuple[Any, Any]]
    """Settings that differ: name and the two values; None where one run does not have it."""
    only_first: int
    """Tasks that only the first run has."""
    only_second: int

    @property
    def verdict(self) -> str:
        """One sentence."""
        it = self.accuracy
        if it.n == 0:
            return "The runs share no task."
        found = f"{100 * it.mean:+.1f} points [{100 * it.low:+.1f}, {100 * it.high:+.1f}], n = {it.n} pairs"
        return f"{'A real difference' if it.real else 'No difference that these runs can show'}: {found}."


def compare_runs(first: Path | str, second: Path | str, *, seed: int = 0) -> Comparison:
    """Compare two run folders (or trajectory files) on the tasks that both finished.

    Args:
        first, second: folders with ``trajectories.jsonl``; a folder that is still being written is
            read as far as it is.
        seed: of the bootstrap.

    Raises:
        DataError: there are no trajectories, or the same task id stands for another question.
    """
    first, second = Path(first), Path(second)
    a, b = _runs(first), _runs(second)
    _same_questions(a, b)
    accuracy = paired_difference(b, a, seed=seed)
    right_a, right_b = _means(a, lambda run: float(run.correct)), _means(b, lambda run: float(run.correct))
    shared = sorted(right_a.keys() & right_b.keys())
    return Comparison(
        accuracy=_with_means(accuracy, [right_a[t] for t in shared], [right_b[t] for t in shared]),
        wins=sum(right_b[task] > right_a[task] for task in shared),
        losses=sum(right_b[task] < right_a[task] for task in shared),
        tokens=_difference(a, b, lambda run: run.usage.input_tokens + run.usage.output_tokens, seed),
        steps=_difference(a, b, lambda run: len(run.steps), seed),
        seconds=_difference(a, b, lambda run: run.seconds, seed),
        agreement=step_agreement(a, b),
        changed=_changed(_settings(first, a), _settings(second, b)),
        only_first=len(right_a.keys() - right_b.keys()),
        only_second=len(right_b.keys() - right_a.keys()),
    )


def step_agreement(teacher: Iterable[Trajectory], student: Iterable[Trajectory]) -> StepAgreement:
    """Compare the first run of each question; errored runs are left out."""
    mine, theirs = _first_runs(teacher), _first_runs(student)
    pairs = [(mine[task], theirs[task]) for task in sorted(mine.keys() & theirs.keys())]
    same: dict[str, int] = defaultdict(int)
    steps = 0
    for one, other in pairs:
        same["answers"] += one.answer is not None and _text(one.answer) == _text(other.answer)
        same["tools"] += _tools(one) == _tools(other)
        codes = [[step.code and program_key(step.code) for step in run.steps] for run in (one, other)]
        same["first"] += bool(codes[0] and codes[1]) and codes[0][0] == codes[1][0]
        same["steps"] += sum(left == right for left, right in zip(*codes, strict=False))
        steps += len(codes[0])
    n = len(pairs)
    return StepAgreement(
        n=n,
        answers=same["answers"] / n if n else 0.0,
        first_actions=same["first"] / n if n else 0.0,
        tools=same["tools"] / n if n else 0.0,
        steps=same["steps"] / steps if steps else 0.0,
    )


def _first_runs(runs: Iterable[Trajectory]) -> dict[str, Trajectory]:
    kept: dict[str, Trajectory] = {}
    for run in latest_runs(runs):
        if not run.stop_reason.is_error:
            kept.setdefault(run.task.id, run)
    return kept


def _tools(run: Trajectory) -> list[str]:
    return [use.name for step in run.steps for use in step.tool_uses]


def _text(answer: str | None) -> str:
    return " ".join((answer or "").casefold().split())


def _runs(path: Path) -> list[Trajectory]:
    runs = read_trajectories(path / "trajectories.jsonl" if path.is_dir() else path)
    if not runs:
        raise DataError(f"{path} has no trajectories.", "Give the folder of agentkd evaluate or collect.")
    return runs


def _same_questions(a: list[Trajectory], b: list[Trajectory]) -> None:
    questions = {run.task.id: run.task.question for run in a}
    for run in b:
        if questions.get(run.task.id, run.task.question) != run.task.question:
            raise DataError(
                f"The task {run.task.id!r} is another question in the second run.",
                "Compare runs on the same tasks.",
            )


def _means(runs: Iterable[Trajectory], of: Callable[[Trajectory], float]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for run in latest_runs(runs):
        if not run.stop_reason.is_error:
            values[run.task.id].append(of(run))
    return {task: math.fsum(items) / len(items) for task, items in values.items()}


def _with_means(found: PairedDifference, first: list[float], second: list[float]) -> Difference:
    n = found.n_pairs
    return Difference(
        first=math.fsum(first) / n if n else 0.0,
        second=math.fsum(second) / n if n else 0.0,
        mean=found.mean,
        low=found.low,
        high=found.high,
        n=n,
    )


def _difference(
    a: list[Trajectory], b: list[Trajectory], of: Callable[[Trajectory], float], seed: int
) -> Difference:
    """Paired bootstrap over tasks, percentile interval."""
    first, second = _means(a, of), _means(b, of)
    tasks = sorted(first.keys() & second.keys())
    n = len(tasks)
    if not n:
        return Difference(first=0.0, second=0.0, mean=0.0, low=0.0, high=0.0, n=0)
    gaps = [second[task] - first[task] for task in tasks]
    rng = random.Random(seed)
    means = sorted(math.fsum(rng.choices(gaps, k=n)) / n for _ in range(RESAMPLES))
    cut = int(0.025 * RESAMPLES)
    return Difference(
        first=math.fsum(first[task] for task in tasks) / n,
        second=math.fsum(second[task] for task in tasks) / n,
        mean=math.fsum(gaps) / n,
        low=means[cut],
        high=means[-1 - cut],
        n=n,
    )


def _settings(path: Path, runs: list[Trajectory]) -> dict[str, Any]:
    """The resolved settings of a run, flat: of its manifest, or of its first record while it is open."""
    manifest = path / "manifest.json"
    whole = read_json(manifest) if manifest.is_file() else {}
    config = whole.get("config") or runs[0].config
    versions = whole.get("versions") or runs[0].versions
    return _flat(
        {
            **config,
            "model": runs[0].model,
            "kind": runs[0].kind,
            "system_prompt": runs[0].system_prompt,
            "tools": list(runs[0].tools),
            "versions": versions,
            "commit": whole.get("commit") or runs[0].commit,
        }
    )


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = item
    return flat


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = list(dict.fromkeys([*a, *b]))
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
