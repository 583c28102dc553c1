"""Settings of an adaptation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from agentkd.prompt import FENCE_CLOSE
from agentkd.tool_use import ToolKind

__all__ = ["AdaptConfig"]


class AdaptConfig(BaseModel):
    """What counts as a tool, and when a question counts as easy. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tools: ToolKind = "both"
    """What counts as a tool: "search" (any tool of the agent), "code", or "both"."""
    samples: int = Field(default=1, ge=1)
    """Direct answers of the student to each question (k)."""
    tau: float = Field(default=0.8, gt=0, le=1)
    """Share of the k answers that must be right for a question to be easy."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the direct answers; more than one of a question needs more than 0 (the paper has 5 at 0.7)."""
    max_tokens: int = Field(default=256, ge=1)
    """Sampled tokens of one direct answer."""
    keep_direct: Literal["all", "easy", "none"] = "all"
    """Of which questions the mix repeats the solution under the prompt without tools: of all (the paper), or
    of the easy ones alone, so that nothing is taught to be known that is looked up."""
    required: bool = False
    """Also write the trajectories with tools under the prompt that requires tools, for all questions: a
    student that is to be forced to use tools must have learnt that prompt."""
    thought: str = Field(default="I know this.", min_length=1)
    """The thought of a solution that is a literal answer alone. ``{answer}`` stands for the answer,
    ``{goal}`` for the first clause of the trajectory's first thought: where the teacher begins by naming what
    it needs, a student that does so, too, decides whether it knows a thing after it has named it."""
    longest_answer: int = Field(default=80, ge=1)
    """Characters of a literal answer; a longer one is not knowledge but a text, and is rejected."""

    @field_validator("thought")
    @classmethod
    def _no_code(cls, thought: str) -> str:
        if FENCE_CLOSE in thought:
            raise ValueError("a thought has no code block in it")
        return thought

    @model_validator(mode="after")
    def _several_samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples at temperature 0 are one and the same; set a temperature")
        return self
