"""What a report says, before it has a form; the page, the Markdown and the JSON all read this."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentkd.errors import DataError
from agentkd.report.published import Published
from agentkd.trajectory import Trajectory

__all__ = [
    "CellLike",
    "Collection",
    "Content",
    "ResultLike",
    "Row",
    "clean",
    "name",
    "number",
    "percent",
    "plain",
    "signed_points",
]

EXAMPLES_SHOWN = 12
TEXT_LIMIT = 4000
"""Characters of one text that the page shows; the JSON Lines file has the rest."""
LABEL_LIMIT = 60
"""Characters of a name in a table."""


class CellLike(Protocol):
    """The figures of one system on one set of tasks, see :class:`agentkd.evaluate.Cell`."""

    @property
    def n(self) -> int: ...
    @property
    def tasks(self) -> int: ...
    @property
    def correct(self) -> int: ...
    @property
    def accuracy(self) -> float | None: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def errors(self) -> int: ...
    @property
    def unscored(self) -> int: ...
    @property
    def tokens_per_task(self) -> float | None: ...
    @property
    def output_tokens_per_task(self) -> float | None: ...
    @property
    def seconds_per_task(self) -> float | None: ...
    @property
    def steps_per_task(self) -> float | None: ...
    @property
    def tool_uses_per_task(self) -> float | None: ...
    @property
    def stop_reasons(self) -> Mapping[str, int]: ...
    @property
    def failures(self) -> Mapping[str, int]: ...


class MeasuresLike(Protocol):
    """Figures beside accuracy, see :class:`agentkd.evaluate.Measures`."""

    @property
    def repairs(self) -> Mapping[str, int]: ...


class ResultLike(Protocol):
    """All figures of one system, see :class:`agentkd.evaluate.SystemResult`."""

    @property
    def label(self) -> str: ...
    @property
    def overall(self) -> CellLike: ...
    @property
    def families(self) -> Mapping[str, CellLike]: ...
    @property
    def levels(self) -> Mapping[str, Mapping[str, CellLike]]: ...
    @property
    def groups(self) -> Mapping[str, CellLike]: ...
    @property
    def measures(self) -> MeasuresLike | None: ...
    def model_dump(self) -> dict[str, Any]:
        """Everything as plain Python values, ``label`` included."""
        ...


class Collection(BaseModel):
    """What became of the trajectories of one collection."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    collected: int = Field(ge=0)
    correct: int | None = Field(default=None, ge=0)
    """How many had the right answer, where that is known."""
    kept: int = Field(ge=0)
    dropped: dict[str, int] = Field(default_factory=dict)
    """Number of dropped trajectories by reason."""


@dataclass(frozen=True)
class Row:
    """One row of a table of accuracies; ``cells`` has one entry a system, None where not run."""

    name: str
    cells: tuple[CellLike | None, ...]
    pooled: bool = False


