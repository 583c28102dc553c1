"""Filtering: which trajectories are worth learning from, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from agentkd.errors import DataError
from agentkd.record import load_tasks, read_trajectories, write_jsonl, write_manifest
from agentkd.trajectory import StopReason, Trajectory

__all__ = ["Dropped", "Filter", "FilterConfig", "Filtered", "Verdict", "filter_run", "standard_filters"]


class Verdict(NamedTuple):
    """Keep or drop, always with the reason."""

    keep: bool
    reason: str = ""


class Filter(Protocol):
    """Judges one trajectory."""

    def __call__(self, trajectory: Trajectory) -> Verdict: ...


class FilterConfig(BaseModel):
    """Settings of the standard filters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_score: float = Field(default=1.0, ge=0, le=1)
    """Lowest score that is kept."""
    allow_parse_errors: bool = False
    """Keep trajectories with a step that had no valid code block. Execution errors are always
    kept: they teach recovery (arXiv 2505.17612, section 3)."""
    per_task: int = Field(default=1, ge=1)
    """Trajectories kept of one task; the shortest first."""
    max_similarity: float = Field(default=0.9, ge=0, le=1)
    """Of two trajectories of a task that share a larger part of their word triples (Jaccard index) the
    longer is dropped; 1 keeps both."""
    per_difficulty: int | None = Field(default=None, ge=1)
    """Trajectories kept of each difficulty: the level that the task names, else easy, medium and hard
    by the share of its rollouts that were right; None keeps all."""


