"""From what a user names to a retriever: passages, a file of them, an index folder, or a URL."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from agentkd.errors import ConfigError, DataError
from agentkd.retrieval import Passage, Retriever

__all__ = ["Corpus", "open_corpus", "open_retriever"]


class Corpus(NamedTuple):
    """Something to search, and what tells it from others."""

    retriever: Retriever | None
    """None where there is nothing to search."""
    identity: str
    """Changes with the passages and the way they are searched; the URL of an endpoint."""
    passages: Sequence[Passage] = ()
    """The passages, where they are in memory."""


def open_retriever(source: str | Path, *, rerank: str | None = None) -> Retriever:
    """Open what a user named.

    Args:
        source: the folder of an index, a file that :class:`agentkd.retrieval.corpus.Source` reads
            (searched by BM25 in memory), or the URL of a retriever, whose token is taken from
            ``AGENTKD_RETRIEVER_TOKEN``.
        rerank: a cross-encoder that puts the best passages in order.

    Raises:
        ConfigError: it is none of these, or an extra is missing.
        DataError: the file has no passages, or a line is not one.
        RetrievalError: the index is damaged, or the retriever does not answer.
    """
    retriever = open_corpus(source).retriever
    assert retriever is not None
    if rerank is None:
        return retriever
    from agentkd.retrieval.rerank import Reranked

    return Reranked(retriever, rerank)


def open_corpus(source: str | Path | None, passages: Sequence[Passage] = ()) -> Corpus:
    """See :func:`open_retriever`; without a source, the given passages, of which there may be none."""
    if source is None:
        return _in_memory(passages) if passages else Corpus(None, "")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        from agentkd.retrieval.client import TOKEN_VARIABLE, HTTPRetriever

        remote = HTTPRetriever(source, token=os.environ.get(TOKEN_VARIABLE))
        remote.search(["ready?"], 1)  # a retriever that is not there is noticed before anything is begun
        return Corpus(remote, remote.url)
    path = Path(source)
    if path.is_dir():
        from agentkd.retrieval.index import Index

        index = Index.open(path)
        return Corpus(index, index.manifest.identity)
    if path.is_file():
        from agentkd.retrieval.corpus import Source

        found = list(Source(str(source)))
        if not found:
            raise DataError(
                f"{path} has no passages.", 'Write one JSON object a line: {"id", "title", "text"}.'
            )
        return _in_memory(found)
    raise ConfigError(
        f"There is no corpus {source}.",
        "Give a JSON Lines file of passages, the folder of an index, or the URL of a retriever.",
    )


def _in_memory(passages: Sequence[Passage]) -> Corpus:
    from agentkd.retrieval.bm25 import BM25Retriever

    digest = hashlib.sha256()
    for passage in passages:
        digest.update(passage.model_dump_json().encode() + b"\n")
    return Corpus(BM25Retriever(passages), digest.hexdigest(), passages)
