"""Code by tests: the answer is a program, and the tests run on it in the sandbox."""

from __future__ import annotations

import re
import secrets

from agentkd.task import Task
from agentkd.trajectory import Score

__all__ = ["code"]

TEST_SECONDS = 10.0
_FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)


def code(task: Task, answer: str) -> Score:
    """1 when ``meta["tests"]`` (Python with asserts: a text, or a list of them) runs through on the answer.

    The answer's code runs first, as an action of its own; the tests end with a word that it cannot
    know, so that a program that exits early has not passed. ``meta["imports"]`` lists further modules
    that the code may import.

    Raises:
        SandboxError: the sandbox failed, which says nothing about the answer.
    """
    from agentkd.sandbox import CodeFailure, open_sandbox

    tests = task.meta.get("tests")
    tests = "\n".join(map(str, tests)) if isinstance(tests, list) else tests
    if not isinstance(tests, str) or not tests.strip():
        return Score(value=None, scorer="code", reason='the task has no "tests" in its meta')
    imports = task.meta.get("imports")
    blocks = _FENCED.findall(answer)
    word = secrets.token_hex(8)
    session = open_sandbox(imports=imports if isinstance(imports, list) else (), timeout=TEST_SECONDS)
    try:
        session("\n\n".join(blocks) if blocks else answer)
        passed = session(f"{tests}\n{word!r}").output == word
    except CodeFailure as exc:
        return Score(value=0.0, scorer="code", reason=exc.message[:300])
    finally:
        session.cleanup()
    return Score(
        value=float(passed), scorer="code", reason="" if passed else "the tests did not run to the end"
    )
