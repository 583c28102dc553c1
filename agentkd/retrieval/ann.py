"""Nearest vectors, by faiss: exact for small corpora, approximate for large ones.

==========  ======================================================================================
"flat"      every vector is compared; exact
"hnsw"      a graph of neighbours (Malkov and Yashunin, arXiv 1603.09320); quick, slow to build
"ivf"       vectors in cells by k-means, of which the nearest are read; quick to build
"ivf-sq8"   the same with each number in one byte instead of four; a quarter of the memory
==========  ======================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from agentkd.errors import ConfigError, RetrievalError, boundary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    ReadRows = Callable[[int, int], Vectors]

__all__ = ["ANN", "AnnKind", "choose_kind"]

AnnKind = Literal["flat", "hnsw", "ivf", "ivf-sq8"]

FLAT_ROWS, HNSW_ROWS, IVF_ROWS = 50_000, 100_000, 5_000_000
"""Up to how many vectors each kind is chosen; above the last one, the quantised kind."""
_BLOCK = 16_384
"""Vectors read at a time while building: what is needed beside the index stays small."""
_TRAIN_PER_CELL = 40
"""Vectors per cell for k-means; faiss warns below 39."""
_NEIGHBOURS, _EF_BUILD, _EF_SEARCH = 32, 100, 128


def choose_kind(rows: int) -> tuple[AnnKind, str]:
    """The kind for so many vectors, and why in a few words."""
    if rows <= FLAT_ROWS:
        return "flat", f"exact search is quick up to {FLAT_ROWS:,} vectors"
    if rows <= HNSW_ROWS:
        return "hnsw", f"a graph is quickest up to {HNSW_ROWS:,} vectors"
    if rows <= IVF_ROWS:
        return "ivf", f"cells are quick to build up to {IVF_ROWS:,} vectors"
    return "ivf-sq8", f"one byte a number saves memory above {IVF_ROWS:,} vectors"


class ANN:
    """A faiss index of unit vectors under inner product. Rows count from 0, in the order given."""

    def __init__(self, index: Any, kind: AnnKind) -> None:
        self._index, self.kind = index, kind

    @property
    def rows(self) -> int:
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        return int(self._index.d)

    @classmethod
    def build(
        cls,
        kind: AnnKind,
        rows: int,
        dimension: int,
        read: ReadRows,
        on_rows: Callable[[int], None] | None = None,
    ) -> ANN:
        """Index ``rows`` vectors, block by block.

        Args:
            kind: see the module's table.
            rows, dimension: shape of the whole.
            read: ``read(begin, end)`` gives those rows, float32, shape (end - begin, dimension).
            on_rows: told how many rows are in.

        Raises:
            ConfigError: an unknown kind, or faiss is missing.
            RetrievalError: a block has another dimension.
        """
        if kind not in get_args(AnnKind):
            raise ConfigError(f"Unknown index kind {kind!r}.", f"Take one of {', '.join(get_args(AnnKind))}.")
        with boundary(RetrievalError, f"building a {kind} index"):
            ann = cls(_empty(kind, rows, dimension), kind)
            if not ann._index.is_trained:
                ann._index.train(_sample(rows, ann._index.nlist * _TRAIN_PER_CELL, read))
            ann.add(rows, read, on_rows)
        return ann

    def fits(self, rows: int) -> bool:
        """Whether so many rows still suit the cells that were made for fewer."""
        return self.kind in ("flat", "hnsw") or _cells(rows) <= 2 * int(self._index.nlist)

    def add(self, rows: int, read: ReadRows, on_rows: Callable[[int], None] | None = None) -> None:
        """Append the rows from :attr:`rows` up to ``rows``; ``read`` as in :meth:`build`."""
        for begin in range(self.rows, rows, _BLOCK):
            block = read(begin, min(begin + _BLOCK, rows))
            if block.shape[1] != self.dimension:
                raise RetrievalError(
                    f"A vector of {block.shape[1]} numbers cannot go into an index of {self.dimension}.",
                    "Use the encoder that the index was built with.",
                )
            self._index.add(block)
            if on_rows:
                on_rows(self.rows)

    def save(self, path: Path) -> None:
        with boundary(RetrievalError, f"writing {path}"):
            _faiss().write_index(self._index, str(path))

    @classmethod
    def load(cls, path: Path, kind: AnnKind, *, mmap: bool = True) -> ANN:
        """Open a saved index: memory-mapped for searching, or read so that rows can be added."""
        faiss = _faiss()
        with boundary(RetrievalError, f"reading {path}", "Build the index anew."):
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0), kind)

    def search(self, queries: Vectors, k: int, dead: NDArray[np.int64]) -> list[list[tuple[int, float]]]:
        """The nearest rows of each query, as (row, cosine similarity), best first.

        Args:
            queries: shape (n, dimension).
            k: rows of each; fewer where the index has fewer.
            dead: rows that are passed over, sorted.

        Raises:
            RetrievalError: another dimension.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise RetrievalError(
                f"A query of shape {queries.shape[1:]} does not fit vectors of {self.dimension}.",
                "Use the encoder that the index was built with.",
            )
        k = min(k, self.rows - len(dead))
        if k < 1 or not len(queries):
            return [[] for _ in queries]
        with boundary(RetrievalError, "searching the vectors"):
            scores, rows = self._index.search(queries, k, params=self._parameters(k, dead))
        return [
            [(int(row), float(score)) for row, score in zip(*pair, strict=True) if row >= 0]
            for pair in zip(rows, scores, strict=True)
        ]

    def _parameters(self, k: int, dead: NDArray[np.int64]) -> Any:
        import numpy as np

        faiss = _faiss()
        options: dict[str, Any] = {}
        if len(dead):
            alive = np.ones(self.rows, bool)
            alive[dead] = False
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(alive, bitorder="little"))
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(_EF_SEARCH, 2 * k), **options)
        if self.kind == "flat":
            return faiss.SearchParameters(**options)
        return faiss.SearchParametersIVF(nprobe=_probes(self._index.nlist), **options)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as exc:
        raise ConfigError("faiss is not installed.", "Install it by: pip install 'agentkd[dense]'.") from exc
    return faiss


