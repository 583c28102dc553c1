"""Sandboxes: where model-written code runs.

A session is a smolagents ``PythonExecutor`` that is closed after use, keeps apart whose fault a
failure was, and records the tool calls of each action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from agentkd.errors import ConfigError
from agentkd.trajectory import ToolUse

if TYPE_CHECKING:
    from smolagents.local_python_executor import CodeOutput

__all__ = ["BACKENDS", "LOCAL_WARNING", "CodeFailure", "Sandbox", "open_sandbox"]

BACKENDS = ("local",)

LOCAL_WARNING = (
    "Model-written code runs in smolagents' local interpreter in a child process that is killed on "
    "timeout. This is not a security boundary: use it for models and tasks that you trust."
)


class CodeFailure(Exception):
    """The model's code failed: an exception, a syntax error, or its time was up.

    Not an :class:`agentkd.errors.SandboxError`, which means that the sandbox itself failed.

    Args:
        message: what the model is told.
        printed: what the code had printed until then.
        timed_out: True when the time limit ended it.
    """

    def __init__(self, message: str, printed: str = "", timed_out: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.printed = printed
        self.timed_out = timed_out


@runtime_checkable
class Sandbox(Protocol):
    """One session. State stays from action to action until it is closed."""

    def send_tools(self, tools: dict[str, Any]) -> None:
        """Make tools callable from the code; they run on the host."""
        ...

    def send_variables(self, variables: dict[str, Any]) -> None:
        """Set variables (JSON values) in the session."""
        ...

    def __call__(self, code_action: str) -> CodeOutput:
        """Run one action.

        Raises:
            CodeFailure: the code failed; the session goes on.
            SandboxError: the sandbox failed.
        """
        ...

    def take_tool_uses(self) -> tuple[ToolUse, ...]:
        """Tool calls since the last time this was asked."""
        ...

    def cleanup(self) -> None:
        """End the session and whatever it left running."""
        ...


def open_sandbox(backend: str | None, *, imports: Sequence[str] = (), timeout: float = 10.0) -> Sandbox:
    """Start a session.

    Args:
        backend: one of :data:`BACKENDS`. There is no default: running model-written code is
            something that the user decides.
        imports: modules the code may import beside the harmless ones of the standard library.
        timeout: seconds one action may take.

    Raises:
        ConfigError: no backend, or an unknown one.
        SandboxError: it cannot start.
    """
    if backend is None:
        raise ConfigError(
            "Model-written code needs a place to run and none was chosen.",
            "Pass --sandbox local (Python: sandbox='local') to run it in a child process on this "
            "machine, which is not a security boundary.",
        )
    if backend not in BACKENDS:
        raise ConfigError(f"Unknown sandbox {backend!r}.", f"Known: {', '.join(BACKENDS)}.")
    from agentkd.sandbox.local import LocalSandbox

    return LocalSandbox(imports=imports, timeout=timeout)
