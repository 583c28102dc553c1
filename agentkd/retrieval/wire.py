"""The wire format of Search-R1's retrieval server, which many agent trainers speak.

::

    POST /retrieve  {"queries": ["..."], "topk": 3, "return_scores": true}
    {"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\nText"}, "score": 0.9}, ...], ...]}

Without scores a result is the document alone. The first line of ``contents`` is the title, in
quotes; the rest is the text. ``title`` and ``text`` are sent beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from agentkd.retrieval import Hit, Passage
from agentkd.retrieval.shown import visible

__all__ = ["passage_of", "read_hits", "write_hits"]


def write_hits(hits: Sequence[Hit], scores: bool) -> list[dict[str, Any]]:
    """The results of one query, as sent."""
    documents = [_document(hit.passage) for hit in hits]
    if not scores:
        return documents
    return [{"document": document, "score": hit.score} for document, hit in zip(documents, hits, strict=True)]


def _document(passage: Passage) -> dict[str, Any]:
    # A line end in the title would move text into the title's line.
    contents = f'"{visible(passage.title)}"\n{passage.text}'
    return {"id": passage.id, "contents": contents, "title": passage.title, "text": passage.text}


def read_hits(results: Any) -> list[Hit]:
    """The results of one query, as received; without scores each counts one less than the one before.

    Raises:
        ValueError: they are not of the wire format; says how.
    """
    if not isinstance(results, list):
        raise ValueError("a query's results are not a list")
    hits = []
    for place, item in enumerate(results):
        if not isinstance(item, dict):
            raise ValueError("a result is not an object")
        scored = isinstance(item.get("document"), dict)
        score = item.get("score") if scored else len(results) - place
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ValueError("a score is not a number")
        hits.append(Hit(passage=passage_of(item["document"] if scored else item), score=float(score)))
    return hits


def passage_of(document: dict[str, Any]) -> Passage:
    """A passage of ``{id, title, text}`` or Search-R1's ``{id, contents}``; other keys are left alone.

    A missing id is made of the text, so that the same text has the same id.

    Raises:
        ValueError: it has no text; says so.
    """
    title, text, contents = (document.get(key) for key in ("title", "text", "contents"))
    if text is None and contents is None:
        contents = document.get("content")  # as some of its descendants have it
    if text is None and isinstance(contents, str):
        first, _, rest = contents.partition("\n")
        if rest:
            title, text = title or first.strip().strip('"'), rest
        else:
            text = contents
    if not isinstance(text, str):
        raise ValueError('there is neither "text" nor "contents"')
    if title is not None and not isinstance(title, str):
        raise ValueError('"title" is not a text')
    id = document.get("id")
    if id is None or id == "":
        id = hashlib.sha256(f"{title}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise ValueError('"id" is neither a text nor a number')
    return Passage(id=str(id), title=title or "", text=text)
