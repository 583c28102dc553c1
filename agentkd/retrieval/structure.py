"""What an index searches: the ``search-`` folder, written by the builder and opened for searching.

::

    dead.npy       rows that are passed over, int64, sorted
    rows.npy       the row of each passage that BM25 knows, int64
    bm25/          words
    dense.faiss    vectors, one for every row of the segments
    probe.npy      what the encoder made of the probe texts
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agentkd.errors import RetrievalError, StorageError, boundary
from agentkd.retrieval import Passage
from agentkd.retrieval.ann import ANN, AnnKind
from agentkd.retrieval.bm25 import BM25
from agentkd.retrieval.encoder import Encoder
from agentkd.retrieval.fusion import fuse
from agentkd.retrieval.probe import write_probe
from agentkd.retrieval.segment import Segment
from agentkd.retrieval.staging import OnProgress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

__all__ = ["DEPTH", "Structure", "alive", "read_dead", "write_vectors", "write_words"]

DEPTH = 100
"""Candidates that each half of a hybrid search hands to the fusion, at least."""
_SPACE = "Free some space, then run the same command again: it goes on."
_REBUILD = "Build the index anew."


def alive(segments: Sequence[Segment], dead: Rows) -> Iterator[tuple[int, Passage]]:
    """(row, passage) of all that can be found."""
    skipped, row = set(dead.tolist()), 0
    for segment in segments:
        for place in range(segment.rows):
            if row not in skipped:
                yield row, segment.passage(place)
            row += 1


def read_dead(folder: Path) -> Rows:
    """Rows that are passed over."""
    import numpy as np

    with boundary(RetrievalError, f"reading {folder / 'dead.npy'}", _REBUILD):
        dead: Rows = np.load(folder / "dead.npy")
    return dead


def write_words(folder: Path, segments: Sequence[Segment], dead: Rows, tell: OnProgress) -> None:
    """Everything but the vectors."""
    import numpy as np

    rows = sum(segment.rows for segment in segments)
    with boundary(StorageError, f"writing {folder}", _SPACE):
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "dead.npy", dead)
        np.save(folder / "rows.npy", np.delete(np.arange(rows, dtype=np.int64), dead))

    def counted() -> Iterator[Passage]:
        for done, (_, passage) in enumerate(alive(segments, dead), 1):
            if done % 1000 == 0:
                tell("indexing words", done, rows - len(dead))
            yield passage

    BM25.build(counted()).save(folder / "bm25")


def write_vectors(
    folder: Path,
    segments: Sequence[Segment],
    kind: AnnKind,
    base: tuple[Path, AnnKind] | None,
    probe: Path | Encoder,
    tell: OnProgress,
) -> None:
    """The vectors' index and the probe.

    Args:
        folder: the new ``search-`` folder.
        segments: with vectors, in the order of their rows.
        kind: of index.
        base: folder and kind of an index over the first of these segments, which is extended.
        probe: the encoder, or the folder of an index that keeps its probe.
        tell: see ``OnProgress``.
    """
    rows = sum(segment.rows for segment in segments)
    dimension = segments[0].dimension
    assert dimension is not None

    def read(begin: int, end: int) -> NDArray[np.float32]:
        return _read(segments, begin, end)

    def on_rows(done: int) -> None:
        tell("indexing vectors", done, rows)

    tell("indexing vectors", 0, rows)
    ann = ANN.load(base[0] / "dense.faiss", kind, mmap=False) if base and base[1] == kind else None
    if ann is not None and ann.fits(rows):
        ann.add(rows, read, on_rows)
    else:
        ann = ANN.build(kind, rows, dimension, read, on_rows)
    ann.save(folder / "dense.faiss")
    if isinstance(probe, Path):
        with boundary(StorageError, f"writing {folder}", _SPACE):
            shutil.copyfile(probe / "probe.npy", folder / "probe.npy")
    else:
        write_probe(folder, probe)


def _read(segments: Sequence[Segment], begin: int, end: int) -> NDArray[np.float32]:
    """Vectors of rows over all segments."""
    import numpy as np

    parts, first = [], 0
    for segment in segments:
        low, high = max(begin - first, 0), min(end - first, segment.rows)
        if low < high:
            parts.append(segment.vectors(low, high))
        first += segment.rows
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Structure:
    """A ``search-`` folder, opened.

    Args:
        folder: from :func:`write_words` and :func:`write_vectors`.
        ann: kind of its vectors, or None where they are not searched.
    """

    def __init__(self, folder: Path, ann: AnnKind | None) -> None:
        import numpy as np

        with boundary(RetrievalError, f"reading {folder}", _REBUILD):
            self._rows: Rows = np.load(folder / "rows.npy", mmap_mode="r")
        self._dead = read_dead(folder)
        self._bm25 = BM25.load(folder / "bm25", len(self._rows))
        self._ann = ANN.load(folder / "dense.faiss", ann) if ann else None

    def words(self, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """By BM25: at most ``k`` (row, score) of each query, best first."""
        return [
            [(int(self._rows[place]), score) for place, score in self._bm25.top(query, k)]
            for query in queries
        ]

    def vectors(self, queries: NDArray[np.float32], k: int) -> list[list[tuple[int, float]]]:
        """By vectors of shape (n, dimension): at most ``k`` (row, cosine) of each, best first."""
        assert self._ann is not None
        return self._ann.search(queries, k, self._dead)

    def both(
        self, queries: Sequence[str], vectors: NDArray[np.float32], k: int
    ) -> list[list[tuple[int, float]]]:
        """By both, fused by rank: at most ``k`` (row, fused score) of each query, best first."""
        depth = max(DEPTH, k)
        pairs = zip(self.words(queries, depth), self.vectors(vectors, depth), strict=True)
        return [fuse([[row for row, _ in ranking] for ranking in pair], k) for pair in pairs]
