"""Merging: several runs, or the shards of one, become one run without duplicates.

The result is an ordinary run folder: ``filter`` and ``distill`` read it, and ``collect`` with the
settings of the run goes on in it with what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from pydantic import ValidationError

from agentkd.errors import ConfigError, DataError, StorageError, boundary
from agentkd.record import iter_jsonl, read_json, read_trajectories, write_json, write_jsonl, write_manifest
from agentkd.retrieval import Passage
from agentkd.shard import Shard
from agentkd.task import Task
from agentkd.trajectory import Trajectory

__all__ = ["Merged", "merge_runs"]

_LOG = "trajectories.jsonl"

R = TypeVar("R", Task, Passage)


class Merged(NamedTuple):
    """What a merge left."""

    trajectories: int
    correct: int
    duplicates: int
    """Trajectories that stood in a run before; the first one is kept."""
    missing_shards: tuple[str, ...]
    """Shards of which no run was given, as in "3/8"."""
    missing_tasks: int
    """Tasks without a trajectory."""


class _Place(NamedTuple):
    """Where a line stands."""

    path: Path
    start: int
    length: int


def merge_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    any_settings: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Merged:
    """Merge runs into the folder ``out``, which must not hold a run.

    Trajectories are ordered by task and sample, so the order of the runs does not matter unless two
    of them hold the same trajectory. Two passes over the files; memory holds ids and places only.

    Args:
        runs: run folders, at least one.
        out: a folder.
        any_settings: merge runs that were made with different settings all the same.
        on_progress: called with the number of trajectories seen.

    Raises:
        ConfigError: the runs were made with different settings, or ``out`` is in use.
        DataError: a run is missing or malformed, or two runs have different tasks under one id.
        StorageError: ``out`` cannot be written.
    """
    if (out / _LOG).exists():
        raise ConfigError(f"{out} holds a run already.", "Choose another --out.")
    for run in runs:
        if not (run / _LOG).is_file():
            raise DataError(
                f"{run} is not a run: it has no {_LOG}.", "Give folders that collect has written."
            )
    settings = _settings(runs, any_settings)
    tasks = _union(runs, "tasks.jsonl", Task)
    passages = _union(runs, "passages.jsonl", Passage)
    order = {task.id: number for number, task in enumerate(tasks)}
    places, correct, seen = _index(runs, order, on_progress)
    if settings is not None:
        write_json(out / "config.json", settings)
    if passages:
        write_jsonl(out / "passages.jsonl", passages)
    write_jsonl(out / "tasks.jsonl", tasks)
    _copy(places, out / _LOG)
    errors = list(_errors(runs, {name for name, _ in places}))
    if errors:
        write_jsonl(out / "errors.jsonl", errors)
    done = {task for task, _ in (_sort_key(name, order) for name, _ in places)}
    merged = Merged(
        len(places),
        correct,
        seen - len(places),
        _missing_shards(runs),
        sum(number not in done for number in order.values()),
    )
    write_manifest(
        out,
        stage="merge",
        config={"runs": [str(run) for run in runs], "any_settings": any_settings, "collect": settings},
        counts=merged._asdict(),
        inputs=[run / _LOG for run in runs],
        outputs=[out / "tasks.jsonl", out / _LOG],
    )
    return merged


def _settings(runs: Sequence[Path], any_settings: bool) -> dict[str, Any] | None:
    """The settings of the runs, without the shard; None where there are none, or several."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for run in runs:
        path = run / "config.json"
        settings = read_json(path) if path.is_file() else {}
        found.append((run, {key: value for key, value in settings.items() if key != "shard"}))
    first, mine = found[0]
    for other, theirs in found[1:]:
        if theirs == mine:
            continue
        if any_settings:
            return None
        keys = sorted(_different(mine, theirs))
        raise ConfigError(
            f"{first} and {other} were made with different settings ({', '.join(keys)}).",
            "Merge them all the same with --any-settings.",
        )
    return mine or None


def _different(mine: dict[str, Any], theirs: dict[str, Any], before: str = "") -> Iterator[str]:
    for key in mine.keys() | theirs.keys():
        left, right = mine.get(key), theirs.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _different(left, right, f"{before}{key}.")
        elif left != right:
            yield before + key


def _union(runs: Sequence[Path], name: str, model: type[R]) -> list[R]:
    """The records of all runs, each id once, in order of appearance."""
    found: dict[str, R] = {}
    for run in runs:
        path = run / name
        for record in iter_jsonl(path, model) if path.is_file() else ():
            if found.setdefault(record.id, record) != record:
                raise DataError(
                    f"{path}: {record.id!r} is another {model.__name__.lower()} than in a run before.",
                    "Runs with other tasks under the same ids cannot be merged.",
                )
    return list(found.values())


def _sort_key(name: str, order: dict[str, int]) -> tuple[int, int]:
    task, _, sample = name.rpartition("#")
    return order.get(task, len(order)), int(sample) if sample.isdigit() else 0


def _index(
    runs: Sequence[Path], order: dict[str, int], on_progress: Callable[[int], None] | None
) -> tuple[list[tuple[str, _Place]], int, int]:
    """Every trajectory once, by task and sample, with its place; how many are correct, and were seen."""
    places: dict[str, _Place] = {}
    correct = seen = 0
    for run in runs:
        path, start = run / _LOG, 0
        with boundary(DataError, f"reading {path}"), path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break  # torn by a crash
                trajectory = _parse(path, number, raw)
                seen += 1
                if trajectory.id not in places:
                    places[trajectory.id] = _Place(path, start, len(raw))
                    correct += trajectory.correct
                start += len(raw)
                if on_progress:
                    on_progress(seen)
    return sorted(places.items(), key=lambda item: _sort_key(item[0], order)), correct, seen


def _parse(path: Path, number: int, raw: bytes) -> Trajectory:
    try:
        return Trajectory.model_validate_json(raw)
    except ValidationError as exc:
        raise DataError(
            f"{path}, line {number}: {exc.errors()[0]['msg']}.", "Each line must be one trajectory."
        ) from exc


def _copy(places: Sequence[tuple[str, _Place]], out: Path) -> None:
    """The lines as they are, in order; the file is there whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    hint = "Free some space or choose another --out, then run the same command again."
    with boundary(StorageError, f"writing {out}", hint), ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        target = stack.enter_context(partial.open("wb"))
        for _, place in places:
            if place.path not in files:
                files[place.path] = stack.enter_context(place.path.open("rb"))
            files[place.path].seek(place.start)
            target.write(files[place.path].read(place.length))
        target.flush()
        os.fsync(target.fileno())
        partial.replace(out)


def _errors(runs: Sequence[Path], finished: set[str]) -> Iterator[Trajectory]:
    """The last error of each rollout that no run finished."""
    last: dict[str, Trajectory] = {}
    for run in runs:
        path = run / "errors.jsonl"
        for item in read_trajectories(path) if path.is_file() else ():
            if item.id not in finished:
                last[item.id] = item
    yield from last.values()


def _missing_shards(runs: Sequence[Path]) -> tuple[str, ...]:
    given: set[Shard] = set()
    for run in runs:
        path = run / "config.json"
        text = read_json(path).get("shard") if path.is_file() else None
        if text is None:
            return ()  # a whole run: its tasks tell what is missing
        given.add(Shard.parse(text))
    counts = {shard.of for shard in given}
    if len(counts) != 1:
        return ()
    (of,) = counts
    return tuple(str(Shard(number, of)) for number in range(1, of + 1) if Shard(number, of) not in given)
