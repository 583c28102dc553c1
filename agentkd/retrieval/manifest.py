"""The manifest of an index folder: what belongs to it, of what size and content.

::

    INDEX/manifest.json       written last and renamed into place: what it does not name is not there
    INDEX/segment-000001/     passages.jsonl, offsets.npy, vectors.f32: never changed once named
    INDEX/search-000001/      bm25/, rows.npy, dead.npy, dense.faiss, probe.npy: what is searched
    INDEX/unfinished/         a build under way: passages and the vectors encoded so far
    INDEX/.lock               held by the one process that builds

Adding and deleting write new folders and then a new manifest; a reader keeps the files that it opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentkd.errors import ConfigError, RetrievalError, StorageError, boundary, first_problem
from agentkd.record import file_hash
from agentkd.retrieval.ann import AnnKind

__all__ = [
    "FORMAT_VERSION",
    "EncoderInfo",
    "FileInfo",
    "IndexConfig",
    "Manifest",
    "SegmentInfo",
    "builder_lock",
    "describe_files",
    "is_index",
    "read_manifest",
    "verify_files",
    "write_manifest",
]

FORMAT_VERSION = 1
"""Raised when an older agentkd could not read what a newer one writes."""
_NAME, _LOCK = "manifest.json", ".lock"
_REBUILD = "Build the index anew, or fetch it again."

SearchKind = Literal["bm25", "dense", "hybrid"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IndexConfig(_Part):
    """How an index is searched and what it is made with."""

    kind: SearchKind = "bm25"
    """"bm25" needs no torch; "dense" searches vectors; "hybrid" does both and fuses the ranks."""
    encoder: str | None = None
    """A sentence-transformers model by name or folder; "minilm" where one is needed and none is named."""
    query_prefix: str | None = None
    """Text before each query; None takes what the model was trained with."""
    passage_prefix: str | None = None
    """Text before each passage; None takes what the model was trained with."""
    ann: Literal["auto"] | AnnKind = "auto"
    """Kind of vector index; "auto" chooses by the number of passages."""

    @model_validator(mode="before")
    @classmethod
    def _default_encoder(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("kind", "bm25") != "bm25" and not values.get("encoder"):
            return {**values, "encoder": "minilm"}
        return values

    @model_validator(mode="after")
    def _no_encoder_for_words(self) -> Self:
        if self.kind == "bm25" and self.encoder is not None:
            raise ValueError('an encoder goes with kind "dense" or "hybrid"')
        return self


class FileInfo(_Part):
    """A file as it was written."""

    bytes: int
    sha256: str


class SegmentInfo(_Part):
    """Passages that were added together."""

    name: str
    """Its folder."""
    rows: int = Field(ge=1)
    source: str = ""
    """Where the passages came from."""


class EncoderInfo(_Part):
    """The encoder that made the vectors."""

    name: str
    dimension: int = Field(ge=1)
    """Numbers of a vector."""


class Manifest(_Part):
    """See the module."""

    format: Literal["agentkd-index"] = "agentkd-index"
    version: int = FORMAT_VERSION
    generation: int = Field(ge=1)
    """Counts the builds, additions and deletions."""
    config: IndexConfig
    encoder: EncoderInfo | None = None
    ann: AnnKind | None = None
    """The kind of vector index that was chosen."""
    segments: tuple[SegmentInfo, ...] = Field(min_length=1)
    deleted: int = Field(default=0, ge=0)
    """Passages that are still in a segment but not found any more."""
    files: dict[str, FileInfo]
    """Every file that belongs to the index, by its path below the folder."""
    made_by: str = ""
    """Version of agentkd."""

    @property
    def rows(self) -> int:
        """Passages in the segments, deleted ones too."""
        return sum(segment.rows for segment in self.segments)

    @property
    def passages(self) -> int:
        """Passages that can be found."""
        return self.rows - self.deleted

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(info.bytes for info in self.files.values())

    @property
    def search_folder(self) -> str:
        return f"search-{self.generation:06d}"

    @property
    def identity(self) -> str:
        """Changes with the passages that can be found and with the way they are searched."""
        parts = [
            self.config.model_dump_json(),
            *(self.files[f"{segment.name}/passages.jsonl"].sha256 for segment in self.segments),
            self.files[f"{self.search_folder}/dead.npy"].sha256,
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_index(path: Path) -> bool:
    """Whether a folder is one of an index, finished or not."""
    return (path / _NAME).is_file() or (path / _LOCK).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest.

    Raises:
        RetrievalError: no index there, an unfinished one, one from a newer version, or a
            manifest that is none.
    """
    path = folder / _NAME
    if not path.is_file():
        if (folder / "unfinished").is_dir():
            raise RetrievalError(
                f"The index {folder} is not finished.",
                "Run the same `agentkd index` command again: it goes on.",
            )
        raise RetrievalError(
            f"There is no index in {folder}.", f"Make one by: agentkd index SOURCE --out {folder}."
        )
    with boundary(RetrievalError, f"reading {path}", _REBUILD):
        content = json.loads(path.read_text(encoding="utf-8"))
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise RetrievalError(
            f"The index {folder} is of format {version}; this agentkd reads up to {FORMAT_VERSION}.",
            "Upgrade agentkd, or build the index anew.",
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as exc:
        raise RetrievalError(f"{path}: {first_problem(exc)}.", _REBUILD) from exc


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in place, durably; from now on it is the index."""
    path = folder / _NAME
    with boundary(StorageError, f"writing {path}", "Free some space, then run the same command again."):
        for name in manifest.files:
            _sync(folder / name)
        for parent in {(folder / name).parent for name in manifest.files}:
            _sync(parent)
        partial = path.with_name(_NAME + ".partial")
        partial.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        _sync(partial)
        partial.replace(path)
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_files(
    folder: Path, parts: Iterable[str], known: dict[str, FileInfo] | None = None
) -> dict[str, FileInfo]:
    """Size and SHA-256 of every file below some of the subfolders; ``known`` ones are not read again."""
    found: dict[str, FileInfo] = {}
    for part in parts:
        for path in sorted((folder / part).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file():
                found[name] = (known or {}).get(name) or FileInfo(
                    bytes=path.stat().st_size, sha256=file_hash(path)
                )
    return found


def verify_files(folder: Path, manifest: Manifest, *, checksums: bool) -> None:
    """Compare the files with the manifest: always their sizes, and their content if asked.

    Raises:
        RetrievalError: a file is missing, cut short or changed.
    """
    for name, info in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise RetrievalError(f"The manifest of {folder} names a file outside it: {name}.", _REBUILD)
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise RetrievalError(f"{path} is missing.", _REBUILD)
        if size != info.bytes:
            raise RetrievalError(f"{path} has {size:,} bytes instead of {info.bytes:,}.", _REBUILD)
        if checksums and file_hash(path) != info.sha256:
            raise RetrievalError(f"{path} was changed: its checksum is another.", _REBUILD)


@contextmanager
def builder_lock(folder: Path) -> Iterator[None]:
    """Be the only builder of a folder; the lock ends with its process.

    Raises:
        ConfigError: another process builds there, or the folder holds something else.
    """
    import fcntl

    if folder.is_dir() and not is_index(folder) and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no index.", "Choose another --out.")
    with boundary(StorageError, f"opening {folder}", "Choose a folder that can be written."):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another process is building {folder}.", "Wait for it, stop it, or choose another --out."
            ) from None
        yield
