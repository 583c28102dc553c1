"""The report as Markdown, for a terminal, a pull request or a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from agentkd.report.content import CellLike, Content, Row, clean, name, percent, plain, signed_points

__all__ = ["render_markdown"]


def render_markdown(content: Content) -> str:
    """The whole report; foreign text is escaped, so it shows as it is."""
    parts = [f"# {_inline(content.title)}", f"Written {content.created} by agentkd."]
    parts += [f"- {_inline(note)}" for note in content.notes]
    if content.results:
        parts += ["## Accuracy", _accuracy_table(content, content.family_rows() + content.pooled_rows())]
        parts += content.caveats()
        if content.level_rows():
            parts += ["### By level", _accuracy_table(content, content.level_rows())]
        costs = [[label, *cells] for label, cells in content.cost_rows()]
        parts += ["## Cost and behaviour", _table(["", *content.labels], costs)]
    if content.differences:
        parts += ["## Paired differences", _difference_table(content)]
    if content.published:
        rows = [[method, *cells] for method, cells in content.published_rows()]
        head = ["", "published (%)", "measured (%)", "system here"]
        parts += ["## The paper's table", _table(head, rows)]
    if content.tool_use:
        parts += ["## Tool use", _tool_table(content)]
    if content.collection:
        parts += ["## Collection", _collection_table(content)]
    if content.losses:
        parts += ["## Training loss", _loss_table(content)]
    if content.served:
        parts += ["## The served student"]
        keys = [key for key in ("question", "answer", "url") if key in content.served]
        parts += [f"- {key}: {_inline(content.served[key])}" for key in keys]
    if content.next_steps:
        parts += ["## Next steps", _fenced("\n".join(content.next_steps), "sh")]
    if content.config:
        settings = json.dumps(plain(content.config), indent=2, ensure_ascii=False)
        parts += ["## Configuration", _fenced(settings, "json")]
    if content.versions:
        rows = [[package, version] for package, version in content.versions.items()]
        parts += ["## Versions", _table(["package", "version"], rows)]
    return _spaced(parts)


def _spaced(parts: Sequence[str]) -> str:
    text = ""
    for before, part in zip(["", *parts], parts, strict=False):
        together = before.startswith("- ") and part.startswith("- ")
        text += ("\n" if together else "\n\n") * bool(text) + part
    return text + "\n"


def _accuracy_table(content: Content, rows: Sequence[Row]) -> str:
    def shown(row: Row) -> str:
        return f"**{_inline(row.name)}**" if row.pooled else _inline(row.name)

    body = [[shown(row), *map(_cell, row.cells)] for row in rows]
    return _table(["", *content.labels], body, escaped=True)


def _cell(cell: CellLike | None) -> str:
    if cell is None:
        return "\u2013"
    if cell.accuracy is None:
        return "n=0"
    return f"{percent(cell.accuracy)} \\[{round(100 * cell.low)}, {round(100 * cell.high)}\\] n={cell.n}"


def _difference_table(content: Content) -> str:
    rows = [
        [name(label), signed_points(mean), f"[{signed_points(low)}, {signed_points(high)}]", str(pairs)]
        for label, (mean, low, high, pairs) in content.differences.items()
    ]
    return _table(["", "difference (points)", "95% interval", "shared tasks"], rows)


def _collection_table(content: Content) -> str:
    rows = []
    for label, counts in content.collection.items():
        dropped = ", ".join(f"{count} {name(reason)}" for reason, count in counts.dropped.items())
        correct = "\u2013" if counts.correct is None else str(counts.correct)
        rows.append([name(label), str(counts.collected), correct, str(counts.kept), dropped or "none"])
    return _table(["", "collected", "correct", "kept", "dropped"], rows)


def _tool_table(content: Content) -> str:
    tools = list(dict.fromkeys(tool for shares in content.tool_use.values() for tool in shares))
    rows = [
        [name(tool), *(percent(content.tool_use[label].get(tool)) for label in content.tool_use)]
        for tool in tools
    ]
    return _table(["runs that called", *map(name, content.tool_use)], rows)


def _loss_table(content: Content) -> str:
    rows = [
        [name(label), str(points[-1][0]), f"{points[0][1]:.3f}", f"{points[-1][1]:.3f}"]
        for label, points in content.losses.items()
        if points
    ]
    return _table(["", "last step", "first loss", "last loss"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], escaped: bool = False) -> str:
    lines = [[_inline(cell) for cell in head], ["---", *["---:"] * (len(head) - 1)]]
    lines += [list(row) if escaped else [_inline(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _inline(text: str) -> str:
    """Text on one line in which no character means anything to Markdown or HTML."""
    line = " ".join(clean(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)


def _fenced(text: str, language: str) -> str:
    text = clean(text, limit=20_000)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
