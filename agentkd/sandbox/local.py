"""The local sandbox: smolagents' interpreter in a child process that is killed on timeout.

Not a security boundary, see :data:`agentkd.sandbox.LOCAL_WARNING`. What it does give: the
host's environment and credentials are not inherited, tools run on the host, an endless loop or
a crash costs its own session only, and nothing is left running.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from smolagents.local_python_executor import CodeOutput, PythonExecutor

from agentkd.errors import AgentkdError, SandboxError
from agentkd.sandbox import CodeFailure
from agentkd.sandbox.inside.wire import plain, receive, send
from agentkd.sandbox.toolhost import ToolHost
from agentkd.trajectory import ToolUse

__all__ = ["LocalSandbox"]

START_SECONDS = 60.0


class _Zygote:
    """The host's end of the one zygote process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        atexit.register(self.stop)

    def open(self, imports: Sequence[str]) -> tuple[int, socket.socket, subprocess.Popen[bytes]]:
        """A new worker: its process id, the socket to talk to it, and the zygote it ends with."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._control is not None
            ours, theirs = socket.socketpair()
            try:
                request = json.dumps({"imports": list(imports)}).encode()
                socket.send_fds(self._control, [request], [theirs.fileno()])
                reply = receive(self._control)
            except OSError as exc:
                ours.close()
                raise SandboxError(f"The sandbox process is gone ({exc}).", "Run the command again.") from exc
            finally:
                theirs.close()
            if reply is None:
                ours.close()
                raise SandboxError("The sandbox process ended.", "Run the command again.")
            assert self._process is not None
            return int(reply["pid"]), ours, self._process

    def kill(self, pid: int) -> None:
        """Kill a worker and wait until it is gone."""
        with self._lock:
            if self._control is None:
                return
            try:
                self._control.sendall(json.dumps({"kill": pid}).encode())
                receive(self._control)
            except OSError:
                self._process = None  # its workers end with it

    def _start(self) -> None:
        if self._control is not None:
            self._control.close()
        ours, theirs = socket.socketpair()
        environment = {
            key: value
            for key, value in os.environ.items()
            if key in ("PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")
        }
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agentkd.sandbox.local_zygote", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the host, which then ends it
            )
            theirs.close()
            ours.settimeout(START_SECONDS)
            try:
                ready = receive(ours)
            except TimeoutError:
                ready = None
            if ready is None:
                self._process.kill()
                self._process.wait()
                log.seek(0)
                tail = log.read()[-500:].decode(errors="replace").strip().splitlines()
                raise SandboxError(
                    f"The sandbox process did not start: {tail[-1] if tail else 'no message'}.",
                    "Check that smolagents can be imported by this Python.",
                )
        ours.settimeout(None)
        self._control = ours

    def stop(self) -> None:
        """End the zygote and its workers."""
        with self._lock:
            if self._control is not None:
                self._control.close()
                self._control = None
            if self._process is not None:
                try:
                    self._process.wait(5)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
                self._process = None


_zygote = _Zygote()


class LocalSandbox(PythonExecutor):
    """One session in one child process. See :class:`agentkd.sandbox.Sandbox`.

    Args:
        imports: modules the code may import beside smolagents' harmless ones.
        timeout: seconds one action may take, time in tools apart.
    """

    def __init__(self, imports: Sequence[str] = (), timeout: float = 10.0) -> None:
        self.imports = tuple(imports)
        self.timeout = timeout
        self._host = ToolHost()
        self._variables: dict[str, Any] = {}
        self._uses: list[ToolUse] = []
        self._pid: int | None = None
        self._sock: socket.socket | None = None
        self._home: subprocess.Popen[bytes] | None = None

    def send_tools(self, tools: dict[str, Any]) -> None:
        self._host.tools.update(tools)
        if self._sock is not None:
            send(self._sock, {"tools": list(self._host.tools)})

    def send_variables(self, variables: dict[str, Any]) -> None:
        self._variables.update({name: plain(value) for name, value in variables.items()})
        if self._sock is not None and variables:
            send(self._sock, {"variables": self._variables})

    def __call__(self, code_action: str) -> CodeOutput:
        sock = self._open()
        deadline = time.monotonic() + self.timeout
        caller = self._host.caller()
        try:
            sock.settimeout(self.timeout)
            send(sock, {"code": code_action})
            while True:
                message = receive(sock, deadline)
                if message is None or "broken" in message:
                    raise self._lost("The code ended its interpreter.")
                if "call" not in message:
                    return self._outcome(message)
                began = time.monotonic()
                sock.settimeout(None)
                send(sock, caller.answer(message))
                deadline += time.monotonic() - began
        except TimeoutError:
            self._end()
            raise CodeFailure(
                f"The code took longer than {self.timeout:g} s and was stopped. All variables are lost.",
                timed_out=True,
            ) from None
        except (OSError, ValueError, RecursionError) as exc:
            raise self._lost(f"The code broke its interpreter ({exc}).") from exc
        except AgentkdError:
            self._end()
            raise
        finally:
            self._uses += caller.uses

    def take_tool_uses(self) -> tuple[ToolUse, ...]:
        uses, self._uses = tuple(self._uses), []
        return uses

    def cleanup(self) -> None:
        self._end()

    def _open(self) -> socket.socket:
        if self._sock is None:
            self._pid, self._sock, self._home = _zygote.open(self.imports)
            send(self._sock, {"tools": list(self._host.tools)})
            if self._variables:
                send(self._sock, {"variables": self._variables})
        return self._sock

    def _end(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._pid is not None:
            _zygote.kill(self._pid)
            self._pid = None

    def _lost(self, what: str) -> Exception:
        """Whose fault it is that the worker is gone: the code's, unless all workers are."""
        self._end()
        try:
            if self._home is not None:
                self._home.wait(0.05)
                return SandboxError("The sandbox process was killed.", "Run the command again.")
        except subprocess.TimeoutExpired:
            pass
        return CodeFailure(f"{what} All variables are lost.")

    def _outcome(self, message: dict[str, Any]) -> CodeOutput:
        if "error" in message:
            raise CodeFailure(str(message["error"]), str(message.get("printed", "")))
        return CodeOutput(
            output=message["value"], logs=str(message["printed"]), is_final_answer=bool(message["final"])
        )
