"""Tools stay on the host: what sandboxed code calls is a message, and this answers it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from agentkd.errors import AgentkdError
from agentkd.sandbox.inside.wire import plain
from agentkd.trajectory import ToolUse, valid_text

__all__ = ["Round", "ToolHost", "valid_value"]

ARGUMENT_LIMIT = 1 << 20
"""Characters of the arguments of one call, as JSON."""
CALLS_LIMIT = 1000
"""Calls of one action."""
VOLUME_LIMIT = 8 << 20
"""Characters of the arguments of all calls of one action."""
DEPTH_LIMIT = 100
"""Lists and dicts within each other: what writes records down goes no deeper than 250."""

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def valid_value(value: Any, depth: int = DEPTH_LIMIT) -> Any:
    """A JSON value that can be written down: all text valid, and not too deep.

    Raises:
        ValueError: too deep.
    """
    if depth < 0:
        raise ValueError("lists or dicts too deep within each other")
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list):
        return [valid_value(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {valid_text(key): valid_value(item, depth - 1) for key, item in value.items()}
    return value


class Round:
    """The calls of several candidates for the same step: equal ones are made once.

    A candidate that makes the same call twice gets two answers, as alone; its k-th is shared with
    the k-th of the others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[tuple[str, int], Future[tuple[dict[str, Any], ToolUse]]] = {}

    def once(
        self, key: tuple[str, int], make: Callable[[], tuple[dict[str, Any], ToolUse]]
    ) -> tuple[dict[str, Any], ToolUse]:
        """The result of ``make`` for this key, made by whoever comes first."""
        with self._lock:
            future = self._made.get(key)
            first = future is None
            if future is None:
                future = self._made[key] = Future()
        if first:
            try:
                future.set_result(make())
            except BaseException as exc:
                future.set_exception(exc)
        return future.result()


class ToolHost:
    """The tools of one session.

    Attributes:
        tools: by the name that the code uses.
    """

    def __init__(self) -> None:
        self.tools: dict[str, Callable[..., Any]] = {}

    def caller(self, together: Round | None = None) -> Caller:
        """Answers the calls of one action of one candidate."""
        return Caller(self, together or Round())

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[dict[str, Any], ToolUse]:
        """Make one call: the reply for the code, and the record.

        Raises:
            AgentkdError: the world failed, not the model; the rollout must know.
        """
        tool = self.tools.get(name)
        inputs = list(getattr(tool, "inputs", {}))
        arguments = {**dict(zip(inputs, args, strict=False)), **kwargs}
        began = time.monotonic()
        try:
            if tool is None:
                raise NameError(f"there is no tool {name}")
            _check(tool, arguments)
            result = plain(tool(*args, **kwargs))
        except AgentkdError:
            raise
        except Exception as exc:
            error = valid_text(f"{type(exc).__name__} in {name}: {exc}")
            use = ToolUse(name=name, arguments=arguments, error=error, seconds=time.monotonic() - began)
            return {"error": error}, use
        use = ToolUse(
            name=name, arguments=arguments, result=valid_text(str(result)), seconds=time.monotonic() - began
        )
        return {"result": result}, use


class Caller:
    """The calls of one candidate.

    Attributes:
        uses: what was called so far.
    """

    def __init__(self, host: ToolHost, together: Round) -> None:
        self._host = host
        self._together = together
        self._seen: Counter[str] = Counter()
        self._volume = 0
        self.uses: list[ToolUse] = []

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to a call.

        Raises:
            ValueError: the message is no call.
            AgentkdError: the world failed.
        """
        name, args, kwargs = message.get("call"), message.get("args"), message.get("kwargs")
        if not (isinstance(name, str) and isinstance(args, list) and isinstance(kwargs, dict)):
            raise ValueError("malformed call")
        try:
            name, args, kwargs = valid_text(name), valid_value(args), valid_value(kwargs)
        except ValueError as exc:
            return {"error": f"ValueError in {name[:80]}: {exc}"}
        key = json.dumps([name, args, kwargs], sort_keys=True)
        self._volume += len(key)
        if len(key) > ARGUMENT_LIMIT:
            return {"error": f"ValueError in {name[:80]}: arguments of more than {ARGUMENT_LIMIT} characters"}
        if len(self.uses) >= CALLS_LIMIT or self._volume > VOLUME_LIMIT:
            return {"error": f"RuntimeError in {name[:80]}: too many calls in one action"}
        self._seen[key] += 1
        reply, use = self._together.once((key, self._seen[key]), lambda: self._host.call(name, args, kwargs))
        self.uses.append(use)
        return reply


def _check(tool: Any, arguments: dict[str, Any]) -> None:
    """Arguments are what the tool's schema says."""
    for name, value in arguments.items():
        schema = getattr(tool, "inputs", {}).get(name) or {}
        kinds = schema.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not kinds or "any" in kinds or not all(kind in _TYPES for kind in kinds):
            continue
        if value is None and schema.get("nullable"):
            continue
        allowed = {one for kind in kinds for one in _TYPES[kind]}
        if type(value) not in allowed:
            raise TypeError(f"{name} must be of type {' or '.join(kinds)}, not {type(value).__name__}")
