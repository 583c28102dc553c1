"""Tasks of a JSON Lines file: full :class:`~agentkd.task.Task` records, or questions with answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from agentkd.errors import DataError, boundary, first_problem
from agentkd.task import Task
from agentkd.taskset.row import check_options, row_task

__all__ = ["jsonl_tasks"]

_HINT = 'Write one JSON object a line: {"question": "...", "answer": "..."}.'


def jsonl_tasks(path: Path, split: str, options: Mapping[str, str]) -> list[Task]:
    """The tasks of a file, in the order of its lines.

    Args:
        path: UTF-8, one JSON object a line; see :func:`agentkd.taskset.row.row_task`.
        split: "train", "test" or "all". A line that names no split belongs to one by a stable
            hash of its question (one in five to "test").
        options: from the spec, as in ``tasks.jsonl?question=problem&split=all``.

    Raises:
        ConfigError: an unknown option.
        DataError: missing, malformed (the line is named), an id twice, or nothing in the split.
    """
    check_options(options, str(path))
    if not path.is_file():
        raise DataError(f"There is no task file {path}.", "Check the path.")
    with boundary(DataError, f"reading {path}", "Save the file as UTF-8."):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    tasks: dict[str, Task] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            task = _task(path, number, line, options)
            if task.id in tasks:
                raise DataError(
                    f"{path}, line {number}: the task {task.id!r} stands there twice.",
                    "Make ids and questions unique.",
                )
            tasks[task.id] = task
    if not tasks:
        raise DataError(f"{path} has no tasks.", _HINT)
    chosen = [task for task in tasks.values() if split == "all" or task.split == split]
    if not chosen:
        raise DataError(
            f"None of the {len(tasks)} tasks in {path} belongs to the split {split!r}.",
            'Use the split "all", or write a "split" into each line.',
        )
    return chosen


def _task(path: Path, number: int, line: str, options: Mapping[str, str]) -> Task:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        return row_task(row, options, family=path.stem, split=None)
    except json.JSONDecodeError as exc:
        raise DataError(f"{path}, line {number}: not JSON ({exc.msg}).", _HINT) from exc
    except ValidationError as exc:
        raise DataError(f"{path}, line {number}: {first_problem(exc)}.", _HINT) from exc
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{path}, line {number}: {exc}.", _HINT) from exc
