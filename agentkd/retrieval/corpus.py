"""From a source to passages: a folder or file of documents, JSON Lines, or a Hugging Face dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field

from agentkd.errors import ConfigError, DataError, boundary
from agentkd.retrieval import Passage
from agentkd.retrieval.document import SUFFIXES, read_document
from agentkd.retrieval.split import split_text
from agentkd.retrieval.wire import passage_of

__all__ = ["Source", "SourceConfig"]

MAX_LINE = 16 << 20
"""Bytes of a JSON line."""
_LINE_HINT = 'Write one JSON object a line: {"id": "...", "title": "...", "text": "..."}.'
_COLUMNS = {
    "id": ("id", "_id", "docid", "pid"),
    "title": ("title", "name"),
    "text": ("text", "contents", "content", "passage", "body"),
}


class SourceConfig(BaseModel):
    """How a source is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: int = Field(default=120, ge=8, le=100_000)
    """About how many words a passage has at most, where documents are split."""
    split: bool | None = None
    """Whether to split; by default documents and datasets are, and lines of JSON are passages already."""
    skip_unreadable: bool = False
    """Leave out documents that cannot be read, instead of stopping at the first."""


class Source:
    """Passages of what a user named; iterate over it, once.

    Args:
        name: a folder (its text, Markdown, HTML and PDF files, and those of its subfolders; not
            hidden ones), one such file, a ``.jsonl`` file, or ``hf:NAME[:CONFIG[:SPLIT]]`` with
            ``?text=COLUMN&title=COLUMN&id=COLUMN`` where the columns have other names.
        config: see :class:`SourceConfig`.

    Raises:
        ConfigError: there is nothing of that name, or it is not known how to read it.

    While iterating:
        DataError: what cannot be read, with its file and line.
    """

    def __init__(self, name: str, config: SourceConfig | None = None) -> None:
        self.name, self.config = (
            (name if name.startswith("hf:") else str(Path(name))),
            config or SourceConfig(),
        )
        self.skipped: list[str] = []
        """Documents that were left out, with the reason."""
        self.ignored = 0
        """Files of a folder that are of another kind."""
        path = Path(name)
        if name.startswith("hf:"):
            self._passages = _dataset(name[3:], self.config)
        elif path.is_dir():
            self._passages = self._folder(path)
        elif not path.is_file():
            raise ConfigError(
                f"There is no {name}.", "Give a folder of documents, a .jsonl file, or hf:NAME of a dataset."
            )
        elif path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
            self._passages = _lines(path, self.config)
        elif path.suffix.lower() in SUFFIXES:
            self._passages = self._document(path, path.name)
        else:
            raise ConfigError(
                f"It is not known how to read {name}.", f"These are: .jsonl, {', '.join(SUFFIXES)}."
            )

    def __iter__(self) -> Iterator[Passage]:
        return self._passages

    def _folder(self, folder: Path) -> Iterator[Passage]:
        for path in sorted(folder.rglob("*")):
            below = path.relative_to(folder)
            if not path.is_file() or any(part.startswith(".") for part in below.parts):
                continue
            if path.suffix.lower() == ".jsonl":
                yield from _lines(path, self.config)
            elif path.suffix.lower() in SUFFIXES:
                yield from self._document(path, below.as_posix())
            else:
                self.ignored += 1

    def _document(self, path: Path, name: str) -> Iterator[Passage]:
        try:
            parts = read_document(path)
        except DataError as exc:
            if not self.config.skip_unreadable:
                raise
            self.skipped.append(exc.message)
            return
        number = 0
        for title, text in parts:
            pieces = [text] if self.config.split is False else split_text(text, self.config.words)
            for piece in pieces:
                yield _passage(path, f"{name}#{number}", title, piece)
                number += 1


