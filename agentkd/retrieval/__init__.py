"""Retrieval: passages, and whatever can search them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Hit", "Passage", "Retriever"]


class Passage(BaseModel):
    """A titled piece of text; one JSON line of a corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    title: str = ""
    text: str


class Hit(BaseModel):
    """A passage and how well it matched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passage: Passage
    score: float
    """Higher is better; the scale is the retriever's own."""


class Retriever(Protocol):
    """Anything that can be searched: BM25, a dense index, a remote service."""

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        """The best ``k`` passages of each query, best first.

        Returns:
            One list per query, of at most ``k`` hits.

        Raises:
            RetrievalError: when the index or service fails.
        """
        ...
