"""Search over titled passages."""

from typing import Any

from smolagents import Tool


class SearchTool(Tool):
    """Returns the best passages as text, one ``[Title] text`` line each.

    Args:
        retriever: anything with ``search(queries, k)``, see ``agentkd.retrieval.Retriever``.
        k: passages a search returns.
    """

    name = "search"
    description = "Searches the passages and returns the best ones, one per line as: [Title] text"
    inputs = {"query": {"type": "string", "description": "What to look for, best the exact name."}}
    output_type = "string"

    def __init__(self, retriever: Any, k: int = 3) -> None:
        super().__init__()
        self.retriever = retriever
        self.k = k

    def forward(self, query: str) -> str:
        hits = self.retriever.search([query], k=self.k)[0]
        if not hits:
            return "No passage found."
        return "\n".join(f"[{hit.passage.title}] {' '.join(hit.passage.text.split())}" for hit in hits)
