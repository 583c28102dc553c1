"""Searching at an endpoint: ours, Search-R1's, or any that speaks its wire format."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from agentkd.errors import ConfigError, RetrievalError
from agentkd.retrieval import Hit
from agentkd.retrieval.query import readable
from agentkd.retrieval.wire import read_hits

__all__ = ["TOKEN_VARIABLE", "HTTPRetriever"]

TOKEN_VARIABLE = "AGENTKD_RETRIEVER_TOKEN"
"""Environment variable with the bearer token of a retriever."""
_WAITS = (0.2, 1.0)
"""Seconds before the second and the third try."""
_BATCH = 256
"""Queries sent together."""
_START = "Start one by: agentkd retriever INDEX."


class HTTPRetriever:
    """A :class:`~agentkd.retrieval.Retriever` behind HTTP. Threads may share it.

    Args:
        url: "http://HOST:PORT" or with its path, "http://HOST:PORT/retrieve".
        token: bearer token, if the server wants one.
        timeout: seconds for one request. A request that fails to connect, or that the server
            answers with 429 or 5xx, is tried three times.

    Raises:
        ConfigError: not an HTTP URL.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 60.0) -> None:
        import httpx

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the URL of a retriever.", "Write http://HOST:PORT.")
        self.url = url if parts.path.strip("/") else url.rstrip("/") + "/retrieve"
        headers = {b"Authorization": f"Bearer {token}".encode()} if token else {}
        self._http = httpx.Client(headers=headers, timeout=timeout)

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        """See :class:`agentkd.retrieval.Retriever`. An empty query finds nothing and is not sent.

        Raises:
            RetrievalError: the server cannot be reached, refuses, or answers something else.
        """
        asked = [(place, text) for place, query in enumerate(queries) if (text := readable(query))]
        found: list[list[Hit]] = [[] for _ in queries]
        if k < 1:
            return found
        for begin in range(0, len(asked), _BATCH):
            batch = asked[begin : begin + _BATCH]
            results = self._ask([text for _, text in batch], k)
            for (place, _), hits in zip(batch, results, strict=True):
                found[place] = hits[:k]
        return found

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _ask(self, queries: list[str], k: int) -> list[list[Hit]]:
        response = self._post({"queries": queries, "topk": k, "return_scores": True})
        try:
            content = response.json()
            results = content["result"] if isinstance(content, dict) else content
            if not isinstance(results, list) or len(results) != len(queries):
                raise ValueError(f"{len(queries)} queries were asked, and the results are not as many")
            return [read_hits(result) for result in results]
        except (ValueError, KeyError, RecursionError) as exc:
            raise RetrievalError(
                f"{self.url} does not answer like a retriever: {type(exc).__name__}: {exc}.", _START
            ) from exc

    def _post(self, body: dict[str, Any]) -> Any:
        import httpx

        for wait in (*_WAITS, None):
            try:
                response = self._http.post(self.url, json=body)
                if response.status_code < 400:
                    return response
                problem = f"{self.url} answered {response.status_code}: {response.text[:200]}"
                again = response.status_code == 429 or response.status_code >= 500
            except httpx.TimeoutException:
                problem, again = f"{self.url} did not answer in time.", False
            except httpx.TransportError as exc:
                problem, again = f"Cannot reach the retriever at {self.url}: {exc}.", True
            if wait is None or not again:
                break
            time.sleep(wait)
        hint = _START
        if "answered 401" in problem or "answered 403" in problem:
            hint = f"Set {TOKEN_VARIABLE} to the server's token."
        raise RetrievalError(problem, hint)
