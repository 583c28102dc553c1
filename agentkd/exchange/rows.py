"""Rows on disk: JSON Lines, JSON, Parquet, folders of JSON files and of ``datasets``.

Reading names the row that is wrong; writing is whole or nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from agentkd.errors import ConfigError, DataError, StorageError, boundary
from agentkd.exchange.draft import Container, Row
from agentkd.trajectory import valid_text

__all__ = ["container_of", "read_rows", "write_rows"]

LONGEST_ROW = 64 * 2**20
"""Bytes of one row; a longer line is a mistake (a file without line ends), not a trajectory."""

_NEEDS = "Install it by: pip install 'agentkd[tasks]'."
_WRITE_HINT = "Choose a place that can be written, or free some space, then run the same command again."


def read_rows(
    path: Path,
    split: Callable[[str], list[str]] | None = None,
    unwrap: Callable[[Row], list[Row]] | None = None,
) -> Iterator[tuple[str, Row]]:
    """Read ``(where, row)``, where "line 3", "row 3" or the name of a file.

    Args:
        path: a file, or a folder of JSON files or of ``datasets``.
        split: cuts the text of a ``.txt`` file into those of its rows; each becomes ``{"text": ...}``.
        unwrap: takes the rows out of a ``.json`` file that is one document.

    Raises:
        DataError: nothing there, empty, not UTF-8, not JSON, not an object, or a row too long.
        ConfigError: reading it needs a package that is not installed.
    """
    if not path.exists():
        raise DataError(f"There is no file {path}.", "Check the path.")
    count = 0
    with boundary(DataError, f"reading {path}"):
        document = unwrap if path.suffix == ".json" else None
        for where, row in _unwrapped(path, document) if document else _read(path, split):
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, {where}: not a JSON object but {_kind(row)}.",
                    "Each row must be one JSON object; is this the right --format?",
                )
            count += 1
            yield where, row
    if not count:
        raise DataError(f"{path} is empty.", "An import needs at least one row.")


def _read(path: Path, split: Callable[[str], list[str]] | None) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".json":
        return _read_json(path)
    if path.suffix == ".txt" and split:
        texts = split(_text(path, "file", path.read_bytes()))
        return ((f"transcript {number}", {"text": text}) for number, text in enumerate(texts, 1))
    return _read_lines(path)


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with path.open("rb") as file:
        while raw := file.readline(LONGEST_ROW + 1):
            number += 1
            if len(raw) > LONGEST_ROW:
                raise DataError(
                    f"{path}, line {number}: longer than {LONGEST_ROW // 2**20} MiB.",
                    "JSON Lines has one object a line; a .json file may hold a list.",
                )
            if raw.strip():
                yield f"line {number}", _parse(path, f"line {number}", raw)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    raw = path.read_bytes()
    if not raw.strip():
        return
    value = _parse(path, "file", raw)
    if isinstance(value, list) and not _is_memory(value):
        for number, row in enumerate(value, 1):
            yield f"row {number}", row
    else:
        yield "file", {"steps": value} if isinstance(value, list) else value


def _unwrapped(path: Path, unwrap: Callable[[Row], list[Row]]) -> Iterator[tuple[str, Any]]:
    for where, document in _read(path, None):
        try:
            rows = unwrap(document)
        except (KeyError, TypeError, ValueError) as exc:
            what = f"no {exc.args[0]!r}" if isinstance(exc, KeyError) else str(exc)
            raise DataError(f"{path}, {where}: not such a document ({what}).", "See --format.") from exc
        for number, row in enumerate(rows, 1):
            yield f"sample {number}" if where == "file" else f"{where}, sample {number}", row


def _is_memory(value: list[Any]) -> bool:
    """A list of smolagents' steps is one run, not many rows."""
    return any(isinstance(item, dict) and "step_number" in item for item in value)


def _read_folder(path: Path) -> Iterator[tuple[str, Any]]:
    if (path / "dataset_dict.json").is_file():
        raise DataError(f"{path} holds several splits.", f"Give one of them, for instance {path / 'train'}.")
    if (path / "dataset_info.json").is_file() or (path / "state.json").is_file():
        with _package("datasets"):
            import datasets
        for number, row in enumerate(datasets.load_from_disk(str(path)), 1):
            yield f"row {number}", dict(row)
        return
    for file in sorted(path.glob("*.json")):
        for where, row in _read_json(file):
            yield f"{file.name}, {where}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    with _package("pyarrow"):
        import pyarrow.parquet
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


