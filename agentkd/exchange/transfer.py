"""Whole files: a run out to a format, and a format in to a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agentkd.errors import ConfigError, DataError, first_problem
from agentkd.exchange.arrow import DATASETS
from agentkd.exchange.atif import ATIF
from agentkd.exchange.chat import CHAT
from agentkd.exchange.draft import Container, Format, Row
from agentkd.exchange.inspect import INSPECT
from agentkd.exchange.loss import differences, remainder, restore, row_differences
from agentkd.exchange.memory import SMOLAGENTS
from agentkd.exchange.react import REACT
from agentkd.exchange.reference import REFERENCE
from agentkd.exchange.rows import container_of, read_rows, write_rows
from agentkd.exchange.steps import STEPS
from agentkd.record import iter_jsonl, load_tasks, write_jsonl, write_manifest
from agentkd.scorer import SCORERS, score
from agentkd.task import Task
from agentkd.trajectory import Trajectory

__all__ = ["FORMATS", "Exported", "Imported", "export_run", "format_named", "import_run"]

FORMATS: dict[str, Format] = {
    item.name: item for item in (CHAT, SMOLAGENTS, REFERENCE, REACT, ATIF, DATASETS, STEPS, INSPECT)
}
"""The formats by name."""

_UNKNOWN = "imported"
"""Label that keeps, as JSON, the keys of a row that its format does not know."""


@dataclass
class Exported:
    """What an export left."""

    count: int = 0
    beside: Counter[str] = field(default_factory=Counter)
    """Values that the format has no field for and that travel beside it, by field."""
    lost: Counter[str] = field(default_factory=Counter)
    """Values that are not in the export, by field: measured by decoding what was written."""


@dataclass
class Imported:
    """What an import left."""

    count: int = 0
    correct: int = 0
    unscored: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """Values of the source that are in no field of the trajectories, or are worded otherwise there."""
    tasks: dict[str, Task] = field(default_factory=dict)


def format_named(name: str) -> Format:
    """A format.

    Raises:
        ConfigError: no such format.
    """
    if name not in FORMATS:
        raise ConfigError(f"Unknown format {name!r}.", f"Known formats: {', '.join(FORMATS)}.")
    return FORMATS[name]


def export_run(
    source: Path | str,
    out: Path | str,
    name: str,
    *,
    plain: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Exported:
    """Write a run's trajectories in another format; the file is there whole or not at all.

    Args:
        source: a run folder, or a ``trajectories.jsonl`` or ``kept.jsonl``.
        out: file or folder; its suffix chooses among what the format allows.
        name: see :data:`FORMATS`.
        plain: leave out what the format has no field for, instead of carrying it beside.
        on_progress: called with the number of trajectories done.

    Raises:
        ConfigError: unknown format, or one that is not written to such a file.
        DataError: the source is missing, empty or malformed, or an id stands in it twice.
        StorageError: ``out`` cannot be written.
    """
    source, out = Path(source), Path(out)
    form = format_named(name)
    container = container_of(out, form.containers)
    path = source / "trajectories.jsonl" if source.is_dir() else source
    result, keeps = Exported(), not plain and container != ".txt"

    def rows() -> Iterator[Row]:
        seen: dict[str, str] = {}
        for number, trajectory in enumerate(iter_jsonl(path, Trajectory, skip_torn=True), 1):
            _once(seen, trajectory.id, path, f"line {number}")
            yield _export(trajectory, form, container, keeps, result)
            if on_progress:
                on_progress(result.count)
        if not result.count:
            raise DataError(f"{path} has no trajectories.", "Run agentkd collect first.")

    write_rows(out, container, rows(), "trajectory_id" if form is ATIF else "id", form.wrap)
    return result


def _export(trajectory: Trajectory, form: Format, container: Container, keeps: bool, result: Exported) -> Row:
    row = _encoded(trajectory, form)
    native = _native(row if container != ".txt" else {"text": row["text"]}, form, None)
    extra = remainder(trajectory, native)
    result.count += 1
    if keeps:
        result.beside += differences(trajectory, native)
        result.lost += differences(trajectory, restore(native, extra))
        _put(row, form, extra)
    else:
        result.lost += differences(trajectory, native)
    return row


def _encoded(trajectory: Trajectory, form: Format) -> Row:
    """The row, with what an import in the same format had found beside its own keys."""
    unknown = json.loads(trajectory.labels.get(_UNKNOWN, "{}")).get(form.name, {})
    return {**unknown, **form.encode(trajectory)}


def _put(row: Row, form: Format, extra: dict[str, Any]) -> None:
    *outer, key = form.extra
    for name in outer:
        row = row.setdefault(name, {})
    row[key] = extra if outer else json.dumps(extra, ensure_ascii=False)


def _take(row: Row, form: Format) -> dict[str, Any] | None:
    """The remainder that travels with a row, if any."""
    *outer, key = form.extra
    for name in outer:
        row = row.get(name) or {}
    extra = row.get(key)
    return json.loads(extra) if isinstance(extra, str) else extra


def import_run(
    source: Path | str,
    out: Path | str,
    name: str,
    *,
    tasks: Path | None = None,
    scorer: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Imported:
    """Read a file of another format and write a run folder: trajectories, tasks, manifest.

    Every answer is scored again, by the scorer of its task.

    Args:
        source: file or folder, see :func:`agentkd.exchange.rows.read_rows`.
        out: a folder without a run in it.
        name: see :data:`FORMATS`.
        tasks: ``tasks.jsonl`` with the gold answers, joined by task id or else by question.
        scorer: compares answers ("exact" by default, and what ``tasks`` says).
        on_progress: called with the number of rows done.

    Raises:
        ConfigError: unknown format or scorer, or a folder that is in use.
        DataError: names the row that is wrong; nothing is written then.
    """
    source, out = Path(source), Path(out)
    form = format_named(name)
    if scorer is not None and scorer not in SCORERS:
        raise ConfigError(f"Unknown scorer {scorer!r}.", f"Known scorers: {', '.join(SCORERS)}.")
    path = out / "trajectories.jsonl"
    if path.exists():
        raise ConfigError(f"{out} holds a run already.", "Choose another --out.")
    gold = _Gold(load_tasks(tasks) if tasks else (), scorer)
    result = Imported()
    try:
        write_jsonl(path, _imported(source, form, gold, result, on_progress))
    except BaseException:
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
        raise
    write_jsonl(out / "tasks.jsonl", result.tasks.values())
    write_manifest(
        out,
        stage="import",
        config={"format": name, "tasks": str(tasks) if tasks else None, "scorer": scorer},
        counts={"imported": result.count, "correct": result.correct, "lost": dict(result.lost)},
        inputs=[source] if source.is_file() else [],
        outputs=[path, out / "tasks.jsonl"],
    )
    return result


class _Gold:
    """What is known of the tasks from elsewhere."""

    def __init__(self, tasks: Any, scorer: str | None) -> None:
        self.scorer = scorer
        self.by_id = {task.id: task for task in tasks}
        self.by_question = {task.question.strip(): task for task in tasks}

    def joined(self, trajectory: Trajectory) -> Trajectory:
        task = trajectory.task
        known = self.by_id.get(task.id) or self.by_question.get(task.question.strip())
        if known is None and self.scorer is None:
            return trajectory
        new = known or task
        if self.scorer is not None:
            new = new.model_copy(update={"scorer": self.scorer})
        made_up = trajectory.id == f"{task.id}#{trajectory.sample}"
        name = f"{new.id}#{trajectory.sample}" if made_up else trajectory.id
        scored = score(new, trajectory.answer)
        return trajectory.model_copy(update={"id": name, "task": new, "score": scored})


def _imported(
    source: Path,
    form: Format,
    gold: _Gold,
    result: Imported,
    on_progress: Callable[[int], None] | None,
) -> Iterator[Trajectory]:
    seen: dict[str, str] = {}
    runs: Counter[str] = Counter()
    for where, row in read_rows(source, form.split, form.unwrap):
        try:
            trajectory = gold.joined(_decoded(row, form, runs))
        except (KeyError, TypeError, ValueError, AttributeError, SyntaxError, IndexError) as exc:
            raise DataError(
                f"{source}, {where}: not a row of the format {form.name!r} ({_why(exc)}).",
                f"It should be {form.about}; see --format.",
            ) from exc
        if not trajectory.steps and _take(row, form) is None:
            raise DataError(
                f"{source}, {where}: no step of a model in it.", f"It should be {form.about}; see --format."
            )
        _once(seen, trajectory.id, source, where)
        task = result.tasks.setdefault(trajectory.task.id, trajectory.task)
        if task.question != trajectory.task.question:
            raise DataError(
                f"{source}, {where}: the task id {task.id!r} stands there with another question.",
                "Make the ids unique.",
            )
        result.count += 1
        result.correct += trajectory.correct
        result.unscored += trajectory.score is None or trajectory.score.value is None
        result.lost += _row_lost(row, trajectory, form)
        yield trajectory
        if on_progress:
            on_progress(result.count)


def _decoded(row: Row, form: Format, runs: Counter[str]) -> Trajectory:
    native, extra = _native(row, form, runs), _take(row, form)
    return native if extra is None else restore(native, extra)


def _native(row: Row, form: Format, runs: Counter[str] | None) -> Trajectory:
    """What the row itself says. Without ``runs`` nothing is made up: names it lacks are placeholders."""
    draft = form.decode(row)
    task, mark, number = (draft.id or "").rpartition("#")
    if not (mark and number.isdigit() and task):
        task, number = draft.id or "", ""
    task = draft.task_id or task or (_hashed(draft.question) if runs is not None else "?")
    sample = int(number) if number else 0 if draft.id else runs[task] if runs is not None else -1
    if runs is not None:
        runs[task] += 1
    native = draft.build(task, sample)
    unknown = {key: value for key, value in row.items() if key not in form.keys and key != form.extra[0]}
    if not unknown:
        return native
    kept = json.dumps({form.name: unknown}, ensure_ascii=False)
    return native.model_copy(update={"labels": {**native.labels, _UNKNOWN: kept}})


def _hashed(question: str) -> str:
    import hashlib

    return f"imported-{hashlib.sha256(question.encode()).hexdigest()[:16]}"


def _row_lost(row: Row, trajectory: Trajectory, form: Format) -> Counter[str]:
    """Values of a row that encoding its trajectory does not give back."""
    again = _encoded(trajectory, form)
    mine = _without(row, form.extra)
    for key, value in mine.items():
        if isinstance(value, str) and isinstance(again.get(key), dict):
            mine[key] = json.loads(value)  # as Parquet keeps it
    return row_differences(mine, again)


def _without(row: Row, place: tuple[str, ...]) -> Row:
    """A copy without what travels beside: that is no value of the source's own."""
    key, *inner = place
    left = {name: value for name, value in row.items() if name != key}
    if inner and isinstance(row.get(key), dict):
        left[key] = _without(row[key], tuple(inner))
    return left


def _once(seen: dict[str, str], name: str, path: Path, where: str) -> None:
    if name in seen:
        raise DataError(
            f"{path}, {where}: the id {name!r} stands there twice (first in {seen[name]}).",
            "Make the ids unique, or leave the second out.",
        )
    seen[name] = where


def _why(exc: Exception) -> str:
    if isinstance(exc, KeyError):
        return f"no {exc.args[0]!r}"
    if isinstance(exc, ValidationError):
        return first_problem(exc)
    return str(exc) or type(exc).__name__