def _passage(where: object, id: str, title: str, text: str) -> Passage:
    """A passage that can be stored."""
    passage = Passage(id=id, title=title, text=text)
    try:
        f"{id}{title}{text}".encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{where}: the text of {id!r} has half a character in it.", "Mend the text.") from exc
    return passage


def _pieces(where: object, passage: Passage, config: SourceConfig, split: bool) -> Iterator[Passage]:
    """A record as it is, or in pieces ``id#0``, ``id#1`` where it is too long."""
    pieces = split_text(passage.text, config.words) if split else []
    if len(pieces) < 2:
        yield _passage(where, passage.id, passage.title, passage.text)
        return
    for number, piece in enumerate(pieces):
        yield _passage(where, f"{passage.id}#{number}", passage.title, piece)


def _lines(path: Path, config: SourceConfig) -> Iterator[Passage]:
    """``{id, title, text}`` or Search-R1's ``{id, contents}``, one a line."""
    with boundary(DataError, f"reading {path}"), path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(raw) > MAX_LINE:
                raise DataError(
                    f"{where}: longer than {MAX_LINE >> 20} MB.", "Cut long texts into passages, one a line."
                )
            if raw.strip():
                yield from _pieces(where, _parsed(where, raw), config, config.split is True)


def _parsed(where: str, raw: bytes) -> Passage:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        return passage_of(row)
    except UnicodeDecodeError as exc:
        raise DataError(f"{where}: not UTF-8 ({exc.reason}).", "Save the file as UTF-8.") from exc
    except json.JSONDecodeError as exc:
        raise DataError(f"{where}: not JSON ({exc.msg}).", _LINE_HINT) from exc
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{where}: {exc}.", _LINE_HINT) from exc


def _dataset(spec: str, config: SourceConfig) -> Iterator[Passage]:
    name, _, query = spec.partition("?")
    chosen = dict(parse_qsl(query))
    if unknown := sorted(set(chosen) - set(_COLUMNS)):
        raise ConfigError(
            f"hf:{spec} has an unknown option {unknown[0]!r}.", f"Known: {', '.join(_COLUMNS)}."
        )
    path, part, split = [*(piece or None for piece in name.split(":")), None, None][:3]
    if path is None:
        raise ConfigError(
            "The dataset's name is missing after 'hf:'.", "Write for instance hf:NAME?text=body."
        )
    try:
        from datasets import load_dataset
    except ImportError as exc:
        raise ConfigError(
            "datasets is not installed.", "Install it by: pip install 'agentkd[tasks]'."
        ) from exc
    hint = "Check its name, config and split, and the network."
    with boundary(ConfigError, f"loading the dataset {path}", hint):
        loaded = load_dataset(path, part)
    if split and split not in loaded:
        raise ConfigError(f"{path} has no split {split!r}.", f"It has: {', '.join(loaded)}.")
    return _rows(path, loaded, [split] if split else list(loaded), chosen, config)


def _rows(
    path: str, loaded: Any, splits: list[str], chosen: dict[str, str], config: SourceConfig
) -> Iterator[Passage]:
    for split in splits:
        columns = loaded[split].column_names
        role = {
            role: chosen.get(role) or next((name for name in usual if name in columns), None)
            for role, usual in _COLUMNS.items()
        }
        for name in [*chosen.values(), role["text"] or "text"]:
            if name not in columns:
                raise ConfigError(
                    f"{path} has no column {name!r}; it has {', '.join(columns)}.",
                    "Name it: hf:NAME?text=COLUMN.",
                )
        for number, row in enumerate(loaded[split]):
            where = f"{path}, split {split}, row {number}"
            values = {key: row[name] for key, name in role.items() if name}
            if values.get("id") is None:
                values["id"] = f"{split}-{number}"
            try:
                passage = passage_of(values)
            except ValueError as exc:
                raise DataError(f"{where}: {exc}.", "Name the columns by ?text=..&title=..&id=..") from exc
            yield from _pieces(where, passage, config, config.split is not False)