@dataclass(frozen=True)
class Content:
    """All that a report says. Build it with :meth:`build`."""

    title: str
    created: str
    results: tuple[ResultLike, ...]
    collection: dict[str, Collection]
    losses: dict[str, list[tuple[int, float]]]
    config: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...]
    served: dict[str, str]
    next_steps: tuple[str, ...]
    examples: tuple[Trajectory, ...]
    differences: dict[str, tuple[float, float, float, int]]
    tool_use: dict[str, dict[str, float]]
    """Share of a system's runs that called a tool, by system and tool."""
    published: tuple[Published, ...]
    viewer: str
    """Address of the page that shows every trajectory; empty where there is none."""

    @classmethod
    def build(
        cls,
        *,
        title: str,
        results: Sequence[ResultLike],
        collection: Mapping[str, Any],
        losses: Mapping[str, Sequence[tuple[int, float]]],
        config: Mapping[str, Any],
        versions: Mapping[str, str],
        notes: Sequence[str],
        served: Mapping[str, str],
        next_steps: Sequence[str],
        examples: Sequence[Trajectory],
        differences: Mapping[str, tuple[float, float, float, int]],
        tool_use: Mapping[str, Mapping[str, float]],
        published: Sequence[Published],
        viewer: str,
    ) -> Content:
        """Check and order what :func:`agentkd.report.write_report` was given."""
        labels = [result.label for result in results]
        if len(set(labels)) < len(labels):
            raise DataError(f"Two systems have the same label: {labels}.", "Give every system its own.")
        return cls(
            title=title,
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            results=tuple(results),
            collection=_collections(collection),
            losses={label: [(step, loss) for step, loss in points] for label, points in losses.items()},
            config=dict(config),
            versions=dict(versions),
            notes=tuple(notes),
            served=dict(served),
            next_steps=tuple(next_steps),
            examples=tuple(examples[:EXAMPLES_SHOWN]),
            differences=dict(differences),
            tool_use={label: dict(shares) for label, shares in tool_use.items()},
            published=tuple(published),
            viewer=viewer,
        )

    @property
    def labels(self) -> list[str]:
        """Names of the systems, in order."""
        return [name(result.label) for result in self.results]

    def family_rows(self) -> list[Row]:
        """One row for each family that any system ran."""
        return [
            Row(name(family), tuple(result.families.get(family) for result in self.results))
            for family in _names(result.families for result in self.results)
        ]

    def pooled_rows(self) -> list[Row]:
        """One row for each group, and the last for all tasks together."""
        rows = [
            Row(name(group), tuple(result.groups.get(group) for result in self.results), pooled=True)
            for group in _names(result.groups for result in self.results)
        ]
        return [*rows, Row("all tasks", tuple(result.overall for result in self.results), pooled=True)]

    def level_rows(self) -> list[Row]:
        """One row for each family and level; empty when no family has two levels."""
        rows = []
        split = False
        for family in _names(result.levels for result in self.results):
            levels = sorted({level for result in self.results for level in result.levels.get(family, {})})
            split = split or len(levels) > 1
            for level in levels:
                cells = tuple(result.levels.get(family, {}).get(level) for result in self.results)
                rows.append(Row(name(f"{family}, {level}"), cells))
        return rows if split else []

    def cost_rows(self) -> list[tuple[str, list[str]]]:
        """Cost and behaviour of each system over all its tasks, as text."""
        cells = [result.overall for result in self.results]
        rows = [
            ("tokens per task (mean, input + output)", [number(cell.tokens_per_task, 0) for cell in cells]),
            ("tokens sampled per task (mean)", [number(cell.output_tokens_per_task, 0) for cell in cells]),
            ("seconds per task (median)", [number(cell.seconds_per_task, 2) for cell in cells]),
            ("steps per task (mean)", [number(cell.steps_per_task, 1) for cell in cells]),
            ("tool calls per task (mean)", [number(cell.tool_uses_per_task, 1) for cell in cells]),
            ("how runs ended", [_counts(cell.stop_reasons) for cell in cells]),
            ("failures on the way", [_counts(cell.failures) for cell in cells]),
            ("errored runs (not counted in n)", [str(cell.errors) for cell in cells]),
        ]
        if any(cell.unscored for cell in cells):
            unscored = [str(cell.unscored) for cell in cells]
            rows.append(("answers that could not be graded (count as wrong)", unscored))
        mended = [result.measures.repairs if result.measures else None for result in self.results]
        if any(mended):
            shown = [number(None, 0) if kinds is None else _counts(kinds) for kinds in mended]
            rows.append(("texts mended (candidates that lost included)", shown))
        return rows

    def published_rows(self) -> list[tuple[str, list[str]]]:
        """The paper's means beside ours, as text."""
        return [
            (row.method, [f"{row.published:.2f}", number(row.measured, 2), row.label or "not run"])
            for row in self.published
        ]

    def caveats(self) -> list[str]:
        """What holds for the figures whatever the notes say."""
        said = [
            "Each accuracy stands with its 95% Wilson interval and n, the number of runs counted. "
            "No answer counts as wrong. Runs ended by an error of the machinery are listed, not counted."
        ]
        if len({result.overall.tasks for result in self.results}) > 1:
            said.append(
                "The systems ran different numbers of tasks. "
                "Compare them on the tasks they share, by the paired differences."
            )
        return said


def _collections(given: Mapping[str, Any]) -> dict[str, Collection]:
    by_label = {"trajectories": given} if "collected" in given else given
    try:
        return {label: Collection.model_validate(counts) for label, counts in by_label.items()}
    except ValidationError as exc:
        raise DataError(
            f"These are no collection counts: {exc.errors()[0]['msg']}.",
            'Give {"collected": n, "kept": n, "dropped": {reason: n}}, or several of those by label.',
        ) from exc


def _names(parts: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for part in parts for key in part))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name(kind).replace('_', ' ')}" for kind, count in counts.items()) or "none"


def percent(share: float | None) -> str:
    """Whole percent; 0% and 100% only when that is exact."""
    if share is None:
        return "\u2013"
    return f"{round(share * 100) if share in (0.0, 1.0) else min(99, max(1, round(share * 100)))}%"


def signed_points(share: float) -> str:
    """A difference of two shares in percentage points, as in ``+12``."""
    return f"{round(share * 100):+d}" if round(share * 100) else "0"


def number(value: float | None, digits: int) -> str:
    """A figure with thousands separators, or a dash."""
    return "\u2013" if value is None else f"{value:,.{digits}f}"


_INVISIBLE = {
    *(0x061C, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2070),
}


def clean(text: str, limit: int = TEXT_LIMIT) -> str:
    """Text that can be shown: control, bidirectional and broken characters made visible, and cut.

    Line ends and tabs stay.
    """
    cut = len(text) - limit
    if cut > 0:
        text = f"{text[:limit]}\n[... {cut:,} characters cut]"
    return "".join(_visible(char) for char in text.replace("\r\n", "\n"))


def name(text: str, limit: int = LABEL_LIMIT) -> str:
    """The same on one line, for labels; cut with an ellipsis."""
    line = " ".join(text[: 10 * limit].split())
    return clean(line if len(line) <= limit else line[: limit - 1] + "\u2026")


def _visible(char: str) -> str:
    code = ord(char)
    if code < 0x20 and char not in "\n\t":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in _INVISIBLE or code & 0xFFFE == 0xFFFE:
        return f"\\u{code:04x}"
    return char


def plain(value: Any) -> Any:
    """Plain JSON of anything: no NaN or infinity (null), no broken Unicode, foreign objects as text."""
    if isinstance(value, Mapping):
        return {_encodable(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _encodable(str(value))


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
