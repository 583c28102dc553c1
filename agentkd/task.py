"""A task: one question, its gold answer, and the name of the scorer that compares them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Task"]


class Task(BaseModel):
    """One question with its gold answer. Frozen; one JSON line in ``tasks.jsonl``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    """Unique within a taskset and stable across runs."""
    question: str = Field(min_length=1)
    """What the agent is asked, verbatim."""
    answer: str | None = None
    """Gold answer; None when there is none (then nothing can be scored)."""
    scorer: str = "exact"
    """Name of the scorer, see :mod:`agentkd.scorer`."""
    family: str = "custom"
    """The kind of question, for tables per family."""
    level: str = "any"
    """Difficulty: "easy", "hard" or "any"."""
    split: str = "test"
    """"train" or "test"."""
    meta: dict[str, Any] = Field(default_factory=dict)
    """Whatever the taskset wants to keep (operands, hops, supporting passages)."""