class Dropped(BaseModel):
    """One line of ``dropped.jsonl``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str
    trajectory: Trajectory


class Filtered(NamedTuple):
    """What a filter run left."""

    kept: list[Trajectory]
    dropped: list[Dropped]

    @property
    def reasons(self) -> Counter[str]:
        """Drops by the first words of their reason."""
        return Counter(item.reason.split(":")[0] for item in self.dropped)


def standard_filters(config: FilterConfig) -> list[Filter]:
    """Finished, right, and in the form that the student shall learn."""

    def ended(trajectory: Trajectory) -> Verdict:
        good = trajectory.stop_reason == StopReason.FINAL_ANSWER
        return Verdict(good, "" if good else f"no answer: {trajectory.stop_reason.value}")

    def right(trajectory: Trajectory) -> Verdict:
        if trajectory.score is None or trajectory.score.value is None:
            return Verdict(
                False, f"not scored: {trajectory.score.reason if trajectory.score else 'no score'}"
            )
        good = trajectory.score.value >= config.min_score
        return Verdict(
            good, "" if good else f"wrong answer: {trajectory.score.value:g} < {config.min_score:g}"
        )

    def well_formed(trajectory: Trajectory) -> Verdict:
        bad = [step for step in trajectory.steps if step.failure and step.failure.kind == "parse"]
        if bad and not config.allow_parse_errors:
            return Verdict(False, f"parse error: step {bad[0].number}")
        return Verdict(True)

    return [ended, right, well_formed]


def filter_run(
    source: Path | str,
    out: Path | str,
    config: FilterConfig | None = None,
    filters: Sequence[Callable[[Trajectory], Verdict]] | None = None,
) -> Filtered:
    """Read ``trajectories.jsonl`` and write ``kept.jsonl``, ``dropped.jsonl``, ``manifest.json``.

    Args:
        source: the file, or the folder that holds it.
        out: a folder.
        config: settings of the standard filters.
        filters: these instead of the standard ones.

    Raises:
        DataError: nothing to filter, or nothing was kept (the files are written all the same).
    """
    source, out = Path(source), Path(out)
    config = config or FilterConfig()
    path = source / "trajectories.jsonl" if source.is_dir() else source
    trajectories = read_trajectories(path)
    if not trajectories:
        raise DataError(f"{path} has no trajectories.", "Run agentkd collect first.")
    trajectories = _in_task_order(trajectories, path.with_name("tasks.jsonl"))
    result = _judge(trajectories, config, filters or standard_filters(config))
    write_jsonl(out / "kept.jsonl", result.kept)
    write_jsonl(out / "dropped.jsonl", result.dropped)
    write_manifest(
        out,
        stage="filter",
        config=config.model_dump(mode="json"),
        counts={"kept": len(result.kept), "dropped": len(result.dropped), "reasons": dict(result.reasons)},
        inputs=[path],
        outputs=[out / "kept.jsonl", out / "dropped.jsonl"],
    )
    if not result.kept:
        raise DataError(
            f"Nothing was kept of {len(trajectories)} trajectories.",
            f"See the reasons in {out / 'dropped.jsonl'}.",
        )
    return result


def _in_task_order(trajectories: list[Trajectory], tasks: Path) -> list[Trajectory]:
    """Rollouts finish in any order; what is learnt from them must not depend on it."""
    if not tasks.is_file():
        return trajectories
    place = {task.id: number for number, task in enumerate(load_tasks(tasks))}
    return sorted(trajectories, key=lambda item: (place.get(item.task.id, len(place)), item.sample))


def _judge(
    trajectories: Sequence[Trajectory],
    config: FilterConfig,
    filters: Sequence[Callable[[Trajectory], Verdict]],
) -> Filtered:
    good: list[Trajectory] = []
    dropped: list[Dropped] = []
    for trajectory in trajectories:
        verdict = next((v for judge in filters if not (v := judge(trajectory)).keep), Verdict(True))
        if verdict.keep:
            good.append(trajectory)
        else:
            dropped.append(Dropped(reason=verdict.reason, trajectory=trajectory))
    return _choose(good, dropped, trajectories, config)


def _choose(
    good: list[Trajectory], dropped: list[Dropped], everyone: Sequence[Trajectory], config: FilterConfig
) -> Filtered:
    """Keep the shortest of each task that differ from one another, and so many of each difficulty.

    What is kept is in the order of the file.
    """
    difficulty = _difficulty(everyone)
    kept: dict[str, list[Trajectory]] = {}
    counts: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for item in sorted(good, key=lambda item: len(item.steps)):
        others = kept.setdefault(item.task.id, [])
        twin = next((other for other in others if _similarity(item, other) > config.max_similarity), None)
        level = difficulty[item.task.id]
        if twin is not None:
            reasons[item.id] = f"near duplicate: of {twin.id}"
        elif len(others) >= config.per_task:
            reasons[item.id] = f"enough: {config.per_task} of this task kept"
        elif config.per_difficulty is not None and counts[level] >= config.per_difficulty:
            reasons[item.id] = f"enough of this difficulty: {level}"
        else:
            others.append(item)
            counts[level] += 1
    dropped += [Dropped(reason=reasons[item.id], trajectory=item) for item in good if item.id in reasons]
    return Filtered([item for item in good if item.id not in reasons], dropped)


def _difficulty(trajectories: Sequence[Trajectory]) -> dict[str, str]:
    """Of each task: the level that its taskset names, else how often it was solved."""
    solved: dict[str, list[bool]] = {}
    levels: dict[str, str] = {}
    for item in trajectories:
        solved.setdefault(item.task.id, []).append(item.correct)
        levels[item.task.id] = item.task.level
    return {task: levels[task] if levels[task] != "any" else _rate(right) for task, right in solved.items()}


def _rate(right: list[bool]) -> str:
    share = sum(right) / len(right)
    return "easy" if share >= 0.75 else "medium" if share >= 0.25 else "hard"


def _similarity(one: Trajectory, other: Trajectory) -> float:
    """Jaccard index of the word triples that the agent wrote, 0 to 1."""
    first, second = _triples(one), _triples(other)
    return len(first & second) / max(1, len(first | second))


def _triples(trajectory: Trajectory) -> set[tuple[str, ...]]:
    words = ["", "", *" ".join(step.output for step in trajectory.steps).split()]
    return set(zip(words, words[1:], words[2:], strict=False))
