"""The trajectories of merged runs: each once, in the order of the tasks, as the lines they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic import ValidationError

from agentkd.errors import DataError, StorageError, boundary, first_problem
from agentkd.record import read_trajectories
from agentkd.trajectory import Trajectory

__all__ = ["LOG", "Found", "Place", "copy_lines", "find_trajectories", "open_errors"]

LOG = "trajectories.jsonl"


class Place(NamedTuple):
    """Where a line stands."""

    path: Path
    start: int
    """Bytes from the beginning."""
    length: int


class Found(NamedTuple):
    """The trajectories of several runs, each once."""

    places: dict[str, Place]
    """By id, in the order of tasks and samples."""
    correct: int
    seen: int
    """Lines, those that stand there twice included."""

    @property
    def duplicates(self) -> int:
        """Lines that stood in a run before."""
        return self.seen - len(self.places)

    def folders(self) -> dict[str, Path]:
        """Which folder each was taken from."""
        return {name: place.path.parent for name, place in self.places.items()}


def _sort_key(name: str, order: Mapping[str, int]) -> tuple[int, int]:
    """Place of the task of a trajectory's id, and its sample."""
    task, _, sample = name.rpartition("#")
    return order.get(task, len(order)), int(sample) if sample.isdigit() else 0


def find_trajectories(
    folders: Sequence[Path],
    order: Mapping[str, int],
    prefer: Mapping[str, Path] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Found:
    """Every trajectory once: of two with one id the first.

    Args:
        folders: each has a ``trajectories.jsonl``.
        order: of the tasks, by id.
        prefer: the folder that is to be taken, by id, where it has that trajectory.
        on_progress: called with the number of lines seen.

    Raises:
        DataError: a line is no trajectory (it is named).
    """
    places: dict[str, Place] = {}
    correct: dict[str, bool] = {}
    seen = 0
    for folder in folders:
        path, start = folder / LOG, 0
        with boundary(DataError, f"reading {path}"), path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break  # torn by a crash
                trajectory = _parse(path, number, raw)
                name, seen = trajectory.id, seen + 1
                first = name not in places
                if first or (prefer and prefer.get(name) == folder != places[name].path.parent):
                    places[name], correct[name] = Place(path, start, len(raw)), trajectory.correct
                start += len(raw)
                if on_progress:
                    on_progress(seen)
    ordered = dict(sorted(places.items(), key=lambda item: _sort_key(item[0], order)))
    return Found(ordered, sum(correct.values()), seen)


def _parse(path: Path, number: int, raw: bytes) -> Trajectory:
    try:
        return Trajectory.model_validate_json(raw)
    except ValidationError as exc:
        raise DataError(
            f"{path}, line {number}: {first_problem(exc)}.", "Each line must be one trajectory."
        ) from exc


def copy_lines(found: Found, out: Path) -> None:
    """The lines as they are, in order; the file is there whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    hint = "Free some space or choose another --out, then run the same command again."
    with boundary(StorageError, f"writing {out}", hint), ExitStack() as stack:
        out.parent.mkdir(parents=True, exist_ok=True)
        files: dict[Path, BinaryIO] = {}
        target = stack.enter_context(partial.open("wb"))
        for place in found.places.values():
            if place.path not in files:
                files[place.path] = stack.enter_context(place.path.open("rb"))
            files[place.path].seek(place.start)
            target.write(files[place.path].read(place.length))
        target.flush()
        os.fsync(target.fileno())
        partial.replace(out)


def open_errors(folders: Sequence[Path], found: Found) -> Iterator[Trajectory]:
    """The last error of each rollout that no run finished."""
    last: dict[str, Trajectory] = {}
    for folder in folders:
        path = folder / "errors.jsonl"
        for item in read_trajectories(path) if path.is_file() else ():
            if item.id not in found.places:
                last[item.id] = item
    yield from last.values()
