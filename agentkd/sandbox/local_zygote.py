"""The child side of the local sandbox: ``python -m agentkd.sandbox.local_zygote CONTROL_FD``.

One zygote a host process imports smolagents once and forks a worker for every session, which
makes a session cost milliseconds. It has no threads, so forking is safe. It ends with its host.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any

from agentkd.sandbox.inside.wire import MESSAGE_LIMIT, OUTPUT_LIMIT, plain, receive, send

MEMORY_LIMIT = 4 << 30


def ends_in_expression(code: str) -> bool:
    """Whether the last statement is an expression, whose value is then the action's value."""
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return False
    return bool(body) and isinstance(body[-1], ast.Expr)


class Worker:
    """Runs the actions of one session."""

    def __init__(self, sock: socket.socket, imports: list[str]) -> None:
        from smolagents.local_python_executor import LocalPythonExecutor

        self.sock = sock
        self.executor = LocalPythonExecutor(
            imports, max_print_outputs_length=OUTPUT_LIMIT, timeout_seconds=None
        )
        self.executor.send_tools({})

    def serve(self) -> None:
        while (message := receive(self.sock)) is not None:
            if "tools" in message:
                self.executor.send_tools({name: self._tool(name) for name in message["tools"]})
            elif "variables" in message:
                self.executor.send_variables(message["variables"])
            else:
                send(self.sock, self._run(message["code"]))

    def _tool(self, name: str) -> Any:
        if name == "final_answer":
            return lambda answer=None: answer

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = {"args": plain(list(args)), "kwargs": plain(kwargs)}
            send(self.sock, {"call": name, **arguments})
            reply = receive(self.sock)
            if reply is None:
                os._exit(0)
            if "error" in reply:
                raise RuntimeError(reply["error"])
            return reply["result"]

        return call

    def _run(self, code: str) -> dict[str, Any]:
        state = self.executor.state
        state.pop("_print_outputs", None)
        try:
            output = self.executor(code)
        except Exception as exc:
            error = (str(exc) or type(exc).__name__)[:OUTPUT_LIMIT]
            return {"error": error, "printed": str(state.get("_print_outputs", ""))[: MESSAGE_LIMIT // 8]}
        show = output.is_final_answer or ends_in_expression(code)
        try:
            value = plain(output.output) if show else None
        except Exception as exc:
            return {"error": f"The value cannot be shown: {exc}", "printed": str(output.logs)}
        return {"value": value, "printed": str(output.logs), "final": bool(output.is_final_answer)}


def _limit() -> None:
    import resource

    for what, value in ((resource.RLIMIT_AS, MEMORY_LIMIT), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(what, (value, value))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the zygote


def _work(sock: socket.socket, imports: list[str]) -> None:
    code = 1
    try:
        _limit()
        sys.setrecursionlimit(3000)
        Worker(sock, imports).serve()
        code = 0
    except BaseException as exc:
        with contextlib.suppress(OSError):
            send(sock, {"broken": f"{type(exc).__name__}: {exc}"})
    finally:
        os._exit(code)


def main() -> None:
    """Fork a worker for every session asked for, kill those named, end with the host."""
    control = socket.socket(fileno=int(sys.argv[1]))
    import smolagents.local_python_executor  # noqa: F401  paid once, inherited by every worker

    children: set[int] = set()
    send(control, {"ready": True})
    while True:
        data, fds, _, _ = socket.recv_fds(control, 65536, 1)
        if not data:
            break
        message = json.loads(data)
        if "kill" in message:
            pid = message["kill"]
            if pid in children:  # still unreaped, so the number cannot be somebody else's
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                children.discard(pid)
            send(control, {"killed": pid})
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            _work(socket.socket(fileno=fds[0]), message["imports"])
        os.close(fds[0])
        children.add(pid)
        send(control, {"pid": pid})
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
