"""Runs an attack without a boundary: ``python control.py FD`` in a throwaway process.

It speaks the sandbox's protocol on the socket FD, so that forged messages have the same way in.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import socket
import sys
from pathlib import Path

# As the sandbox does, without the package around it, which would take longer than most attacks.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "agentkd" / "sandbox"))

from inside.wire import _plain, receive, send


def main() -> None:
    """Run the order's actions; send what the last one's last expression is, and what was printed."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    order = receive(sock) or {}
    state = {"__name__": "__main__", "T": order["targets"]}
    printed = io.StringIO()
    value = None
    try:
        with contextlib.redirect_stdout(printed):
            for code in order["codes"]:
                body = ast.parse(code)
                last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
                exec(compile(body, "<attack>", "exec"), state)
                if isinstance(last, ast.Expr):
                    value = eval(compile(ast.Expression(last.value), "<attack>", "eval"), state)
        big = len(value) if isinstance(value, (str, bytes)) else 0
        answer = {"value": _plain(value), "size": max(big, printed.tell())}
    except Exception as exc:
        answer = {"error": f"{type(exc).__name__}: {exc}"[:2000]}
    send(sock, answer)
    os._exit(0)


if __name__ == "__main__":
    main()
