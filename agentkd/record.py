"""Records on disk: JSON Lines in, JSON Lines out, nothing lost.

Whole files are written under a temporary name and renamed. Append-only files are written one
complete line at a time and repaired when they are opened: a line torn by a crash is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ValidationError

from agentkd.errors import ConfigError, DataError, StorageError, boundary, first_problem
from agentkd.task import Task
from agentkd.trajectory import Trajectory

__all__ = [
    "AppendLog",
    "file_hash",
    "iter_jsonl",
    "load_tasks",
    "provenance",
    "read_json",
    "read_trajectories",
    "write_json",
    "write_jsonl",
    "write_manifest",
    "write_text",
]

R = TypeVar("R", bound=BaseModel)

_WRITE_HINT = "Choose a folder that can be written, or free some space, then run the same command again."


def iter_jsonl(path: Path, model: type[R], *, skip_torn: bool = False) -> Iterator[R]:
    """Read records one by one.

    Args:
        path: a JSON Lines file, UTF-8.
        model: what a line is.
        skip_torn: pass over a last line that has no line end (a crash cut it off).

    Raises:
        DataError: no such file, not UTF-8, or a line that is not a ``model``; names the line.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.", "Check the path, or run the stage that writes it first.")
    with boundary(DataError, f"reading {path}"), path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if skip_torn and not raw.endswith(b"\n"):
                return
            if raw.strip():
                yield _parse(path, number, raw, model)


