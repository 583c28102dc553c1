"""An index on disk: built once, opened memory-mapped, searched by words, by vectors or by both.

::

    index = Index.build("idx", passages, kind="hybrid")
    index = Index.open("idx")
    for hit in index.search(["Who founded Silver Harbor?"], k=5)[0]:
        print(hit.score, hit.passage.title)
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import ValidationError

from agentkd.errors import ConfigError, RetrievalError, first_problem
from agentkd.retrieval import Hit, Passage
from agentkd.retrieval.build import IndexBuilder
from agentkd.retrieval.encoder import Encoder, check_vectors, load_encoder
from agentkd.retrieval.manifest import IndexConfig, Manifest, SearchKind, read_manifest, verify_files
from agentkd.retrieval.probe import check_probe
from agentkd.retrieval.query import readable
from agentkd.retrieval.segment import Segment
from agentkd.retrieval.staging import OnProgress
from agentkd.retrieval.structure import Structure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Index"]


class Index:
    """A :class:`~agentkd.retrieval.Retriever` over an index folder. Threads may search it together.

    Made by :meth:`build` or :meth:`open`; :meth:`add` and :meth:`delete` change the folder, and
    this object with it. Other processes that have the index open keep what they opened.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, kind: SearchKind, encoder: Encoder | None = None
    ) -> None:
        self.folder, self.kind = folder, kind
        self._encoder, self._lock = encoder, threading.Lock()
        self._take(manifest)

    def _take(self, manifest: Manifest) -> None:
        ann = None if self.kind == "bm25" else manifest.ann
        self._structure = Structure(self.folder / manifest.search_folder, ann)
        self._segments = [Segment(self.folder / info.name) for info in manifest.segments]
        self._ends = list(accumulate(segment.rows for segment in self._segments))
        self.manifest = manifest

    @classmethod
    def build(
        cls,
        folder: Path | str,
        passages: Iterable[Passage],
        *,
        kind: SearchKind = "bm25",
        encoder: str | Encoder | None = None,
        replace: bool = False,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> Index:
        """Build an index and open it; a build that was killed goes on where it was.

        Args:
            folder: to be written.
            passages: any number of them, read once; ids must be unique.
            kind: "bm25" (no torch), "dense" or "hybrid".
            encoder: name or folder of a sentence-transformers model, or an
                :class:`~agentkd.retrieval.encoder.Encoder`; "minilm" where none is given.
            replace: an index that is there is replaced once the new one is whole.
            on_progress: called with (what, done, total or None).
            settings: further fields of :class:`~agentkd.retrieval.manifest.IndexConfig`.

        Raises:
            ConfigError: a setting is wrong, an extra is missing, the folder holds something else,
                or another process builds there.
            DataError: no passages, or an id twice.
            RetrievalError: the encoder's vectors cannot be searched (NaN, another dimension).
            StorageError: the disk is full.
        """
        name = encoder if isinstance(encoder, str) or encoder is None else encoder.name
        given = None if isinstance(encoder, str) else encoder
        try:
            config = IndexConfig(kind=kind, encoder=name, **settings)
        except ValidationError as exc:
            raise ConfigError(
                f"{first_problem(exc)}.", "See agentkd.retrieval.manifest.IndexConfig."
            ) from exc
        IndexBuilder(Path(folder), given, on_progress).build(passages, config, replace=replace)
        return cls.open(folder, encoder=given)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        kind: SearchKind | None = None,
        encoder: str | Encoder | None = None,
        verify: bool = False,
    ) -> Index:
        """Open an index; its files are memory-mapped, its encoder is loaded by the first search.

        Args:
            folder: from :meth:`build`.
            kind: search another way than it was built for: a hybrid index by "bm25" needs no torch.
            encoder: used instead of the one that the index names; refused if it makes other vectors.
            verify: compare the checksum of every file, not only the sizes.

        Raises:
            RetrievalError: no index there, an unfinished or damaged one, or one of a newer format.
            ConfigError: vectors are asked for that it does not have, or another encoder.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        wanted = kind or manifest.config.kind
        if wanted != "bm25" and manifest.encoder is None:
            raise ConfigError(
                f"The index {path} has no vectors, so it cannot be searched as {wanted!r}.",
                f"Build it by: agentkd index SOURCE --out {path} --kind {wanted} --replace.",
            )
        try:
            verify_files(path, manifest, checksums=verify)
            index = cls(path, manifest, wanted)
        except RetrievalError:
            if read_manifest(path).generation == manifest.generation:
                raise
            return cls.open(path, kind=kind, encoder=encoder, verify=verify)  # it has just been changed
        if encoder is not None:
            index._encoder = index._checked(encoder)
        return index

    def __len__(self) -> int:
        """Passages that can be found."""
        return self.manifest.passages

    def passage(self, row: int) -> Passage:
        """The passage in a row of the index."""
        place = bisect_right(self._ends, row)
        return self._segments[place].passage(row - (self._ends[place - 1] if place else 0))

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        """The best ``k`` passages of each query, best first.

        Args:
            queries: n texts; of each, 10,000 characters are read. An empty one finds nothing.
            k: passages of each; fewer where the index has fewer, or where no word matches (BM25).

        Returns:
            n lists of at most k hits. The score is BM25's, the cosine similarity in [-1, 1]
            (dense), or the sum of reciprocal ranks (hybrid; at most 2/6).

        Raises:
            ConfigError: the encoder is missing or is another one than the index was built with.
            RetrievalError: a file of the index cannot be read.
        """
        asked = [(place, text) for place, query in enumerate(queries) if (text := readable(query))]
        found: list[list[Hit]] = [[] for _ in queries]
        if not asked or k < 1:
            return found
        for (place, _), ranking in zip(asked, self._rank([query for _, query in asked], k), strict=True):
            found[place] = [Hit(passage=self.passage(row), score=score) for row, score in ranking]
        return found

    def _rank(self, queries: list[str], k: int) -> list[list[tuple[int, float]]]:
        if self.kind == "bm25":
            return self._structure.words(queries, k)
        vectors = self._encode(queries)
        if self.kind == "dense":
            return self._structure.vectors(vectors, k)
        return self._structure.both(queries, vectors, k)

    def _encode(self, queries: list[str]) -> NDArray[np.float32]:
        with self._lock:
            if self._encoder is None:
                assert self.manifest.encoder is not None
                self._encoder = self._checked(self.manifest.encoder.name)
        vectors = self._encoder.encode(queries, "query")
        check_vectors(vectors, len(queries), self._encoder.dimension, self._encoder.name)
        return vectors

    def _checked(self, encoder: str | Encoder) -> Encoder:
        """An encoder, if it is the one that the index was built with."""
        config, info = self.manifest.config, self.manifest.encoder
        if info is None:
            raise ConfigError(f"The index {self.folder} has no vectors.", "Leave the encoder out.")
        if isinstance(encoder, str):
            encoder = load_encoder(
                encoder, query_prefix=config.query_prefix, passage_prefix=config.passage_prefix
            )
        check_probe(self.folder / self.manifest.search_folder, encoder, info.name)
        return encoder

    def load(self) -> Self:
        """Load the encoder now, so that the first search is not slow; returns the index."""
        if self.kind != "bm25":
            self._encode(["ready?"])
        return self

    def add(
        self, passages: Iterable[Passage], *, source: str = "", on_progress: OnProgress | None = None
    ) -> int:
        """Add passages with new ids; only they are encoded. Returns how many.

        Raises:
            DataError: no passages, or an id that the index has.
        """
        built = IndexBuilder(self.folder, self._encoder, on_progress).add(passages, source=source)
        self._take(built.manifest)
        return built.added

    def delete(self, ids: Iterable[str]) -> int:
        """Delete passages by id; returns how many.

        Raises:
            DataError: an id that the index does not have (then nothing is deleted).
        """
        built = IndexBuilder(self.folder, self._encoder).delete(ids)
        self._take(built.manifest)
        return built.deleted
