"""What the expert does in one step, how it is worded, and how it goes wrong on purpose."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from agentkd.prompt import action_text

__all__ = ["MISTAKES", "Action", "Voice", "spoil"]

MISTAKES = ("wrong answer", "syntax error", "exception", "no code block")
"""The ways in which the expert errs."""

T = TypeVar("T")


class Voice:
    """How one answer is worded: always the same at temperature 0, varied above.

    Args:
        rng: of this request, step and sample.
        temperature: 0 takes the first of every choice.
    """

    def __init__(self, rng: random.Random, temperature: float) -> None:
        self._rng = rng
        self._temperature = temperature

    def pick(self, choices: Sequence[T]) -> T:
        """One of several wordings that mean the same."""
        return self._rng.choice(choices) if self._temperature > 0 else choices[0]

    def chance(self, probability: float) -> bool:
        """Whether to leave the usual plan; the probability is meant at temperature 1."""
        return self._temperature > 0 and self._rng.random() < probability * min(self._temperature, 1.0)


@dataclass(frozen=True)
class Action:
    """A thought with its code, and what a mistaken expert would have done instead."""

    thought: str
    code: str
    slip_code: str
    """Code that runs and gives a wrong answer."""
    slip_thought: str = ""
    """The thought that goes with it; empty for the same thought."""

    def text(self) -> str:
        """The step as it stands in a conversation."""
        return action_text(self.thought, self.code)


def spoil(action: Action, mistake: str, rng: random.Random) -> str:
    """The text of an action with a mistake in it.

    Args:
        action: what would be right.
        mistake: one of ``MISTAKES``.
        rng: chooses details.
    """
    if mistake == "wrong answer":
        return action_text(action.slip_thought or action.thought, action.slip_code)
    if mistake == "syntax error":
        return action_text(action.thought, _without_end(action.code))
    if mistake == "exception":
        return action_text(action.thought, _with_unknown_name(action.code))
    return f"Thought: {action.thought}" + rng.choice(("", " I can do that without code."))


def _without_end(code: str) -> str:
    """Leave out a closing bracket, or the colon of a loop."""
    return code[:-1] if code.endswith(")") else code.replace(":\n", "\n", 1)


def _with_unknown_name(code: str) -> str:
    """Forget an import, or call a function by a name that does not exist."""
    lines = code.split("\n")
    if "import " in lines[0]:
        return "\n".join(lines[1:])
    return (
        code.replace("search(", "lookup(") if "search(" in code else code.replace("final_answer(", "answer(")
    )
