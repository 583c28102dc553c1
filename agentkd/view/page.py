"""The page: one document without a network, its script and style locked by their hashes.

The same page is served (it then asks its server for the trajectories) and exported (they are in it as
JSON blocks, each parsed when it is opened). All of it that comes from a file is set as text by the
script, never as markup; the content security policy is the second lock behind that.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from agentkd.errors import StorageError, boundary
from agentkd.view.row import as_json
from agentkd.view.runs import Mask, Run

__all__ = ["export_page", "page", "policy"]


def _part(name: str) -> str:
    return resources.files("agentkd.view").joinpath(name).read_text(encoding="utf-8")


def _script() -> str:
    return "".join(_part(name) for name in ("python.js", "store.js", "detail.js", "app.js"))


def policy(connect: str) -> str:
    """The content security policy; ``connect`` is where the page may ask for data."""

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hashed(_script())}; style-src {hashed(_part('style.css'))}; "
        f"connect-src {connect}; img-src data:; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'"
    )


def page(title: str, data: str = "", connect: str = "'self'") -> str:
    """The document.

    Args:
        title: of the window.
        data: JSON blocks, see :func:`export_page`; without them the page asks its server.
        connect: see :func:`policy`.
    """
    parts = {
        "@TITLE@": escape(title),
        "@POLICY@": policy(connect),
        "@STYLE@": _part("style.css"),
        "@SCRIPT@": _script(),
        "@DATA@": data,
    }
    return re.sub("|".join(parts), lambda found: parts[found[0]], _part("page.html"))


def export_page(
    runs: Sequence[Run],
    out: Path,
    *,
    mask: Mask | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Write one file that shows the runs anywhere; returns the number of trajectories in it.

    Args:
        runs: read ones.
        out: the file, written whole or not at all.
        mask: says which tokens are learnt; asked for every trajectory.
        on_progress: called with the number of trajectories done.

    Raises:
        StorageError: the file cannot be written.
    """
    head, tail = page(_title(runs), "@HERE@", "'none'").split("@HERE@")
    count = 0
    with boundary(StorageError, f"writing {out}", "Choose a file that can be written."):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(head)
            for block in _blocks(runs, mask):
                file.write(block)
                count += 1
                if on_progress:
                    on_progress(count)
            file.write(_block("runs", {"runs": [run.summary() for run in runs], "mask": mask is not None}))
            file.write(tail)
        partial.replace(out)
    return count


def _blocks(runs: Sequence[Run], mask: Mask | None) -> Iterator[str]:
    for at, run in enumerate(runs):
        for row in run.rows:
            record = run.record(row[0])
            detail = run.detail(row[0])
            if mask is not None:
                detail["mask"] = mask(record)
            yield _block(f"t-{at}-{row[0]}", detail)


def _block(name: str, value: Any) -> str:
    """JSON in a script element that is none; no text in it can end the element."""
    return f'<script type="application/json" id="{name}">{embedded(value)}</script>\n'


def embedded(value: Any) -> str:
    """JSON without a character that means something to HTML."""
    text = as_json(value)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _title(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs[:3]) + (" and more" if len(runs) > 3 else "")
