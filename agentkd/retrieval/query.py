"""What is read of a query, whoever searches."""

from __future__ import annotations

__all__ = ["MAX_QUERY_CHARS", "readable"]

MAX_QUERY_CHARS = 10_000
"""Characters of a query that are read; a longer one is cut."""


def readable(query: str) -> str:
    """The query, cut to its limit; half characters, which no tokenizer takes, become question marks."""
    return query[:MAX_QUERY_CHARS].encode("utf-8", "replace").decode("utf-8").strip()
