"""Reranking: a cross-encoder reads query and passage together; slower, and better at the top."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from agentkd.errors import ConfigError, RetrievalError, boundary
from agentkd.retrieval import Hit, Retriever
from agentkd.retrieval.staging import passage_text

__all__ = ["Reranked"]


class Reranked:
    """A retriever whose best passages are put in order by a cross-encoder.

    Args:
        retriever: finds the candidates.
        model: name or folder of a sentence-transformers cross-encoder, for instance
            "cross-encoder/ms-marco-MiniLM-L6-v2".
        depth: candidates of each query, at least ``k``.

    Raises:
        ConfigError: the ``dense`` extra or the model is missing.
    """

    def __init__(self, retriever: Retriever, model: str, *, depth: int = 30) -> None:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as exc:
            raise ConfigError(
                "sentence-transformers is not installed.", "Install it by: pip install 'agentkd[dense]'."
            ) from exc
        self.retriever, self.model, self.depth = retriever, model, depth
        hint = "Give the folder of a cross-encoder, or a name on the hub (with a network or a filled cache)."
        with boundary(ConfigError, f"loading the reranker {model}", hint):
            self._model: Any = CrossEncoder(model, num_labels=1)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.retriever)  # type: ignore[arg-type]

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        """See :class:`agentkd.retrieval.Retriever`; the scores are the cross-encoder's.

        Raises:
            RetrievalError: the cross-encoder fails, or returns NaN.
        """
        import numpy as np

        candidates = self.retriever.search(queries, max(k, self.depth))
        pairs = [
            (query, passage_text(hit.passage))
            for query, hits in zip(queries, candidates, strict=True)
            for hit in hits
        ]
        if not pairs:
            return candidates
        with self._lock, boundary(RetrievalError, f"reranking with {self.model}"):
            scores = np.asarray(self._model.predict(pairs, show_progress_bar=False), np.float64).reshape(-1)
        if not np.isfinite(scores).all():
            raise RetrievalError(f"The reranker {self.model} returned NaN.", "Check the model's weights.")
        ranked, first = [], 0
        for hits in candidates:
            own = scores[first : first + len(hits)]
            first += len(hits)
            order = np.argsort(-own, kind="stable")[: max(k, 0)]
            ranked.append([Hit(passage=hits[place].passage, score=float(own[place])) for place in order])
        return ranked
