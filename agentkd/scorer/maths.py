"""Mathematics: are two answers the same expression, set, interval, tuple or matrix?

Plain numbers and equal texts are decided here; the rest by math-verify in a process that can be
killed (:mod:`agentkd.scorer.workers`).
"""

from __future__ import annotations

import re
import threading
from functools import cache

from agentkd.scorer.number import to_number
from agentkd.scorer.text import golds, normalise, stated_answer
from agentkd.scorer.workers import Workers
from agentkd.task import Task
from agentkd.trajectory import Score

__all__ = ["maths"]

LONGEST = 2000
"""Characters of an expression that is still parsed."""
_ERROR = re.compile(r"\s*(error|traceback|timeout|reached max|code execution)\b", re.IGNORECASE)
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{\s*\(?([^{}()]*)\)?\s*\}")
_LOCK = threading.Lock()


@cache
def _workers() -> Workers:
    return Workers()


def maths(task: Task, answer: str) -> Score:
    """1 when the answer is mathematically the gold answer, whatever its notation (LaTeX or Python).

    Sets and lists may come in any order, tuples and intervals may not. A comparison that does not
    end in its time has the value None and says so.
    """
    if _ERROR.match(answer):
        return Score(value=0.0, scorer="math", reason="the answer is an error message")
    stated = stated_answer(answer)
    if not stated.strip("${} "):
        return Score(value=0.0, scorer="math", reason="no answer")
    problem = ""
    for gold in golds(task):
        verdict, why = _verdict(stated, stated_answer(gold))
        if verdict:
            return Score(value=1.0, scorer="math", reason=why)
        problem = problem or (why if verdict is None else "")
    return Score(value=None if problem else 0.0, scorer="math", reason=problem)


def _verdict(answer: str, gold: str) -> tuple[bool | None, str]:
    wanted, got = to_number(gold), to_number(answer)
    if wanted is not None and got is not None:
        return wanted == got, "as numbers"
    if "".join(answer.split()) == "".join(gold.split()):
        return True, "as texts"
    if found := _WORDS.fullmatch(gold):
        words = _WORDS.sub(r"\1", answer).strip(" ()")
        return normalise(words) == normalise(found.group(1)), "as texts"
    if len(answer) > LONGEST:
        return False, ""
    with _LOCK:  # one pool, whoever comes first
        workers = _workers()
    reply = workers.ask({"gold": gold, "answer": answer})
    return (None, reply.problem) if reply.problem is not None else (bool(reply.value), "")
