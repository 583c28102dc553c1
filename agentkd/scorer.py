"""Scorers: is this answer right? Used by filter, evaluation and partition alike.

A scorer never turns an error into a correct answer: what cannot be compared has the value None
and a reason.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import Protocol

from agentkd.errors import ConfigError
from agentkd.task import Task
from agentkd.trajectory import Score

__all__ = ["SCORERS", "Scorer", "check_scorers", "normalise", "score", "to_number"]

RELATIVE_TOLERANCE = 1e-6


class Scorer(Protocol):
    """Compares an answer with the gold answer."""

    def __call__(self, answer: str, gold: str) -> Score: ...


def score(task: Task, answer: str | None) -> Score:
    """Score an answer with the task's own scorer.

    Raises:
        ConfigError: the task names an unknown scorer.
    """
    check_scorers([task])
    if task.answer is None:
        return Score(value=None, scorer=task.scorer, reason="the task has no gold answer")
    if answer is None or not answer.strip():
        return Score(value=0.0, scorer=task.scorer, reason="no answer")
    return SCORERS[task.scorer](answer, task.answer)


def check_scorers(tasks: Iterable[Task]) -> None:
    """Notice a wrong name before anything is run.

    Raises:
        ConfigError: a task names an unknown scorer.
    """
    for task in tasks:
        if task.scorer not in SCORERS:
            raise ConfigError(
                f"Task {task.id} asks for the scorer {task.scorer!r}.",
                f"Known scorers: {', '.join(SCORERS)}.",
            )


def normalise(text: str) -> str:
    """SQuAD normalisation: case, punctuation, English articles and white space.

    Source: Rajpurkar et al. 2016, the official evaluation script's rules.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(char for char in text if char not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def to_number(text: str) -> Fraction | None:
    """The number a text is, or None: signs, thousands separators, decimals, exponents, fractions.

    A text that only contains a number ("about 12 apples") is not one, but a currency sign
    before it or a full stop after it is allowed.
    """
    cleaned = unicodedata.normalize("NFKC", text).strip().strip("$€£").rstrip(".").strip()
    cleaned = cleaned.replace("\u2212", "-")
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", cleaned):
        cleaned = cleaned.replace(",", "")
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?|[+-]?\d+/\d+", cleaned):
        return None
    try:
        return Fraction(cleaned)
    except (ValueError, ZeroDivisionError):
        return None


def _exact(answer: str, gold: str) -> Score:
    wanted = to_number(gold)
    if wanted is not None:  # the normalisation below would drop a sign or a decimal point
        return Score(value=float(to_number(answer) == wanted), scorer="exact")
    return Score(value=float(normalise(answer) == normalise(gold)), scorer="exact")


def _numeric(answer: str, gold: str) -> Score:
    wanted = to_number(gold)
    if wanted is None:
        return Score(value=None, scorer="numeric", reason=f"the gold answer {gold!r} is not a number")
    got = to_number(answer)
    if got is None:
        return Score(value=0.0, scorer="numeric", reason="the answer is not a number")
    if wanted.denominator == 1 and got.denominator == 1:
        return Score(value=float(got == wanted), scorer="numeric")
    close = abs(got - wanted) <= Fraction(RELATIVE_TOLERANCE) * max(abs(wanted), abs(got))
    return Score(value=float(close), scorer="numeric", reason=f"relative tolerance {RELATIVE_TOLERANCE:g}")


def _f1(answer: str, gold: str) -> Score:
    got, wanted = normalise(answer).split(), normalise(gold).split()
    shared = sum((Counter(got) & Counter(wanted)).values())
    if shared == 0:
        return Score(value=float(got == wanted), scorer="f1")
    precision, recall = shared / len(got), shared / len(wanted)
    value = 2 * precision * recall / (precision + recall)
    return Score(value=1.0 if math.isclose(value, 1.0) else value, scorer="f1")


SCORERS: dict[str, Scorer] = {"exact": _exact, "numeric": _numeric, "f1": _f1}
"""The scorers by name. "f1" is token F1 (SQuAD); the others give 0 or 1."""
