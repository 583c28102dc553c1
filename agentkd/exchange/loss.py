"""What a format has no field for: measured, carried beside, and counted.

A trajectory is encoded and decoded again; :func:`remainder` is what that did not give back.
Where the format has room for it, the remainder travels with the row and :func:`restore` puts it
back, so a round trip loses nothing; where it has not, :func:`differences` names every field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from agentkd.trajectory import Trajectory

__all__ = ["differences", "remainder", "restore", "row_differences"]


def remainder(whole: Trajectory, native: Trajectory) -> dict[str, Any]:
    """The fields of ``whole`` that ``native`` has not, or has otherwise.

    Returns:
        ``{"trajectory": {...}, "task": {...}, "steps": {number: {...}}, "of": steps}``; the steps
        stand whole under "trajectory" where their number differs.
    """
    left, right = whole.model_dump(mode="json"), native.model_dump(mode="json")
    result: dict[str, Any] = {
        "trajectory": _changed(left, right, leave={"steps", "task"}),
        "task": _changed(left["task"], right["task"]),
        "steps": {},
        "of": len(left["steps"]),
    }
    if len(left["steps"]) != len(right["steps"]):
        result["trajectory"]["steps"] = left["steps"]
    else:
        for mine, theirs in zip(left["steps"], right["steps"], strict=True):
            if changed := _changed(mine, theirs):
                result["steps"][str(mine["number"])] = changed
    return result


def _changed(left: dict[str, Any], right: dict[str, Any], leave: set[str] | None = None) -> dict[str, Any]:
    return {key: value for key, value in left.items() if key not in (leave or ()) and value != right.get(key)}


def restore(native: Trajectory, extra: dict[str, Any]) -> Trajectory:
    """Put a remainder back. Steps that were added or taken away since lose what belonged to each.

    Raises:
        ValueError: the remainder is not one.
    """
    data = native.model_dump(mode="json")
    data.update(extra["trajectory"])
    data["task"].update(extra["task"])
    if len(native.steps) == extra["of"]:
        for step in data["steps"]:
            step.update(extra["steps"].get(str(step["number"]), {}))
    return Trajectory.model_validate(data)


def differences(whole: Trajectory, other: Trajectory) -> Counter[str]:
    """How many values of each field of ``whole`` are not the same in ``other``: ``steps.usage: 3``."""
    rest = remainder(whole, other)
    counts = Counter(dict.fromkeys(rest["trajectory"], 1))
    counts.update(f"task.{name}" for name in rest["task"])
    counts.update(f"steps.{name}" for step in rest["steps"].values() for name in step)
    return counts


def row_differences(row: Any, other: Any) -> Counter[str]:
    """The same for two rows of a foreign format: paths of values that ``other`` has not or has otherwise."""
    theirs = dict(_leaves(other))
    return Counter(_path(place) for place, value in _leaves(row) if theirs.get(place, _ABSENT) != value)


_ABSENT = object()


def _leaves(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*place, key))
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _leaves(item, (*place, number))
    elif value not in (None, {}, []):  # an empty value says nothing that could be lost
        yield place, value


def _path(place: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in place if isinstance(part, str))
