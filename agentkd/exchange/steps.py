"""Steps: ``{task_id, question, answer, steps: [{thought, code, observation}], final_answer}``.

The plainest form that recorded trajectories are passed around in.
"""

from __future__ import annotations

import json
from typing import Any

from agentkd.exchange.draft import Draft, Format, Row, Turn, acted, said
from agentkd.exchange.recast import printed_of, shown
from agentkd.trajectory import Trajectory

__all__ = ["STEPS"]

_STEP_KEYS = {"thought", "code", "observation"}
_BESIDE = "imported_steps"


def _encode(trajectory: Trajectory) -> Row:
    beside = json.loads(trajectory.labels.get(_BESIDE, "{}"))
    return {
        "task_id": trajectory.task.id,
        "question": trajectory.task.question,
        "answer": trajectory.task.answer,
        "teacher": trajectory.model,
        "steps": [
            {
                "thought": step.thought,
                "code": step.code or "",
                "observation": printed_of(step.observation),
                **beside.get(str(step.number), {}),
            }
            for step in trajectory.steps
        ],
        "final_answer": trajectory.answer or "",
        "correct": trajectory.correct,
    }


def _decode(row: Row) -> Draft:
    steps: list[dict[str, Any]] = row["steps"]
    beside = {
        str(number): rest
        for number, step in enumerate(steps, 1)
        if (rest := {key: value for key, value in step.items() if key not in _STEP_KEYS})
    }
    return Draft(
        question=row["question"],
        turns=tuple(_turn(step, number == len(steps)) for number, step in enumerate(steps, 1)),
        task_id=row.get("task_id"),
        gold=row.get("answer"),
        answer=row.get("final_answer") or None,
        model=row.get("teacher") or "unknown",
        labels={_BESIDE: json.dumps(beside, ensure_ascii=False)} if beside else {},
    )


def _turn(step: dict[str, Any], last: bool) -> Turn:
    thought, code, printed = step["thought"] or "", step["code"] or "", step.get("observation") or ""
    observation = None if last and not printed else shown(printed)
    return acted(thought, code, observation) if code else said(f"Thought: {thought}", observation)


STEPS = Format(
    name="steps",
    about="steps of thought, code and observation",
    encode=_encode,
    decode=_decode,
    keys=frozenset(["task_id", "question", "answer", "teacher", "steps", "final_answer", "correct"]),
    containers=(".jsonl", ".json"),
)