def _parse(path: Path, where: str, raw: bytes) -> Any:
    text = _text(path, where, raw)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{path}, {where}: not JSON ({exc}).", "Is this the right --format?") from exc
    return _clean(value) if "\\ud" in text.lower() else value


def _text(path: Path, where: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}, {where}: not UTF-8 ({exc.reason}).", "Save the file as UTF-8.") from exc


def _clean(value: Any) -> Any:
    """Without halves of surrogate pairs, which no file can hold."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, dict):
        return {valid_text(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


def _package(name: str) -> Any:
    return boundary(ConfigError, f"importing {name}", _NEEDS)


def container_of(path: Path, allowed: Iterable[Container]) -> Container:
    """Which container a path means.

    Raises:
        ConfigError: this format is not written so.
    """
    choices = list(allowed)
    folders = [choice for choice in choices if not choice.startswith(".")]
    is_file = path.suffix in (".jsonl", ".json", ".parquet", ".txt")
    chosen: str = path.suffix if is_file else next(iter(folders), "")
    if chosen not in choices:
        names = [choice if choice.startswith(".") else "a folder" for choice in choices]
        raise ConfigError(
            f"This format is not written to {path.name!r}.", f"--out may be: {', '.join(names)}."
        )
    return chosen  # type: ignore[return-value]


def write_rows(
    path: Path,
    container: Container,
    rows: Iterable[Row],
    name_key: str = "id",
    wrap: Callable[[list[Row]], Row] | None = None,
) -> None:
    """Write all rows under a temporary name, and rename it when all are there.

    Args:
        path: file or folder.
        container: see :func:`container_of`.
        rows: taken one by one where the container allows it.
        name_key: names the files of a folder of JSON files.
        wrap: makes one document of all rows of a ``.json`` file.

    Raises:
        StorageError: the disk is full or not writable.
        ConfigError: the folder exists already and is not empty, or a package is missing.
    """
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{path} is a folder that is not empty.", "Choose another --out.")
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    with boundary(StorageError, f"writing {path}", _WRITE_HINT):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if wrap is not None and container == ".json":
                document = json.dumps(wrap(list(rows)), ensure_ascii=False) + "\n"
                partial.write_text(document, encoding="utf-8")
            else:
                _WRITERS[container](partial, rows, name_key)
            if path.is_dir():
                path.rmdir()  # empty, see above
            partial.replace(path)
        finally:
            _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _dump(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False)


def _write_lines(path: Path, rows: Iterable[Row], name_key: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(_dump(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, rows: Iterable[Row], name_key: str) -> None:
    path.write_text(json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_text(path: Path, rows: Iterable[Row], name_key: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(row["text"] + "\n\n")


def _write_files(path: Path, rows: Iterable[Row], name_key: str) -> None:
    path.mkdir()
    for number, row in enumerate(rows, 1):
        name = re.sub(r"[^\w.-]+", "_", str(row.get(name_key) or ""))[:80]
        text = json.dumps(row, ensure_ascii=False, indent=1) + "\n"
        (path / f"{number:06d}-{name}.json").write_text(text, encoding="utf-8")


def _write_parquet(path: Path, rows: Iterable[Row], name_key: str) -> None:
    with _package("pyarrow"):
        import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([_flat(row) for row in rows]), path)


def _write_dataset(path: Path, rows: Iterable[Row], name_key: str) -> None:
    with _package("datasets"):
        import datasets
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_list([_flat(row) for row in rows]).save_to_disk(str(path))
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _flat(row: Row) -> Row:
    """Objects as JSON strings: Arrow would give every row the union of all their fields."""
    return {key: _dump(value) if isinstance(value, dict) else value for key, value in row.items()}


_WRITERS = {
    ".jsonl": _write_lines,
    ".json": _write_json,
    ".txt": _write_text,
    ".parquet": _write_parquet,
    "files": _write_files,
    "dataset": _write_dataset,
}
