"""CoT + retrieval: passages for the question before a chain of thought."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from agentkd.errors import ConfigError, DataError
from agentkd.retrieval.shown import passage_lines
from agentkd.trajectory import Context, Trajectory
from agentkd.transform.means import Means, changed

__all__ = ["Passages", "PassagesSettings"]


class PassagesSettings(BaseModel):
    """Settings of :class:`Passages`. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: int = Field(default=3, ge=1)
    """Passages that are asked for."""
    max_tokens: int | None = Field(default=1024, ge=16)
    """Budget of their text in (estimated) tokens; None for no limit."""


class Passages:
    """Put before each question what is found for it (CoT distillation + RAG, a baseline of arXiv 2505.17612).

    The chains of thought stay as the teacher wrote them, so the baseline has the same teacher on the same
    questions as the one without passages. Passages are shown as the search tool shows them, and the student
    folder says how many, so that evaluation shows the student as many.
    """

    name = "passages"

    def __init__(self, settings: PassagesSettings) -> None:
        self.settings = settings

    def __call__(self, trajectories: Sequence[Trajectory], means: Means) -> list[Trajectory]:
        """See :class:`agentkd.transform.Transform`."""
        if means.retriever is None:
            raise ConfigError("There is nothing to search.", "Name a --corpus.")
        other = next((item.id for item in trajectories if item.kind != "cot"), None)
        if other is not None:
            raise DataError(f"{other} is no chain of thought.", "An agent searches by itself.")
        found = means.retriever.search([it.task.question for it in trajectories], self.settings.k)
        made: list[Trajectory] = []
        for item, hits in zip(trajectories, found, strict=True):
            text = passage_lines(hits, self.settings.max_tokens) if hits else "No passage found."
            context = Context(text=text, k=self.settings.k, max_tokens=self.settings.max_tokens)
            made.append(changed(self, item, f"{len(hits)} passages", context=context))
            means.on_progress(len(made), len(trajectories))
        return made
