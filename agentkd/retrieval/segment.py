"""A segment of an index: passages that were added together, and their vectors. Read by row."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from agentkd.errors import DataError, RetrievalError, StorageError, boundary
from agentkd.retrieval import Passage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["OFFSETS", "PASSAGES", "VECTORS", "Segment", "VectorWriter", "passage_line", "write_passages"]

PASSAGES, OFFSETS, VECTORS = "passages.jsonl", "offsets.npy", "vectors.f32"
_EVERY = 500
"""Passages between two reports of progress."""
_SPACE = "Free some space, then run the same command again: it goes on."


def write_passages(
    folder: Path,
    passages: Iterable[Passage],
    *,
    taken: Iterable[str] = (),
    on_row: Callable[[int], None] | None = None,
) -> int:
    """Write passages as JSON Lines and where each line begins; returns how many.

    Args:
        folder: gets ``passages.jsonl`` and ``offsets.npy``.
        passages: in the order of their rows.
        taken: ids that are in the index already.
        on_row: told now and then how many are written.

    Raises:
        DataError: an id stands there twice, or is taken.
    """
    import numpy as np

    known, seen, offsets = set(taken), set[str](), [0]
    with boundary(StorageError, f"writing {folder}", _SPACE):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / PASSAGES).open("wb") as file:
            for passage in passages:
                if passage.id in known:
                    raise DataError(
                        f"The index has a passage {json.dumps(passage.id)} already.",
                        "Delete it first, or give the new one another id.",
                    )
                if passage.id in seen:
                    raise DataError(
                        f"The passage id {json.dumps(passage.id)} stands there twice.", "Make the ids unique."
                    )
                seen.add(passage.id)
                line = passage_line(passage)
                file.write(line)
                offsets.append(offsets[-1] + len(line))
                if on_row and len(offsets) % _EVERY == 0:
                    on_row(len(offsets) - 1)
        np.save(folder / OFFSETS, np.array(offsets, np.int64))
    if on_row:
        on_row(len(offsets) - 1)
    return len(offsets) - 1


def passage_line(passage: Passage) -> bytes:
    """A passage as it is stored."""
    with boundary(DataError, f"writing the passage {json.dumps(passage.id)}", "Save the text as UTF-8."):
        return (passage.model_dump_json() + "\n").encode("utf-8")


class Segment:
    """Rows of passages, memory-mapped.

    Args:
        folder: from :func:`write_passages`.
        dimension: of the vectors, or None where there are none.

    Raises:
        RetrievalError: the files do not fit each other.
    """

    def __init__(self, folder: Path, dimension: int | None = None) -> None:
        import numpy as np

        self.folder, self.dimension = folder, dimension
        with boundary(RetrievalError, f"reading {folder}", "Build the index anew."):
            self._offsets: NDArray[np.int64] = np.load(folder / OFFSETS, mmap_mode="r")
            with (folder / PASSAGES).open("rb") as file:
                self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.rows = len(self._offsets) - 1
        if self.rows < 1 or int(self._offsets[-1]) != len(self._text):
            raise RetrievalError(f"The passages in {folder} are cut short.", "Build the index anew.")

    def passage(self, row: int) -> Passage:
        """One passage."""
        with boundary(RetrievalError, f"reading passage {row} of {self.folder}", "Build the index anew."):
            return Passage.model_validate_json(self.line(row))

    def line(self, row: int) -> bytes:
        """One passage as it is stored."""
        return self._text[int(self._offsets[row]) : int(self._offsets[row + 1])]

    def __iter__(self) -> Iterator[Passage]:
        return (self.passage(row) for row in range(self.rows))

    @property
    def vector_rows(self) -> int:
        """Whole vectors that are there."""
        path = self.folder / VECTORS
        if self.dimension is None or not path.is_file():
            return 0
        return path.stat().st_size // (4 * self.dimension)

    def vectors(self, begin: int, end: int) -> NDArray[np.float32]:
        """Vectors of rows, shape (end - begin, dimension); read, not mapped, so that they can be freed."""
        import numpy as np

        assert self.dimension is not None
        count = (end - begin) * self.dimension
        with boundary(RetrievalError, f"reading {self.folder / VECTORS}", "Build the index anew."):
            flat = np.fromfile(
                self.folder / VECTORS, dtype="<f4", count=count, offset=4 * begin * self.dimension
            )
            return flat.reshape(end - begin, self.dimension)


class VectorWriter:
    """Appends vectors to a segment, durably; a vector torn by a crash is cut off."""

    def __init__(self, segment: Segment) -> None:
        assert segment.dimension is not None
        path = segment.folder / VECTORS
        whole = 4 * segment.dimension * min(segment.vector_rows, segment.rows)
        with boundary(StorageError, f"opening {path}", _SPACE):
            self._file = path.open("ab")
            self._file.truncate(whole)
        self._path = path

    def append(self, vectors: NDArray[np.float32]) -> None:
        with boundary(StorageError, f"writing {self._path}", _SPACE):
            self._file.write(vectors.astype("<f4").tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
