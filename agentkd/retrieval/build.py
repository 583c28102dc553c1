"""Building an index folder, adding to it and deleting from it. See :mod:`agentkd.retrieval.manifest`.

A build writes the passages, encodes them in pieces that survive a crash, makes what is searched,
and only then names all of it in a new manifest. A vector is made once: adding encodes what is new,
deleting marks rows, and when a fifth of the rows is marked the rest is copied into one segment.
Words are indexed anew each time, so that BM25 scores as if the index had just been built.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agentkd.errors import ConfigError, DataError, StorageError, boundary
from agentkd.retrieval import Passage
from agentkd.retrieval.ann import AnnKind, choose_kind
from agentkd.retrieval.encoder import Encoder, load_encoder
from agentkd.retrieval.manifest import (
    EncoderInfo,
    IndexConfig,
    Manifest,
    SegmentInfo,
    builder_lock,
    describe_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from agentkd.retrieval.probe import check_probe
from agentkd.retrieval.segment import VECTORS, Segment, passage_line, write_passages
from agentkd.retrieval.staging import UNFINISHED, OnProgress, Staged, stage
from agentkd.retrieval.structure import alive, read_dead, write_vectors, write_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

__all__ = ["Built", "IndexBuilder"]

COMPACT_SHARE = 0.2
"""Share of deleted rows from which on the rest is copied together."""
_BLOCK = 16_384


class Built(NamedTuple):
    """What a build did."""

    manifest: Manifest
    added: int
    deleted: int
    encoded: int
    """Vectors made now; fewer than ``added`` when an unfinished build was gone on with."""


class IndexBuilder:
    """The one who writes an index folder.

    Args:
        folder: the index.
        encoder: used instead of loading the one that the settings name.
        on_progress: see :data:`agentkd.retrieval.staging.OnProgress`.
    """

    def __init__(
        self, folder: Path, encoder: Encoder | None = None, on_progress: OnProgress | None = None
    ) -> None:
        self.folder, self._encoder = Path(folder), encoder
        self._tell: OnProgress = on_progress or (lambda what, done, total: None)

    def build(
        self, passages: Iterable[Passage], config: IndexConfig, *, source: str = "", replace: bool = False
    ) -> Built:
        """A new index; an unfinished one of the same passages and encoder is gone on with.

        Raises:
            ConfigError: another process builds there, or the folder holds an index and ``replace``
                is not set.
            DataError: no passages, or an id twice.
        """
        with builder_lock(self.folder):
            old = self._open() if (self.folder / "manifest.json").is_file() else None
            if old is None:
                tidy(self.folder, None)
            if old is not None and not replace:
                raise ConfigError(
                    f"{self.folder} holds an index already.", "Choose another folder, or replace it."
                )
            staged = self._stage(passages, config, None)
            if staged is None:
                raise _empty(source)
            return _Commit(self, config, old, []).run(staged, source, [])

    def add(self, passages: Iterable[Passage], *, source: str = "") -> Built:
        """Add passages with new ids.

        Raises:
            DataError: no passages, or an id that the index has.
        """
        with builder_lock(self.folder):
            old = self._open()
            taken = [passage.id for _, passage in self._live(old)]
            staged = self._stage(passages, old.config, old, taken)
            if staged is None:
                raise _empty(source)
            return _Commit(self, old.config, old, old.segments).run(staged, source, [])

    def sync(self, passages: Iterable[Passage], *, source: str = "") -> Built:
        """Make the index hold exactly these passages: new and changed ones come in, missing ones go.

        Raises:
            DataError: no passages, or an id twice.
        """
        with builder_lock(self.folder):
            old = self._open()
            rows, lines = {}, {}
            for row, passage in self._live(old):
                rows[passage.id], lines[row] = row, hash(passage_line(passage))
            seen: set[str] = set()
            stale: list[int] = []

            def fresh() -> Iterator[Passage]:
                for passage in passages:
                    if passage.id in seen:
                        raise DataError(
                            f"The passage id {passage.id!r} stands there twice.", "Make it unique."
                        )
                    seen.add(passage.id)
                    row = rows.get(passage.id)
                    if row is not None and lines[row] == hash(passage_line(passage)):
                        continue
                    if row is not None:
                        stale.append(row)
                    yield passage

            staged = self._stage(fresh(), old.config, old)
            if not seen:
                raise _empty(source)
            gone = [*stale, *(row for id, row in rows.items() if id not in seen)]
            if staged is None and not gone:
                return Built(old, 0, 0, 0)
            return _Commit(self, old.config, old, old.segments).run(staged, source, gone)

    def delete(self, ids: Iterable[str]) -> Built:
        """Delete passages.

        Raises:
            DataError: an id that the index does not have, or nothing would be left.
        """
        with builder_lock(self.folder):
            old, unwanted = self._open(), set(ids)
            found = {passage.id: row for row, passage in self._live(old) if passage.id in unwanted}
            if unknown := sorted(unwanted - set(found)):
                more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
                raise DataError(f"The index has no passage {unknown[0]!r}{more}.", "Nothing was deleted.")
            if not found:
                return Built(old, 0, 0, 0)
            return _Commit(self, old.config, old, old.segments).run(None, "", list(found.values()))

    def _open(self) -> Manifest:
        manifest = read_manifest(self.folder)
        verify_files(self.folder, manifest, checksums=False)
        tidy(self.folder, manifest)
        return manifest

    def _live(self, manifest: Manifest) -> Iterator[tuple[int, Passage]]:
        segments = [Segment(self.folder / info.name) for info in manifest.segments]
        return alive(segments, read_dead(self.folder / manifest.search_folder))

    def _stage(
        self,
        passages: Iterable[Passage],
        config: IndexConfig,
        old: Manifest | None,
        taken: Iterable[str] = (),
    ) -> Staged | None:
        if config.kind == "bm25":
            return stage(self.folder, passages, None, self._tell, taken=taken)
        if self._encoder is None:
            assert config.encoder is not None
            self._tell("loading the encoder", 0, None)
            self._encoder = load_encoder(
                config.encoder, query_prefix=config.query_prefix, passage_prefix=config.passage_prefix
            )
        if old is not None and old.encoder is not None:
            check_probe(self.folder / old.search_folder, self._encoder, old.encoder.name)
        return stage(self.folder, passages, self._encoder, self._tell, taken=taken)


def _empty(source: str) -> DataError:
    return DataError(
        f"{source or 'The corpus'} has no passages.",
        "Give documents with text in them, or at least one line of JSON.",
    )


class _Commit:
    """Makes what is searched over old and new segments, then names all of it in a manifest."""

    def __init__(
        self, builder: IndexBuilder, config: IndexConfig, old: Manifest | None, kept: Sequence[SegmentInfo]
    ) -> None:
        self.folder, self._tell, self._encoder = builder.folder, builder._tell, builder._encoder
        self.config, self.old, self.kept = config, old, list(kept)
        self.generation = old.generation + 1 if old else 1

    def run(self, staged: Staged | None, source: str, gone: Sequence[int]) -> Built:
        """Take a new segment in and pass over more rows."""
        dimension = self._dimension()
        segments = [Segment(self.folder / info.name, dimension) for info in self.kept]
        infos = list(self.kept)
        if staged is not None:
            segments.append(staged)
            infos.append(SegmentInfo(name=self._name("segment"), rows=staged.rows, source=source))
        dead, rows = self._dead(gone), sum(segment.rows for segment in segments)
        if len(dead) >= rows:
            raise DataError("No passage would be left.", "Delete the folder of the index instead.")
        base = self._base()
        if len(dead) > COMPACT_SHARE * rows:
            infos = [self._compact(segments, dead, infos)]
            segments, dead, base = [Segment(self.folder / infos[0].name, dimension)], dead[:0], None
        kind = self._search_files(segments, dead, base)
        if staged is not None:
            with boundary(StorageError, f"writing {self.folder}"):
                staged.move(self.folder / self._name("segment"))
        manifest = self._manifest(infos, kind, len(dead))
        write_manifest(self.folder, manifest)
        tidy(self.folder, manifest)
        added = staged.rows if staged else 0
        return Built(manifest, added, len(gone), staged.encoded if staged else 0)

    def _name(self, part: str) -> str:
        return f"{part}-{self.generation:06d}"

    def _dimension(self) -> int | None:
        if self.config.kind == "bm25":
            return None
        if self._encoder is not None:
            return self._encoder.dimension
        assert self.old is not None
        assert self.old.encoder is not None
        return self.old.encoder.dimension

    def _dead(self, gone: Sequence[int]) -> Rows:
        import numpy as np

        rows = list(gone)
        if self.old and self.kept:
            rows += read_dead(self.folder / self.old.search_folder).tolist()
        return np.unique(np.array(rows, np.int64))

    def _base(self) -> tuple[Path, AnnKind] | None:
        """The vectors of the kept segments, where there are any."""
        if not self.kept or self.old is None or self.old.ann is None:
            return None
        return self.folder / self.old.search_folder, self.old.ann

    def _compact(self, segments: list[Segment], dead: Rows, infos: list[SegmentInfo]) -> SegmentInfo:
        """Copy all rows that are not passed over into one segment."""
        import numpy as np

        self._tell("copying what is left", 0, None)
        name = self._name("segment") + "-joined"
        rows = write_passages(self.folder / name, (passage for _, passage in alive(segments, dead)))
        if segments[0].dimension is not None:
            first, gone = 0, set(dead.tolist())
            with (
                boundary(StorageError, f"writing {self.folder / name}"),
                (self.folder / name / VECTORS).open("wb") as file,
            ):
                for segment in segments:
                    for begin in range(0, segment.rows, _BLOCK):
                        end = min(begin + _BLOCK, segment.rows)
                        keep = [row for row in range(end - begin) if first + begin + row not in gone]
                        file.write(np.ascontiguousarray(segment.vectors(begin, end)[keep]).tobytes())
                    first += segment.rows
        return SegmentInfo(name=name, rows=rows, source=infos[0].source)

    def _search_files(
        self, segments: list[Segment], dead: Rows, base: tuple[Path, AnnKind] | None
    ) -> AnnKind | None:
        folder = self.folder / self._name("search")
        write_words(folder, segments, dead, self._tell)
        if self.config.kind == "bm25":
            return None
        rows = sum(segment.rows for segment in segments)
        kind = choose_kind(rows)[0] if self.config.ann == "auto" else self.config.ann
        if self.old and self.kept:
            probe: Path | Encoder = self.folder / self.old.search_folder
        else:
            assert self._encoder is not None
            probe = self._encoder
        write_vectors(folder, segments, kind, base, probe, self._tell)
        return kind

    def _manifest(self, infos: list[SegmentInfo], kind: AnnKind | None, deleted: int) -> Manifest:
        from agentkd import __version__

        encoder = self.old.encoder if self.old and self.kept else None
        if self._encoder is not None and self.config.kind != "bm25":
            encoder = EncoderInfo(name=self._encoder.name, dimension=self._encoder.dimension)
        self._tell("writing checksums", 0, None)
        parts = [*(info.name for info in infos), self._name("search")]
        return Manifest(
            generation=self.generation,
            config=self.config,
            encoder=encoder,
            ann=kind,
            segments=tuple(infos),
            deleted=deleted,
            files=describe_files(self.folder, parts, self.old.files if self.old else None),
            made_by=__version__,
        )


def tidy(folder: Path, manifest: Manifest | None) -> None:
    """Remove folders that the manifest does not name: of earlier generations, or left by a crash."""
    named = {Path(name).parts[0] for name in manifest.files} if manifest else set()
    for path in [*folder.glob("segment-*"), *folder.glob("search-*")]:
        if path.is_dir() and path.name not in named:
            shutil.rmtree(path)
    if not (folder / UNFINISHED / "state.json").is_file():
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
