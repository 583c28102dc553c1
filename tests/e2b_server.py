"""A loopback server that speaks what the E2B SDK speaks: a kernel's ``POST /execute``, and the few calls
of the control plane that start, fork and end machines.

Every machine is a real Python child process that executes what it is sent, as a notebook would. A
fork is a new process that executes all that its original executed: the same state, reached again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KERNEL = r"""
import ast, io, json, os, sys, traceback
link_in, link_out = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
null = os.open(os.devnull, os.O_RDWR)
os.dup2(null, 0); os.dup2(2, 1)
def say(**event):
    link_out.write(json.dumps(event) + "\n"); link_out.flush()
class Stream(io.TextIOBase):
    def __init__(self, kind): self.kind = kind
    def write(self, text):
        for start in range(0, len(text), 4096):
            say(type=self.kind, text=text[start:start + 4096], timestamp=0)
        return len(text)
sys.stdout, sys.stderr = Stream("stdout"), Stream("stderr")
names = {"__name__": "__main__"}
for line in link_in:
    try:
        code = json.loads(line)
        if code.startswith("!pip "):  # the notebook's way to run a program
            run = f"subprocess.getoutput(sys.executable + ' -m ' + {code[1:]!r})"
            code = f"import subprocess, sys\nprint({run})"
        body = ast.parse(code).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None
        if value is not None:
            say(type="result", text=repr(value), is_main_result=True)
    except BaseException as exc:
        say(type="error", name=type(exc).__name__, value=str(exc), traceback=traceback.format_exc())
    say(type="number_of_executions", execution_count=1)
    say(type="end_of_execution")
"""


class Machine:
    """One kernel."""

    def __init__(self) -> None:
        self.cells: list[str] = []
        self.lock = threading.Lock()
        self.scratch = tempfile.TemporaryDirectory(prefix="machine-", ignore_cleanup_errors=True)
        Path(self.scratch.name).chmod(0o1777)  # as /tmp: programs of other users write there
        self.process = subprocess.Popen(
            [sys.executable, "-c", KERNEL],
            env={**os.environ, "TMPDIR": self.scratch.name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def execute(self, code: str) -> Iterator[str]:
        """Lines of events."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with self.lock:
            self.cells.append(code)
            self.process.stdin.write(json.dumps(code) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                yield line
                if json.loads(line)["type"] == "end_of_execution":
                    return

    def fork(self) -> Machine:
        """Another one in the same state."""
        copy = Machine()
        for cell in self.cells:
            for _ in copy.execute(cell):
                pass
        return copy

    def kill(self) -> None:
        """End it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.scratch.cleanup()


class Cloud(ThreadingHTTPServer):
    """All machines.

    Attributes:
        forks: whether the control plane forks machines.
        executions: calls of ``/execute`` so far.
        extended: lifetimes that were asked for later.
        created: bodies of the requests for machines.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.machines: dict[str, Machine] = {}
        self.forks = True
        self.executions = 0
        self.extended: list[int] = []
        self.created: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def machine(self, name: str) -> Machine | None:
        if name == "debug_sandbox_id" and name not in self.machines:
            self.machines[name] = Machine()  # in debug mode nobody asks for one
        return self.machines.get(name)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Cloud

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        if self.path == "/execute":
            self._execute(body)
        elif self.path.endswith("/sandboxes"):
            self.server.created.append(body)
            self._json(201, self._new(Machine()))
        elif self.path.endswith("/timeout"):
            self.server.extended.append(body["timeout"])
            self._send(204, b"")
        elif self.path.endswith("/fork"):
            original = self.server.machines.get(self.path.split("/")[-2])
            if original is None or not self.server.forks:
                self._json(
                    404 if original is None else 403, {"code": 403, "message": "fork is not in this plan"}
                )
            else:
                copies = [original.fork() for _ in range(body.get("count", 1))]
                self._json(201, [{"sandbox": self._new(copy)} for copy in copies])
        else:
            self._json(404, {"code": 404, "message": "not found"})

    def do_DELETE(self) -> None:
        machine = self.server.machines.pop(self.path.split("/")[-1], None)
        if machine is not None:
            machine.kill()
        self._send(204 if machine else 404, b"")

    def _new(self, machine: Machine) -> dict[str, Any]:
        name = uuid.uuid4().hex
        self.server.machines[name] = machine
        return {
            "templateID": "code-interpreter-v1",
            "sandboxID": name,
            "clientID": "client",
            "envdVersion": "0.4.0",
            "envdAccessToken": "token",
        }

    def _execute(self, body: dict[str, Any]) -> None:
        self.server.executions += 1
        machine = self.server.machine(self.headers.get("E2b-Sandbox-Id") or "")
        if machine is None:
            self._json(502, {"code": 502, "message": "The sandbox was not found"})
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in machine.execute(body["code"]):
            data = line.encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def cloud() -> Iterator[Cloud]:
    """A running server; it and its machines end with the block."""
    server = Cloud()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        for machine in server.machines.values():
            machine.kill()
