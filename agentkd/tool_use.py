"""Did an agent use a tool, or did it answer directly? And did it do so where it should?

Both are decided on the syntax tree of the code, never on its text. A *direct* answer is a lone
``final_answer(<literal>)`` with no tool call before it. What counts as a tool is a setting: the
agent's tools ("search"), Python itself ("code"), or either ("both").

Source: *Adapting While Learning* (arXiv 2411.00412), whose tool-usage accuracy is defined here, too.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple, get_args

from agentkd.errors import ConfigError
from agentkd.trajectory import Step, Trajectory

__all__ = [
    "ToolKind",
    "ToolUsage",
    "check_tool_kind",
    "is_direct",
    "tool_usage_accuracy",
    "used_tool",
    "without_tools",
]

ToolKind = Literal["search", "code", "both"]
"""What counts as a tool: a call of any tool of the agent ("search"), code that computes something
("code"), or either ("both")."""

FINAL_ANSWER = "final_answer"


def check_tool_kind(what: str) -> None:
    """Notice a wrong name.

    Raises:
        ConfigError: not one of :data:`ToolKind`.
    """
    if what not in get_args(ToolKind):
        raise ConfigError(
            f"{what!r} is no kind of tool.",
            f"What counts as a tool is one of: {', '.join(get_args(ToolKind))}.",
        )


def is_direct(action: str | Trajectory | None) -> bool:
    """True for a lone ``final_answer(<literal>)``.

    Args:
        action: the code of a step, or a trajectory: then its last step must be such an answer, and no
            code may have run before it (a step that could not be parsed ran none).
    """
    if isinstance(action, Trajectory):
        *before, last = action.steps or (None,)
        return (
            last is not None
            and last.is_final
            and is_direct(last.code)
            and not any(step is not None and step.code is not None for step in before)
        )
    body = _body(action)
    if len(body) != 1 or not isinstance(body[0], ast.Expr) or not isinstance(body[0].value, ast.Call):
        return False
    call = body[0].value
    values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "answer")]
    return (
        isinstance(call.func, ast.Name)
        and call.func.id == FINAL_ANSWER
        and len(values) == 1 == len(call.args) + len(call.keywords)
        and _is_literal(values[0])
    )


def without_tools(code: str | None, what: ToolKind = "both", tools: Collection[str] = ()) -> bool:
    """Whether an action may be taken where tools are not to be used (P_n).

    A direct answer may. Where only the agent's tools count ("search"), so may any code that names none of
    them: it can compute, and that is no tool then.

    Args:
        code: of the action, before it is run.
        what: what counts as a tool.
        tools: names of the agent's tools; ``final_answer`` is none.
    """
    if what != "search":
        return is_direct(code)
    body = _body(code)
    names = {node.id for statement in body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return bool(body) and names.isdisjoint({*tools} - {FINAL_ANSWER})


def used_tool(trajectory: Trajectory, what: ToolKind = "both") -> bool:
    """Whether the agent used a tool anywhere in a trajectory.

    Args:
        trajectory: the record; a call that failed counts, a sampled action that was not taken does not.
        what: what counts as a tool.

    Raises:
        ConfigError: ``what`` is none of :data:`ToolKind`.
    """
    check_tool_kind(what)
    called = any(use.name != FINAL_ANSWER for step in trajectory.steps for use in step.tool_uses)
    if what == "search":
        return called
    computed = any(_computes(step) for step in trajectory.steps)
    return computed if what == "code" else called or computed


def _computes(step: Step) -> bool:
    """True when code ran that does more than to print, to answer, and to hand values to and from tools."""
    calls = {FINAL_ANSWER, "print", *(use.name for use in step.tool_uses)}
    return not all(_hands_on(statement, calls) for statement in _body(step.code))


def _hands_on(statement: ast.stmt, calls: set[str]) -> bool:
    if isinstance(statement, ast.Assign):
        return all(isinstance(target, ast.Name) for target in statement.targets) and _passes(
            statement.value, calls
        )
    return isinstance(statement, ast.Expr) and _passes(statement.value, calls)


def _passes(value: ast.expr, calls: set[str]) -> bool:
    if isinstance(value, ast.Call):
        arguments = [*value.args, *(keyword.value for keyword in value.keywords)]
        known = isinstance(value.func, ast.Name) and value.func.id in calls
        return known and all(_passes(argument, calls) for argument in arguments)
    return isinstance(value, ast.Name) or _is_literal(value)


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _body(code: str | None) -> list[ast.stmt]:
    """The statements; none where the code cannot be parsed, for then nothing of it has run."""
    try:
        return ast.parse(code or "").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return []


class ToolUsage(NamedTuple):
    """How well tools were used where they were needed."""

    easy_without: int
    """a: easy questions answered without a tool."""
    easy_with: int
    """b: easy questions with a tool."""
    hard_with: int
    """c: hard questions with a tool."""
    hard_without: int
    """d: hard questions without a tool."""

    @property
    def n(self) -> int:
        """Questions."""
        return sum(self)

    @property
    def on_easy(self) -> float | None:
        """a / (a + b); None when there is no easy question."""
        return _share(self.easy_without, self.easy_with)

    @property
    def on_hard(self) -> float | None:
        """c / (c + d); None when there is no hard question."""
        return _share(self.hard_with, self.hard_without)

    @property
    def accuracy(self) -> float | None:
        """0.5 a / (a + b) + 0.5 c / (c + d), 0 to 1; None when there are no easy or no hard questions.

        To use tools always, or never, gives 0.5. Over one kind of question alone either would be
        perfect, so nothing is said then.
        """
        if self.on_easy is None or self.on_hard is None:
            return None
        return 0.5 * self.on_easy + 0.5 * self.on_hard

    @property
    def tool_rate(self) -> float | None:
        """Share of all questions with a tool; None when there are none."""
        return _share(self.easy_with + self.hard_with, self.easy_without + self.hard_without)


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None


def tool_usage_accuracy(rows: Iterable[tuple[bool, bool]]) -> ToolUsage:
    """Count (easy, used a tool) pairs, one a question.

    Easy is what the evaluated model itself answers correctly without tools (under
    :data:`agentkd.prompt.DIRECT`).
    """
    pairs = list(rows)
    return ToolUsage(
        easy_without=pairs.count((True, False)),
        easy_with=pairs.count((True, True)),
        hard_with=pairs.count((False, True)),
        hard_without=pairs.count((False, False)),
    )
