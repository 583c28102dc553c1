"""The runs that are looked at: which files they are, and where in them each trajectory stands.

Only the rows of the list are kept in memory; a trajectory is read from its file when it is opened. A
file that grows is read on from where it was left, and a last line without its end is waited for.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentkd.errors import ConfigError, DataError, boundary
from agentkd.view.row import COLUMNS, Record, row_of, shown, texts

__all__ = ["Mask", "Run", "open_runs"]

Mask = Callable[[Record], dict[str, Any]]
"""Of a trajectory the tokens that are learnt: ``{"runs": [[text, weight], ...]}``, weight 0 for
context, or ``{"problem": why there are none}``."""

_FILES = ("trajectories.jsonl", "errors.jsonl", "kept.jsonl", "dropped.jsonl")
_DEEPEST = 3
"""Folders below the one that was named; a recipe's runs are in ``evaluate/NAME``."""
_CHANGED = "The file has changed: load the list again."
_IMPORT = (
    "Trajectories of other formats are shown once they are imported: "
    "agentkd import FILE --format NAME --out RUN."
)


@dataclass
class _File:
    """One file of a run, and how far it has been read."""

    path: Path
    inode: int = -1
    read: int = 0
    """Bytes, whole lines only."""
    lines: int = 0


@dataclass(frozen=True)
class _Place:
    path: Path
    offset: int
    length: int
    nested: bool
    """A line of ``dropped.jsonl``: the trajectory stands beside the reason."""


@dataclass
class Run:
    """The trajectories of one run."""

    name: str
    files: list[_File]
    manifest: Path | None = None
    """What closes the run's folder; None where a single file is looked at."""
    rows: list[list[Any]] = field(default_factory=list)
    """See :data:`agentkd.view.row.COLUMNS`."""
    problems: list[str] = field(default_factory=list)
    """What could not be read."""
    _places: list[_Place] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def refresh(self) -> bool:
        """Read what is new; True when there was something.

        A file that was replaced or cut is read again from its beginning.
        """
        with self._lock:
            if any(self._replaced(file) for file in self.files):
                self.rows, self._places, self.problems = [], [], []
                for file in self.files:
                    file.read = file.lines = 0
            read = [self._read(file) for file in self.files]  # each, whatever came of the one before
            return any(read)

    def _replaced(self, file: _File) -> bool:
        try:
            found = file.path.stat()
        except OSError:
            return file.read > 0
        return file.read > 0 and (found.st_ino != file.inode or found.st_size < file.read)

    def _read(self, file: _File) -> bool:
        before = file.read
        try:
            with boundary(DataError, f"reading {file.path}"), file.path.open("rb") as lines:
                file.inode = os.fstat(lines.fileno()).st_ino
                lines.seek(file.read)
                for raw in lines:
                    if not raw.endswith(b"\n") and not _whole(raw):
                        break  # it is being written, or was torn by a crash
                    file.lines += 1
                    if raw.strip():
                        self._take(file, raw)
                    file.read += len(raw)
        except DataError:
            if file.path.exists():
                raise
        return file.read > before

    def _take(self, file: _File, raw: bytes) -> None:
        nested = file.path.name == "dropped.jsonl"
        try:
            record = _parse(raw)
            verdict = "kept" if file.path.name == "kept.jsonl" else None
            if nested:
                record, verdict = record["trajectory"], str(record["reason"])
            if not isinstance(record, dict) or "steps" not in record:
                raise ValueError("not a trajectory")
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            what = f"no {exc.args[0]!r}" if isinstance(exc, KeyError) else str(exc)
            self.problems.append(f"{file.path.name}, line {file.lines}: {what[:200]}; it is left out.")
            return
        self.rows.append(row_of(len(self.rows), record, verdict))
        self._places.append(_Place(file.path, file.read, len(raw), nested))

    @property
    def open(self) -> bool:
        """Whether the run is still being written, or was stopped before its end."""
        return self.manifest is not None and not self.manifest.is_file()

    def record(self, number: int) -> Record:
        """One trajectory, as it stands in its file.

        Raises:
            DataError: there is no such one, or the file has changed under it.
        """
        if not 0 <= number < len(self._places):
            raise DataError(f"{self.name} has no trajectory {number}.", "Load the list again.")
        place = self._places[number]
        with boundary(DataError, f"reading {place.path}", _CHANGED), place.path.open("rb") as file:
            file.seek(place.offset)
            return _record(place, file.read(place.length))

    def find(self, text: str) -> Iterator[int]:
        """Numbers of the trajectories in which a text stands, in any case of its letters."""
        wanted = text.casefold()
        escaped = json.dumps(wanted)[1:-1].encode()
        for number, (place, raw) in enumerate(self._lines()):
            # Most lines are passed over without being parsed: where all is ASCII, its bytes tell.
            plain = raw.isascii() and b"\\u" not in raw and b"\\u" not in escaped
            if plain and escaped not in raw.lower():
                continue
            if any(wanted in part.casefold() for part in texts(_record(place, raw))):
                yield number

    def _lines(self) -> Iterator[tuple[_Place, bytes]]:
        places = list(self._places)
        with boundary(DataError, f"searching {self.name}", _CHANGED), ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in {at.path for at in places}}
            for place in places:
                files[place.path].seek(place.offset)
                yield place, files[place.path].read(place.length)

    def summary(self) -> dict[str, Any]:
        """What the page needs to list the run."""
        return {
            "name": self.name,
            "columns": COLUMNS,
            "rows": self.rows,
            "problems": self.problems,
            "open": self.open,
        }

    def detail(self, number: int) -> Record:
        """One trajectory as the page shows it."""
        return shown(self.record(number))


