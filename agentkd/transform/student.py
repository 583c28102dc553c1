"""Transforms that ask how likely the student finds a text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from agentkd.prompt import (
    COT_STUDENT,
    STUDENT,
    action_text,
    chat_messages,
    question_text,
    system_prompt,
    trajectory_messages,
)
from agentkd.trajectory import Step, Trajectory
from agentkd.transform.means import Means, changed, rewritten

if TYPE_CHECKING:
    from agentkd.engine.likelihood import Likelihood

__all__ = ["FriendlySettings", "SkipChunks", "SkipSettings", "StudentFriendly"]

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


class FriendlySettings(BaseModel):
    """Settings of :class:`StudentFriendly`. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per_task: int = Field(default=1, ge=1)
    """Trajectories kept of each task."""


class StudentFriendly:
    """Of several right trajectories of a task the ones the student finds likeliest (SmartAD).

    The measure is the student's mean negative log-likelihood a token over what the model emitted, behind
    the prompt the student will have. Filter with ``--per-task`` above 1 first, or there is nothing to choose.
    """

    name = "student-friendly"

    def __init__(self, settings: FriendlySettings) -> None:
        self.settings = settings

    def __call__(self, trajectories: Sequence[Trajectory], means: Means) -> list[Trajectory]:
        """See :class:`agentkd.transform.Transform`."""
        scores: dict[str, float] = {}
        by_task: dict[str, list[Trajectory]] = {}
        for done, item in enumerate(trajectories, 1):
            value = self._score(item, means)
            scores[item.id] = float("inf") if value is None else value
            by_task.setdefault(item.task.id, []).append(item)
            means.on_progress(done, len(trajectories))
        chosen: list[Trajectory] = []
        for items in by_task.values():
            ranked = sorted(items, key=lambda it: (scores[it.id], it.id))
            best = {it.id for it in ranked[: self.settings.per_task]}
            for item in items:
                if item.id in best:
                    note = f"{scores[item.id]:.3f} nats a token, the best of {len(items)}"
                    chosen.append(changed(self, item, note))
        return chosen

    def _score(self, item: Trajectory, means: Means) -> float | None:
        asked = ["nll", item.id, [[step.output, step.observation] for step in item.steps]]
        return means.nll(asked, lambda student: student.nll(_asked(item, student)))


class SkipSettings(BaseModel):
    """Settings of :class:`SkipChunks`. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tolerance: float = Field(default=0.0, ge=0)
    """Nats a token by which what follows may become less likely when a chunk is left out."""
    min_chunks: int = Field(default=1, ge=0)
    """Chunks that a thought keeps at least."""


class SkipChunks:
    """Leave out chunks of thought that the student does not need (after Skip-Thinking, arXiv 2505.18642).

    A chunk is a sentence or a line. From the last to the first, one is left out when what follows it (of an
    agent the action, of a chain of thought the answer line) becomes no less likely to the student
    without it. Skip-Thinking decides this during training; here it is decided once, before.
    """

    name = "skip-chunks"

    def __init__(self, settings: SkipSettings) -> None:
        self.settings = settings

    def __call__(self, trajectories: Sequence[Trajectory], means: Means) -> list[Trajectory]:
        """See :class:`agentkd.transform.Transform`."""
        made: list[Trajectory] = []
        for done, item in enumerate(trajectories, 1):
            made.append(self._one(item, means))
            means.on_progress(done, len(trajectories))
        return made

    def _one(self, item: Trajectory, means: Means) -> Trajectory:
        steps: list[Step] = []
        before, after = 0, 0
        for step in item.steps:
            parts = None if step.failure is not None else _parts(item, step)
            if parts is None:
                steps.append(step)
                continue
            chunks, rest = parts
            kept = self._needed(item, steps, chunks, rest, means)
            before, after = before + len(chunks), after + len(kept)
            steps.append(step if len(kept) == len(chunks) else self._rebuilt(item, step, kept, rest))
        if before == after:
            return item
        return changed(self, item, f"{before - after} of {before} chunks left out", steps=tuple(steps))

    def _needed(
        self, item: Trajectory, past: Sequence[Step], chunks: Sequence[str], rest: str, means: Means
    ) -> list[str]:
        def nll(kept: Sequence[str]) -> float | None:
            begun = _begun(item, kept)
            turns = [(step.output, step.observation) for step in past]

            def score(student: Likelihood) -> float | None:
                return student.continuation_nll(_asked(item, student, turns), begun, rest)

            return means.nll(["rest", item.id, turns, begun, rest], score)

        kept = list(chunks)
        best = nll(kept)
        for place in range(len(kept) - 1, -1, -1):
            if best is None or len(kept) <= self.settings.min_chunks:
                break
            shorter = kept[:place] + kept[place + 1 :]
            value = nll(shorter)
            if value is not None and value <= best + self.settings.tolerance:
                kept, best = shorter, min(value, best)
        return kept

    def _rebuilt(self, item: Trajectory, step: Step, kept: Sequence[str], rest: str) -> Step:
        if item.kind == "agent":
            thought = " ".join(kept)
            return rewritten(step, action_text(thought, step.code or ""), thought, self.name)
        text = _begun(item, kept) + rest
        return rewritten(step, text, text, self.name)


def _parts(item: Trajectory, step: Step) -> tuple[list[str], str] | None:
    """The chunks of a thought, and what follows it; None where there is nothing to leave out."""
    if item.kind == "agent":
        if step.code is None:
            return None
        thought = step.thought.removeprefix("Thought:").strip()
        rest = action_text("", step.code).removeprefix("Thought: ").lstrip("\n")
    else:
        *lines, rest = step.output.rstrip().splitlines() or [""]
        thought = "\n".join(lines)
    chunks = [chunk for chunk in _SENTENCE.split(thought) if chunk.strip()]
    return (chunks, rest) if chunks else None


def _begun(item: Trajectory, chunks: Sequence[str]) -> str:
    if item.kind == "agent":
        return f"Thought: {' '.join(chunks)}\n"
    return "".join(f"{chunk}\n" for chunk in chunks)


def _asked(
    item: Trajectory, student: Likelihood, turns: Sequence[tuple[str, str | None]] | None = None
) -> list[dict[str, str]]:
    """The conversation as the student will see it: all of it, or up to some turns."""
    tools = [SimpleNamespace(**json.loads(text)) for text in item.tools]
    prompt = student.system_prompt or (COT_STUDENT if item.kind == "cot" else system_prompt(STUDENT, tools))
    if turns is not None:
        question = question_text(item.task.question, item.context.text if item.context else None)
        return chat_messages(prompt, question, turns)
    messages = trajectory_messages(item, prompt)
    return messages if messages[-1]["role"] == "assistant" else messages[:-1]
