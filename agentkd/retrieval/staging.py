"""New passages on their way into an index: written, then encoded in pieces that survive a crash."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from agentkd.record import file_hash, read_json, write_json
from agentkd.retrieval import Passage
from agentkd.retrieval.encoder import Encoder, check_vectors
from agentkd.retrieval.segment import PASSAGES, VECTORS, Segment, VectorWriter, write_passages

__all__ = ["UNFINISHED", "OnProgress", "Staged", "passage_text", "stage"]

OnProgress = Callable[[str, int, int | None], None]
"""Told what is being done, how far it is and how far it goes (None: unknown)."""

UNFINISHED = "unfinished"
"""Folder, below the index's, of passages that no manifest names yet."""
PIECE = 256
"""Passages encoded between two writes; a crash loses no more than these."""
_STATE = "state.json"


class Staged(Segment):
    """A segment that is not part of an index yet."""

    encoded: int = 0
    """Vectors that were made now, not found from an earlier try."""

    def move(self, to: Path) -> None:
        """Make it a segment; the files that are open stay open."""
        (self.folder / _STATE).unlink(missing_ok=True)
        self.folder.replace(to)
        self.folder = to


def stage(
    index: Path,
    passages: Iterable[Passage],
    encoder: Encoder | None,
    tell: OnProgress,
    *,
    taken: Iterable[str] = (),
) -> Staged | None:
    """Write and encode passages; goes on where an earlier try of the same passages stopped.

    Args:
        index: the index folder.
        passages: what to write, in order.
        encoder: None for an index without vectors.
        tell: see ``OnProgress``.
        taken: ids that are refused.

    Returns:
        The segment, or None when there were no passages.

    Raises:
        DataError: an id twice.
        RetrievalError: the encoder returns what cannot be searched.
    """
    folder = index / UNFINISHED
    if not write_passages(folder, passages, taken=taken, on_row=lambda n: tell("reading passages", n, None)):
        shutil.rmtree(folder)
        return None
    if encoder is None:
        (folder / VECTORS).unlink(missing_ok=True)
        return Staged(folder)
    state = {
        "encoder": [encoder.name, encoder.dimension, getattr(encoder, "prefix", None)],
        "passages": file_hash(folder / PASSAGES),
    }
    if not (folder / _STATE).is_file() or read_json(folder / _STATE) != state:
        (folder / VECTORS).unlink(missing_ok=True)
        write_json(folder / _STATE, state)
    segment = Staged(folder, encoder.dimension)
    segment.encoded = _encode(segment, encoder, tell)
    return segment


def _encode(segment: Segment, encoder: Encoder, tell: OnProgress) -> int:
    writer = VectorWriter(segment)
    begin = done = segment.vector_rows
    tell("encoding", done, segment.rows)
    try:
        while done < segment.rows:
            rows = range(done, min(done + PIECE, segment.rows))
            vectors = encoder.encode([passage_text(segment.passage(row)) for row in rows], "passage")
            check_vectors(vectors, len(rows), encoder.dimension, encoder.name)
            writer.append(vectors)
            done = rows.stop
            tell("encoding", done, segment.rows)
    finally:
        writer.close()
    return done - begin


def passage_text(passage: Passage) -> str:
    """What is encoded of a passage."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text
