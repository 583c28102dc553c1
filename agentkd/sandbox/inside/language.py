"""Runs the model's code: CPython's own ``exec``, with the ways out that an action has.

The value of a last expression, what was printed, ``final_answer(value)`` and a short account of
an exception come back. Nothing here is a boundary: that is what the process has been put into.
"""

from __future__ import annotations

import ast
import builtins
import io
import linecache
import os
import re
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

from .wire import OUTPUT_LIMIT, plain, receive, send

__all__ = ["Actor", "Runner"]

FRAMES = 3
"""Own lines that an error is traced through."""
_NAME = re.compile(r"<action \d+>")
_import, _exit = builtins.__import__, os._exit


class _Final(BaseException):
    """Raised by ``final_answer``: nothing after it runs."""


class _Printed(io.TextIOBase):
    """Takes what is printed, up to the limit, and says how much there was."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.length = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.length < OUTPUT_LIMIT:
            self.parts.append(text[: OUTPUT_LIMIT - self.length])
        self.length += len(text)
        return len(text)

    def text(self) -> str:
        shown = "".join(self.parts)
        if self.length > OUTPUT_LIMIT:
            shown += f"\n[output cut: the first {OUTPUT_LIMIT} of {self.length} characters]"
        return shown


class Runner:
    """The namespace of a session and how an action runs in it.

    Args:
        allowed: modules that the code may import; "*" for all. A convenience that keeps actions
            to what the prompt promises, not a boundary.
        call: calls a tool on the host: name, positional and keyword arguments to a result or
            an error text.
    """

    def __init__(self, allowed: list[str], call: Callable[[str, list[Any], dict[str, Any]], Any]) -> None:
        self.allowed = frozenset(allowed)
        self.call = call
        self.number = 0
        self.final: list[Any] = []
        self.lock = threading.Lock()
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        self.state = main.__dict__
        own = dict(vars(builtins))
        own["__import__"] = self._import
        self.state["__builtins__"] = own

    def set(self, tools: list[str], variables: dict[str, Any]) -> None:
        """Make tools callable and set variables."""
        for name in tools:
            self.state[name] = self._final_answer if name == "final_answer" else self._tool(name)
        self.state.update(variables)

    def run(self, code: str) -> dict[str, Any]:
        """Run one action. The outcome is a message for the host."""
        self.number += 1
        self.final = []
        printed = _Printed()
        kept, sys.stdout = sys.stdout, printed
        try:
            outcome = self._run(code, f"<action {self.number}>")
        finally:
            sys.stdout = kept
        return {**outcome, "printed": printed.text()}

    def _run(self, code: str, filename: str) -> dict[str, Any]:
        linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
        value: Any = None
        try:
            body = ast.parse(code, filename)
            last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
            exec(compile(body, filename, "exec"), self.state)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), filename, "eval"), self.state)
        except _Final:
            pass
        except BaseException as exc:
            if not self.final:
                return {"error": _describe(exc)}
        final = bool(self.final)
        try:
            return {"value": plain(self.final[0] if final else value), "final": final}
        except BaseException as exc:
            return {"error": f"The value cannot be shown: {_describe(exc)}"}

    def _final_answer(self, answer: Any = None) -> None:
        self.final = [answer]
        raise _Final

    def _tool(self, name: str) -> Callable[..., Any]:
        def tool(*args: Any, **kwargs: Any) -> Any:
            given, named = plain(list(args)), plain(kwargs)
            with self.lock:
                reply = self.call(name, given, named)
            if "error" in reply:
                raise RuntimeError(reply["error"])
            return reply["result"]

        tool.__name__ = tool.__qualname__ = name
        return tool

    def _import(
        self,
        name: str,
        globals: Any = None,
        locals: Any = None,
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        if not self.allowed & {"*", name, name.partition(".")[0]}:
            known = ", ".join(sorted(self.allowed))
            raise ImportError(f"Import of {name} is not allowed. Allowed: {known}.")
        return _import(name, globals, locals, fromlist, level)


class Actor:
    """A process that runs actions: its code comes, and its calls and outcomes go, by one socket.

    Attributes:
        sock: to whoever asked.
        runner: the namespace of the session.
    """

    sock: socket.socket
    runner: Runner

    def _act(self) -> None:
        message = receive(self.sock)
        if message is None:
            _exit(0)
        outcome = self.runner.run(message["code"])
        try:
            send(self.sock, outcome)
        except ValueError as exc:
            send(self.sock, {"error": f"The value cannot be shown: {exc}", "printed": outcome["printed"]})

    def _call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        send(self.sock, {"call": name, "args": args, "kwargs": kwargs})
        reply = receive(self.sock)
        if reply is None:
            _exit(0)
        return reply


def _describe(exc: BaseException) -> str:
    """Type, message and the model's own lines; no paths of this machine."""
    kind = type(exc).__name__
    try:
        if isinstance(exc, SyntaxError) and _NAME.fullmatch(exc.filename or ""):
            line = (exc.text or "").strip()[:200]
            return f"{kind}: {exc.msg} (line {exc.lineno}{': ' + line if line else ''})"[:OUTPUT_LIMIT]
        message = _without_paths(str(exc))[:OUTPUT_LIMIT]
    except BaseException:
        message = "(its message cannot be shown)"
    text = f"{kind}: {message}" if message else kind
    try:
        own = [f for f in traceback.extract_tb(exc.__traceback__) if _NAME.fullmatch(f.filename)]
        for frame in own[-FRAMES:]:
            where = "" if frame.name == "<module>" else f" in {frame.name}"
            text += f"\n  line {frame.lineno}{where}: {(frame.line or '')[:200]}"
    except BaseException:
        pass  # the code may have broken traceback or linecache
    return text


def _without_paths(text: str) -> str:
    for folder in sorted({*sys.path, sys.prefix, sys.base_prefix}, key=len, reverse=True):
        if len(folder) > 4:
            text = text.replace(folder, "...")
    return text
