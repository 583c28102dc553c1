"""Public test sets, read from files in the form in which they are published.

``set:NAME=FILE`` takes a file (JSON Lines, JSON, CSV), ``set:NAME`` the dataset of the Hugging Face hub.
All tasks belong to "test": nothing is trained on them. Each set is scored by a deterministic scorer; the
published tables of some use a judge, see ``agentkd score``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from agentkd.errors import ConfigError, DataError, boundary
from agentkd.task import Task
from agentkd.taskset.hub import open_dataset
from agentkd.taskset.row import row_task

__all__ = ["PUBLIC_SETS", "PublicSet", "public_tasks"]


class PublicSet(NamedTuple):
    """One published set."""

    title: str
    size: int
    """Questions of it in the tables of arXiv 2505.17612; ``--n`` takes as many of a longer file."""
    scorer: str
    hub: tuple[str, str | None, str]
    """Dataset, config and split on the hub."""


PUBLIC_SETS: dict[str, PublicSet] = {
    "hotpotqa": PublicSet("HotpotQA", 500, "exact", ("hotpotqa/hotpot_qa", "distractor", "validation")),
    "musique": PublicSet("MuSiQue", 500, "exact", ("dgslibisey/MuSiQue", None, "validation")),
    "2wiki": PublicSet("2WikiMultihopQA", 500, "exact", ("xanhho/2WikiMultihopQA", None, "validation")),
    "bamboogle": PublicSet("Bamboogle", 125, "exact", ("chiayewken/bamboogle", None, "test")),
    "math_500": PublicSet("MATH-500", 500, "math", ("HuggingFaceH4/MATH-500", None, "test")),
    "gsm_hard": PublicSet("GSM-Hard", 500, "numeric", ("reasoning-machines/gsm-hard", None, "train")),
    "aime": PublicSet("AIME", 90, "numeric", ("AI-MO/aimo-validation-aime", None, "train")),
    "olymmath": PublicSet("OlymMATH", 200, "math", ("RUC-AIBOX/OlymMATH", "en-hard", "test")),
}
"""The eight sets of the paper."""

_QUESTION = ("question", "problem", "input")
_ANSWER = ("answer", "target")
_ID = ("id", "_id", "unique_id", "orig_id")
_LEVELS = ("level", "type", "subject")
_LISTS = ("data", "examples", "rows", "questions")
_HINT = "Give the file as it is published; docs/evaluation.md lists the columns of each set."


def public_tasks(spec: str) -> list[Task]:
    """The tasks of ``NAME=FILE`` or ``NAME``, in the order of the file.

    Raises:
        ConfigError: no such set, or ``datasets`` is missing.
        DataError: the file is missing or malformed; names the row.
    """
    name, _, place = spec.partition("=")
    known = PUBLIC_SETS.get(name.strip())
    if known is None:
        raise ConfigError(f"There is no public set {name!r}.", f"Known: {', '.join(PUBLIC_SETS)}.")
    if place:
        rows = _rows(Path(place))
    else:
        dataset, config, split = known.hub
        rows = open_dataset(dataset, config)[split]
    where = place or known.hub[0]
    tasks: dict[str, Task] = {}
    for number, row in enumerate(rows, 1):
        try:
            task = _task(name.strip(), known, row)
        except (ValueError, TypeError, AttributeError) as exc:
            why = exc.errors()[0]["msg"] if isinstance(exc, ValidationError) else exc
            raise DataError(f"{where}, row {number}: {why}.", _HINT) from exc
        if task is None:
            continue
        if task.id in tasks:
            raise DataError(f"{where}, row {number}: the task {task.id!r} stands there twice.", _HINT)
        tasks[task.id] = task
    if not tasks:
        raise DataError(f"{where} has no questions.", _HINT)
    return list(tasks.values())


def _rows(path: Path) -> Iterable[Any]:
    if not path.is_file():
        raise DataError(f"There is no file {path}.", "Check the path.")
    with boundary(DataError, f"reading {path}", _HINT):
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines(keepends=True)))
        if path.suffix == ".json" and text.lstrip()[:1] in "[{":
            try:
                value = json.loads(text)
            except json.JSONDecodeError as exc:
                if "Extra data" not in exc.msg:  # JSON Lines under another name
                    raise
            else:
                if isinstance(value, list):
                    return value
                return next((value[key] for key in _LISTS if isinstance(value.get(key), list)), [value])
        return [json.loads(line) for line in text.split("\n") if line.strip()]


def _task(name: str, known: PublicSet, row: Mapping[str, Any]) -> Task | None:
    """None for a question that MuSiQue marks as not answerable."""
    columns = {key.strip().casefold(): value for key, value in row.items() if isinstance(key, str)}
    if columns.get("answerable") is False:
        return None
    question = _first(columns, _QUESTION)
    answer = _first(columns, _ANSWER)
    if question is None or answer is None:
        raise ValueError(f"no question or no answer; the columns are {', '.join(map(str, row))}")
    fields: dict[str, Any] = {"question": question, "answer": answer, "scorer": known.scorer}
    if (own := _first(columns, _ID)) is not None:
        own = str(own)
        fields["id"] = own if own.startswith(name) else f"{name}:{own}"
    aliases = columns.get("answer_aliases")
    if isinstance(aliases, list):
        fields["answer_aliases"] = aliases
    meta = columns.get("meta") if isinstance(columns.get("meta"), dict) else {}
    level = _first(columns, _LEVELS) or _first(meta or {}, _LEVELS)
    if isinstance(level, (str, int)):
        fields["level"] = str(level)
    return row_task(fields, {}, family=name, split="test")


def _first(columns: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((columns[name] for name in names if columns.get(name) not in (None, "")), None)
