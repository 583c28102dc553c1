"""BM25 over passages, by the bm25s library: in memory, or saved into a folder and memory-mapped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agentkd.errors import RetrievalError, boundary
from agentkd.record import iter_jsonl
from agentkd.retrieval import Hit, Passage
from agentkd.retrieval.query import readable

__all__ = ["BM25", "BM25Retriever"]

_WORD = re.compile(r"\w+", re.UNICODE)


class BM25:
    """The scores of a corpus, and the rows that match a query best. Rows count from 0.

    Robertson and Zaragoza's BM25 in Lucene's form (k1 = 1.5, b = 0.75), computed when the index
    is built (Lù, "BM25S", arXiv 2407.03618).
    """

    def __init__(self, index: Any, rows: int) -> None:
        self._index, self.rows = index, rows

    @classmethod
    def build(cls, passages: Iterable[Passage]) -> BM25:
        """Index passages in their order; the texts are not kept."""
        import bm25s

        words: dict[str, int] = {}
        # The title counts twice: a question mostly names the thing it asks about.
        corpus = [
            [words.setdefault(token, len(words)) for token in _tokens(f"{p.title} {p.title} {p.text}")]
            for p in passages
        ]
        index = bm25s.BM25()
        if words:
            with boundary(RetrievalError, "building the BM25 index"):
                index.index((corpus, words), create_empty_token=False, show_progress=False)
        else:  # passages without a single word: nothing can be found, and that is no error
            index.vocab_dict = {}
        return cls(index, len(corpus))

    def save(self, folder: Path) -> None:
        """Write the index into ``folder``."""
        with boundary(RetrievalError, f"writing {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            if self._index.vocab_dict:
                self._index.save(folder, show_progress=False)

    @classmethod
    def load(cls, folder: Path, rows: int) -> BM25:
        """Open what :meth:`save` wrote; the scores are memory-mapped, the vocabulary is read."""
        import bm25s

        index = bm25s.BM25()
        index.vocab_dict = {}
        with boundary(RetrievalError, f"reading {folder}", "Build the index anew."):
            if (folder / "params.index.json").is_file():
                index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        return cls(index, rows)

    def top(self, query: str, k: int) -> list[tuple[int, float]]:
        """At most ``k`` rows that share a word with the query, as (row, score), best first."""
        import numpy as np

        words = self._index.vocab_dict
        tokens = [words[token] for token in _tokens(readable(query)) if token in words]
        if not tokens or k < 1:
            return []
        with boundary(RetrievalError, "searching the BM25 index"):
            scores = self._index.get_scores_from_ids(tokens)
        if k < len(scores):
            # All that reach the k-th best score, so that equal scores are told apart by row below.
            candidates = np.flatnonzero(scores >= max(np.partition(scores, -k)[-k], 1e-12))
        else:
            candidates = np.flatnonzero(scores > 0)
        order = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
        return [(int(row), float(scores[row])) for row in order]


class BM25Retriever:
    """Lexical search over titles and texts, in memory.

    Args:
        passages: the corpus; ids must be unique.

    Raises:
        RetrievalError: an empty corpus, or an id twice.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        if not passages:
            raise RetrievalError("The corpus has no passages.", "Give at least one passage to search in.")
        if len({passage.id for passage in passages}) != len(passages):
            raise RetrievalError("Two passages have the same id.", "Make the ids unique.")
        self.passages = tuple(passages)
        self._bm25 = BM25.build(self.passages)

    @classmethod
    def from_jsonl(cls, path: Path | str) -> BM25Retriever:
        """Index a file of ``{"id", "title", "text"}`` lines."""
        path = Path(path)
        return cls(list(iter_jsonl(path, Passage)))

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        """See :class:`agentkd.retrieval.Retriever`. A query without a known word finds nothing."""
        return [
            [Hit(passage=self.passages[row], score=score) for row, score in self._bm25.top(query, k)]
            for query in queries
        ]


def _tokens(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
