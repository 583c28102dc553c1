"""What became of one request: gathered where it is known, read by the metrics and the access log."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agentkd.errors import SandboxError
from agentkd.serve.request import ChatRequest, RequestError

if TYPE_CHECKING:
    from agentkd.serve.backend import ChatResult

__all__ = ["SERVED", "Served"]

SERVED = "agentkd.served"
"""Its key in an ASGI scope."""


class Served:
    """The facts of one chat request; no text of it. Each is written by one thread at a time."""

    def __init__(self) -> None:
        self.model: str | None = None
        """The model that answered; None when there is none of the name that was asked for."""
        self.stream = False
        self.pieces = 0
        """Pieces of text and steps sent, the least that was generated."""
        self.prompt_tokens: int | None = None
        """None: not known, the answer was never finished."""
        self.completion_tokens: int | None = None
        self.steps = 0
        self.tool_calls: list[tuple[str, bool]] = []
        """Name, and whether it succeeded."""
        self.step_failures: list[str] = []
        """Kinds, see :class:`agentkd.trajectory.Failure`."""
        self.stop_reason: str | None = None
        """Of an agent, see :class:`agentkd.trajectory.StopReason`."""
        self.sandbox_failed = False
        self.error: str | None = None
        """OpenAI's short name of the error, or its class."""
        self._working = False
        self._then: Callable[[], None] | None = None

    def begin(self) -> None:
        """A thread works on it from here on. This and the next two are called on the event loop."""
        self._working = True

    def end(self) -> None:
        """The thread has ended."""
        self._working = False
        if self._then is not None:
            self._then()

    def when_over(self, act: Callable[[], None]) -> bool:
        """Call ``act`` as soon as no thread works on it; returns whether that is still to come."""
        if self._working:
            self._then = act
        else:
            act()
        return self._working

    def accept(self, request: ChatRequest) -> None:
        """The request is valid and its model is here."""
        self.model, self.stream = request.model, request.stream

    def step(self, event: dict[str, Any]) -> None:
        """An agent has got on; ``event`` as in :class:`agentkd.serve.Listener`."""
        self.pieces += 1
        if event.get("state") != "done":
            return
        self.steps += 1
        self.tool_calls += [(use["name"], use["error"] is None) for use in event.get("tool_uses") or ()]
        if event.get("failure"):
            self.step_failures.append(event["failure"]["kind"])

    def finish(self, result: ChatResult) -> None:
        """The answer is whole."""
        self.prompt_tokens, self.completion_tokens = result.prompt_tokens, result.completion_tokens
        rollout = getattr(result, "rollout", None)
        if rollout is not None:
            self.stop_reason = rollout["stop_reason"]

    def fail(self, exc: Exception, error: RequestError) -> None:
        """The backend raised ``exc``, which the client sees as ``error``."""
        self.error = error.code or type(exc).__name__
        self.sandbox_failed = isinstance(exc, SandboxError) or error.code == "sandbox_error"

    @property
    def tokens(self) -> int:
        """What the caller is charged: all tokens, or of a broken answer the least there were."""
        if self.completion_tokens is None:
            return self.pieces
        return (self.prompt_tokens or 0) + self.completion_tokens
