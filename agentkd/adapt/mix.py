"""Rows to learn from: trajectories, each under the prompt it is learnt under and with where it comes from.

The label ``prompt`` says under which prompt a row is learnt ("direct", "allowed", "required", see
:data:`agentkd.prompt.TOOL_PROMPTS`), ``target`` what it teaches ("direct" or "tools"), ``source`` which
trajectory it was made of, ``class`` whether its question was easy or hard, ``rewriter`` who took the tools
out, ``copy`` which repetition it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from agentkd.adapt.knowledge import Solution
from agentkd.errors import DataError, boundary
from agentkd.prompt import TOOL_PROMPTS, action_text, system_prompt
from agentkd.scorer import score
from agentkd.trajectory import Step, StopReason, Trajectory, Usage

__all__ = ["Rows", "balanced_copies"]


class Rows:
    """Makes rows; all of them name the tools of all trajectories, so that every file makes the same student.

    Args:
        traces: the trajectories with tools.

    Raises:
        DataError: a tool is not a schema.
    """

    def __init__(self, traces: Sequence[Trajectory]) -> None:
        found: dict[str, str] = {}
        with boundary(DataError, "reading the tools' schemas of the trajectories", "Collect them again."):
            for trace in traces:
                for text in trace.tools:
                    found.setdefault(json.loads(text)["name"], text)
            self.tools = tuple(found.values())
            tools = [SimpleNamespace(**json.loads(text)) for text in self.tools]
            self.prompts = {name: system_prompt(template, tools) for name, template in TOOL_PROMPTS.items()}

    def direct(self, trace: Trajectory, solution: Solution | None, prompt: str, **labels: str) -> Trajectory:
        """A question with its solution without tools.

        Args:
            trace: what the solution was made of.
            solution: None when the trajectory itself has no tools in it.
            prompt: "direct" or "allowed".
            labels: further ones.
        """
        if solution is None:
            return self._row(trace, prompt, target="direct", rewriter="none", **labels)
        text = action_text(solution.thought, solution.code)
        step = Step(
            number=1,
            actor=solution.by,
            raw=text,
            output=text,
            thought=solution.thought,
            code=solution.code,
            is_final=True,
        )
        alone = trace.model_copy(
            update={
                "steps": (step,),
                "score": score(trace.task, trace.answer),
                "stop_reason": StopReason.FINAL_ANSWER,
                "usage": Usage(),
                "seconds": 0.0,
            }
        )
        return self._row(alone, prompt, target="direct", rewriter=solution.by, **labels)

    def with_tools(self, trace: Trajectory, prompt: str, **labels: str) -> Trajectory:
        """A question with its trajectory with tools, under "allowed" or "required"."""
        return self._row(trace, prompt, target="tools", **labels)

    def _row(self, trace: Trajectory, prompt: str, **labels: str) -> Trajectory:
        copy = labels.get("copy", "1")
        name = f"{trace.id}~{prompt}" + ("" if copy == "1" else f".{copy}")
        return trace.model_copy(
            update={
                "id": name,
                "system_prompt": self.prompts[prompt],
                "tools": self.tools,
                "labels": {**trace.labels, **labels, "prompt": prompt, "source": trace.id},
            }
        )


def balanced_copies(easy: int, hard: int) -> Mapping[str, int]:
    """How often the questions of each class stand in the mix: the smaller class floor(long / short) times."""
    if not easy or not hard:
        return {"easy": 1, "hard": 1}
    return {"easy": max(1, hard // easy), "hard": max(1, easy // hard)}
