"""Scorers: is this answer right? Used by filter, evaluation and partition alike.

A scorer never turns an error into a correct answer: what cannot be compared has the value None
and a reason. What a scorer needs beside the gold answer stands in ``Task.meta``: "aliases" (further
gold answers), "tolerance" and "unit" (numeric), "choices" (choice), "tests" (code).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from agentkd.errors import AgentkdError, ConfigError
from agentkd.scorer.choice import choice
from agentkd.scorer.code import code
from agentkd.scorer.maths import maths
from agentkd.scorer.number import numeric, to_number
from agentkd.scorer.text import exact, f1, golds, normalise, stated_answer
from agentkd.task import Task
from agentkd.trajectory import Score

__all__ = [
    "SCORERS",
    "Scorer",
    "check_scorers",
    "golds",
    "normalise",
    "score",
    "stated_answer",
    "to_number",
]

LONGEST_ANSWER = 100_000
"""Characters of an answer that is still compared; a longer one is wrong."""


class Scorer(Protocol):
    """Compares an answer with the gold answer of its task."""

    def __call__(self, task: Task, answer: str) -> Score: ...


def _asked_afterwards(task: Task, answer: str) -> Score:
    return Score(
        value=None, scorer="judge", reason="judged afterwards: agentkd score RUN --scorer judge --model NAME"
    )


SCORERS: dict[str, Scorer] = {
    "exact": exact,
    "numeric": numeric,
    "f1": f1,
    "math": maths,
    "choice": choice,
    "code": code,
    "judge": _asked_afterwards,
}
"""The scorers by name. "f1" is token F1 (SQuAD); the others give 0 or 1. A judge needs an endpoint and
is asked after the run, see :class:`agentkd.scorer.judge.Judge`."""


def score(task: Task, answer: str | None, *, scorer: Callable[[Task, str], Score] | None = None) -> Score:
    """Score an answer with the task's own scorer, or with another.

    Raises:
        ConfigError: the task names an unknown scorer, or its scorer is not installed.
    """
    if scorer is None:
        check_scorers([task])
        scorer = SCORERS[task.scorer]
    if task.scorer != "code" and (task.answer is None or not task.answer.strip()):
        return Score(value=None, scorer=task.scorer, reason="the task has no gold answer")
    if answer is None or not answer.strip():
        return Score(value=0.0, scorer=task.scorer, reason="no answer")
    if len(answer) > LONGEST_ANSWER:
        return Score(
            value=0.0, scorer=task.scorer, reason=f"the answer has more than {LONGEST_ANSWER} characters"
        )
    try:
        return scorer(task, answer)
    except ConfigError:
        raise
    except AgentkdError as exc:
        return Score(value=None, scorer=task.scorer, reason=f"{type(exc).__name__}: {exc.message}")


def check_scorers(tasks: Iterable[Task]) -> None:
    """Notice a wrong name, or one whose library is missing, before anything is run.

    Raises:
        ConfigError: a task names an unknown scorer, or one that is not installed.
    """
    from importlib.util import find_spec

    for task in tasks:
        if task.scorer not in SCORERS:
            raise ConfigError(
                f"Task {task.id} asks for the scorer {task.scorer!r}.",
                f"Known scorers: {', '.join(SCORERS)}.",
            )
        if task.scorer == "math" and find_spec("math_verify") is None:
            raise ConfigError(
                f"Task {task.id} asks for the scorer 'math', which needs math-verify.",
                "Install it by: pip install 'agentkd[math]'.",
            )
