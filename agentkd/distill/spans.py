"""Which part of a step a token belongs to, and how much it counts in the loss.

The parts are those of *SmartAD*: thought, action, final answer. A step of an agent is its thought up to the
code block, the code block, and in it the call of ``final_answer``; a chain of thought is its text and its
answer line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentkd.engine.render import Turn
from agentkd.errors import ConfigError
from agentkd.prompt import FENCE_OPEN
from agentkd.trajectory import Step

__all__ = ["Part", "SpanWeights", "step_parts", "turn_weights"]

Part = Literal["thought", "action", "final_answer"]

_ANSWER_LINE = re.compile(r"^.*\banswer\b\W*[:=].*\Z", re.IGNORECASE | re.MULTILINE)


class SpanWeights(BaseModel):
    """How much a token of each part counts; the loss is the weighted mean. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    thought: float = Field(default=1.0, ge=0)
    """Of the text before the code block."""
    action: float = Field(default=1.0, ge=0)
    """Of the code block, its fences included."""
    final_answer: float = Field(default=1.0, ge=0)
    """Of the call of final_answer, or of the answer line of a chain of thought."""


def step_parts(step: Step, kind: str) -> list[Part]:
    """The part that each character of ``step.output`` belongs to."""
    text = step.output
    parts: list[Part] = ["thought"] * len(text)
    if kind == "cot":
        found = _ANSWER_LINE.search(text)
        return _painted(parts, found.span(), "final_answer") if found else parts
    fence = text.find(FENCE_OPEN)
    if fence < 0:
        return parts
    parts = _painted(parts, (fence, len(text)), "action")
    code = step.code or ""
    at = text.find(code, fence) if code else -1
    for begin, end in _final_calls(code) if at >= 0 else ():
        parts = _painted(parts, (at + begin, at + end), "final_answer")
    return parts


def _painted(parts: list[Part], where: tuple[int, int], part: Part) -> list[Part]:
    begin, end = where
    return parts[:begin] + [part] * (end - begin) + parts[end:]


def _final_calls(code: str) -> Iterator[tuple[int, int]]:
    """Character ranges of the calls of ``final_answer``."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return
    lines = code.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "final_answer":
            if node.end_lineno is None or node.end_col_offset is None:
                continue
            yield (
                _place(lines, node.lineno, node.col_offset),
                _place(lines, node.end_lineno, node.end_col_offset),
            )


def _place(lines: Sequence[str], line: int, column: int) -> int:
    """The character of a place that the parser gives as line and byte."""
    before = lines[line - 1].encode()[:column].decode()
    return sum(len(text) for text in lines[: line - 1]) + len(before)


def turn_weights(
    turn: Turn, step: Step, kind: str, weights: SpanWeights, given: int, tokenizer: Any
) -> list[float]:
    """The weight of each emitted token of a turn.

    Args:
        turn: the turn of the rendered conversation that the step became.
        step: the step.
        kind: of the trajectory.
        weights: of the parts.
        given: characters at the begin of the step that are not to be learnt (a first thought).
        tokenizer: that rendered the turn; must be able to tell where its tokens come from.

    Returns:
        ``turn.end - turn.begin`` weights. What the template adds around the step, and the token
        that ends the turn, count 1.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "Weights by part need a tokenizer that says where its tokens come from.", "Use a fast tokenizer."
        )
    parts = step_parts(step, kind)
    shown = step.output if step.output in turn.text else step.output.strip()
    at = turn.text.find(shown)
    shift = step.output.find(shown) - at  # from a character of the turn to one of the step
    encoded = tokenizer(turn.text, add_special_tokens=False, return_offsets_mapping=True)
    values: list[float] = []
    for begin, _ in encoded["offset_mapping"][: turn.end - turn.begin]:
        if not at <= begin < at + len(shown):
            values.append(1.0)
        elif begin + shift < given:
            values.append(0.0)
        else:
            values.append(float(getattr(weights, parts[begin + shift])))
    return values
