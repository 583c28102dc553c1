"""Retro-search on trajectories: what if the agent had gone on instead of changing course?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from smolagents.models import ChatMessage, MessageRole, Model
from smolagents.monitoring import TokenUsage

from agentkd.action import parse_action
from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.rollout import rollout
from agentkd.sandbox import DEFAULT_BACKEND
from agentkd.trajectory import Trajectory
from agentkd.transform.means import Means, changed

__all__ = ["RetroSearch", "RetroSettings", "changes_course"]

_SWITCH = re.compile(
    r"(?:^|[.!?\n]\s*)(?:wait|but|however|alternatively|actually|instead|hmm|on second thought|"
    r"let me try another|another (?:way|approach)|maybe i should|"
    r"let me (?:re-?check|reconsider|verify|double-check))\b",
    re.IGNORECASE,
)


def changes_course(thought: str) -> bool:
    """Whether a thought leaves the way it was on ("wait", "alternatively", "let me double-check")."""
    return _SWITCH.search(thought.removeprefix("Thought:").strip()) is not None


class RetroSettings(BaseModel):
    """Settings of :class:`RetroSearch`. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(default=2, ge=1)
    """Ways on that are tried from each cut."""
    cuts: int = Field(default=3, ge=1)
    """Places at which a trajectory is cut, at most; the earliest first."""
    redraws: int = Field(default=4, ge=1)
    """Answers that are asked for where the model is not to change course, before the way is given up."""
    temperature: float = Field(default=0.7, ge=0)
    max_tokens: int = Field(default=512, ge=1)
    """Sampled tokens of one step."""
    sandbox: str = DEFAULT_BACKEND
    """Where code runs."""
    search_k: int = Field(default=3, ge=1)
    """Passages that one search returns, as in the collection."""


class _Forbidden(Exception):
    """The model would not go on without changing course."""


class _Resumed(Model):
    """Says the steps that are given, then asks; the first new step must not change course."""

    def __init__(self, given: Sequence[str], means: Means, draw: int, settings: RetroSettings) -> None:
        super().__init__(model_id=str(getattr(means.model, "model_id", "model")))
        self.given, self.means, self.draw, self.settings = list(given), means, draw, settings
        self.said = 0

    def generate(self, messages: list[Any], **options: Any) -> ChatMessage:
        self.said += 1
        if self.said <= len(self.given):
            return _message(self.given[self.said - 1])
        plain = [{"role": str(it.role.value), "content": it.content[0]["text"]} for it in messages]
        for time in range(self.settings.redraws):
            text = self.means.ask(
                plain,
                draw=self.draw * self.settings.redraws + time,
                temperature=self.settings.temperature,
                max_tokens=self.settings.max_tokens,
                stop_sequences=options.get("stop_sequences"),
            )
            if self.said > len(self.given) + 1 or not changes_course(parse_action(text).thought):
                return _message(text)
        raise _Forbidden


def _message(text: str) -> ChatMessage:
    return ChatMessage(
        role=MessageRole.ASSISTANT, content=text, token_usage=TokenUsage(input_tokens=0, output_tokens=0)
    )


class RetroSearch:
    """Retro-Search (arXiv 2504.04383) for agents.

    A trajectory is cut before a step whose thought changes course. The steps before it are run again in a
    fresh session (where an observation differs from the recorded one, the cut is given up), the model goes on
    from there, and an answer that changes course at once is drawn anew. The first continuation that is right
    and has fewer steps, or as many and less text, replaces the rest. The paper forbids the words by their
    logits; endpoints do not offer that to everybody, so they are refused here.
    """

    name = "retro-search"

    def __init__(self, settings: RetroSettings) -> None:
        self.settings = settings

    def __call__(self, trajectories: Sequence[Trajectory], means: Means) -> list[Trajectory]:
        """See :class:`agentkd.transform.Transform`."""
        return list(means.each(trajectories, lambda item: self._one(item, means)))

    def _one(self, item: Trajectory, means: Means) -> Trajectory:
        if item.kind != "agent":
            return item
        places = [n for n, step in enumerate(item.steps) if n and changes_course(step.thought)]
        for place in places[: self.settings.cuts]:
            for sample in range(self.settings.samples):
                found = self._resampled(item, place, sample, means)
                if found is not None and _shorter(found, item):
                    note = f"cut before step {place + 1}: {_size(item)} -> {_size(found)} (steps, characters)"
                    return changed(
                        self,
                        item,
                        note,
                        steps=found.steps,
                        answer=found.answer,
                        score=found.score,
                        stop_reason=found.stop_reason,
                    )
        return item

    def _resampled(self, item: Trajectory, place: int, sample: int, means: Means) -> Trajectory | None:
        """The rollout that goes on from a cut; None where it cannot, or came to nothing right."""
        given = [step.output for step in item.steps[:place]]
        model = _Resumed(given, means, sample, self.settings)
        config = AgentConfig(
            prompt=item.system_prompt,
            max_steps=int(item.config.get("max_steps") or len(item.steps)),
            imports=tuple(item.config.get("imports") or ()),
            sandbox=self.settings.sandbox,
            search_k=self.settings.search_k,
        )
        agent = agent_factory(config, search_tools(means.retriever, config), model)(item.task, item.sample)
        try:
            found = rollout(agent, item.task, sample=item.sample)
        finally:
            agent.cleanup()
        if found.failure is not None and found.failure.kind == "provider":
            from agentkd.errors import ProviderError

            raise ProviderError(found.failure.message)
        same = all(
            (new.output, new.observation) == (old.output, old.observation)
            for new, old in zip(found.steps[:place], item.steps[:place], strict=False)
        )
        if not same or not found.correct or len(found.steps) <= place:
            return None
        # The steps before the cut are the recorded ones, with their tokens and times.
        return found.model_copy(update={"steps": (*item.steps[:place], *found.steps[place:])})


def _size(item: Trajectory) -> tuple[int, int]:
    return len(item.steps), sum(len(step.output) for step in item.steps)


def _shorter(one: Trajectory, other: Trajectory) -> bool:
    return _size(one) < _size(other)