def _record(place: _Place, raw: bytes) -> Record:
    with boundary(DataError, f"reading {place.path}", _CHANGED):
        value = _parse(raw)
        record: Record = value["trajectory"] if place.nested else value
        return record


def _whole(raw: bytes) -> bool:
    """Whether a last line without its end lacks nothing else: no beginning of an object is JSON."""
    try:
        return isinstance(_parse(raw), dict)
    except (ValueError, RecursionError):
        return False


def _parse(raw: bytes) -> Any:
    """JSON, with null for NaN and infinity, which no browser takes."""
    return json.loads(raw, parse_constant=lambda _: None)


def open_runs(paths: list[Path]) -> list[Run]:
    """The runs at the paths, read.

    Args:
        paths: run folders, filter folders, evaluation folders, the folder of a whole recipe (all the runs
            in it), or single files of trajectories.

    Raises:
        ConfigError: nothing is there.
        DataError: there is no run, or nothing of a file could be read as a trajectory.
    """
    runs: list[Run] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"There is no {path}.", "Name a run folder or a trajectories.jsonl.")
        found = _runs_in(path)
        if not found:
            raise DataError(f"{path} holds no run.", _IMPORT)
        runs += found
    for run in runs:
        run.refresh()
        if run.problems and not run.rows:
            raise DataError(f"{run.files[0].path}: no trajectory in it ({run.problems[0]})", _IMPORT)
        if run.manifest is None and not run.rows:
            raise DataError(f"{run.files[0].path} holds no finished trajectory.", _IMPORT)
    _name_apart(runs)
    return runs


def _runs_in(path: Path) -> list[Run]:
    if path.is_file():
        return [Run(path.name if path.name not in _FILES else path.parent.name or path.name, [_File(path)])]
    own = _run(path, path.resolve().name)
    if own is not None:
        return [own]
    found = []
    for folder, inner, _ in os.walk(path):
        below = Path(folder).relative_to(path)
        if len(below.parts) >= _DEEPEST:
            inner.clear()
        inner.sort()
        run = _run(Path(folder), str(below))
        if run is not None:
            found.append(run)
    return sorted(found, key=_of_interest)


def _run(folder: Path, name: str) -> Run | None:
    files = [_File(folder / file) for file in _FILES if (folder / file).is_file()]
    begun = (folder / "tasks.jsonl").is_file() and (folder / "config.json").is_file()
    if not files and not begun:
        return None
    files = files or [_File(folder / "trajectories.jsonl")]
    return Run(name, files, folder / "manifest.json")


def _of_interest(run: Run) -> tuple[int, str]:
    """Evaluations first, then what was kept, then what was collected."""
    first = run.name.split("/")[0]
    return (0 if first == "evaluate" else 1 if run.files[0].path.name in _FILES[2:] else 2, run.name)


def _name_apart(runs: list[Run]) -> None:
    """Two runs of one name are told apart by their folders."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.files[0].path.parent)
