"""Parsing of an action: a thought and one block of code, as small models write it.

What can be understood is understood, step by step down a ladder, and every repair is named, so
that it can be counted:

- ``dropped_tail``: text after the first block;
- ``closed_fence``: the block had no end;
- ``code_tag``: the block stood between ``<code>`` tags;
- ``other_fence``: the block was fenced in another way (``~~~``, or another language's name);
- ``bare_code``: there was no fence, and the text from some line on is Python with a call in it.
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

from agentkd import prompt as prompts

__all__ = ["Parsed", "parse_action", "program_key"]

_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n?[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<(code|python)>\s*\n?(.*?)(?:\n?[ \t]*</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_OTHER = re.compile(
    r"(```|~~~)[ \t]*(?:python3|tool_code|[\w+-]*)[ \t]*\n?(.*?)(?:\n?[ \t]*\1|\Z)", re.DOTALL | re.IGNORECASE
)
_LABEL = re.compile(r"^\s*(?:code|action|python)\s*:?\s*$", re.IGNORECASE)


LINE_LIMIT = 200
"""Lines of a text without any fence in which code is still looked for."""


class Parsed(NamedTuple):
    """An action, as parsed."""

    thought: str
    code: str | None
    output: str
    """The text that stands in the conversation."""
    repairs: tuple[str, ...]


def parse_action(text: str) -> Parsed:
    """Find the thought and the one code block of a step; without a block ``code`` is None."""
    text = text.strip()
    block = _BLOCK.search(text)
    if block is not None:
        return _fenced(text, block)
    for pattern, repair in ((_TAG, "code_tag"), (_OTHER, "other_fence")):
        found = pattern.search(text)
        if found is not None and _is_python(found.group(2)):
            repairs = [repair, *(["dropped_tail"] if text[found.end() :].strip() else [])]
            return _rewritten(text[: found.start()], found.group(2), repairs)
    start = _bare_code(text)
    if start is not None:
        lines = text.splitlines()
        before = lines[: start - 1] if start and _LABEL.match(lines[start - 1]) else lines[:start]
        return _rewritten("\n".join(before), "\n".join(lines[start:]), ["bare_code"])
    return Parsed(_thought(text), None, text, ())


def _fenced(text: str, block: re.Match[str]) -> Parsed:
    repairs = []
    output = text[: block.end()]
    if not output.rstrip().endswith(prompts.FENCE_CLOSE) or block.end(1) == len(text):
        output = f"{output.rstrip()}\n{prompts.FENCE_CLOSE}"
        repairs.append("closed_fence")
    if text[block.end() :].strip():
        repairs.append("dropped_tail")
    return Parsed(_thought(text[: block.start()]), block.group(1).strip("\n"), output, tuple(repairs))


def _rewritten(before: str, code: str, repairs: list[str]) -> Parsed:
    """The action as it should have been written: that is what the model sees of it later."""
    code = code.strip("\n")
    output = f"{before.strip()}\n{prompts.FENCE_OPEN}\n{code}\n{prompts.FENCE_CLOSE}".strip()
    return Parsed(_thought(before), code, output, tuple(repairs))


def _thought(text: str) -> str:
    return re.sub(r"^\s*Thought:\s*", "", text).strip()


def _bare_code(text: str) -> int | None:
    """The first line from which on the text is Python that calls something."""
    lines = text.splitlines()
    if len(lines) > LINE_LIMIT:
        return None
    for start in range(len(lines)):
        if lines[start].strip() and _is_python("\n".join(lines[start:]), calls=True):
            return start
    return None


def _is_python(text: str, calls: bool = False) -> bool:
    try:
        tree = ast.parse(text.strip("\n"))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    found = bool(tree.body)
    return found and (not calls or any(isinstance(node, ast.Call) for node in ast.walk(tree)))


def program_key(code: str) -> str:
    """Equal for code that differs in layout and comments only; what does not parse is itself."""
    try:
        return ast.dump(ast.parse(code))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return code.strip()
