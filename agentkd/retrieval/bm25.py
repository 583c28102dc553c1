"""BM25 over passages, by the bm25s library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentkd.errors import RetrievalError, boundary
from agentkd.record import iter_jsonl
from agentkd.retrieval import Hit, Passage

__all__ = ["BM25Retriever"]

_WORD = re.compile(r"\w+", re.UNICODE)


class BM25Retriever:
    """Lexical search over titles and texts, in memory.

    Args:
        passages: the corpus; ids must be unique.

    Raises:
        RetrievalError: an empty corpus, or an id twice.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        import bm25s

        if not passages:
            raise RetrievalError("The corpus has no passages.", "Give at least one passage to search in.")
        if len({passage.id for passage in passages}) != len(passages):
            raise RetrievalError("Two passages have the same id.", "Make the ids unique.")
        self.passages = tuple(passages)
        # The title counts twice: a question mostly names the thing it asks about.
        corpus = [_tokens(f"{p.title} {p.title} {p.text}") for p in self.passages]
        self._index: Any = bm25s.BM25()
        with boundary(RetrievalError, "building the BM25 index"):
            self._index.index(corpus, show_progress=False)

    @classmethod
    def from_jsonl(cls, path: Path) -> BM25Retriever:
        """Index a file of ``{"id", "title", "text"}`` lines."""
        return cls(list(iter_jsonl(path, Passage)))

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        """See :class:`agentkd.retrieval.Retriever`. A query without a known word finds nothing."""
        k = min(k, len(self.passages))
        return [self._search_one(query, k) for query in queries]

    def _search_one(self, query: str, k: int) -> list[Hit]:
        tokens = [token for token in _tokens(query[:10_000]) if token in self._index.vocab_dict]
        if not tokens:
            return []
        with boundary(RetrievalError, "searching the BM25 index"):
            scores = self._index.get_scores(tokens)
            # Equal scores come in corpus order, so that a search always returns the same.
            best = (-scores).argsort(kind="stable")[:k]
        return [Hit(passage=self.passages[i], score=float(scores[i])) for i in best if scores[i] > 0]


def _tokens(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
