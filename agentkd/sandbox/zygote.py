"""The child side of the local sandbox: ``python -m agentkd.sandbox.zygote CONTROL_FD``.

One zygote a host process imports smolagents once and forks a worker for every session, which
makes a session cost milliseconds. It has no threads, so forking is safe. It ends with its host.

Messages are JSON with a four-byte length before them, never pickle.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import socket
import struct
import sys
from typing import Any

MESSAGE_LIMIT = 16 << 20
MEMORY_LIMIT = 4 << 30
OUTPUT_LIMIT = 50_000


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    """Write one message."""
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")  # chr(0xD800) has no UTF-8
    sock.sendall(struct.pack("!I", len(data)) + data)


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """Read one message; None at the end of the stream.

    Raises:
        ValueError: longer than the limit, or not JSON.
    """
    head = _exactly(sock, 4)
    if head is None:
        return None
    (length,) = struct.unpack("!I", head)
    if length > MESSAGE_LIMIT:
        raise ValueError(f"message of {length} bytes")
    data = _exactly(sock, length)
    if data is None:
        return None
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("message is not an object")
    return message


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        block = sock.recv(min(count - len(data), 1 << 20))
        if not block:
            return None
        data += block
    return bytes(data)


def plain(value: Any) -> Any:
    """A JSON value for whatever the code made: itself where JSON has it, else its text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        # Integers of any length are exact in Python's JSON; text is cut so that it fits a message.
        return value[:OUTPUT_LIMIT] if isinstance(value, str) else value
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= 10_000:
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain(item) for item in items]
    if isinstance(value, dict) and len(value) <= 10_000:
        return {str(key): plain(item) for key, item in value.items()}
    return str(value)[:OUTPUT_LIMIT]


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
