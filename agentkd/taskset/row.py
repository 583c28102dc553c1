"""From a row of somebody's data to a :class:`~agentkd.task.Task`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from agentkd.errors import ConfigError
from agentkd.task import Task
from agentkd.taskset.split import split_of, stable_hash

__all__ = ["ROW_OPTIONS", "TEST_PERCENT", "check_options", "guess_column", "row_task"]

ROW_OPTIONS = ("question", "answer", "scorer", "split")
"""Options that may stand behind the name of a file or dataset, as in ``tasks.jsonl?answer=gold``."""
TEST_PERCENT = 20
"""Share of the rows that belongs to "test" where the rows do not say so themselves."""

_QUESTION_COLUMNS = ("question", "problem", "query", "prompt", "input", "instruction")
_ANSWER_COLUMNS = (
    "answer",
    "answers",
    "gold",
    "golden_answers",
    "final_answer",
    "target",
    "solution",
    "output",
)
_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?")


def check_options(options: Mapping[str, str], where: str) -> None:
    """Raises ConfigError for an option that does not exist."""
    for name in options:
        if name not in ROW_OPTIONS:
            raise ConfigError(f"{where} has an unknown option {name!r}.", f"Known: {', '.join(ROW_OPTIONS)}.")


def guess_column(columns: Mapping[str, Any], role: str, chosen: str | None) -> str | None:
    """The column for a role ("question" or "answer"): the chosen one, or the first usual name."""
    if chosen is not None:
        return chosen if chosen in columns else None
    usual = _QUESTION_COLUMNS if role == "question" else _ANSWER_COLUMNS
    return next((name for name in usual if name in columns), None)


def row_task(row: Mapping[str, Any], options: Mapping[str, str], *, family: str, split: str | None) -> Task:
    """Make a task of a row.

    Columns with the names of Task fields are taken for what they are, others go into ``meta``.

    Args:
        row: the columns by name.
        options: "question", "answer" name the columns, "scorer" the scorer.
        family: for rows that name none.
        split: the split of the row, or None to take it from the row, or else from a stable hash
            of the question (so the same question is always on the same side).

    Raises:
        ValueError: no usable question, or a field of the wrong type; says which.
    """
    question_column = guess_column(row, "question", options.get("question"))
    answer_column = guess_column(row, "answer", options.get("answer"))
    if question_column is None:
        raise ValueError(f"no column {options.get('question') or 'question'!r}; there are {', '.join(row)}")
    if options.get("answer") and answer_column is None:
        raise ValueError(f"no column {options['answer']!r}; there are {', '.join(row)}")
    question = row[question_column]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{question_column!r} is not a non-empty text")
    answer = _answer_text(row.get(answer_column)) if answer_column else None
    fields = {name: row[name] for name in ("id", "scorer", "family", "level") if row.get(name) is not None}
    used = {question_column, answer_column, "split", "meta", *fields}
    own_split = row.get("split") if row.get("split") in ("train", "test") else None
    task = Task.model_validate(
        {
            "id": f"{family}-{stable_hash(question):016x}",
            "family": family,
            "scorer": options.get("scorer") or ("numeric" if _is_number(answer) else "exact"),
            **fields,
            "question": question,
            "answer": answer,
            "split": split or own_split or split_of(f"row:{question}", TEST_PERCENT),
            "meta": {
                **(row["meta"] if isinstance(row.get("meta"), dict) else {}),
                **{name: value for name, value in row.items() if name not in used},
                **_aliases(row, answer_column),
            },
        }
    )
    task.model_dump_json()  # fails now, with the row's place, for a text that cannot be stored as UTF-8
    return task


def _answer_text(value: Any) -> str | None:
    """The gold answer as text; of several accepted ones the first (see :func:`_aliases`); of GSM8K's what
    follows ####."""
    if isinstance(value, dict) and "text" in value:  # SQuAD
        value = value["text"]
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return None
    if isinstance(value, (dict, list)):
        raise ValueError("the answer is neither a text nor a number")
    text = str(value).strip()
    return text.rsplit("####", 1)[1].strip() if "####" in text else text


def _aliases(row: Mapping[str, Any], column: str | None) -> dict[str, list[str]]:
    """Further answers that count as right: the others of a list, and those of a column of their own."""
    value = row.get(column) if column else None
    if isinstance(value, dict):  # SQuAD
        value = value.get("text")
    listed = [*(value[1:] if isinstance(value, list) else []), *_listed(row, "answer_aliases", "aliases")]
    names = list(dict.fromkeys(str(item).strip() for item in listed if isinstance(item, (str, int, float))))
    return {"aliases": names} if names else {}


def _listed(row: Mapping[str, Any], *columns: str) -> list[Any]:
    return [item for name in columns if isinstance(row.get(name), list) for item in row[name]]


def _is_number(answer: str | None) -> bool:
    return answer is not None and _NUMBER.fullmatch(answer) is not None
