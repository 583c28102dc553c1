"""ReAct text: ``Question``, then ``Thought 1``, ``Action 1``, ``Observation 1`` and so on.

The form of Yao et al. 2022 (arXiv 2210.03629): ``Action 1: Search[Ada Lovelace]`` and
``Finish[1815]``, here also a fenced block of Python. LangChain's ``Action`` / ``Action Input`` /
``Final Answer`` is read too. A row is ``{"id", "question", "answer", "text"}``; a ``.txt`` file
holds the texts alone, one after another.
"""

from __future__ import annotations

import ast
import re

from agentkd.exchange.draft import Draft, Format, Row, Turn, acted, said
from agentkd.exchange.recast import printed_of, shown
from agentkd.prompt import FENCE_CLOSE, FENCE_OPEN
from agentkd.trajectory import Step, Trajectory

__all__ = ["REACT"]

_NAMES = "Question|Thought|Action Input|Action|Observation|Final Answer|Answer"
_MARK = re.compile(rf"^({_NAMES})(?: \d+)?:[ \t]*", re.MULTILINE)
_LIKE_MARK = re.compile(rf"^(\\*(?:{_NAMES})(?: \d+)?:)", re.MULTILINE)
_ESCAPED = re.compile(rf"^\\(\\*(?:{_NAMES})(?: \d+)?:)", re.MULTILINE)
_ENDS = ("Final Answer", "Answer")
_BRACKET = re.compile(r"\A(\w+)\[(.*)\]\Z", re.DOTALL)
_FENCED = re.compile(rf"\A{FENCE_OPEN}\n(.*)\n{FENCE_CLOSE}\Z", re.DOTALL)


def _encode(trajectory: Trajectory) -> Row:
    lines = [_field("Question", trajectory.task.question)]
    for step in trajectory.steps:
        number = f" {step.number}"
        lines.append(_field(f"Thought{number}", step.thought))
        if step.code is not None:
            lines.append(_field(f"Action{number}", _action(step)))
        if step.is_final and trajectory.answer and not _short(step.code or ""):
            lines.append(_field("Answer", trajectory.answer))  # the code alone does not say it
        if step.observation is not None:
            lines.append(_field(f"Observation{number}", printed_of(step.observation)))
    return {
        "id": trajectory.id,
        "question": trajectory.task.question,
        "answer": trajectory.task.answer,
        "model": trajectory.model,
        "text": "\n".join(lines),
    }


def _field(mark: str, text: str) -> str:
    """A line of the text that looks like a mark gets a backslash before it."""
    escaped = _LIKE_MARK.sub(r"\\\1", text)
    return f"{mark}: {escaped}"


def _action(step: Step) -> str:
    """``Search[x]`` where that says all, else the code."""
    code = step.code or ""
    short = _short(code)
    if short is not None and _code_of(short) == code:
        return short
    return f"{FENCE_OPEN}\n{code}\n{FENCE_CLOSE}"


def _short(code: str) -> str | None:
    try:
        tree = ast.parse(code, mode="eval").body
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "print":
            (tree,) = tree.args
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
            (value,) = tree.args
            text = ast.literal_eval(value)
            name = "Finish" if tree.func.id == "final_answer" else tree.func.id.capitalize()
            return f"{name}[{text}]" if isinstance(text, str) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return None


def _code_of(action: str, given: str | None = None) -> str:
    """The Python of an action: a fenced block, ``Name[argument]``, or a name and its input."""
    action = action.strip()
    if fenced := _FENCED.match(action):
        return fenced.group(1)
    if bracket := _BRACKET.match(action):
        action, given = bracket.groups()
    elif given is None:
        return action
    name = re.sub(r"\W", "_", action.strip()).lower()
    call = f"({given.strip()!r})"
    return f"final_answer{call}" if name == "finish" else f"print({name}{call})"


def split_texts(text: str) -> list[str]:
    """The transcripts of a text: each begins with its question."""
    starts = [found.start() for found in _MARK.finditer(text) if found.group(1) == "Question"]
    if not starts and text.strip():
        return [text]
    return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _decode(row: Row) -> Draft:
    fields = _fields(row["text"])
    question = row.get("question") or next((text for mark, text in fields if mark == "Question"), "")
    if not question:
        raise ValueError('the text has no "Question:"')
    return Draft(
        question=question,
        turns=tuple(_turns(fields)),
        id=row.get("id"),
        gold=row.get("answer"),
        answer=next((text for mark, text in reversed(fields) if mark in _ENDS), None),
        model=row.get("model") or "unknown",
    )


def _fields(text: str) -> list[tuple[str, str]]:
    marks = list(_MARK.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        (mark.group(1), _ESCAPED.sub(r"\1", text[mark.end() : end].strip()))
        for mark, end in zip(marks, ends, strict=True)
    ]


def _turns(fields: list[tuple[str, str]]) -> list[Turn]:
    turns: list[Turn] = []
    now: dict[str, str] = {}
    for mark, text in [*fields, ("Thought", "")]:
        if mark in _ENDS:
            now.setdefault("Action", f"Finish[{text}]")
            continue
        begins = mark == "Thought" or (mark == "Action" and "Action" in now)
        if begins and now:
            turns.append(_turn(now))
            now = {}
        if mark != "Question":
            now[mark] = text
    return turns


def _turn(parts: dict[str, str]) -> Turn:
    thought = parts.get("Thought", "")
    observation = shown(parts["Observation"]) if "Observation" in parts else None
    if "Action" not in parts:
        return said(f"Thought: {thought}", observation)
    return acted(thought, _code_of(parts["Action"], parts.get("Action Input")), observation)


REACT = Format(
    name="react",
    about="ReAct text",
    encode=_encode,
    decode=_decode,
    keys=frozenset(["id", "question", "answer", "model", "text"]),
    containers=(".jsonl", ".txt"),
    split=split_texts,
)
