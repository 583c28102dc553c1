"""Reciprocal-rank fusion: one ranking out of several, whose scores need not be comparable."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["RRF_K", "fuse"]

RRF_K = 5
"""How little the first ranks stand out. Cormack, Clarke and Büttcher (SIGIR 2009) have 60, for many
rankings of documents; with two rankings and one to three gold passages any value up to 20 found more
(``benchmarks/retrieval.py``), because the first ranks matter most then."""


def fuse(rankings: Sequence[Sequence[int]], k: int) -> list[tuple[int, float]]:
    """Fuse rankings of rows.

    Args:
        rankings: rows, best first; a row that a ranking lacks gets nothing from it.
        k: rows that are returned at most.

    Returns:
        (row, score) best first, the score being the sum of 1 / (RRF_K + rank), ranks from 1. Equal
        scores stand in the order of the first ranking, then of the next.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, 1):
            scores[row] = scores.get(row, 0.0) + 1 / (RRF_K + rank)
    return sorted(scores.items(), key=lambda item: -item[1])[:k]
