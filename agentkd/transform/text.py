"""Transforms that have a model rewrite thoughts: shortening by difficulty, and a plan first."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from agentkd.prompt import action_text, answer_from_cot
from agentkd.trajectory import Step, Trajectory
from agentkd.transform.means import Means, changed, rewritten

__all__ = ["PlanFirst", "PlanSettings", "Shorten", "ShortenSettings"]


class ShortenSettings(BaseModel):
    """Settings of :class:`Shorten`. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    easy: int = Field(default=12, ge=1)
    """Words of a thought where the question is easy."""
    medium: int = Field(default=25, ge=1)
    """Words where it is neither."""
    hard: int = Field(default=60, ge=1)
    """Words where it is hard."""
    max_tokens: int = Field(default=1024, ge=1)
    """Of the model's answer."""


_SHORTEN = """\
Below are a question and the thoughts of its solution, numbered. First judge how difficult the question is. \
Then rewrite every thought so that it keeps what is needed to act on and nothing else, in at most {easy} \
words if the question is easy, {medium} if it is medium, {hard} if it is hard. Keep names and numbers.

Answer in exactly this form:
Difficulty: easy, medium or hard
Thought 1: ...
Thought 2: ..."""

_NUMBERED = re.compile(r"^\s*Thought (\d+):\s*(.+?)(?=^\s*Thought \d+:|\Z)", re.MULTILINE | re.DOTALL)
_DIFFICULTY = re.compile(r"^\s*Difficulty:\s*\W*(easy|medium|hard)\b", re.IGNORECASE | re.MULTILINE)


class Shorten:
    """Difficulty-aware rewriting (DAP of LiteCoT, arXiv 2505.19716).

    One call a trajectory: the model judges the difficulty and rewrites every thought to a length that fits.
    A rewritten thought is taken where it is shorter than the old one, within twice the limit, and holds no
    code block; the code and the observations stay. Of a chain of thought the answer line stays.
    """

    name = "shorten"

    def __init__(self, settings: ShortenSettings) -> None:
        self.settings = settings

    def __call__(self, trajectories: Sequence[Trajectory], means: Means) -> list[Trajectory]:
        """See :class:`agentkd.transform.Transform`."""
        return list(means.each(trajectories, lambda item: self._one(item, means)))

    def _one(self, item: Trajectory, means: Means) -> Trajectory:
        thoughts = {step.number: _bare_thought(item, step) for step in item.steps}
        listing = "\n".join(f"Thought {number}: {text}" for number, text in thoughts.items() if text)
        if not listing:
            return item
        system = _SHORTEN.format(**self.settings.model_dump(include={"easy", "medium", "hard"}))
        user = f"Question: {item.task.question}\n\n{listing}"
        answer = means.ask(
            [{"role": "system", "content": system}, {"role": "user", "content": user}],
            max_tokens=self.settings.max_tokens,
            temperature=0.0,
        )
        judged = _DIFFICULTY.search(answer)
        if judged is None:
            return item
        difficulty = judged.group(1).lower()
        limit = 2 * getattr(self.settings, difficulty)
        found = {int(number): " ".join(text.split()) for number, text in _NUMBERED.findall(answer)}
        steps = tuple(self._shorter(item, step, found.get(step.number, ""), limit) for step in item.steps)
        count = sum(new is not old for new, old in zip(steps, item.steps, strict=True))
        if not count:
            return item
        return changed(self, item, f"{difficulty}: {count} of {len(steps)} thoughts shortened", steps=steps)

    def _shorter(self, item: Trajectory, step: Step, text: str, limit: int) -> Step:
        old = _bare_thought(item, step)
        if not text or "```" in text or not len(text) < len(old) or len(text.split()) > limit:
            return step
        return _with_thought(item, step, text, self.name)


class PlanSettings(BaseModel):
    """Settings of :class:`PlanFirst`. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_words: int = Field(default=60, ge=1)
    """Longest plan."""
    max_tokens: int = Field(default=256, ge=1)
    """Of the model's answer."""


_PLAN = """\
Below are a question and a solution that is right. Write the plan that leads to it: what is asked for, and \
the steps in their order, in at most {max_words} words. Name what is to be looked up or computed, but do not \
compute anything and do not give results or the answer. Answer with the plan only, in one paragraph."""


class PlanFirst:
    """A plan before the first thought (solution guidance, arXiv 2412.09906; E2C, arXiv 2509.23946).

    The plan is written by the model from the question and the trajectory. One that gives the answer away,
    holds code or is too long is not taken. The student learns to write it before it acts.
    """

    name = "plan-first"

    def __init__(self, settings: PlanSettings) -> None:
        self.settings = settings

    def __call__(self, trajectories: Sequence[Trajectory], means: Means) -> list[Trajectory]:
        """See :class:`agentkd.transform.Transform`."""
        return list(means.each(trajectories, lambda item: self._one(item, means)))

    def _one(self, item: Trajectory, means: Means) -> Trajectory:
        if not item.steps:
            return item
        solution = "\n\n".join(step.output for step in item.steps if step.failure is None)
        system = _PLAN.format(max_words=self.settings.max_words)
        user = f"Question: {item.task.question}\n\nSolution:\n{solution}"
        answer = means.ask(
            [{"role": "system", "content": system}, {"role": "user", "content": user}],
            max_tokens=self.settings.max_tokens,
            temperature=0.0,
        )
        plan = re.sub(r"^\s*plan:\s*", "", " ".join(answer.split()), flags=re.IGNORECASE)
        if not plan or "```" in plan or len(plan.split()) > self.settings.max_words or _tells(plan, item):
            return item
        first = item.steps[0]
        thought = f"Plan: {plan}\n{_bare_thought(item, first)}".rstrip()
        steps = (_with_thought(item, first, thought, self.name), *item.steps[1:])
        return changed(self, item, f"a plan of {len(plan.split())} words", steps=steps)


def _tells(plan: str, item: Trajectory) -> bool:
    """Whether a plan gives the answer away that the question does not hold."""
    answers = [it for it in (item.answer, item.task.answer) if it and it.strip()]
    return any(
        re.search(rf"(?<!\w){re.escape(it.strip())}(?!\w)", plan, re.IGNORECASE)
        and it.lower() not in item.task.question.lower()
        for it in answers
    )


def _bare_thought(item: Trajectory, step: Step) -> str:
    """The thought of a step; of a chain of thought all of it but the answer line."""
    if item.kind == "agent":
        return step.thought.removeprefix("Thought:").strip()
    lines = step.output.rstrip().splitlines()
    return "\n".join(lines[:-1] if lines and answer_from_cot(lines[-1]) is not None else lines).strip()


def _with_thought(item: Trajectory, step: Step, thought: str, name: str) -> Step:
    if item.kind == "agent":
        if step.code is None:
            return step
        return rewritten(step, action_text(thought, step.code), thought, name)
    last = step.output.rstrip().splitlines()[-1]
    text = f"{thought}\n{last}" if answer_from_cot(last) is not None else thought
    return rewritten(step, text, text, name)
