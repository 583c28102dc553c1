"""The report: one self-contained page, the same in Markdown, and every figure as JSON.

:func:`write_report` is all there is. The page needs no network and runs no foreign script;
whatever a model or a task wrote appears on it as text. Without matplotlib the report is written
without plots and says how to get them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentkd.errors import StorageError, boundary
from agentkd.report.content import Collection, Content, ResultLike, plain
from agentkd.report.markdown import render_markdown
from agentkd.report.page import render_page
from agentkd.report.published import PAPER_SETS, SIZES, Published, beside_published, size_of
from agentkd.trajectory import Trajectory

__all__ = [
    "PAPER_SETS",
    "SIZES",
    "Collection",
    "Published",
    "ResultLike",
    "beside_published",
    "size_of",
    "write_report",
]


def write_report(
    out_dir: Path,
    *,
    title: str,
    results: Sequence[ResultLike],
    collection: Mapping[str, Any] | None = None,
    losses: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    served: Mapping[str, str] | None = None,
    next_steps: Sequence[str] = (),
    examples: Sequence[Trajectory] = (),
    differences: Mapping[str, tuple[float, float, float, int]] | None = None,
    tool_use: Mapping[str, Mapping[str, float]] | None = None,
    published: Sequence[Published] = (),
    viewer: str = "",
) -> Path:
    """Write ``index.html``, ``report.md`` and ``report.json`` into ``out_dir``, each atomically.

    Args:
        out_dir: the report's folder; made when missing.
        title: heading of the page.
        results: one :class:`agentkd.evaluate.SystemResult` for each system, baselines first.
        collection: what became of the collected trajectories:
            ``{"collected": 120, "correct": 105, "kept": 100, "dropped": {"wrong answer": 20}}``
            ("correct" may be left out), or several of those by label, as in
            ``{"agent": {...}, "cot": {...}}``.
        losses: ``(step, loss)`` points of each training run, by label.
        config: the resolved settings, shown and recorded as they are.
        versions: of what made it, by package name.
        notes: what a reader must know, one plain sentence or paragraph each.
        served: ``{"question", "answer", "url"}`` of the question asked of the served student.
        next_steps: shell lines to copy; a line starting with ``#`` is shown as an explanation.
        examples: runs to show step by step, at most 12 of them.
        differences: ``(mean, low, high, n_pairs)`` of
            :func:`agentkd.evaluate.paired_difference`, by label, as in ``{"agent - cot": ...}``.
        tool_use: of each system, the share of runs (0 to 1) that called a tool, by its name.
        published: what the paper says of the same methods, see :func:`beside_published`.
        viewer: address of a page of ``agentkd view`` beside the report, with ``#run=NAME`` of the examples.

    Returns:
        Path of ``index.html``.

    Raises:
        DataError: ``collection`` is neither of the two forms, or two systems have one label.
        StorageError: the folder cannot be written.
    """
    content = Content.build(
        title=title,
        results=results,
        collection=collection or {},
        losses=losses or {},
        config=config or {},
        versions=versions or {},
        notes=notes,
        served=served or {},
        next_steps=next_steps,
        examples=examples,
        differences=differences or {},
        tool_use=tool_use or {},
        published=published,
        viewer=viewer,
    )
    document = json.dumps(figures(content), indent=2, ensure_ascii=False, allow_nan=False)
    _write_text(out_dir / "report.json", document + "\n")
    _write_text(out_dir / "report.md", render_markdown(content))
    index = out_dir / "index.html"
    _write_text(index, render_page(content))
    return index


def figures(content: Content) -> dict[str, Any]:
    """Everything in ``report.json``."""
    systems = {}
    for result in content.results:
        dumped = result.model_dump()
        systems[dumped.pop("label")] = dumped
    document: dict[str, Any] = plain(
        {
            "schema_version": 1,
            "title": content.title,
            "created": content.created,
            "systems": systems,
            "differences": {
                label: {"mean": mean, "low": low, "high": high, "n_pairs": n}
                for label, (mean, low, high, n) in content.differences.items()
            },
            "collection": {
                label: counts.model_dump(exclude_none=True) for label, counts in content.collection.items()
            },
            "losses": content.losses,
            "tool_use": content.tool_use,
            "published": [row._asdict() for row in content.published],
            "served": content.served,
            "notes": content.notes,
            "next_steps": content.next_steps,
            "config": content.config,
            "versions": content.versions,
        }
    )
    return document


def _write_text(path: Path, text: str) -> None:
    with boundary(StorageError, f"writing {path}", "Choose another folder for the report."):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
