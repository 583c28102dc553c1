"""Search over titled passages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolagents import Tool


class SearchTool(Tool):
    """Returns the best passages as text, one ``[Title] text`` line each.

    Args:
        retriever: anything with ``search(queries, k)``, see ``agentkd.retrieval.Retriever``; or the
            folder of an index, a JSON Lines file of passages, or the URL of a retriever.
        k: passages a search returns.
        max_tokens: what a search may return together; the passage that passes it is cut and
            marked. None for no limit.
        count: tokens of a text; estimated, rather too high, where none is given.
    """

    name = "search"
    description = "Searches the passages and returns the best ones, one per line as: [Title] text"
    inputs = {"query": {"type": "string", "description": "What to look for, best the exact name."}}
    output_type = "string"

    def __init__(
        self,
        retriever: Any,
        k: int = 3,
        max_tokens: int | None = 1024,
        count: Callable[[str], int] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(retriever, (str, Path)):
            from agentkd.retrieval.source import open_retriever

            retriever = open_retriever(retriever)
        self.retriever = retriever
        self.k = k
        self.max_tokens = max_tokens
        self.count = count

    def forward(self, query: str) -> str:
        from agentkd.retrieval.shown import passage_lines

        hits = self.retriever.search([query], k=self.k)[0]
        if not hits:
            return "No passage found."
        return passage_lines(hits, self.max_tokens, self.count)