def _parse(path: Path, number: int, raw: bytes, model: type[R]) -> R:
    try:
        return model.model_validate_json(raw.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise DataError(
            f"{path}, line {number}: not UTF-8 ({exc.reason}).", "Save the file as UTF-8."
        ) from exc
    except ValidationError as exc:
        raise DataError(
            f"{path}, line {number}: {first_problem(exc)}.",
            f"Each line must be one JSON object that is a {model.__name__}.",
        ) from exc


def load_tasks(path: Path | str) -> list[Task]:
    """Read ``tasks.jsonl``.

    Raises:
        DataError: malformed (the line is named), empty, or an id stands there twice.
    """
    path = Path(path)
    tasks = list(iter_jsonl(path, Task))
    if not tasks:
        raise DataError(
            f"{path} has no tasks.", 'Write one JSON object a line: {"id", "question", "answer"}.'
        )
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise DataError(f"{path}: the task id {task.id!r} stands there twice.", "Make the ids unique.")
        seen.add(task.id)
    return tasks


def read_trajectories(path: Path | str) -> list[Trajectory]:
    """Read ``trajectories.jsonl``; a torn last line is passed over. See :func:`iter_jsonl`."""
    path = Path(path)
    return list(iter_jsonl(path, Trajectory, skip_torn=True))


def _line(record: BaseModel) -> str:
    with boundary(DataError, f"writing a {type(record).__name__} as JSON"):
        return record.model_dump_json() + "\n"


def write_jsonl(path: Path, records: Iterable[BaseModel]) -> int:
    """Write all records at once, atomically; returns how many."""
    count = 0
    with boundary(StorageError, f"writing {path}", _WRITE_HINT):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(_line(record))
                count += 1
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return count


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with boundary(StorageError, f"writing {path}", _WRITE_HINT):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power failure may leave the new name with nothing behind it
        partial.replace(path)


def read_json(path: Path) -> Any:
    """Read one JSON document.

    Raises:
        DataError: missing or malformed.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.", "Check the path, or run the stage that writes it first.")
    with boundary(DataError, f"reading {path}"):
        return json.loads(path.read_text(encoding="utf-8"))


class AppendLog:
    """An append-only JSON Lines file with one writer.

    On opening, a torn last line is cut off, and the file is locked so that a second writer is
    refused; the lock goes with its process. Threads may append at the same time: those that wait
    for the disk share one flush. After a write that failed nothing more is written: what the disk
    took of the line is cut off, so that no later line is glued to it.

    Args:
        path: the file; made when there is none.
        fsync: wait until the disk has a record. Without it a record outlives the process, but not
            a power failure.

    Raises:
        ConfigError: another process is writing the file.

    Attributes:
        failed: whether a write has failed; the file can be opened anew.
    """

    def __init__(self, path: Path, *, fsync: bool = True) -> None:
        import fcntl

        self.path = path
        self.fsync = fsync
        self._write_lock, self._sync_lock = threading.Lock(), threading.Lock()
        self._written = self._synced = 0
        self.failed = False
        with boundary(StorageError, f"opening {path}", _WRITE_HINT):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer, which would try to write what is left of a failed line again later.
            self._file = path.open("ab", buffering=0)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise ConfigError(
                    f"Another process is writing {path}.", "Wait for it, stop it, or choose another --out."
                ) from None
            self._end = self._repaired()

    def _repaired(self) -> int:
        """Cut off a torn last line; returns where the file ends then, in bytes."""
        end = size = self._file.seek(0, os.SEEK_END)
        with self.path.open("rb") as file:
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
        if end != size:
            self._file.truncate(end)
        return end

    def append(self, record: BaseModel, *, wait: bool = True) -> None:
        """Write one record; it is durable on return, or with the next one when ``wait`` is False."""
        self.append_line(_line(record), wait=wait)

    def append_line(self, line: str, *, wait: bool = True) -> None:
        """The same for a record that is a line of JSON already, its line end included."""
        with boundary(StorageError, f"writing {self.path}", _WRITE_HINT):
            with self._write_lock:
                self._refuse_if_failed()
                self._write(line.encode("utf-8"))
                self._written += 1
                mine = self._written
            if self.fsync and wait:
                self._sync(mine)

    def _refuse_if_failed(self) -> None:
        if self.failed:
            raise StorageError(f"Nothing more is written to {self.path}: a write has failed.", _WRITE_HINT)

    def _write(self, data: bytes) -> None:
        """All of it or nothing, whatever ends it."""
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except BaseException as exc:
            self.failed = isinstance(exc, OSError)
            try:
                self._file.truncate(self._end)
            except OSError:
                self.failed = True  # the torn line is cut off when the file is opened again
            raise
        self._end += len(data)

    def _sync(self, mine: int) -> None:
        with self._sync_lock:
            if self._synced < mine:  # else a flush that began after our write has covered it
                upto = self._written
                self._refuse_if_failed()
                try:
                    os.fsync(self._file.fileno())
                except OSError:
                    self.failed = True  # asked again, the system may say that all is well
                    raise
                self._synced = upto

    def close(self) -> None:
        """Let go of the file.

        Raises:
            StorageError: the system says only now that it could not write; what failed before has
                been said.
        """
        try:
            with boundary(StorageError, f"writing {self.path}", _WRITE_HINT):
                self._file.close()
        except StorageError:
            if not self.failed:
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StorageError:
            if kind is None:  # else it is the full disk again, which has been reported
                raise


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with boundary(DataError, f"reading {path}"), path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(
    folder: Path,
    *,
    stage: str,
    config: dict[str, Any],
    counts: dict[str, Any],
    inputs: Iterable[Path] = (),
    outputs: Iterable[Path] = (),
) -> None:
    """Close a run folder: ``manifest.json``, written last.

    Args:
        folder: the run folder.
        stage: "collect", "filter", ...
        config: the resolved settings.
        counts: what came out.
        inputs, outputs: files whose SHA-256 is recorded; those in the folder by their name alone, so
            that a folder says the same wherever it lies.
    """
    write_json(
        folder / "manifest.json",
        {
            "schema_version": 1,
            "stage": stage,
            "config": config,
            "counts": counts,
            "inputs": {_name_in(folder, path): file_hash(path) for path in inputs},
            "outputs": {path.name: file_hash(path) for path in outputs},
            **provenance(),
        },
    )


def _name_in(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


@cache
def provenance() -> dict[str, Any]:
    """Versions of everything that matters, and the git commit where there is one."""
    versions = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in ("agentkd", "smolagents", "openai", "torch", "transformers", "peft", "vllm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "commit": _commit()}


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
