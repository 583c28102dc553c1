"""Sandboxes: where model-written code runs.

A session is a smolagents ``PythonExecutor`` that is closed after use, keeps apart whose fault a
failure was, and records the tool calls of each action. Where it ``can_fork``, it also tries
several actions in forks of its state and goes on from the one that is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from agentkd.errors import ConfigError
from agentkd.trajectory import ToolUse

if TYPE_CHECKING:
    from smolagents.local_python_executor import CodeOutput

__all__ = [
    "BACKENDS",
    "DEFAULT_BACKEND",
    "LOCAL_WARNING",
    "CodeFailure",
    "ForkingSandbox",
    "Outcome",
    "Sandbox",
    "open_sandbox",
    "start_sandbox",
]

BACKENDS = ("fork", "e2b", "docker", "local")
"""What there is to run code in: processes of this machine behind an OS boundary, E2B's cloud, a
container, smolagents' interpreter."""

DEFAULT_BACKEND = "fork"

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


class Outcome(NamedTuple):
    """What one action did."""

    printed: str = ""
    value: Any = None
    """The last expression's value, or the final answer; JSON."""
    is_final: bool = False
    """Whether ``final_answer`` was called."""
    error: str | None = None
    """What the model is told of its failure; None when there was none."""
    timed_out: bool = False
    ended: bool = False
    """The action's process has ended and cannot become the session."""
    tool_uses: tuple[ToolUse, ...] = ()
    seconds: float = 0.0
    """Wall-clock seconds, time in tools included."""


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


@runtime_checkable
class ForkingSandbox(Sandbox, Protocol):
    """A session that can try several actions without changing."""

    def try_each(
        self, codes: Sequence[str], timeout: float | None = None, *, more: bool = False
    ) -> list[Outcome]:
        """Run each code in a fork of the session's state; one outcome each.

        With ``more``, what was tried since the last commit or discard stays, and more can be.
        """
        ...

    def commit(self, index: int) -> None:
        """Go on from the state of one of them, counted from the first; it is not run again."""
        ...

    def discard(self) -> None:
        """Go on as if none had been tried."""
        ...

    def close(self) -> None:
        """End the session and whatever it left running."""
        ...


def open_sandbox(
    backend: str | None = None, *, imports: Sequence[str] = (), timeout: float = 10.0
) -> Sandbox:
    """Start a session.

    Args:
        backend: one of :data:`BACKENDS`; :data:`DEFAULT_BACKEND` by default. Nothing weaker is
            taken when it is not available.
        imports: modules the code may import beside the harmless ones of the standard library.
        timeout: seconds one action may take.

    Raises:
        ConfigError: an unknown backend, or one whose extra is not installed.
        SandboxError: it is not available here.
    """
    backend = backend or DEFAULT_BACKEND
    if backend == "fork":
        from agentkd.sandbox.fork import ForkSandbox
        from agentkd.sandbox.isolation import choose

        choose()  # raises what is missing now, not in the first action
        return ForkSandbox(imports=imports, timeout=timeout)
    if backend == "e2b":
        from agentkd.sandbox import e2b

        e2b.check()
        return e2b.E2BSandbox(imports=imports, timeout=timeout)
    if backend == "docker":
        from agentkd.sandbox import docker

        docker.check()
        return docker.DockerSandbox(imports=imports, timeout=timeout)
    if backend == "local":
        from agentkd.sandbox.local import LocalSandbox

        return LocalSandbox(imports=imports, timeout=timeout)
    raise ConfigError(f"Unknown sandbox {backend!r}.", f"Known: {', '.join(BACKENDS)}.")


def start_sandbox(backend: str | None = None, *, imports: Sequence[str] = ()) -> None:
    """Start what the sessions of this process share, so that the first ones need not wait for it.

    Args:
        backend, imports: as :func:`open_sandbox` takes them. Only "fork" shares something: its zygote.

    Raises:
        SandboxError: it is not available here, or does not start.
    """
    if (backend or DEFAULT_BACKEND) == "fork":
        from agentkd.sandbox.isolation import module_paths
        from agentkd.sandbox.zygotes import zygote_for

        zygote_for(None, module_paths(tuple(imports)))