def _empty(kind: AnnKind, rows: int, dimension: int) -> Any:
    faiss = _faiss()
    if kind == "flat":
        index = faiss.IndexFlatIP(dimension)
        _reserve(index.codes, 4 * rows * dimension)
        return index
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EF_BUILD
        _reserve(faiss.downcast_index(index.storage).codes, 4 * rows * dimension)
        return index
    cells = _cells(rows)
    coarse = faiss.IndexFlatIP(dimension)
    if kind == "ivf":
        index = faiss.IndexIVFFlat(coarse, dimension, cells, faiss.METRIC_INNER_PRODUCT)
    else:
        eight_bit = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(coarse, dimension, cells, eight_bit, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 0
    index.cp.min_points_per_centroid = 1  # a small corpus is no mistake
    return index


def _reserve(codes: Any, size: int) -> None:
    """Room for all vectors at once: growing by doubling would hold up to twice as much."""
    codes.resize(size)
    codes.resize(0)


def _cells(rows: int) -> int:
    """About 2 * sqrt(rows), and few enough for k-means."""
    return max(1, int(min(2 * math.sqrt(rows), rows / _TRAIN_PER_CELL)))


def _probes(cells: int) -> int:
    """Cells read for a query: a smaller share of more cells."""
    return min(cells, max(8, round(3 * math.sqrt(cells))))


def _sample(rows: int, wanted: int, read: ReadRows) -> Vectors:
    """Rows for k-means: blocks spread evenly over the whole, whose order may mean something."""
    import numpy as np

    if rows <= wanted:
        return read(0, rows)
    step = 64
    starts = np.linspace(0, rows - step, num=max(1, wanted // step)).astype(int)
    return np.concatenate([read(begin, begin + step) for begin in starts])
