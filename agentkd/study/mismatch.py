"""Does the answer follow from what was thought and seen?

Two signs that it does not, both read off the record without a model: the last statement of the last thought
("... is X", "... = X") is not the answer given (think-answer mismatch), or the answer stands in no
observation, thought, tool result or in the question, and was not computed either (unsupported).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from agentkd.scorer import normalise, to_number
from agentkd.study import Share
from agentkd.trajectory import Trajectory

__all__ = ["MismatchStudy", "study_mismatch"]

_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w])")
_STATED = re.compile(
    r"(?:\b(?:is|are|was|were|equals)|=)\s+[\"'*]*([^\n=\"'*]{1,80}?)(?=[\"'*]*(?:[,;]|\.\s|\.?$|=))", re.M
)
_POINTING = re.compile(r",?\s*(?:so\s+)?(?:that|this|it|which) is the (?:final )?answer\b", re.IGNORECASE)


class MismatchStudy(BaseModel):
    """Runs with an answer; those that an error ended are left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mismatch: Share
    """Of the runs whose last thought states an answer: it is another one."""
    mismatch_when_correct: Share
    mismatch_when_wrong: Share
    unsupported: Share
    """Of all runs with an answer."""
    unsupported_when_correct: Share
    unsupported_when_wrong: Share
    examples: tuple[str, ...] = ()
    """Ids of runs that show either."""


def study_mismatch(runs: Iterable[Trajectory], examples: int = 20) -> MismatchStudy:
    """Count both signs, overall and by whether the answer is right."""
    marks: list[tuple[str, bool, bool | None, bool]] = []
    for run in runs:
        if run.answer is not None and run.steps and not run.stop_reason.is_error:
            marks.append((run.id, run.correct, _mismatch(run), not _supported(run)))

    def mismatched(right: Iterable[bool]) -> Share:
        chosen = [mark for _, correct, mark, _ in marks if correct in set(right) and mark is not None]
        return Share.of(sum(chosen), len(chosen))

    def unsupported(right: Iterable[bool]) -> Share:
        chosen = [mark for _, correct, _, mark in marks if correct in set(right)]
        return Share.of(sum(chosen), len(chosen))

    return MismatchStudy(
        mismatch=mismatched((True, False)),
        mismatch_when_correct=mismatched((True,)),
        mismatch_when_wrong=mismatched((False,)),
        unsupported=unsupported((True, False)),
        unsupported_when_correct=unsupported((True,)),
        unsupported_when_wrong=unsupported((False,)),
        examples=tuple(name for name, _, mismatch, bare in marks if mismatch or bare)[:examples],
    )


def _mismatch(run: Trajectory) -> bool | None:
    """None where the last thought states no answer."""
    assert run.answer is not None
    thought = run.steps[-1].thought
    if run.kind == "cot":  # the line "Answer: ..." is the answer, not the thought
        thought = re.split(r"(?im)^\W*(?:final )?answer\W*:", thought)[0]
    stated = [found.strip(" .") for found in _STATED.findall(_POINTING.sub("", thought))]
    if not stated:
        return None
    last = stated[-1]
    wanted = to_number(run.answer)
    if wanted is not None:
        numbers = [to_number(found) for found in _NUMBER.findall(last)]
        return None if not numbers else wanted not in numbers
    return not _contains(last, run.answer)


def _supported(run: Trajectory) -> bool:
    assert run.answer is not None
    seen = [run.task.question, *(step.observation or "" for step in run.steps)]
    seen += [use.result or "" for step in run.steps for use in step.tool_uses]
    seen += [step.thought for step in run.steps[:-1] or run.steps]
    text = "\n".join(seen)
    wanted = to_number(run.answer)
    if wanted is not None and wanted in {to_number(found) for found in _NUMBER.findall(text)}:
        return True
    # What the last action computes itself needs no earlier mention.
    return _contains(text, run.answer) or _computed(run)


def _computed(run: Trajectory) -> bool:
    """Whether the last code passes something else than a constant to ``final_answer``."""
    code = run.steps[-1].code or ""
    given = re.findall(r"final_answer\s*\(\s*([^\n]+?)\s*\)\s*$", code, re.MULTILINE)
    return any(not re.fullmatch(r"[+-]?[\d.,]+|([\"']).*\1", item) for item in given)


def _contains(text: str, answer: str) -> bool:
    return f" {normalise(answer)} " in f" {normalise(text)} "
