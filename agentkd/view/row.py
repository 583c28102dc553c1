"""What the list shows of one trajectory, and what the page is sent of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from agentkd.trajectory import SCHEMA_VERSION, StopReason

__all__ = ["COLUMNS", "Record", "as_json", "result_of", "row_of", "shown", "texts", "version_note"]

Record = dict[str, Any]
"""One line of a file, as JSON."""

COLUMNS = (
    "n", "id", "task", "question", "family", "level", "kind", "model", "answer", "result", "score", "stop",
    "steps", "tokens", "chars", "seconds", "tools", "failures", "verdict", "sampled",
)  # fmt: skip
"""Of the list; a row is a list in this order, because names on 10,000 rows would be most of it."""

_QUESTION, _ANSWER = 240, 80
"""Characters of a text in the list."""
_ERRORS = frozenset(reason.value for reason in StopReason if reason.is_error)
_UNSEEN = ("prompt_token_ids", "output_token_ids")
"""Fields of a step that the page does not show."""


def row_of(number: int, record: Record, verdict: str | None) -> list[Any]:
    """The list's row of a trajectory; a field that is not there, or not what it should be, is empty.

    Args:
        number: place in the run, from 0.
        record: the trajectory.
        verdict: "kept", why it was dropped, or None where nothing was filtered.
    """
    task, steps = _dict(record.get("task")), _dicts(record.get("steps"))
    usage, score = _dict(record.get("usage")), _dict(record.get("score"))
    question = _text(task.get("question"))
    tools = {_text(use.get("name")) for step in steps for use in _dicts(step.get("tool_uses"))}
    failures = {_text(_dict(step.get("failure")).get("kind")) for step in steps}
    failures.add(_text(_dict(record.get("failure")).get("kind")))
    return [
        number,
        _text(record.get("id")) or f"line {number + 1}",
        _text(task.get("id")) or question,
        question[:_QUESTION],
        _text(task.get("family")),
        _text(task.get("level")),
        _text(record.get("kind")),
        _text(record.get("model")),
        _text(record.get("answer"))[:_ANSWER],
        result_of(record),
        _number(score.get("value")),
        _text(record.get("stop_reason")),
        len(steps),
        int((_number(usage.get("input_tokens")) or 0) + (_number(usage.get("output_tokens")) or 0)),
        sum(len(_text(step.get("output"))) for step in steps),
        round(_number(record.get("seconds")) or 0.0, 2),
        sorted(tools - {""}),
        sorted(failures - {""}),
        verdict,
        any(step.get("candidates") for step in steps),
    ]


def result_of(record: Record) -> str:
    """ "correct", "partial", "wrong", "not graded", "no gold" or "errored"."""
    if _text(record.get("stop_reason")) in _ERRORS:
        return "errored"
    value = _number(_dict(record.get("score")).get("value"))
    if value is None:
        gold = _dict(record.get("task")).get("answer")
        if gold is None:
            return "no gold"
        return "wrong" if record.get("answer") is None else "not graded"
    return "correct" if value >= 1 else "partial" if value > 0 else "wrong"


def version_note(record: Record) -> str | None:
    """What to know of a record that is not of this version of agentkd; None where there is nothing."""
    version = record.get("schema_version")
    if version == SCHEMA_VERSION:
        return None
    if version is None:
        return "This record does not say its version: it is shown as far as its fields are known."
    other = "an older" if isinstance(version, int) and version < SCHEMA_VERSION else "another"
    return (
        f"This record has schema version {version}, {other} one than {SCHEMA_VERSION}: "
        "it is shown as far as its fields are known."
    )


def shown(record: Record) -> Record:
    """The record without what the page does not show: token ids are half of an evaluation's file."""
    steps = [
        {key: value for key, value in step.items() if key not in _UNSEEN}
        for step in _dicts(record.get("steps"))
    ]
    return {**record, "steps": steps, "note": version_note(record)}


def texts(record: Record) -> Iterator[str]:
    """Every text of a trajectory that a search looks at."""
    task = _dict(record.get("task"))
    yield from (_text(record.get("id")), _text(task.get("question")), _text(task.get("answer")))
    yield _text(record.get("answer"))
    for step in _dicts(record.get("steps")):
        yield from (_text(step.get("output")), _text(step.get("observation")))
        yield _text(_dict(step.get("failure")).get("message"))


def as_json(value: Any) -> str:
    """JSON that a browser takes: a number too large for one (1e999) is null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _number(value: Any) -> float | None:
    """A finite number, or None: NaN is no score."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < float("inf") else None
